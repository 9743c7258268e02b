/* AVX-512 with VNNI: one instruction multiplies 64 unsigned weights by 64 signed activations and adds them up for 16 rows. The
 * weights stay as they are stored, with their offset; its share of the sum, offset * qsum, is subtracted at the start.
 */
#include <immintrin.h>

#define LANES 16
#define MOST_TOKENS 8
#include "kernels_vector.h"
#include "scar.h"

INLINE real tile_scales(const uint8_t *scales, int part) {
  (void)part;
  return (real)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
}

/* Four activations to every row. */
INLINE __m512i spread(const int8_t *q) {
  int32_t four;
  memcpy(&four, q, sizeof four);
  return _mm512_set1_epi32(four);
}

INLINE void tile_sums(int type, int tokens, int part, const uint8_t *tile, const inputs *in, size_t block, whole *sums) {
  (void)part;
  const int8_t *q = in->q + block * TILE_COLS;
  const size_t stride = in->blocks * TILE_COLS;
  const int vectors = type == WEIGHT_INT8 ? 8 : 4;
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i sum[MOST_TOKENS];
  UNROLL for (int t = 0; t < tokens; t++)
    sum[t] = _mm512_set1_epi32(in->qsum[(size_t)t * in->blocks + block] * (type == WEIGHT_INT8 ? -128 : -8));
  UNROLL for (int g = 0; g < vectors; g++) {
    __m512i stored = _mm512_loadu_si512(tile + 64 * g);
    __m512i low = type == WEIGHT_INT8 ? stored : _mm512_and_si512(stored, nibble);
    UNROLL for (int t = 0; t < tokens; t++) sum[t] = _mm512_dpbusd_epi32(sum[t], low, spread(q + (size_t)t * stride + 4 * g));
    if (type == WEIGHT_INT8) continue;
    __m512i high = _mm512_and_si512(_mm512_srli_epi16(stored, 4), nibble);
    UNROLL for (int t = 0; t < tokens; t++) sum[t] = _mm512_dpbusd_epi32(sum[t], high, spread(q + (size_t)t * stride + 4 * g + 16));
  }
  UNROLL for (int t = 0; t < tokens; t++) sums[t] = (whole)sum[t];
}

const edgeml_kernels edgeml_kernels_avx512vnni = {
    "avx512vnni", edgeml_quantize_avx2, matmul_int8, matmul_int4, matmul_f32, activate, axpy, edgeml_attend_avx512};
