/* Attention: every kernel set against the plain one, bit for bit, the plain one against double precision, and threads against
 * one. Under the address, undefined-behaviour and thread sanitizers. Prints a checksum of the results: the same on every machine.
 */
#include "context.h"
#include "edgeml.h"
#include "scar.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_SETS = 8 };
static int failures;
static uint64_t random_state = 1, checksum;

static void expect(int condition, const char *what, const char *set, int number) {
  if (condition) return;
  if (failures++ < 20) printf("FAILED %s (%s, case %d)\n", what, set, number);
}

static uint32_t random_bits(void) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(random_state >> 32);
}

static uint32_t pick(const uint32_t *from, size_t n) { return from[random_bits() % n]; }
#define PICK(...) pick((const uint32_t[]){__VA_ARGS__}, sizeof((const uint32_t[]){__VA_ARGS__}) / sizeof(uint32_t))

static float random_float(void) { /* roughly normal */
  float x = 0;
  for (int i = 0; i < 4; i++) x += (float)(int32_t)random_bits() * 0x1p-31f;
  return x;
}

static void *allocate(size_t bytes) {
  void *p = malloc(bytes + 1);
  if (!p) abort();
  memset(p, 0xff, bytes + 1); /* NaN where nothing is written */
  return p;
}

static float *random_floats(size_t n, float size) {
  float *x = allocate(n * sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = random_float() * size;
  return x;
}

static edgeml_attention make_case(int number) {
  edgeml_attention a = {.batch = PICK(1, 1, 2), .heads = PICK(1, 2, 3), .tokens = PICK(1, 2, 17, 63, 64, 65, 66, 130, 600)};
  a.head_size = PICK(1, 3, 8, 16, 31, 48, 64, 70), a.clusters = PICK(1, 2, 5, 16, 1000), a.domains = PICK(1, 2, 4, 9, 300);
  a.global_tokens = PICK(0, 0, 1, 3, 80, 100000), a.causal = (int32_t)PICK(0, 1), a.token_major = (int32_t)PICK(0, 1);
  a.threshold = (float)PICK(0, 1, 2, 5) / 4 - 0.125f;
  a.published = number % 5 == 4;
  if (a.published) a.causal = 0, a.global_tokens = 0;
  size_t rows = a.batch * a.tokens, all = rows * a.heads * a.head_size;
  int32_t *cluster = allocate(rows * sizeof *cluster), *domain = allocate(rows * sizeof *domain);
  uint8_t *pad = allocate(rows);
  float *confidence = random_floats(rows, 1), wild = number % 7 == 6 ? 40.0f : 1.0f;
  uint32_t nested = PICK(0, 1), padded_share = PICK(0, 0, 20, 90, 100);
  for (size_t i = 0; i < rows; i++) {
    cluster[i] = (int32_t)(random_bits() % a.clusters);
    domain[i] = (int32_t)((nested ? (uint32_t)cluster[i] : random_bits()) % a.domains);
    pad[i] = random_bits() % 100 < padded_share;
  }
  float *values = random_floats(all, 1);
  if (number % 6 == 5) values[random_bits() % all] = number % 4 ? NAN : INFINITY;
  a.q = random_floats(all, wild), a.k = random_floats(all, 1), a.v = values, a.cluster = cluster, a.domain = domain;
  a.confidence = confidence, a.pad = pad, a.y = allocate(all * sizeof(float)), a.density = allocate(a.batch * sizeof(float));
  return a;
}

static void free_case(edgeml_attention *a) {
  const void *all[] = {a->q, a->k, a->v, a->y, a->cluster, a->domain, a->confidence, a->pad, a->density};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free((void *)(uintptr_t)all[i]);
}

static size_t result_bytes(const edgeml_attention *a) { return a->batch * a->heads * a->tokens * a->head_size * sizeof(float); }

static void compute(const edgeml_attention *a, edgeml_context *context, const char *isa, int number) {
  size_t bytes = edgeml_attention_scratch(context, a);
  uint8_t *memory = allocate(bytes);
  expect(bytes && !edgeml_scar_attention(context, isa, a, memory, NULL), "status", isa ? isa : "threads", number);
  expect(memory[bytes] == 0xff, "bytes after the working memory", isa ? isa : "threads", number);
  free(memory);
}

/* ---- double precision ---- */

static int pair_allowed(const edgeml_attention *a, size_t b, size_t i, size_t j) {
  size_t x = b * a->tokens + i, y = b * a->tokens + j;
  int sure_x = a->confidence[x] > a->threshold, sure_y = a->confidence[y] > a->threshold;
  if (a->published) return a->cluster[x] == a->cluster[y] || sure_x == sure_y;
  if (a->pad[x] || a->pad[y] || (a->causal && j > i)) return 0;
  return i < a->global_tokens || j < a->global_tokens || a->cluster[x] == a->cluster[y] ||
         (a->domain[x] == a->domain[y] && sure_x && sure_y);
}

static size_t row_of(const edgeml_attention *a, size_t b, size_t h, size_t t) {
  return (a->token_major ? (b * a->tokens + t) * a->heads + h : (b * a->heads + h) * a->tokens + t) * a->head_size;
}

static double score(const edgeml_attention *a, size_t q, size_t k) {
  double sum = 0;
  for (size_t d = 0; d < a->head_size; d++) sum += (double)a->q[q + d] * a->k[k + d];
  return sum / sqrt((double)a->head_size);
}

static void check_row(const edgeml_attention *a, size_t b, size_t h, size_t i, int number) {
  double top = -INFINITY, total = 0, y[128] = {0}, size;
  size_t row = row_of(a, b, h, i);
  for (size_t j = 0; j < a->tokens; j++)
    if (pair_allowed(a, b, i, j)) top = fmax(top, score(a, row, row_of(a, b, h, j)));
  for (size_t j = 0; j < a->tokens; j++) {
    if (!pair_allowed(a, b, i, j)) continue;
    double weight = exp(score(a, row, row_of(a, b, h, j)) - top);
    total += weight;
    for (size_t d = 0; d < a->head_size; d++) y[d] += weight * a->v[row_of(a, b, h, j) + d];
  }
  size = total > 0 ? fmax(1, fabs(top)) : 1;
  for (size_t d = 0; d < a->head_size; d++) {
    double expected = total > 0 ? y[d] / total : 0, got = a->y[row + d];
    if (!isfinite(expected) && number % 7 == 6) continue; /* a weight may be 0 in floats that is not in doubles */
    expect(isfinite(expected) ? fabs(got - expected) <= 1e-5 * size : !isfinite(got), "double precision", "scalar", number);
  }
}

static void check_density(const edgeml_attention *a, int number) {
  for (size_t b = 0; b < a->batch; b++) {
    double pairs = 0, all = (double)a->tokens * (double)a->tokens;
    for (size_t i = 0; i < a->tokens; i++)
      for (size_t j = 0; j < a->tokens; j++) pairs += pair_allowed(a, b, i, j);
    expect(fabs(a->density[b] - pairs / all) < 1e-6, "density", "scalar", number);
  }
}

/* ---- all sets, all cases ---- */

static void run_case(int number, edgeml_context *const *contexts, size_t context_count) {
  const char *sets[MOST_SETS];
  size_t count = edgeml_backends(sets, MOST_SETS);
  edgeml_attention a = make_case(number), other = a;
  other.y = allocate(result_bytes(&a));
  compute(&a, NULL, "scalar", number);
  if (a.tokens <= 130)
    for (size_t b = 0; b < a.batch; b++)
      for (size_t h = 0; h < a.heads; h++)
        for (size_t i = 0; i < a.tokens; i++) check_row(&a, b, h, i, number);
  check_density(&a, number);
  for (size_t s = 1; s < count; s++) {
    memset(other.y, 0xff, result_bytes(&a));
    compute(&other, NULL, sets[s], number);
    expect(!memcmp(a.y, other.y, result_bytes(&a)), "bits", sets[s], number);
  }
  for (size_t c = 0; c < context_count; c++) {
    memset(other.y, 0xff, result_bytes(&a));
    compute(&other, contexts[c], NULL, number);
    expect(!memcmp(a.y, other.y, result_bytes(&a)), "bits", "threads", number);
  }
  const uint8_t *bytes = (const uint8_t *)a.y;
  for (size_t i = 0; i < result_bytes(&a); i++) checksum = (checksum ^ bytes[i]) * 1099511628211u;
  free(other.y);
  free_case(&a);
}

static void refuse(void) {
  edgeml_attention good = make_case(0), a;
  uint8_t *memory = allocate(edgeml_attention_scratch(NULL, &good));
  edgeml_fault fault;
#define REFUSED(change) (a = good, change, edgeml_scar_attention(NULL, NULL, &a, memory, &fault) == EDGEML_BAD_ARGUMENT)
  expect(REFUSED(a.heads = 0) && REFUSED(a.tokens = (size_t)1 << 25) && REFUSED(a.head_size = 5000), "sizes", "", 0);
  expect(REFUSED(a.clusters = 0) && REFUSED(a.domains = 1u << 21) && REFUSED(a.threshold = NAN), "options", "", 0);
  expect(REFUSED((a.published = 1, a.causal = 1)) && REFUSED(a.batch = SIZE_MAX), "what does not fit", "", 0);
  a = good, a.pad = NULL, a.clusters = 1;
  int32_t *cluster = allocate(a.batch * a.tokens * sizeof *cluster);
  memset(cluster, 0, a.batch * a.tokens * sizeof *cluster);
  cluster[a.batch * a.tokens - 1] = -7, a.cluster = cluster;
  expect(edgeml_scar_attention(NULL, NULL, &a, memory, &fault) == EDGEML_BAD_ARGUMENT && fault.value == -7, "an id", "", 0);
  expect(edgeml_scar_attention(NULL, "none", &good, memory, NULL) == EDGEML_NO_SUCH_ISA, "a set", "", 0);
  free(cluster);
  free(memory);
  free_case(&good);
}

int main(void) {
  edgeml_context *contexts[2] = {NULL, NULL};
  for (uint32_t c = 0; c < 2; c++) {
    /* An empty bundle: attention wants only its threads. */
    edgeml_options options = {.fd = 0, .index = "", .slots = 1, .threads = 2 + 3 * c, .readers = 1, .requests = 1};
    if (edgeml_open(&options, &contexts[c], NULL)) return printf("no context\n"), 1;
  }
  refuse();
  for (int number = 0; number < 120; number++) run_case(number, contexts, 2);
  for (int c = 0; c < 2; c++) edgeml_close(contexts[c]);
  printf("checksum %016llx, %d failures\n", (unsigned long long)checksum, failures);
  return failures != 0;
}
