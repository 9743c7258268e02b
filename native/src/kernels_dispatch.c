/* Which kernels this processor can run. The choice is made once, by whichever thread comes first. */
#include "kernels.h"

#include <pthread.h>
#include <string.h>

#if defined(__AVX__) || defined(__AVX2__) || defined(__AVX512F__) || defined(__ARM_FEATURE_DOTPROD)
#error "compile kernels_dispatch.c without instruction set flags: it must run on a processor that has none of them"
#endif

enum { MOST_TABLES = 4 };
static const edgeml_kernels *runnable[MOST_TABLES];
static size_t runnable_count;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void add(const edgeml_kernels *table) { runnable[runnable_count++] = table; }

#if defined(__x86_64__)
static void detect(void) {
  __builtin_cpu_init();
  add(&edgeml_kernels_scalar);
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return;
  add(&edgeml_kernels_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    add(&edgeml_kernels_avx512vnni);
}
#elif defined(__aarch64__)
#include <sys/auxv.h>
#define HWCAP_DOTPROD (1ul << 20)

static void detect(void) {
  add(&edgeml_kernels_scalar);
  add(&edgeml_kernels_neon); /* part of every ARMv8-A */
  if (getauxval(AT_HWCAP) & HWCAP_DOTPROD) add(&edgeml_kernels_neon_dotprod);
}
#else
static void detect(void) { add(&edgeml_kernels_scalar); }
#endif

size_t edgeml_kernels_list(const edgeml_kernels **out, size_t cap) {
  pthread_once(&once, detect);
  for (size_t i = 0; i < runnable_count && i < cap; i++) out[i] = runnable[i];
  return runnable_count;
}

const edgeml_kernels *edgeml_kernels_get(const char *name) {
  pthread_once(&once, detect);
  if (name == NULL) return runnable[runnable_count - 1];
  for (size_t i = 0; i < runnable_count; i++)
    if (strcmp(runnable[i]->name, name) == 0) return runnable[i];
  return NULL;
}

size_t edgeml_matrix_bytes(int type, size_t rows, size_t cols) {
  static const size_t bytes[] = {[WEIGHT_F32] = TILE_BYTES_F32, [WEIGHT_INT8] = TILE_BYTES_INT8, [WEIGHT_INT4] = TILE_BYTES_INT4};
  if (type < WEIGHT_F32 || type > WEIGHT_INT4) return 0;
  return (rows + TILE_ROWS - 1) / TILE_ROWS * ((cols + TILE_COLS - 1) / TILE_COLS) * bytes[type];
}
