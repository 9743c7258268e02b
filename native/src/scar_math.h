/* The power of the softmax, written once for single floats and for vectors of them, like kernels_math.h: every width gives the same
 * bits. The includer has also defined `spread` (a float to all lanes), `larger` and `fused`.
 */
#ifndef EDGEML_SCAR_MATH_H
#define EDGEML_SCAR_MATH_H

#include "kernels_math.h"

/* 2^t for t <= 0 with a relative error below 2e-7: 1 for 0, 0 below -126.5, NaN for NaN. The polynomial of 2^r, |r| <= 1/2, is
 * minimax among those that are 1 at 0. */
static inline real power(real t) {
  t = larger(spread(-127.0f), t);
  real shifted = t + ROUNDER;
  real r = t - (shifted - ROUNDER);
  real p = fused(spread(0.00132647273f), r, spread(0.00967151299f));
  p = fused(p, r, spread(0.0555073358f));
  p = fused(p, r, spread(0.240222424f));
  p = fused(p, r, spread(0.693147004f));
  p = fused(p, r, spread(1.0f));
  return p * real_of((bits_of(shifted) + 127u) << 23);
}

#endif
