/* Seconds are the best of several rounds. GB/s counts the matrix's bytes once per product, so at n = 1 it compares with the
 * memory's read rate and beyond with the processor's arithmetic. usage: bench_kernels [rows] [columns] [copies]
 */
#include "kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MOST_SETS = 8, MOST_INPUTS = 64, ROUNDS = 7 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *allocate(size_t bytes) {
  void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (p == NULL) abort();
  memset(p, 17, bytes);
  return p;
}

typedef struct work {
  size_t rows, cols, copies; /* copies of the matrix used in turn, so that they come from memory */
  uint8_t *tiles;
  float *x, *y, *scale;
  int8_t *q;
  int32_t *qsum;
} work;

static double product_seconds(const edgeml_kernels *set, int type, const work *w, size_t n) {
  double best = 1e9;
  size_t bytes = edgeml_matrix_bytes(type, w->rows, w->cols);
  for (int round = 0; round < ROUNDS; round++) {
    double start = now();
    for (size_t i = 0; i < w->copies; i++) {
      const uint8_t *tiles = w->tiles + i * bytes;
      edgeml_matmul_int *matmul = type == WEIGHT_INT8 ? set->matmul_int8 : set->matmul_int4;
      if (type == WEIGHT_F32) set->matmul_f32(tiles, w->rows, w->cols, 0, w->rows, w->x, n, NULL, w->y, w->rows);
      else matmul(tiles, w->rows, w->cols, 0, w->rows, w->q, w->scale, w->qsum, n, NULL, w->y, w->rows);
    }
    double seconds = (now() - start) / (double)w->copies;
    if (seconds < best) best = seconds;
  }
  return best;
}

static void fill(const work *w) {
  for (size_t i = 0; i < MOST_INPUTS * w->cols; i++) w->x[i] = (float)((int)(i * 37 % 201) - 100) * 0.05f;
}

static double small_seconds(const edgeml_kernels *set, const work *w, int activation) {
  double best = 1e9;
  for (int round = 0; round < ROUNDS; round++) {
    fill(w);
    double start = now();
    if (activation == ACTIVATION_NONE) set->quantize(w->x, MOST_INPUTS, w->cols, w->q, w->scale, w->qsum);
    else set->activate(activation, w->x, MOST_INPUTS * w->cols);
    double seconds = now() - start;
    if (seconds < best) best = seconds;
  }
  return best;
}

static void report(const edgeml_kernels *set, const work *w) {
  static const char *const names[] = {[WEIGHT_F32] = "f32", [WEIGHT_INT8] = "int8", [WEIGHT_INT4] = "int4"};
  static const size_t counts[] = {1, 2, 4, 8, 64};
  for (int type = WEIGHT_F32; type <= WEIGHT_INT4; type++)
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
      size_t n = counts[i];
      double seconds = product_seconds(set, type, w, n), bytes = (double)edgeml_matrix_bytes(type, w->rows, w->cols);
      printf("%-12s %-4s n = %2zu  %8.1f us  %6.1f GB/s  %7.1f GMAC/s\n", set->name, names[type], n, 1e6 * seconds, 1e-9 * bytes / seconds,
             1e-9 * (double)(w->rows * w->cols * n) / seconds);
    }
  double values = (double)(MOST_INPUTS * w->cols);
  printf("%-12s ns a value: quantize %.3f  gelu %.3f  silu %.3f\n", set->name, 1e9 * small_seconds(set, w, ACTIVATION_NONE) / values,
         1e9 * small_seconds(set, w, ACTIVATION_GELU) / values, 1e9 * small_seconds(set, w, ACTIVATION_SILU) / values);
}

int main(int argc, char **argv) {
  work w = {.rows = argc > 1 ? strtoul(argv[1], NULL, 10) : 1536, .cols = argc > 2 ? strtoul(argv[2], NULL, 10) : 384};
  w.copies = argc > 3 ? strtoul(argv[3], NULL, 10) : 8;
  size_t values = MOST_INPUTS * (w.cols + 31) / 32 * 32;
  w.tiles = allocate(w.copies * edgeml_matrix_bytes(WEIGHT_F32, w.rows, w.cols));
  w.x = allocate(values * sizeof(float));
  w.y = allocate(MOST_INPUTS * w.rows * sizeof(float));
  w.scale = allocate(values / 32 * sizeof(float));
  w.qsum = allocate(values / 32 * sizeof(int32_t));
  w.q = allocate(values);
  const edgeml_kernels *sets[MOST_SETS];
  size_t count = edgeml_kernels_list(sets, MOST_SETS);
  for (size_t s = 0; s < count; s++) {
    fill(&w);
    sets[s]->quantize(w.x, MOST_INPUTS, w.cols, w.q, w.scale, w.qsum);
    report(sets[s], &w);
  }
  free(w.tiles);
  free(w.x);
  free(w.y);
  free(w.scale);
  free(w.qsum);
  free(w.q);
  return 0;
}
