/* Everything about a vector kernel set that does not depend on its instructions: the order of the loops, every float step.
 *
 * An instruction set's file defines LANES (floats in a vector) and MOST_TOKENS, includes this file, and supplies
 *
 *     tile_sums    exact integer sums of one tile's rows [part * LANES, (part + 1) * LANES) for up to MOST_TOKENS inputs
 *     tile_scales  the same rows' scales, float16 -> float
 *
 * The file is written in the vector extension of GCC and Clang, where + - * on vectors mean the same as on numbers.
 *
 * Order of the loops: 16 rows; then groups of up to MOST_TOKENS inputs; then the blocks along k. So a tile comes from memory
 * once, is unpacked once for each group, and the running sums of a group stay in registers. While the first group is computed,
 * tiles are prefetched some way ahead: the processor's own prefetcher stops at page ends and keeps too short a distance.
 */
#ifndef EDGEML_KERNELS_VECTOR_H
#define EDGEML_KERNELS_VECTOR_H

#include "kernels.h"

#include <string.h>

typedef float real __attribute__((vector_size(4 * LANES)));
typedef uint32_t word __attribute__((vector_size(4 * LANES)));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));
#include "kernels_math.h"

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define KEEP_ROLLED _Pragma("clang loop unroll(disable)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define KEEP_ROLLED _Pragma("GCC unroll 1") /* where too many values would want a register at once */
#endif

enum { PARTS = TILE_ROWS / LANES, PREFETCH_AHEAD = 2048, CACHE_LINE = 64 };

/* A row block's inputs: where a group of tokens begins, and how far apart its rows are. */
typedef struct inputs {
  const int8_t *q;
  const float *scale;
  const int32_t *qsum;
  size_t blocks; /* along k: row strides are blocks * 32 of q, blocks of scale and qsum */
} inputs;

INLINE void tile_sums(int type, int tokens, int part, const uint8_t *tile, const inputs *in, size_t block, whole *sums);
INLINE real tile_scales(const uint8_t *scales, int part);

INLINE real load(const void *p) {
  real x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE void store(void *p, real x) { memcpy(p, &x, sizeof x); }

INLINE void prefetch(const uint8_t *tile, size_t bytes) {
  for (size_t i = 0; i < bytes; i += CACHE_LINE) __builtin_prefetch((const void *)((uintptr_t)tile + PREFETCH_AHEAD + i));
}

/* Bias, one NaN for all, and no byte beyond the last row. */
INLINE void finish(int tokens, real (*sum)[PARTS], size_t rows, size_t row, const float *bias, float *y, size_t ldy) {
  size_t count = rows - row < TILE_ROWS ? rows - row : TILE_ROWS;
  float line[TILE_ROWS] = {0};
  real shift[PARTS];
  if (bias != NULL) memcpy(line, bias + row, count * sizeof(float));
  UNROLL for (int p = 0; p < PARTS; p++) shift[p] = load(line + p * LANES);
  UNROLL for (int t = 0; t < tokens; t++) {
    UNROLL for (int p = 0; p < PARTS; p++) store(line + p * LANES, canonical(bias == NULL ? sum[t][p] : sum[t][p] + shift[p]));
    memcpy(y + (size_t)t * ldy + row, line, count * sizeof(float));
  }
}

INLINE void int_group(int type, int tokens, int first, const uint8_t *tile, const inputs *in, real (*sum)[PARTS]) {
  const size_t bytes = type == WEIGHT_INT8 ? TILE_BYTES_INT8 : TILE_BYTES_INT4;
  UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int p = 0; p < PARTS; p++) sum[t][p] = (real){0};
  for (size_t b = 0; b < in->blocks; b++, tile += bytes) {
    if (first) prefetch(tile, bytes);
    UNROLL for (int p = 0; p < PARTS; p++) {
      whole dot[MOST_TOKENS];
      tile_sums(type, tokens, p, tile, in, b, dot);
      real scale = tile_scales(tile + bytes - 2 * TILE_ROWS, p);
      UNROLL for (int t = 0; t < tokens; t++) {
        real step = __builtin_convertvector(dot[t], real) * (scale * in->scale[(size_t)t * in->blocks + b]);
        sum[t][p] = sum[t][p] + step;
      }
    }
  }
}

INLINE void float_group(int tokens, int first, const uint8_t *column, const float *x, size_t k, real (*sum)[PARTS]) {
  UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int p = 0; p < PARTS; p++) sum[t][p] = (real){0};
  for (size_t i = 0; i < k; i++, column += TILE_ROWS * sizeof(float)) {
    if (first) prefetch(column, CACHE_LINE);
    UNROLL for (int p = 0; p < PARTS; p++) {
      real weights = load(column + (size_t)(p * LANES) * sizeof(float));
      UNROLL for (int t = 0; t < tokens; t++) sum[t][p] = sum[t][p] + weights * x[(size_t)t * k + i];
    }
  }
}

