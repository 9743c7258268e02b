/* Plain C: one query after another. */
#include "scar.h"

#include <string.h>

typedef float real;
typedef uint32_t word;

/* a * b + c rounded once. In double the product is exact; the sum is rounded to odd, which keeps it on its side of every float
 * and of every midpoint between two, so that the second rounding is the only one that counts. */
static float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  double product = (double)a * b, other = c, sum = product + other, back = sum - product;
  double error = (product - (sum - back)) + (other - back);
  union { double real; uint64_t bits; } s = {.real = sum};
  if ((error > 0 || error < 0) && !(s.bits & 1)) s.bits += (error > 0) == (sum > 0) ? 1u : ~UINT64_C(0);
  return (float)s.real;
#endif
}

static float larger(float a, float b) { return a > b ? a : b; }
static float spread(float x) { return x; }
#include "scar_math.h"

typedef struct row {
  const float *q;
  float *y;
  float most, sum;
  uint32_t token;
} row;

static void add_chunk(const attend *a, row *r, const uint32_t *keys, size_t n, unsigned mask, int finite) {
  float weight[MOST_IN_TILE], most = r->most;
  for (size_t j = 0; j < n; j++) {
    const float *k = a->k + keys[j] * a->stride;
    float score = 0;
    for (size_t i = 0; i < a->size; i++) score = fused(k[i], r->q[i], score);
    weight[j] = allowed(a, mask, r->token, keys[j]) ? score : real_of(SIGN_BIT | INFINITY_BITS);
    most = larger(weight[j], most);
  }
  float factor = power(r->most - most);
  r->most = most, r->sum *= factor;
  for (size_t j = 0; j < n; j++) r->sum += weight[j] = power(weight[j] - most);
  for (size_t i = 0; i < a->size; i++) {
    float y = r->y[i] * factor;
    for (size_t j = 0; j < n; j++)
      if (finite || weight[j] != 0) y = fused(weight[j], a->v[keys[j] * a->stride + i], y);
    r->y[i] = y;
  }
}

static int all_finite(const attend *a, const uint32_t *keys, size_t n) {
  for (size_t j = 0; j < n; j++)
    for (size_t i = 0; i < a->size; i++)
      if (magnitude(a->v[keys[j] * a->stride + i]) >= INFINITY_BITS) return 0;
  return 1;
}

static void finish(const attend *a, const row *r) {
  float inverse = 1.0f / r->sum;
  for (size_t i = 0; i < a->size; i++) r->y[i] = canonical(r->y[i] * inverse);
}

static void attend_query(const attend *a, uint32_t token, const extremes *tile, const extremes *chunks, const int *finite) {
  row r = {a->work, a->y + token * a->stride, a->most[token], a->sum[token], token};
  for (size_t i = 0; i < a->size; i++) a->work[i] = a->q[token * a->stride + i] * a->scale;
  if (r.most == LOWEST) memset(r.y, 0, a->size * sizeof *r.y);
  for (size_t begin = 0, n, c = 0; begin < a->key_count; begin += n, c++) {
    int mask = mask_of(a, tile, &chunks[c]);
    n = tile_of(a->key_count - begin);
    if (mask != SKIP) add_chunk(a, &r, a->keys + begin, n, (unsigned)mask, finite[c]);
  }
  if (a->last) finish(a, &r);
  a->most[token] = r.most, a->sum[token] = r.sum;
}

void edgeml_attend_scalar(const attend *a) {
  extremes chunks[MOST_CHUNKS];
  int finite[MOST_CHUNKS];
  for (size_t begin = 0, n, c = 0; begin < a->key_count; begin += n, c++) {
    n = tile_of(a->key_count - begin);
    chunks[c] = extremes_of(a, a->keys + begin, n), finite[c] = all_finite(a, a->keys + begin, n);
  }
  for (size_t begin = 0, n; begin < a->query_count; begin += n) {
    n = tile_of(a->query_count - begin);
    extremes tile = extremes_of(a, a->queries + begin, n);
    for (size_t i = 0; i < n; i++) attend_query(a, a->queries[begin + i], &tile, chunks, finite);
  }
}
