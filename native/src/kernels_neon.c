/* NEON, twice: for every ARMv8-A ("neon"), and for processors with the dot-product instructions ("neon-dotprod"), whose file
 * defines DOTPROD and includes this one.
 *
 * sdot multiplies signed bytes by signed bytes and adds four products to each of four rows. Without it, products of bytes are
 * 16 bits wide: two of int8 weights (2 * 128 * 127 = 32512) or all eight that a lane gets from an int4 tile (8 * 15 * 127 =
 * 15240) are added up there before they are widened. Nibbles stay unsigned, as small positive bytes, and their offset's share of
 * the sum, 8 * qsum, is subtracted at the end; bytes lose their offset of 128 by turning the top bit.
 */
#include <arm_neon.h>
#include <float.h>

#define LANES 4
#define MOST_TOKENS 4
#include "kernels_vector.h"
#include "scar.h"

INLINE real tile_scales(const uint8_t *scales, int part) {
  return (real)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(scales + 8 * part)));
}

#ifdef DOTPROD
INLINE int32x4_t add_products(int32x4_t sum, int8x16_t weights, int8x16_t q, int lane) {
  switch (lane) { /* the instruction wants a constant, and gets one when the loops are unrolled */
    case 0: return vdotq_laneq_s32(sum, weights, q, 0);
    case 1: return vdotq_laneq_s32(sum, weights, q, 1);
    case 2: return vdotq_laneq_s32(sum, weights, q, 2);
    default: return vdotq_laneq_s32(sum, weights, q, 3);
  }
}

INLINE void tile_sums(int type, int tokens, int part, const uint8_t *tile, const inputs *in, size_t block, whole *sums) {
  const int8_t *q = in->q + block * TILE_COLS;
  const size_t stride = in->blocks * TILE_COLS;
  int32x4_t sum[MOST_TOKENS];
  int8x16_t halves[MOST_TOKENS][2];
  UNROLL for (int t = 0; t < tokens; t++) {
    sum[t] = vdupq_n_s32(type == WEIGHT_INT8 ? 0 : in->qsum[(size_t)t * in->blocks + block] * -8);
    halves[t][0] = vld1q_s8(q + (size_t)t * stride);
    halves[t][1] = vld1q_s8(q + (size_t)t * stride + 16);
  }
  UNROLL for (int g = 0; g < 4; g++) {
    uint8x16_t stored = vld1q_u8(tile + 64 * g + 16 * part);
    uint8x16_t low = type == WEIGHT_INT8 ? veorq_u8(stored, vdupq_n_u8(128)) : vandq_u8(stored, vdupq_n_u8(15));
    uint8x16_t high = type == WEIGHT_INT8 ? veorq_u8(vld1q_u8(tile + 64 * (g + 4) + 16 * part), vdupq_n_u8(128)) : vshrq_n_u8(stored, 4);
    UNROLL for (int t = 0; t < tokens; t++) {
      sum[t] = add_products(sum[t], vreinterpretq_s8_u8(low), halves[t][0], g);
      sum[t] = add_products(sum[t], vreinterpretq_s8_u8(high), halves[t][1], g);
    }
  }
  UNROLL for (int t = 0; t < tokens; t++) sums[t] = (whole)sum[t];
}
#else
/* Four activations to every row. */
INLINE int8x16_t spread(const int8_t *q) {
  int32_t four;
  memcpy(&four, q, sizeof four);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

/* The two vectors of weights that share a byte (int4) or lie side by side (int8), as signed bytes. */
INLINE void weight_pair(int type, const uint8_t *tile, int part, int pair, int8x16_t *first, int8x16_t *second) {
  if (type == WEIGHT_INT8) {
    const uint8x16_t top = vdupq_n_u8(128);
    *first = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(tile + 128 * pair + 16 * part), top));
    *second = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(tile + 128 * pair + 64 + 16 * part), top));
  } else {
    uint8x16_t stored = vld1q_u8(tile + 64 * pair + 16 * part);
    *first = vreinterpretq_s8_u8(vandq_u8(stored, vdupq_n_u8(15)));
    *second = vreinterpretq_s8_u8(vshrq_n_u8(stored, 4));
  }
}

