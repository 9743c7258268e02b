/* The operators in onnxruntime: domain "edgeml", version 1.
 *
 * onnxruntime's C interface is a table that only grows, so the few functions needed are declared here by their place in it and
 * no header package is needed. A wrong place is a crash, not an error: tests/runtime/test_operators.py runs every one of them.
 * API version 17 is asked for, so that older runtimes accept the library.
 *
 *   PagedExperts(hidden (..., d) f32, ids (..., k) i64, weights (..., k) f32) -> (..., d) f32     attribute site
 *   Linear(x (..., cols) f32) -> (..., rows) f32                                                  attribute page
 *   EmbedRows(ids (...) i64) -> (..., cols) f32                                                   attribute page
 *   ScarAttention(q, k, v f32, cluster, domain (B, N) i32, confidence (B, N) f32, pad (B, N) bool, may be left out)
 *     -> y f32, density (B) f32, may be left out
 *     q, k, v, y: (B, H, N, size), or (B, N, H * size) with the attribute heads
 *     attributes: clusters, domains, threshold; where not given 0: heads, global_tokens, causal, published, scale
 *     (what they mean, and that a scale of 0 is 1 / sqrt(size): edgeml_attention in edgeml.h)
 *
 * A session's operators find their context by the configuration entry "edgeml.context", read when the library is registered,
 * and their request by the thread they run on. With the entry "edgeml.threads" = "session" PagedExperts and Linear compute on the
 * session's threads (intra_op_num_threads, as many as the context's) instead of the context's own. ScarAttention needs nothing of a bundle, only its context's threads and kernels;
 * its working memory, edgeml_attention_scratch bytes, is allocated for the length of a call, as onnxruntime's operators do it.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "context.h"

#define EXPORT __attribute__((visibility("default")))

typedef void OrtStatus; /* NULL: fine */
typedef OrtStatus *function(void);

typedef struct OrtApi { /* slots of the table that are used; all return OrtStatus* unless a comment says otherwise */
  function *slot[275];
} OrtApi;

typedef struct OrtApiBase {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

enum { API_VERSION = 17, ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, FLOAT = 1, INT32 = 6, INT64 = 7, BOOL = 9, REQUIRED = 0, OPTIONAL = 1, MEMORY_DEFAULT = 0, MAX_DIMS = 16 };

#define CALL(api, number, type, ...) (((type)(void *)(api)->slot[number])(__VA_ARGS__))
typedef OrtStatus *create_status(int code, const char *message);
typedef OrtStatus *create_domain(const char *name, void **out);
typedef OrtStatus *domain_add(void *domain, const void *op);
typedef OrtStatus *options_add(void *options, void *domain);
typedef OrtStatus *tensor_data(void *value, void **out);
typedef OrtStatus *dimension_count(const void *info, size_t *out);
typedef OrtStatus *dimensions(const void *info, int64_t *out, size_t count);
typedef OrtStatus *tensor_info(const void *value, void **out);
typedef OrtStatus *attribute_int(const void *info, const char *name, int64_t *out);
typedef OrtStatus *attribute_float(const void *info, const char *name, float *out);
typedef OrtStatus *context_count(const void *kernel_context, size_t *out);
typedef OrtStatus *context_input(const void *kernel_context, size_t index, const void **out);
typedef OrtStatus *context_output(void *kernel_context, size_t index, const int64_t *dims, size_t count, void **out);
typedef void release_info(void *info);
typedef void release_status(OrtStatus *status);
typedef OrtStatus *config_entry(const void *options, const char *key, char *value, size_t *size);
typedef OrtStatus *has_config_entry(const void *options, const char *key, int *out);
typedef OrtStatus *parallel_for(const void *kernel_context, void (*body)(void *argument, size_t i), size_t count, size_t batches, void *argument);
enum {
  CREATE_STATUS = 0, CREATE_DOMAIN = 26, DOMAIN_ADD = 27, OPTIONS_ADD_DOMAIN = 28, TENSOR_DATA = 51, DIMENSION_COUNT = 61,
  DIMENSIONS = 62, TENSOR_INFO = 65, ATTRIBUTE_FLOAT = 85, ATTRIBUTE_INT = 86, INPUT_COUNT = 88, OUTPUT_COUNT = 89, CONTEXT_INPUT = 90, CONTEXT_OUTPUT = 91, RELEASE_STATUS = 93, RELEASE_INFO = 99,
  HAS_CONFIG_ENTRY = 237, CONFIG_ENTRY = 238, PARALLEL_FOR = 274
};

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp { /* onnxruntime's layout, in its order; it calls the V2 functions where both are declared */
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const void *info);
  const char *(*GetName)(const OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *);
  int (*GetInputType)(const OrtCustomOp *, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp *);
  int (*GetOutputType)(const OrtCustomOp *, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *);
  void (*KernelCompute)(void *kernel, void *context);
  void (*KernelDestroy)(void *kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const void *info, void **kernel);
  OrtStatus *(*KernelComputeV2)(void *kernel, void *context);
  OrtStatus *(*InferOutputShape)(const OrtCustomOp *, void *);
  int (*GetStartVersion)(const OrtCustomOp *);
  int (*GetEndVersion)(const OrtCustomOp *);
  size_t (*GetMayInplace)(int **, int **);
  void (*ReleaseMayInplace)(int *, int *);
  size_t (*GetAliasMap)(int **, int **);
  void (*ReleaseAliasMap)(int *, int *);
};