/* Calls BODY with the number of tokens as a constant, so that each number has loops of its own. */
#define FOR_TOKENS(count, BODY) \
  switch (count) {              \
    case 1: BODY(1); break;     \
    case 2: BODY(2); break;     \
    case 3: BODY(3); break;     \
    FOUR_AND_MORE(BODY)         \
  }
#if MOST_TOKENS == 4
#define FOUR_AND_MORE(BODY) default: BODY(4);
#elif MOST_TOKENS == 8
#define FOUR_AND_MORE(BODY) \
  case 4: BODY(4); break;   \
  case 5: BODY(5); break;   \
  case 6: BODY(6); break;   \
  case 7: BODY(7); break;   \
  default: BODY(8);
#endif

INLINE void matmul_int(int type, const uint8_t *tiles, size_t rows, size_t k, size_t row_begin, size_t row_end, const int8_t *q,
                       const float *scale, const int32_t *qsum, size_t n, const float *bias, float *y, size_t ldy) {
  size_t blocks = (k + TILE_COLS - 1) / TILE_COLS, bytes = type == WEIGHT_INT8 ? TILE_BYTES_INT8 : TILE_BYTES_INT4;
  for (size_t row = row_begin; row < row_end && row < rows; row += TILE_ROWS) {
    const uint8_t *tile = tiles + row / TILE_ROWS * blocks * bytes;
    for (size_t t = 0; t < n; t += MOST_TOKENS) {
      inputs in = {q + t * blocks * TILE_COLS, scale + t * blocks, qsum + t * blocks, blocks};
      real sum[MOST_TOKENS][PARTS];
#define GROUP(tokens) int_group(type, tokens, t == 0, tile, &in, sum), finish(tokens, sum, rows, row, bias, y + t * ldy, ldy)
      FOR_TOKENS(n - t, GROUP)
#undef GROUP
    }
  }
}

static void matmul_int8(const void *tiles, size_t rows, size_t k, size_t row_begin, size_t row_end, const int8_t *q,
                        const float *scale, const int32_t *qsum, size_t n, const float *bias, float *y, size_t ldy) {
  matmul_int(WEIGHT_INT8, tiles, rows, k, row_begin, row_end, q, scale, qsum, n, bias, y, ldy);
}

static void matmul_int4(const void *tiles, size_t rows, size_t k, size_t row_begin, size_t row_end, const int8_t *q,
                        const float *scale, const int32_t *qsum, size_t n, const float *bias, float *y, size_t ldy) {
  matmul_int(WEIGHT_INT4, tiles, rows, k, row_begin, row_end, q, scale, qsum, n, bias, y, ldy);
}

#ifndef DOTPROD /* which shares the rest with "neon" */
static void matmul_f32(const void *tiles, size_t rows, size_t k, size_t row_begin, size_t row_end, const float *x, size_t n,
                       const float *bias, float *y, size_t ldy) {
  size_t blocks = (k + TILE_COLS - 1) / TILE_COLS;
  for (size_t row = row_begin; row < row_end && row < rows; row += TILE_ROWS) {
    const uint8_t *tile = (const uint8_t *)tiles + row / TILE_ROWS * blocks * TILE_BYTES_F32;
    for (size_t t = 0; t < n; t += MOST_TOKENS) {
      real sum[MOST_TOKENS][PARTS];
#define GROUP(tokens) float_group(tokens, t == 0, tile, x + t * k, k, sum), finish(tokens, sum, rows, row, bias, y + t * ldy, ldy)
      FOR_TOKENS(n - t, GROUP)
#undef GROUP
    }
  }
}

INLINE void activate_all(int activation, float *y, size_t n) {
  for (; n >= LANES; n -= LANES, y += LANES) store(y, activated(activation, load(y)));
  if (n == 0) return;
  float line[LANES] = {0};
  memcpy(line, y, n * sizeof(float));
  store(line, activated(activation, load(line)));
  memcpy(y, line, n * sizeof(float));
}

static void activate(int activation, float *y, size_t n) {
  if (activation == ACTIVATION_GELU) activate_all(ACTIVATION_GELU, y, n);
  if (activation == ACTIVATION_RELU) activate_all(ACTIVATION_RELU, y, n);
  if (activation == ACTIVATION_SILU) activate_all(ACTIVATION_SILU, y, n);
}

static void axpy(float *out, float w, const float *y, size_t n) {
  for (; n >= LANES; n -= LANES, y += LANES, out += LANES) store(out, canonical(load(out) + load(y) * w));
  if (n == 0) return;
  float line[LANES] = {0}, other[LANES] = {0};
  memcpy(line, out, n * sizeof(float));
  memcpy(other, y, n * sizeof(float));
  store(line, canonical(load(line) + load(other) * w));
  memcpy(out, line, n * sizeof(float));
}
#endif

#endif