INLINE void tile_sums(int type, int tokens, int part, const uint8_t *tile, const inputs *in, size_t block, whole *sums) {
  const int8_t *q = in->q + block * TILE_COLS;
  const size_t stride = in->blocks * TILE_COLS;
  int32x4_t wide_low[MOST_TOKENS], wide_high[MOST_TOKENS];
  int16x8_t low[MOST_TOKENS], high[MOST_TOKENS];
  UNROLL for (int t = 0; t < tokens; t++) {
    wide_low[t] = wide_high[t] = vdupq_n_s32(0);
    low[t] = high[t] = vdupq_n_s16(0);
  }
  KEEP_ROLLED for (int pair = 0; pair < 4; pair++) {
    int8x16_t first, second;
    weight_pair(type, tile, part, pair, &first, &second);
    UNROLL for (int t = 0; t < tokens; t++) {
      const int8_t *row = q + (size_t)t * stride;
      int8x16_t a = spread(row + (type == WEIGHT_INT8 ? 8 * pair : 4 * pair));
      int8x16_t b = spread(row + (type == WEIGHT_INT8 ? 8 * pair + 4 : 4 * pair + 16));
      low[t] = type == WEIGHT_INT8 ? vmull_s8(vget_low_s8(first), vget_low_s8(a)) : vmlal_s8(low[t], vget_low_s8(first), vget_low_s8(a));
      high[t] = type == WEIGHT_INT8 ? vmull_high_s8(first, a) : vmlal_high_s8(high[t], first, a);
      low[t] = vmlal_s8(low[t], vget_low_s8(second), vget_low_s8(b));
      high[t] = vmlal_high_s8(high[t], second, b);
      if (type != WEIGHT_INT8 && pair < 3) continue;
      wide_low[t] = vpadalq_s16(wide_low[t], low[t]);
      wide_high[t] = vpadalq_s16(wide_high[t], high[t]);
    }
  }
  UNROLL for (int t = 0; t < tokens; t++) {
    int32_t offset = type == WEIGHT_INT8 ? 0 : in->qsum[(size_t)t * in->blocks + block] * 8;
    sums[t] = (whole)vsubq_s32(vpaddq_s32(wide_low[t], wide_high[t]), vdupq_n_s32(offset));
  }
}
#endif

#ifndef DOTPROD
/* 32 floats. The bits of |x| order like the numbers, with infinity and NaN on top. */
INLINE void quantize_block(const float *x, int8_t *q, float *scale, int32_t *qsum) {
  uint32x4_t largest = vdupq_n_u32(0);
  UNROLL for (int i = 0; i < 8; i++)
    largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + 4 * i)), vdupq_n_u32(~SIGN_BIT)));
  const uint32_t bits = vmaxvq_u32(largest);
  const float most = vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(bits)), 0);
  const int finite = bits < INFINITY_BITS;
  float inverse = 127.0f / most;
  if (!finite || !(inverse <= FLT_MAX)) inverse = 0.0f; /* 127 / 0, or so small a block that it counts as zero */
  *scale = finite ? most / 127.0f : vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(NAN_BITS)), 0);
  int8x16_t halves[2];
  UNROLL for (int h = 0; h < 2; h++) {
    int16x4_t four[4];
    UNROLL for (int i = 0; i < 4; i++) {
      int32x4_t rounded = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 16 * h + 4 * i), inverse));
      four[i] = vmovn_s32(finite ? rounded : vdupq_n_s32(0));
    }
    halves[h] = vcombine_s8(vmovn_s16(vcombine_s16(four[0], four[1])), vmovn_s16(vcombine_s16(four[2], four[3])));
    vst1q_s8(q + 16 * h, halves[h]);
  }
  *qsum = (int32_t)vaddlvq_s8(halves[0]) + vaddlvq_s8(halves[1]);
}

void edgeml_quantize_neon(const float *x, size_t n, size_t k, int8_t *q, float *scale, int32_t *qsum) {
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

void edgeml_matmul_f32_neon(const void *tiles, size_t rows, size_t k, size_t row_begin, size_t row_end, const float *x, size_t n,
                            const float *bias, float *y, size_t ldy) {
  matmul_f32(tiles, rows, k, row_begin, row_end, x, n, bias, y, ldy);
}

void edgeml_activate_neon(int activation, float *y, size_t n) { activate(activation, y, n); }
void edgeml_axpy_neon(float *out, float w, const float *y, size_t n) { axpy(out, w, y, n); }

const edgeml_kernels edgeml_kernels_neon = {
    "neon", edgeml_quantize_neon, matmul_int8, matmul_int4, edgeml_matmul_f32_neon, edgeml_activate_neon, edgeml_axpy_neon,
    edgeml_attend_neon};
#else
const edgeml_kernels edgeml_kernels_neon_dotprod = {
    "neon-dotprod", edgeml_quantize_neon, matmul_int8, matmul_int4, edgeml_matmul_f32_neon, edgeml_activate_neon, edgeml_axpy_neon,
    edgeml_attend_neon};
#endif