enum which { PAGED_EXPERTS, LINEAR, EMBED_ROWS, SCAR_ATTENTION, OPERATORS };
static const char *const names[OPERATORS] = {"PagedExperts", "Linear", "EmbedRows", "ScarAttention"};

typedef struct operator_entry {
  OrtCustomOp op; /* first: onnxruntime hands back a pointer to it */
  enum which which;
  uint64_t handle; /* of the context */
  int session_threads;
} operator_entry;

/* Of one context that sessions were made for, and whose threads compute. Never freed: session options keep pointers into it, and nothing tells when the
 * last of them is gone. So it names its context by handle, and options that outlive the context find it closed. */
typedef struct operators {
  void *domain;
  operator_entry entries[OPERATORS];
  struct operators *next;
} operators;

typedef struct kernel {
  const OrtApi *api;
  edgeml_context *context;
  enum which which;
  int session_threads;
  uint32_t number; /* site or page */
  edgeml_attention attention; /* its options; heads 0 where not given */
} kernel;

typedef struct tensor {
  void *data;
  int64_t dims[MAX_DIMS];
  size_t rank, rows; /* rows: all but the last dimension */
  int64_t last;
} tensor;

/* ---- computing ---- */

static OrtStatus *fail(const OrtApi *api, int code, const char *message) { return CALL(api, CREATE_STATUS, create_status *, code, message); }

static OrtStatus *fail_with(const kernel *k, const edgeml_fault *fault) {
  char text[256];
  if (fault->status == EDGEML_BAD_ARGUMENT)
    snprintf(text, sizeof text, "edgeml.%s: %lld is outside its range", names[k->which], (long long)fault->value);
  else
    snprintf(text, sizeof text, "edgeml.%s: page %u at offset %llu: %s%s%s", names[k->which], fault->page,
             (unsigned long long)fault->offset, edgeml_status_text(fault->status), fault->error ? ": " : "",
             fault->error ? strerror(fault->error) : "");
  return fail(k->api, ORT_FAIL, text);
}

static OrtStatus *get_input(const OrtApi *api, void *context, size_t index, tensor *out) {
  const void *value;
  void *info;
  OrtStatus *status = CALL(api, CONTEXT_INPUT, context_input *, context, index, &value);
  if (status) return status;
  status = CALL(api, TENSOR_INFO, tensor_info *, value, &info);
  if (status) return status;
  status = CALL(api, DIMENSION_COUNT, dimension_count *, info, &out->rank);
  if (!status && out->rank > MAX_DIMS) status = fail(api, ORT_INVALID_ARGUMENT, "edgeml: a tensor of more than 16 dimensions");
  if (!status) status = CALL(api, DIMENSIONS, dimensions *, info, out->dims, out->rank);
  CALL(api, RELEASE_INFO, release_info *, info);
  if (status) return status;
  out->rows = 1, out->last = out->rank ? out->dims[out->rank - 1] : 1;
  for (size_t i = 0; i + 1 < out->rank; i++) out->rows *= (size_t)out->dims[i];
  return CALL(api, TENSOR_DATA, tensor_data *, (void *)(uintptr_t)value, &out->data);
}

static OrtStatus *get_output(const OrtApi *api, void *context, size_t index, const int64_t *dims, size_t rank, float **data) {
  void *value;
  OrtStatus *status = CALL(api, CONTEXT_OUTPUT, context_output *, context, index, dims, rank, &value);
  return status || !value ? status : CALL(api, TENSOR_DATA, tensor_data *, value, (void **)data); /* NULL: nobody wants it */
}

