/* Activation functions, written once for single floats and for vectors of them.
 *
 * The includer first defines `real` (float, or a vector of floats) and `word` (uint32_t, or a vector as wide). Only + - * /
 * and integer operations on the bits occur, so every width gives the same bits. Choices are made by masks: all ones where
 * true. The integers are unsigned, so nothing can overflow, whatever bits come in.
 */
#ifndef EDGEML_KERNELS_MATH_H
#define EDGEML_KERNELS_MATH_H

#include <stdint.h>

#define SIGN_BIT 0x80000000u
#define INFINITY_BITS 0x7f800000u
#define NAN_BITS 0x7fc00000u
#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding it leaves the nearest integer, ties to even, in the low bits */

static inline word bits_of(real x) {
  union { real r; word w; } u = {.r = x};
  return u.w;
}

static inline real real_of(word w) {
  union { word w; real r; } u = {.w = w};
  return u.r;
}

/* a < b for words below 2^31. */
static inline word less_mask(word a, word b) { return 0u - ((a - b) >> 31); }

static inline word select_word(word mask, word a, word b) { return (mask & a) | (~mask & b); }

static inline real select_real(word mask, real a, real b) { return real_of(select_word(mask, bits_of(a), bits_of(b))); }

static inline word magnitude(real x) { return bits_of(x) & ~SIGN_BIT; }

static inline word constant(uint32_t bits) { return bits - (word){0}; }

/* One quiet NaN for all. */
static inline real canonical(real x) {
  return real_of(select_word(less_mask(constant(INFINITY_BITS), magnitude(x)), constant(NAN_BITS), bits_of(x)));
}

/* exp(t) for |t| <= 88, relative error below 2e-7 (0 below -87.7). 2^i * exp(r), |r| <= ln(2) / 2; the polynomial of
 * (exp(r) - 1 - r) / r^2 is minimax on that interval. ln(2) is split in two so that i times its first part is exact. */
static inline real exp_bounded(real t) {
  real shifted = t * 1.44269504f + ROUNDER;
  real i = shifted - ROUNDER;
  real r = t - i * 0.693359375f + i * 2.12194440e-4f;
  real p = 0.00139506003f * r + 0.00836895371f;
  p = p * r + 0.0416662042f;
  p = p * r + 0.166665183f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  return p * real_of((bits_of(shifted) + 127u) << 23);
}

/* erf(x), absolute error below 2e-7. Near zero x + x * P(x^2); from 1 on 1 - exp(Q(|x|)), where Q fits the logarithm of erfc;
 * beyond 4 the nearest float is 1. A NaN takes the first way and stays one. */
static inline real erf_real(real x) {
  word size = magnitude(x);
  real s = x * x;
  real p = -0.000546292502f * s + 0.00487070245f;
  p = p * s + -0.0266638093f;
  p = p * s + 0.112780642f;
  p = p * s + -0.37611939f;
  p = p * s + 0.128378922f;
  p = p * x + x;
  real a = select_real(less_mask(size, constant(0x40800000u)), real_of(size), real_of(constant(0x40800000u)));
  real e = 0.000185574895f * a + -0.00293961575f;
  e = e * a + 0.0218053512f;
  e = e * a + -0.103037436f;
  e = e * a + -0.638225602f;
  e = e * a + -1.12704008f;
  e = e * a + -0.000353708912f;
  real tail = real_of(bits_of(1.0f - exp_bounded(e)) | (bits_of(x) & SIGN_BIT));
  word near = less_mask(size, constant(0x3f800000u)) | less_mask(constant(INFINITY_BITS), size);
  return select_real(near, p, tail);
}

static inline real gelu(real x) { return canonical(x * 0.5f * (1.0f + erf_real(x * 0.707106781f))); }

/* x / (1 + exp(-x)); exp counts as infinite from 88 on, where the quotient is below 1e-36. */
static inline real silu(real x) {
  word size = magnitude(x), sign = bits_of(x) & SIGN_BIT;
  word far = less_mask(constant(0x42b00000u), size);
  real t = real_of(select_word(far, constant(0x42b00000u), size) | (sign ^ SIGN_BIT));
  word grows = far & (0u - (sign >> 31));
  real e = real_of(select_word(grows, constant(INFINITY_BITS), bits_of(exp_bounded(t))));
  return canonical(x / (1.0f + e));
}

static inline real relu(real x) {
  word negative = 0u - (bits_of(x) >> 31);
  return canonical(real_of(bits_of(x) & ~(negative & ~less_mask(constant(INFINITY_BITS), magnitude(x)))));
}

static inline real activated(int activation, real x) {
  return activation == 1 ? gelu(x) : activation == 2 ? relu(x) : activation == 3 ? silu(x) : x;
}

#endif
