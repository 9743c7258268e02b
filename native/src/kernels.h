/* The arithmetic on weight tiles, one table of functions for each instruction set.
 *
 * Every table gives the same bits. Block sums are exact integers; float steps are single multiplications and additions in one
 * fixed order, never fused; polynomials are evaluated alike everywhere; and a result that is not a number is always the same
 * quiet NaN, because its sign and payload are where processors differ. (Attention does fuse, everywhere the same: scar.h.) So a
 * table may be chosen for speed alone, and a test on one machine speaks for the others. This promise needs the default rounding
 * mode and -ffp-contract=off.
 *
 * Tiles are 16 rows x 32 columns (see edgeml/kernels.py for their bytes). All functions allocate nothing, cannot fail, and may
 * run from several threads on different rows. Nothing needs more alignment than its type has; tiles may lie at any address.
 */
#ifndef EDGEML_KERNELS_H
#define EDGEML_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum { TILE_ROWS = 16, TILE_COLS = 32 };
enum { WEIGHT_F32 = 1, WEIGHT_INT8 = 2, WEIGHT_INT4 = 3 };                /* as in a bundle's index */
enum { ACTIVATION_NONE = 0, ACTIVATION_GELU = 1, ACTIVATION_RELU = 2, ACTIVATION_SILU = 3 };
enum { TILE_BYTES_F32 = 2048, TILE_BYTES_INT8 = 544, TILE_BYTES_INT4 = 288 };

/* Below, k32 is k rounded up to 32; a block is 32 columns of one row. */

/* y (n, ldy) = tiles (rows, k) times n quantized inputs, plus bias. Computes rows [row_begin, row_end): multiples of 16, but
 * row_end may also be `rows` itself; writes only rows < `rows`. bias: `rows` floats, or NULL. */
typedef void edgeml_matmul_int(const void *tiles, size_t rows, size_t k, size_t row_begin, size_t row_end, const int8_t *q,
                               const float *scale, const int32_t *qsum, size_t n, const float *bias, float *y, size_t ldy);

struct attend;

typedef struct edgeml_kernels {
  const char *name; /* "scalar", "avx2", "avx512vnni", "neon", "neon-dotprod" */

  /* n rows of k floats -> q (n, k32) padded with zeros, scale (n, k32 / 32), qsum (n, k32 / 32) = the sum of q in the block.
   * A block with NaN or infinity gets scale NaN and q = 0. */
  void (*quantize)(const float *x, size_t n, size_t k, int8_t *q, float *scale, int32_t *qsum);

  edgeml_matmul_int *matmul_int8;
  edgeml_matmul_int *matmul_int4;

  /* The same for float weights and inputs x (n, k). */
  void (*matmul_f32)(const void *tiles, size_t rows, size_t k, size_t row_begin, size_t row_end, const float *x, size_t n,
                     const float *bias, float *y, size_t ldy);

  void (*activate)(int activation, float *y, size_t n);         /* in place */
  void (*axpy)(float *out, float w, const float *y, size_t n); /* out = out + w * y */
  void (*attend)(const struct attend *attend);                  /* scar.h */
} edgeml_kernels;

/* The table of this name; NULL names the best one for this processor. NULL for a name unknown or of no use here. */
const edgeml_kernels *edgeml_kernels_get(const char *name);

/* Fills `out` with at most `cap` tables that this processor can run, scalar first, the best last; returns how many there are. */
size_t edgeml_kernels_list(const edgeml_kernels **out, size_t cap);

/* Bytes of the tiles of a matrix, without its bias; 0 for an unknown type. rows and cols are at most 2^24. */
size_t edgeml_matrix_bytes(int type, size_t rows, size_t cols);

/* The tables themselves, for kernels_dispatch.c: each exists only in builds for its architecture. */
extern const edgeml_kernels edgeml_kernels_scalar, edgeml_kernels_avx2, edgeml_kernels_avx512vnni;
extern const edgeml_kernels edgeml_kernels_neon, edgeml_kernels_neon_dotprod;

/* `quantize` of "avx2", which "avx512vnni" shares. */
void edgeml_quantize_avx2(const float *x, size_t n, size_t k, int8_t *q, float *scale, int32_t *qsum);

/* What "neon-dotprod" shares with "neon". */
void edgeml_quantize_neon(const float *x, size_t n, size_t k, int8_t *q, float *scale, int32_t *qsum);
void edgeml_matmul_f32_neon(const void *tiles, size_t rows, size_t k, size_t row_begin, size_t row_end, const float *x, size_t n,
                            const float *bias, float *y, size_t ldy);
void edgeml_activate_neon(int activation, float *y, size_t n);
void edgeml_axpy_neon(float *out, float w, const float *y, size_t n);

#endif