static OrtStatus *compute_experts(const kernel *k, void *context) {
  tensor x, ids, weights;
  float *out;
  OrtStatus *status = get_input(k->api, context, 0, &x);
  if (!status) status = get_input(k->api, context, 1, &ids);
  if (!status) status = get_input(k->api, context, 2, &weights);
  if (status) return status;
  if (x.rank < 1 || x.last != (int64_t)k->context->sites[k->number].hidden || ids.rank < 1 || ids.rows != x.rows ||
      weights.rows != x.rows || weights.last != ids.last)
    return fail(k->api, ORT_INVALID_ARGUMENT, "edgeml.PagedExperts: hidden, ids and weights do not fit each other and the site");
  status = get_output(k->api, context, 0, x.dims, x.rank, &out);
  if (status) return status;
  edgeml_request ours = {0}, *request = request_current(k->context);
  if (!request) request = &ours;
  int failed = edgeml_experts(k->context, request, k->number, x.data, ids.data, weights.data, x.rows, (size_t)ids.last, out);
  return failed ? fail_with(k, &request->fault) : NULL;
}

static OrtStatus *compute_linear(const kernel *k, void *context) {
  tensor x;
  float *out;
  const matrix *m = &k->context->pager.pages[k->number].matrices[0];
  OrtStatus *status = get_input(k->api, context, 0, &x);
  if (status) return status;
  if (x.rank < 1 || x.last != (int64_t)m->cols) return fail(k->api, ORT_INVALID_ARGUMENT, "edgeml.Linear: x does not fit the page's matrix");
  x.dims[x.rank - 1] = m->rows;
  status = get_output(k->api, context, 0, x.dims, x.rank, &out);
  if (status) return status;
  edgeml_linear(k->context, k->number, x.data, x.rows, out);
  return NULL;
}

static OrtStatus *compute_rows(const kernel *k, void *context) {
  tensor ids;
  float *out;
  OrtStatus *status = get_input(k->api, context, 0, &ids);
  if (status) return status;
  if (ids.rank >= MAX_DIMS) return fail(k->api, ORT_INVALID_ARGUMENT, "edgeml.EmbedRows: ids have too many dimensions");
  ids.dims[ids.rank] = k->context->pager.pages[k->number].matrices[0].cols;
  status = get_output(k->api, context, 0, ids.dims, ids.rank + 1, &out);
  if (status) return status;
  edgeml_request ours = {0}, *request = request_current(k->context);
  if (!request) request = &ours;
  int failed = edgeml_embed_rows(k->context, request, k->number, ids.data, ids.rows * (size_t)ids.last, out);
  return failed ? fail_with(k, &request->fault) : NULL;
}

/* ---- attention ---- */

enum { Q, K, V, CLUSTER, DOMAIN_IDS, CONFIDENCE, PAD, ATTENTION_INPUTS, Y = 0, DENSITY };

/* Whether the graph gives this input, or wants this output. */
static OrtStatus *is_there(const OrtApi *api, void *context, int counter, size_t index, int *out) {
  size_t count;
  const void *value = context;
  OrtStatus *status = CALL(api, counter, context_count *, context, &count);
  if (!status && count > index && counter == INPUT_COUNT) status = CALL(api, CONTEXT_INPUT, context_input *, context, index, &value);
  *out = !status && count > index && value;
  return status;
}

static int same_shape(const tensor *a, const tensor *b) {
  return a->rank == b->rank && !memcmp(a->dims, b->dims, a->rank * sizeof *a->dims);
}

/* Sizes and pointers of a call; 0 where the tensors do not fit each other. */
static int fill_attention(const tensor *in, int has_pad, edgeml_attention *a) {
  const int64_t *d = in[Q].dims;
  if (in[Q].rank != 3 && in[Q].rank != 4) return 0;
  size_t heads = a->heads, width = (size_t)in[Q].last;
  a->token_major = in[Q].rank == 3;
  if (a->token_major ? !heads || width % heads : heads && heads != (size_t)d[1]) return 0;
  a->batch = (size_t)d[0], a->heads = a->token_major ? heads : (size_t)d[1], a->tokens = (size_t)d[a->token_major ? 1 : 2];
  a->head_size = a->token_major ? width / heads : width;
  if (!same_shape(&in[Q], &in[K]) || !same_shape(&in[Q], &in[V])) return 0;
  for (int i = CLUSTER; i < (has_pad ? ATTENTION_INPUTS : PAD); i++)
    if (in[i].rank != 2 || in[i].dims[0] != d[0] || in[i].dims[1] != (int64_t)a->tokens) return 0;
  a->q = in[Q].data, a->k = in[K].data, a->v = in[V].data, a->confidence = in[CONFIDENCE].data;
  a->cluster = in[CLUSTER].data, a->domain = in[DOMAIN_IDS].data, a->pad = has_pad ? in[PAD].data : NULL;
  return 1;
}

