/* NEON: 6 x 4 of the 32 registers hold sums. */
#include <arm_neon.h>

#define LANES 4
#define ROWS 6
#define COLUMNS 4
#include "scar_vector.h"

INLINE real fused(real a, real b, real c) { return (real)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE real larger(real a, real b) {
  return (real)vbslq_f32(vcgtq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a, (float32x4_t)b);
}

void edgeml_attend_neon(const attend *a) { attend_tiles(a); }
