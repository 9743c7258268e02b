/* A bundle answers without Python: libedgeml pages its weights in, onnxruntime runs its graphs.
 *
 *     answer LIBONNXRUNTIME BUNDLE TASK SLOTS ID...
 *
 * LIBONNXRUNTIME is the shared library of onnxruntime 1.17 or newer (the pip package and the Android archive have one); SLOTS how
 * many paged experts may be in memory, 0 for all of them; each ID a token, as the task's tokenizer gives them. It prints the
 * label and its score, and what was read for it. Exit codes as everywhere in edgeml: 2 wrong usage, 3 bad bundle, 4 device fault.
 *
 * The order of things, which any host keeps: bundle, manifest, context, session options with the context's number and the
 * operators, a session for each stage; then for each request: begin, embed, router, trunk, head, end. A request's stages run on
 * the thread that began it, and sessions are released before the context is closed.
 */
#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgeml.h"
#include "edgeml_bundle.h"
#include "json.h"
#include "ort.h"

/* libedgeml's entry for onnxruntime: adds the operators to session options that name a context. */
extern ort_status *RegisterCustomOps(void *options, const void *base);

enum { USAGE = 2, BAD_BUNDLE = 3, FAULT = 4, MOST_TENSORS = 16, MOST_NAMES = 8, NAME_BYTES = 64 };

typedef struct tensors { /* what stages hand to each other, by name */
  char names[MOST_TENSORS][NAME_BYTES];
  void *values[MOST_TENSORS];
  size_t count;
} tensors;

typedef struct host {
  const ort_api *api;
  void *env, *options, *memory;
  edgeml_bundle *bundle;
  edgeml_context *context;
  edgeml_request request;
  json manifest;
} host;

static void stop(int code, const char *what, const char *why) {
  fprintf(stderr, "answer: %s%s%s\n", what, *why ? ": " : "", why);
  exit(code);
}

/* onnxruntime's own sentence, which has libedgeml's in it where an operator failed, ends the program. */
static void check(const host *h, ort_status *status, const char *what) {
  if (status) stop(h->request.fault.status == EDGEML_READ_FAILED ? FAULT : BAD_BUNDLE, what, ORT(h->api, error_message, status));
}

static json wanted(json value, const char *what) {
  if (!value.at) stop(BAD_BUNDLE, "the manifest has no", what);
  return value;
}

/* The item of an array of objects that has this name. */
static json named(json array, json name, const char *text, const char *what) {
  char given[NAME_BYTES];
  if (text == NULL && json_text(name, given, sizeof given)) text = given;
  for (json item = json_first(array); item.at && text; item = json_next(item))
    if (json_is(json_get(item, "name"), text)) return item;
  stop(BAD_BUNDLE, what, text ? text : "a name that is too long");
  return array;
}

/* ---- the bundle and its context ---- */

static edgeml_expert_ref *references(json list, uint32_t *count) {
  *count = (uint32_t)json_count(list);
  edgeml_expert_ref *refs = calloc(*count + 1ul, sizeof *refs), *next = refs;
  if (!refs) stop(FAULT, "not enough memory", "");
  for (json pair = json_first(list); pair.at; pair = json_next(pair)) {
    const long page = json_number(json_first(pair)), sub = json_number(json_next(json_first(pair)));
    if (page < 0 || sub < 0) stop(BAD_BUNDLE, "an expert of the manifest is not [page, sub]", "");
    *next++ = (edgeml_expert_ref){(uint32_t)page, (uint32_t)sub};
  }
  return refs;
}

/* The arrays are needed until edgeml_open returns; this program does not live long enough to free them. */
static edgeml_site *sites_of(json manifest, uint32_t *count) {
  json list = wanted(json_get(manifest, "sites"), "sites");
  *count = (uint32_t)json_count(list);
  edgeml_site *sites = calloc(*count + 1ul, sizeof *sites), *next = sites;
  if (!sites) stop(FAULT, "not enough memory", "");
  for (json site = json_first(list); site.at; site = json_next(site), next++) {
    next->experts = references(wanted(json_get(site, "experts"), "experts"), &next->expert_count);
    next->shared = references(wanted(json_get(site, "shared"), "shared"), &next->shared_count);
    next->hidden = (uint32_t)json_number(json_get(site, "hidden")), next->top_k = (uint32_t)json_number(json_get(site, "top_k"));
  }
  return sites;
}

static void open_bundle(host *h, const char *path, uint32_t slots) {
  edgeml_bundle_fault fault;
  edgeml_fault native;
  char text[200];
  size_t bytes;
  if (edgeml_bundle_open(path, &h->bundle, &fault))
    stop(fault.status == EDGEML_BUNDLE_BAD ? BAD_BUNDLE : FAULT, path, edgeml_bundle_fault_text(&fault, text, sizeof text));
  const char *manifest = edgeml_bundle_manifest(h->bundle, &bytes);
  h->manifest = json_document(manifest, bytes);
  edgeml_options options = {.fd = edgeml_bundle_fd(h->bundle), .direct = slots != 0, .threads = 1, .readers = 2, .requests = 1};
  options.index = edgeml_bundle_index(h->bundle, &options.index_bytes);
  options.sites = sites_of(h->manifest, &options.site_count);
  edgeml_plan_result plan;
  int status = edgeml_plan(&options, &plan);
  options.slots = slots ? slots : plan.pageable_pages;
  if (!status) status = edgeml_open(&options, &h->context, &native);
  if (status) stop(status == EDGEML_BAD_INDEX || status == EDGEML_BAD_ARGUMENT || status == EDGEML_CHECKSUM ? BAD_BUNDLE : FAULT, path, edgeml_status_text(status));
}