static OrtStatus *compute_attention(const kernel *k, void *context) {
  tensor in[ATTENTION_INPUTS];
  edgeml_attention a = k->attention;
  edgeml_fault fault;
  int has_pad = 0, wants_density = 0;
  OrtStatus *status = is_there(k->api, context, INPUT_COUNT, PAD, &has_pad);
  if (!status) status = is_there(k->api, context, OUTPUT_COUNT, DENSITY, &wants_density);
  for (size_t i = 0; i < (has_pad ? ATTENTION_INPUTS : PAD) && !status; i++) status = get_input(k->api, context, i, &in[i]);
  if (status) return status;
  if (!fill_attention(in, has_pad, &a))
    return fail(k->api, ORT_INVALID_ARGUMENT, "edgeml.ScarAttention: the shapes of its inputs, or heads, do not fit each other");
  size_t bytes = edgeml_attention_scratch(k->context, &a);
  if (!bytes) return fail(k->api, ORT_INVALID_ARGUMENT, "edgeml.ScarAttention: too many heads or tokens, or vectors of a bad size");
  status = get_output(k->api, context, Y, in[Q].dims, in[Q].rank, &a.y);
  if (!status && wants_density) status = get_output(k->api, context, DENSITY, in[Q].dims, 1, &a.density);
  if (status) return status;
  void *memory = malloc(bytes);
  if (!memory) return fail(k->api, ORT_FAIL, "edgeml.ScarAttention: not enough memory");
  int failed = edgeml_scar_attention(k->context, NULL, &a, memory, &fault);
  free(memory);
  return failed ? fail_with(k, &fault) : NULL;
}

/* ---- the session's threads ---- */

typedef struct lending {
  const OrtApi *api;
  void *context;
} lending;

typedef struct lent_body {
  void (*body)(void *argument, int worker);
  void *argument;
} lent_body;

static void run_lent(void *argument, size_t i) {
  const lent_body *l = argument;
  l->body(l->argument, (int)i);
}

static void lend(void *lender, void (*body)(void *argument, int worker), int count, void *argument) {
  const lending *l = lender;
  lent_body lent = {body, argument};
  OrtStatus *status = CALL(l->api, PARALLEL_FOR, parallel_for *, l->context, run_lent, (size_t)count, 0, &lent);
  if (!status) return;
  CALL(l->api, RELEASE_STATUS, release_status *, status);
  body(argument, 0); /* does what is left alone */
}

static OrtStatus *kernel_compute(void *state, void *context) {
  const kernel *k = state;
  lending ours = {k->api, context};
  OrtStatus *status;
  pool_lend(k->session_threads ? lend : NULL, &ours);
  switch (k->which) {
    case PAGED_EXPERTS: status = compute_experts(k, context); break;
    case LINEAR: status = compute_linear(k, context); break;
    case SCAR_ATTENTION: status = compute_attention(k, context); break;
    default: status = compute_rows(k, context);
  }
  pool_lend(NULL, NULL);
  return status;
}

/* ---- creating ---- */

static OrtStatus *fail_closed(const OrtApi *api) {
  return fail(api, ORT_INVALID_ARGUMENT, "edgeml: the context named by edgeml.context is closed");
}

static int number_fits(const edgeml_context *c, enum which which, int64_t number) {
  if (which == SCAR_ATTENTION) return 1; /* has none */
  if (which == PAGED_EXPERTS) return number >= 0 && number < (int64_t)c->site_count;
  if (number < 0 || number >= (int64_t)c->pager.page_count) return 0;
  return c->pager.pages[number].kind == (which == LINEAR ? KIND_LINEAR : KIND_ROWS);
}

