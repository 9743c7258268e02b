/* AVX2 with fused multiply-add: 6 x 2 of the 16 registers hold sums. */
#include <immintrin.h>

#define LANES 8
#define ROWS 6
#define COLUMNS 2
#include "scar_vector.h"

INLINE real fused(real a, real b, real c) { return (real)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE real larger(real a, real b) { return (real)_mm256_max_ps((__m256)a, (__m256)b); }

void edgeml_attend_avx2(const attend *a) { attend_tiles(a); }