/* ---- onnxruntime ---- */

static void open_runtime(host *h, const char *library) {
  void *loaded = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!loaded) stop(USAGE, "onnxruntime cannot be loaded", dlerror());
  const ort_base *(*get_base)(void);
  *(void **)&get_base = dlsym(loaded, "OrtGetApiBase");
  if (!get_base || !(h->api = get_base()->get_api(ORT_API_VERSION))) stop(USAGE, library, "this is no onnxruntime 1.17 or newer");
  char number[32];
  snprintf(number, sizeof number, "%" PRIu64, edgeml_handle(h->context));
  check(h, ORT(h->api, create_env, ORT_FATAL, "edgeml", &h->env), "onnxruntime");
  check(h, ORT(h->api, create_options, &h->options), "onnxruntime");
  check(h, ORT(h->api, set_severity, h->options, ORT_FATAL), "onnxruntime");
  check(h, ORT(h->api, set_threads, h->options, 1), "onnxruntime");
  check(h, ORT(h->api, no_arena, h->options), "onnxruntime"); /* an arena would keep each graph's largest batch for ever */
  check(h, ORT(h->api, no_pattern, h->options), "onnxruntime");
  check(h, ORT(h->api, add_entry, h->options, "edgeml.context", number), "onnxruntime");
  check(h, RegisterCustomOps(h->options, get_base()), "the operators");
  check(h, ORT(h->api, cpu_memory, ORT_ARENA, 0, &h->memory), "onnxruntime");
}

static void *stage_session(host *h, json stage, const char *name) {
  edgeml_bundle_page page;
  edgeml_bundle_fault fault;
  char text[200];
  void *session;
  const long number = json_number(json_get(stage, "page"));
  if (number < 0 || edgeml_bundle_get_page(h->bundle, (uint32_t)number, &page) || page.kind != EDGEML_PAGE_ONNX)
    stop(BAD_BUNDLE, name, "the stage's page is no graph");
  void *graph = malloc(page.length);
  if (!graph) stop(FAULT, "not enough memory", "");
  if (edgeml_bundle_read(h->bundle, (uint32_t)number, graph, &fault)) stop(FAULT, name, edgeml_bundle_fault_text(&fault, text, sizeof text));
  check(h, ORT(h->api, create_session, h->env, graph, page.length, h->options, &session), name);
  free(graph);
  return session;
}

/* ---- tensors and stages ---- */

static void put(tensors *t, const char *name, void *value) {
  if (t->count == MOST_TENSORS) stop(BAD_BUNDLE, "the stages make too many tensors", "");
  snprintf(t->names[t->count], NAME_BYTES, "%s", name);
  t->values[t->count++] = value;
}

static void put_data(host *h, tensors *t, const char *name, void *data, size_t bytes, const int64_t *dims, size_t rank, int type) {
  void *value;
  check(h, ORT(h->api, create_tensor, h->memory, data, bytes, dims, rank, type, &value), name);
  put(t, name, value);
}

static size_t find(const tensors *t, const char *name) {
  for (size_t i = 0; i < t->count; i++)
    if (!strcmp(t->names[i], name)) return i;
  stop(BAD_BUNDLE, "a stage reads what no stage before it makes", name);
  return 0;
}

/* Names of a stage's inputs or outputs. */
static size_t read_names(json list, char names[MOST_NAMES][NAME_BYTES], const char *pointers[MOST_NAMES]) {
  size_t n = 0;
  for (json item = json_first(list); item.at; item = json_next(item), n++) {
    if (n == MOST_NAMES || !json_text(item, names[n], NAME_BYTES)) stop(BAD_BUNDLE, "a stage has too many or too long names", "");
    pointers[n] = names[n];
  }
  return n;
}

static void run_stage(host *h, json name, tensors *t) {
  char in_names[MOST_NAMES][NAME_BYTES], out_names[MOST_NAMES][NAME_BYTES], title[NAME_BYTES];
  const char *ins[MOST_NAMES], *outs[MOST_NAMES];
  void *inputs[MOST_NAMES], *outputs[MOST_NAMES] = {NULL};
  if (!json_text(name, title, sizeof title)) stop(BAD_BUNDLE, "a stage's name is too long", "");
  json stage = named(wanted(json_get(h->manifest, "stages"), "stages"), name, NULL, "there is no stage");
  const size_t in_count = read_names(json_get(stage, "inputs"), in_names, ins), out_count = read_names(json_get(stage, "outputs"), out_names, outs);
  for (size_t i = 0; i < in_count; i++) inputs[i] = t->values[find(t, ins[i])];
  void *session = stage_session(h, stage, title); /* an application keeps its sessions; this one answers once */
  check(h, ORT(h->api, run, session, NULL, ins, inputs, in_count, outs, out_count, outputs), title);
  for (size_t i = 0; i < out_count; i++) put(t, outs[i], outputs[i]);
  ORT(h->api, release_session, session);
}

