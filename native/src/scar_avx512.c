/* AVX-512: 6 x 4 vectors of sums leave room for a row of the other matrix and a spread number. */
#include <immintrin.h>

#define LANES 16
#define ROWS 6
#define COLUMNS 4
#include "scar_vector.h"

INLINE real fused(real a, real b, real c) { return (real)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE real larger(real a, real b) { return (real)_mm512_max_ps((__m512)a, (__m512)b); }

void edgeml_attend_avx512(const attend *a) { attend_tiles(a); }
