/* Which kernels this processor can run. The choice is made once, by whichever thread comes first. */
#include "kernels.h"

#include <pthread.h>
#include <string.h>

#if defined(__AVX__) || defined(__AVX2__) || defined(__AVX512F__) || (defined(__ARM_FEATURE_DOTPROD) && !defined(__APPLE__))
#error "compile kernels_dispatch.c without instruction set flags: it must run on a processor that has none of them"
#endif

enum { MOST_TABLES = 4 };
static const edgeml_kernels *runnable[MOST_TABLES];
static size_t runnable_count;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void add(const edgeml_kernels *table) { runnable[runnable_count++] = table; }

#if defined(__x86_64__)
#include <cpuid.h>

/* The processor is asked itself: __builtin_cpu_supports needs a part of the compiler's library that not every compiler ships. */
static unsigned enabled_registers(void) { /* what the system saves and restores */
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

static void detect(void) {
  enum { FMA = 1 << 12, OSXSAVE = 1 << 27, F16C = 1 << 29, AVX2 = 1 << 5, AVX512F = 1 << 16, AVX512BW = 1 << 30, AVX512VNNI = 1 << 11 };
  const unsigned avx512vl = 1u << 31, first = FMA | OSXSAVE | F16C, ymm = 0x6, zmm = 0xe6, wide = AVX512F | AVX512BW | avx512vl;
  unsigned a, b, c, d, more;
  add(&edgeml_kernels_scalar);
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first || (enabled_registers() & ymm) != ymm) return;
  if (!__get_cpuid_count(7, 0, &a, &b, &more, &d) || !(b & AVX2)) return;
  add(&edgeml_kernels_avx2);
  if ((b & wide) == wide && (more & AVX512VNNI) && (enabled_registers() & zmm) == zmm) add(&edgeml_kernels_avx512vnni);
}
#elif defined(__aarch64__)
#ifdef __APPLE__
#include <sys/sysctl.h>

static int has_dotprod(void) {
  int there = 0;
  size_t size = sizeof there;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &there, &size, NULL, 0) == 0 && there;
}
#else
#include <sys/auxv.h>
#define HWCAP_DOTPROD (1ul << 20)

static int has_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_DOTPROD) != 0; }
#endif

static void detect(void) {
  add(&edgeml_kernels_scalar);
  add(&edgeml_kernels_neon); /* part of every ARMv8-A */
  if (has_dotprod()) add(&edgeml_kernels_neon_dotprod);
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
