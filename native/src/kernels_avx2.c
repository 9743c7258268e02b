/* AVX2. Its one product of bytes, maddubs, adds pairs of unsigned x signed products and saturates at 16 bits. With 4-bit weights
 * it cannot: 15 * 127 * 2 = 3810, and even the eight products that a lane gets from a tile, 8 * 3810 = 30480, fit. So lanes are
 * added up in 16 bits and widened once a tile. A byte weight is taken as two such nibbles, high * 16 + low.
 */
#include <float.h>
#include <immintrin.h>

#define LANES 8
#define MOST_TOKENS 4
#include "kernels_vector.h"
#include "scar.h"

INLINE real tile_scales(const uint8_t *scales, int part) {
  return (real)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + 16 * part)));
}

/* Four activations to every row. */
INLINE __m256i spread(const int8_t *q) {
  int32_t four;
  memcpy(&four, q, sizeof four);
  return _mm256_set1_epi32(four);
}

INLINE void tile_sums(int type, int tokens, int part, const uint8_t *tile, const inputs *in, size_t block, whole *sums) {
  const int8_t *q = in->q + block * TILE_COLS;
  const size_t stride = in->blocks * TILE_COLS;
  const int vectors = type == WEIGHT_INT8 ? 8 : 4;
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i low_sum[MOST_TOKENS], high_sum[MOST_TOKENS];
  UNROLL for (int t = 0; t < tokens; t++) low_sum[t] = high_sum[t] = _mm256_setzero_si256();
  KEEP_ROLLED for (int g = 0; g < vectors; g++) {
    __m256i stored = _mm256_loadu_si256((const __m256i *)(tile + 64 * g + 32 * part));
    __m256i low = _mm256_and_si256(stored, nibble), high = _mm256_and_si256(_mm256_srli_epi16(stored, 4), nibble);
    UNROLL for (int t = 0; t < tokens; t++) {
      const int8_t *four = q + (size_t)t * stride + 4 * g;
      __m256i for_low = spread(four), for_high = type == WEIGHT_INT8 ? for_low : spread(four + 16);
      low_sum[t] = _mm256_add_epi16(low_sum[t], _mm256_maddubs_epi16(low, for_low));
      if (type == WEIGHT_INT8) high_sum[t] = _mm256_add_epi16(high_sum[t], _mm256_maddubs_epi16(high, for_high));
      else low_sum[t] = _mm256_add_epi16(low_sum[t], _mm256_maddubs_epi16(high, for_high));
    }
  }
  UNROLL for (int t = 0; t < tokens; t++) {
    __m256i sum = _mm256_madd_epi16(low_sum[t], ones);
    if (type == WEIGHT_INT8) sum = _mm256_add_epi32(sum, _mm256_slli_epi32(_mm256_madd_epi16(high_sum[t], ones), 4));
    sums[t] = (whole)sum - in->qsum[(size_t)t * in->blocks + block] * (type == WEIGHT_INT8 ? 128 : 8);
  }
}

INLINE __m256i largest_of(__m256i a) {
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm256_broadcastd_epi32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1)));
}

/* 32 floats. The bits of |x| order like the numbers, with infinity and NaN on top. */
INLINE void quantize_block(const float *x, int8_t *q, float *scale, int32_t *qsum) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), unsigned_bits = _mm256_set1_epi32(0x7fffffff);
  __m256 values[4];
  __m256i largest = _mm256_setzero_si256(), whole_values[4];
  UNROLL for (int i = 0; i < 4; i++) {
    values[i] = _mm256_loadu_ps(x + 8 * i);
    largest = _mm256_max_epu32(largest, _mm256_and_si256(_mm256_castps_si256(values[i]), unsigned_bits));
  }
  const __m128 most = _mm_castsi128_ps(_mm256_castsi256_si128(largest_of(largest)));
  const uint32_t bits = (uint32_t)_mm_cvtsi128_si32(_mm_castps_si128(most));
  const int finite = bits < INFINITY_BITS;
  float inverse = 127.0f / _mm_cvtss_f32(most);
  if (!finite || !(inverse <= FLT_MAX)) inverse = 0.0f; /* 127 / 0, or so small a block that it counts as zero */
  *scale = finite ? _mm_cvtss_f32(most) / 127.0f : _mm_cvtss_f32(_mm_castsi128_ps(_mm_set1_epi32(NAN_BITS)));
  UNROLL for (int i = 0; i < 4; i++) {
    __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(values[i], _mm256_set1_ps(inverse)));
    whole_values[i] = finite ? rounded : _mm256_setzero_si256();
  }
  __m256i first = _mm256_packs_epi32(whole_values[0], whole_values[1]), second = _mm256_packs_epi32(whole_values[2], whole_values[3]);
  __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), order);
  _mm256_storeu_si256((__m256i *)q, packed);
  __m256i sums = _mm256_sad_epu8(_mm256_xor_si256(packed, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  __m128i two = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  *qsum = _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 2) - 128 * TILE_COLS;
}

void edgeml_quantize_avx2(const float *x, size_t n, size_t k, int8_t *q, float *scale, int32_t *qsum) {
  const size_t whole_blocks = k / TILE_COLS, rest = k % TILE_COLS;
  for (; n > 0; n--, x += rest) {
    for (size_t b = 0; b < whole_blocks; b++, x += TILE_COLS, q += TILE_COLS) quantize_block(x, q, scale++, qsum++);
    if (rest == 0) continue;
    float last[TILE_COLS] = {0};
    memcpy(last, x, rest * sizeof(float));
    quantize_block(last, q, scale++, qsum++);
    q += TILE_COLS;
  }
}

const edgeml_kernels edgeml_kernels_avx2 = {
    "avx2", edgeml_quantize_avx2, matmul_int8, matmul_int4, matmul_f32, activate, axpy, edgeml_attend_avx2};