/* An attribute that need not be there; 0 then. */
static int64_t optional_int(const OrtApi *api, const void *info, const char *name) {
  int64_t value = 0;
  OrtStatus *status = CALL(api, ATTRIBUTE_INT, attribute_int *, info, name, &value);
  if (!status) return value;
  CALL(api, RELEASE_STATUS, release_status *, status);
  return 0;
}

static OrtStatus *read_attention(const OrtApi *api, const void *info, edgeml_attention *out) {
  int64_t clusters, domains, heads = optional_int(api, info, "heads"), globals = optional_int(api, info, "global_tokens");
  *out = (edgeml_attention){.causal = optional_int(api, info, "causal") != 0, .published = optional_int(api, info, "published") != 0};
  OrtStatus *status = CALL(api, ATTRIBUTE_INT, attribute_int *, info, "clusters", &clusters);
  if (!status) status = CALL(api, ATTRIBUTE_INT, attribute_int *, info, "domains", &domains);
  if (!status) status = CALL(api, ATTRIBUTE_FLOAT, attribute_float *, info, "threshold", &out->threshold);
  if (status) return status;
  status = CALL(api, ATTRIBUTE_FLOAT, attribute_float *, info, "scale", &out->scale);
  if (status) out->scale = 0, CALL(api, RELEASE_STATUS, release_status *, status);
  out->batch = out->tokens = out->head_size = out->heads = 1;
  out->clusters = clusters < 0 || clusters > UINT32_MAX ? 0 : (uint32_t)clusters;
  out->domains = domains < 0 || domains > UINT32_MAX ? 0 : (uint32_t)domains;
  out->global_tokens = globals < 0 ? 0 : globals > UINT32_MAX ? UINT32_MAX : (uint32_t)globals;
  if (!edgeml_attention_scratch(NULL, out) || globals < 0 || heads < 0)
    return fail(api, ORT_INVALID_ARGUMENT, "edgeml.ScarAttention: an attribute is outside its range, or published goes with another");
  out->heads = (size_t)heads;
  return NULL;
}

static OrtStatus *kernel_create(const OrtCustomOp *op, const OrtApi *api, const void *info, void **out) {
  const operator_entry *entry = (const operator_entry *)op;
  const char *attribute = entry->which == PAGED_EXPERTS ? "site" : "page";
  int64_t number = 0;
  edgeml_attention attention = {0};
  OrtStatus *status;
  if (entry->which == SCAR_ATTENTION) status = read_attention(api, info, &attention);
  else status = CALL(api, ATTRIBUTE_INT, attribute_int *, info, attribute, &number);
  if (status) return status;
  edgeml_context *c = context_of(entry->handle);
  if (!c) return fail_closed(api);
  kernel *k = malloc(sizeof *k);
  if (k && number_fits(c, entry->which, number)) {
    *k = (kernel){api, c, entry->which, entry->session_threads, (uint32_t)number, attention}; /* a user of the context from here on */
    *out = k;
    return NULL;
  }
  char text[128] = "edgeml: not enough memory";
  if (k)
    snprintf(text, sizeof text, "edgeml.%s names %s %lld, which the bundle does not have", names[entry->which], attribute,
             (long long)number);
  free(k);
  atomic_fetch_sub(&c->users, 1);
  return fail(api, ORT_INVALID_ARGUMENT, text);
}

static void kernel_destroy(void *state) {
  kernel *k = state;
  if (k) atomic_fetch_sub(&k->context->users, 1);
  free(k);
}

static enum which which_of(const OrtCustomOp *op) { return ((const operator_entry *)op)->which; }
static const char *get_name(const OrtCustomOp *op) { return names[which_of(op)]; }
static const char *get_provider(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }
static size_t input_count(const OrtCustomOp *op) {
  if (which_of(op) == SCAR_ATTENTION) return ATTENTION_INPUTS;
  return which_of(op) == PAGED_EXPERTS ? 3 : 1;
}
static size_t output_count(const OrtCustomOp *op) { return which_of(op) == SCAR_ATTENTION ? 2 : 1; }
static int input_type(const OrtCustomOp *op, size_t index) {
  static const int attention[ATTENTION_INPUTS] = {FLOAT, FLOAT, FLOAT, INT32, INT32, FLOAT, BOOL};
  if (which_of(op) == SCAR_ATTENTION) return attention[index];
  if (which_of(op) == EMBED_ROWS) return INT64;
  return which_of(op) == PAGED_EXPERTS && index == 1 ? INT64 : FLOAT;
}
static int output_type(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, FLOAT; }
static int input_need(const OrtCustomOp *op, size_t index) { return which_of(op) == SCAR_ATTENTION && index == PAD ? OPTIONAL : REQUIRED; }
static int output_need(const OrtCustomOp *op, size_t index) { return which_of(op) == SCAR_ATTENTION && index == DENSITY ? OPTIONAL : REQUIRED; }
static int memory_type(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, MEMORY_DEFAULT; }
static int one(const OrtCustomOp *op) { return (void)op, 1; }
static int highest_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

