/* The kernels' public entry points: one matrix or one activation, on memory of the caller. For tests and probes. */
#include "edgeml.h"
#include "kernels.h"

#include <stdlib.h>

enum { MOST_BACKENDS = 8 };

size_t edgeml_backends(const char **names, size_t room) {
  const edgeml_kernels *tables[MOST_BACKENDS];
  size_t count = edgeml_kernels_list(tables, MOST_BACKENDS);
  for (size_t i = 0; i < count && i < room; i++) names[i] = tables[i]->name;
  return count;
}

int edgeml_apply_matrix(const char *isa, int type, const void *tiles, size_t tiles_bytes, size_t rows, size_t cols, const float *x,
                        size_t n, const float *bias, float *y) {
  const size_t most = (size_t)1 << 24;
  if (rows < 1 || rows > most || cols < 1 || cols > most || n > most) return EDGEML_BAD_ARGUMENT;
  if (edgeml_matrix_bytes(type, rows, cols) == 0 || edgeml_matrix_bytes(type, rows, cols) != tiles_bytes) return EDGEML_BAD_ARGUMENT;
  const edgeml_kernels *kernels = edgeml_kernels_get(isa);
  if (kernels == NULL) return EDGEML_NO_SUCH_ISA;
  if (n == 0) return EDGEML_OK;
  if (type == WEIGHT_F32) {
    kernels->matmul_f32(tiles, rows, cols, 0, rows, x, n, bias, y, rows);
    return EDGEML_OK;
  }
  const size_t blocks = (cols + TILE_COLS - 1) / TILE_COLS * n;
  float *scale = malloc(blocks * sizeof *scale);
  int32_t *qsum = malloc(blocks * sizeof *qsum);
  int8_t *q = malloc(blocks * TILE_COLS);
  int status = scale != NULL && qsum != NULL && q != NULL ? EDGEML_OK : EDGEML_NO_MEMORY;
  if (status == EDGEML_OK) {
    edgeml_matmul_int *matmul = type == WEIGHT_INT8 ? kernels->matmul_int8 : kernels->matmul_int4;
    kernels->quantize(x, n, cols, q, scale, qsum);
    matmul(tiles, rows, cols, 0, rows, q, scale, qsum, n, bias, y, rows);
  }
  free(scale);
  free(qsum);
  free(q);
  return status;
}

int edgeml_apply_activation(const char *isa, int activation, float *y, size_t n) {
  if (activation < ACTIVATION_NONE || activation > ACTIVATION_SILU) return EDGEML_BAD_ARGUMENT;
  const edgeml_kernels *kernels = edgeml_kernels_get(isa);
  if (kernels == NULL) return EDGEML_NO_SUCH_ISA;
  kernels->activate(activation, y, n);
  return EDGEML_OK;
}