/* Without a router every expert may be chosen: a bias of zeros (1, sites, most experts of a site). */
static void put_no_bias(host *h, tensors *t) {
  json list = json_get(h->manifest, "sites");
  int64_t dims[3] = {1, (int64_t)json_count(list), 0};
  for (json site = json_first(list); site.at; site = json_next(site)) {
    const int64_t experts = (int64_t)json_count(json_get(site, "experts"));
    if (experts > dims[2]) dims[2] = experts;
  }
  const size_t bytes = (size_t)(dims[1] * dims[2]) * sizeof(float);
  float *zeros = calloc(1, bytes ? bytes : 1);
  if (!zeros) stop(FAULT, "not enough memory", "");
  put_data(h, t, "bias", zeros, bytes, dims, 3, ORT_FLOAT);
}

static void print_answer(host *h, json task, const tensors *t) {
  void *value = t->values[find(t, "scores")], *info;
  float *scores;
  size_t count;
  check(h, ORT(h->api, tensor_info, value, &info), "scores");
  check(h, ORT(h->api, element_count, info, &count), "scores");
  ORT(h->api, release_info, info);
  check(h, ORT(h->api, tensor_data, value, (void **)&scores), "scores");
  size_t best = 0;
  for (size_t i = 1; i < count; i++) best = scores[i] > scores[best] ? i : best;
  json label = json_first(json_get(task, "labels"));
  for (size_t i = 0; i < best; i++) label = json_next(label);
  char text[256];
  if (count == 0 || !json_text(label, text, sizeof text)) stop(BAD_BUNDLE, "the head answers with other labels than the task has", "");
  edgeml_stats stats;
  edgeml_get_stats(h->context, &stats);
  printf("label %s\nscore %.6f\nkernels %s\nhits %" PRIu64 "\nmisses %" PRIu64 "\npage_in_bytes %" PRIu64 "\n", text, scores[best],
         stats.isa, h->request.counters.hits, h->request.counters.misses, h->request.counters.page_in_bytes);
}

int main(int argc, char **argv) {
  if (argc < 6) stop(USAGE, "answer LIBONNXRUNTIME BUNDLE TASK SLOTS ID...", "");
  const size_t n = (size_t)argc - 5;
  int64_t *ids = calloc(n, sizeof *ids), *types = calloc(n, sizeof *types), dims[2] = {1, (int64_t)n};
  float *mask = calloc(n, sizeof *mask);
  if (!ids || !types || !mask) stop(FAULT, "not enough memory", "");
  for (size_t i = 0; i < n; i++) {
    char *end;
    ids[i] = strtoll(argv[5 + i], &end, 10), mask[i] = 1;
    if (*end || end == argv[5 + i]) stop(USAGE, "this is no token id", argv[5 + i]);
  }
  host h = {0};
  open_bundle(&h, argv[2], (uint32_t)strtoul(argv[4], NULL, 10));
  json task = named(wanted(json_get(h.manifest, "tasks"), "tasks"), h.manifest, argv[3], "there is no task"), stages = json_get(task, "stages");
  if (!json_get(stages, "trunk").at || !json_first(json_get(task, "labels")).at) stop(USAGE, argv[3], "this task does not classify texts");
  open_runtime(&h, argv[1]);
  tensors t = {.count = 0};
  put_data(&h, &t, "ids", ids, n * sizeof *ids, dims, 2, ORT_INT64);
  put_data(&h, &t, "types", types, n * sizeof *types, dims, 2, ORT_INT64);
  put_data(&h, &t, "mask", mask, n * sizeof *mask, dims, 2, ORT_FLOAT);
  edgeml_request_begin(h.context, &h.request);
  run_stage(&h, json_get(stages, "embed"), &t);
  if (json_text(json_get(stages, "router"), (char[NAME_BYTES]){0}, NAME_BYTES)) run_stage(&h, json_get(stages, "router"), &t);
  else put_no_bias(&h, &t);
  run_stage(&h, json_get(stages, "trunk"), &t);
  run_stage(&h, json_get(stages, "head"), &t);
  edgeml_request_end(&h.request);
  print_answer(&h, task, &t);
  for (size_t i = 0; i < t.count; i++) ORT(h.api, release_value, t.values[i]);
  ORT(h.api, release_memory, h.memory);
  ORT(h.api, release_options, h.options);
  ORT(h.api, release_env, h.env);
  edgeml_close(h.context);
  edgeml_bundle_close(h.bundle);
  free(ids), free(types), free(mask);
  return 0;
}