static const OrtCustomOp prototype = {
    .version = API_VERSION, .GetName = get_name, .GetExecutionProviderType = get_provider, .GetInputType = input_type,
    .GetInputTypeCount = input_count, .GetOutputType = output_type, .GetOutputTypeCount = output_count,
    .KernelDestroy = kernel_destroy, .GetInputCharacteristic = input_need, .GetOutputCharacteristic = output_need,
    .GetInputMemoryType = memory_type, .GetVariadicInputMinArity = one,
    .GetVariadicInputHomogeneity = one, .GetVariadicOutputMinArity = one, .GetVariadicOutputHomogeneity = one,
    .CreateKernelV2 = kernel_create, .KernelComputeV2 = kernel_compute, .GetStartVersion = one, .GetEndVersion = highest_version,
};

/* ---- registering ---- */

static pthread_mutex_t made_lock = PTHREAD_MUTEX_INITIALIZER;
static operators *made;

/* With made_lock held. */
static OrtStatus *make_operators(const OrtApi *api, uint64_t handle, int session_threads) {
  operators *o = calloc(1, sizeof *o);
  if (!o) return fail(api, ORT_FAIL, "edgeml: not enough memory");
  OrtStatus *status = CALL(api, CREATE_DOMAIN, create_domain *, "edgeml", &o->domain);
  for (int i = 0; i < OPERATORS && !status; i++) {
    o->entries[i] = (operator_entry){prototype, (enum which)i, handle, session_threads && (i == PAGED_EXPERTS || i == LINEAR)};
    status = CALL(api, DOMAIN_ADD, domain_add *, o->domain, &o->entries[i].op);
  }
  if (status) free(o);
  else o->next = made, made = o;
  return status;
}

static OrtStatus *find_operators(const OrtApi *api, uint64_t handle, int session_threads, const operators **out) {
  OrtStatus *status = NULL;
  const operator_entry *e;
  pthread_mutex_lock(&made_lock);
  for (*out = made; *out; *out = (*out)->next) {
    e = &(*out)->entries[PAGED_EXPERTS];
    if (e->handle == handle && e->session_threads == session_threads) break;
  }
  if (!*out) status = make_operators(api, handle, session_threads), *out = made;
  pthread_mutex_unlock(&made_lock);
  return status;
}

EXPORT OrtStatus *RegisterCustomOps(void *options, const void *base) {
  const OrtApi *api = ((const OrtApiBase *)base)->GetApi(API_VERSION);
  if (!api) return NULL; /* older than 1.17: its nodes will say that the operators are unknown */
  char text[32] = "", threads[16] = "";
  size_t size = sizeof text, threads_size = sizeof threads;
  int there = 0, asked = 0;
  OrtStatus *status = CALL(api, HAS_CONFIG_ENTRY, has_config_entry *, options, "edgeml.context", &there);
  if (status) return status;
  if (!there) return fail(api, ORT_INVALID_ARGUMENT, "edgeml: set the session configuration entry edgeml.context before registering");
  status = CALL(api, CONFIG_ENTRY, config_entry *, options, "edgeml.context", text, &size);
  if (!status) status = CALL(api, HAS_CONFIG_ENTRY, has_config_entry *, options, "edgeml.threads", &asked);
  if (!status && asked) status = CALL(api, CONFIG_ENTRY, config_entry *, options, "edgeml.threads", threads, &threads_size);
  if (status) return status;
  if (asked && strcmp(threads, "session"))
    return fail(api, ORT_INVALID_ARGUMENT, "edgeml: the session configuration entry edgeml.threads is session, or not there");
  edgeml_context *c = context_of(strtoull(text, NULL, 10));
  if (!c) return fail_closed(api);
  const operators *found;
  status = find_operators(api, c->handle, asked, &found);
  if (!status) status = CALL(api, OPTIONS_ADD_DOMAIN, options_add *, options, found->domain);
  atomic_fetch_sub(&c->users, 1);
  return status;
}
