/* Plain C: the way out for processors without a kernel of their own, and what the other tables are tested against. */
#include "kernels.h"
#include "scar.h"

#include <string.h>

typedef float real;
typedef uint32_t word;
#include "kernels_math.h"

static void quantize(const float *x, size_t n, size_t k, int8_t *q, float *scale, int32_t *qsum) {
  for (; n > 0; n--, x += k)
    for (size_t begin = 0; begin < k; begin += TILE_COLS, q += TILE_COLS, scale++, qsum++) {
      size_t count = k - begin < TILE_COLS ? k - begin : TILE_COLS;
      uint32_t largest = 0; /* the bits of |x| order like the numbers, with infinity and NaN on top */
      for (size_t i = 0; i < count; i++) largest = magnitude(x[begin + i]) > largest ? magnitude(x[begin + i]) : largest;
      int finite = largest < INFINITY_BITS;
      float inverse = finite && largest > 0 ? 127.0f / real_of(largest) : 0.0f;
      if (magnitude(inverse) == INFINITY_BITS) inverse = 0.0f; /* so small a block counts as zero */
      *scale = finite ? real_of(largest) / 127.0f : real_of(NAN_BITS);
      *qsum = 0;
      memset(q, 0, TILE_COLS);
      for (size_t i = 0; finite && i < count; i++) {
        q[i] = (int8_t)(int32_t)((x[begin + i] * inverse + ROUNDER) - ROUNDER); /* within +-127: |x| * inverse < 127.5 */
        *qsum += q[i];
      }
    }
}

/* The value of a float16; exact. */
static float half_value(const uint8_t *p) {
  uint32_t half = (uint32_t)p[0] | (uint32_t)p[1] << 8, sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return real_of(sign | INFINITY_BITS | rest << 13);
  if (rest >= 0x0400u) return real_of(sign | ((rest << 13) + (112u << 23)));
  float small = (float)rest * 0x1p-24f;
  return sign ? -small : small;
}

static size_t rows_here(size_t rows, size_t row) { return rows - row < TILE_ROWS ? rows - row : TILE_ROWS; }

static void finish(const float *sum, size_t count, const float *bias, float *y) {
  for (size_t r = 0; r < count; r++) y[r] = canonical(bias == NULL ? sum[r] : sum[r] + bias[r]);
}

/* Stored weights of a tile, (16, 32). */
static void unpack(int type, const uint8_t *tile, int16_t (*stored)[TILE_COLS]) {
  for (size_t row = 0; row < TILE_ROWS; row++)
    for (size_t col = 0; col < TILE_COLS; col++) {
      const size_t group = col / 4, place = 4 * row + col % 4;
      if (type == WEIGHT_INT8) stored[row][col] = tile[64 * group + place];
      else stored[row][col] = group < 4 ? tile[64 * group + place] & 15 : tile[64 * (group - 4) + place] >> 4;
    }
}

static int32_t dot(const int16_t *stored, const int8_t *q) {
  int32_t sum = 0;
  for (size_t i = 0; i < TILE_COLS; i++) sum += stored[i] * (int16_t)q[i];
  return sum;
}

/* Inputs in groups, so that a tile is unpacked once for several of them. */
static void matmul_int(int type, const uint8_t *tiles, size_t rows, size_t k, size_t row_begin, size_t row_end, const int8_t *q,
                       const float *scale, const int32_t *qsum, size_t n, const float *bias, float *y, size_t ldy) {
  enum { GROUP = 8 };
  const size_t blocks = (k + TILE_COLS - 1) / TILE_COLS, bytes = type == WEIGHT_INT8 ? TILE_BYTES_INT8 : TILE_BYTES_INT4;
  const int32_t zero = type == WEIGHT_INT8 ? 128 : 8;
  for (size_t row = row_begin; row < row_end && row < rows; row += TILE_ROWS)
    for (size_t first = 0; first < n; first += GROUP) {
      const size_t last = n - first < GROUP ? n : first + GROUP;
      float sum[GROUP][TILE_ROWS] = {{0}};
      for (size_t b = 0; b < blocks; b++) {
        const uint8_t *tile = tiles + (row / TILE_ROWS * blocks + b) * bytes;
        int16_t stored[TILE_ROWS][TILE_COLS];
        float wide[TILE_ROWS];
        unpack(type, tile, stored);
        for (size_t r = 0; r < TILE_ROWS; r++) wide[r] = half_value(tile + bytes - 2 * TILE_ROWS + 2 * r);
        for (size_t t = first; t < last; t++)
          for (size_t r = 0; r < TILE_ROWS; r++) {
            int32_t exact = dot(stored[r], q + (t * blocks + b) * TILE_COLS) - zero * qsum[t * blocks + b];
            sum[t - first][r] += (float)exact * (wide[r] * scale[t * blocks + b]);
          }
      }
      for (size_t t = first; t < last; t++)
        finish(sum[t - first], rows_here(rows, row), bias == NULL ? NULL : bias + row, y + t * ldy + row);
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

static void matmul_f32(const void *tiles, size_t rows, size_t k, size_t row_begin, size_t row_end, const float *x, size_t n,
                       const float *bias, float *y, size_t ldy) {
  size_t blocks = (k + TILE_COLS - 1) / TILE_COLS;
  for (size_t row = row_begin; row < row_end && row < rows; row += TILE_ROWS) {
    const uint8_t *column = (const uint8_t *)tiles + row / TILE_ROWS * blocks * TILE_BYTES_F32;
    for (size_t t = 0; t < n; t++) {
      float sum[TILE_ROWS] = {0}, weights[TILE_ROWS];
      for (size_t i = 0; i < k; i++) {
        memcpy(weights, column + i * sizeof weights, sizeof weights);
        for (size_t r = 0; r < TILE_ROWS; r++) sum[r] += weights[r] * x[t * k + i];
      }
      finish(sum, rows_here(rows, row), bias == NULL ? NULL : bias + row, y + t * ldy + row);
    }
  }
}

static void activate(int activation, float *y, size_t n) {
  for (size_t i = 0; i < n; i++) y[i] = activated(activation, y[i]);
}

static void axpy(float *out, float w, const float *y, size_t n) {
  for (size_t i = 0; i < n; i++) out[i] = canonical(out[i] + w * y[i]);
}

const edgeml_kernels edgeml_kernels_scalar = {
    "scalar", quantize, matmul_int8, matmul_int4, matmul_f32, activate, axpy, edgeml_attend_scalar};
