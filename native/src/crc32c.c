/* CRC-32C with the processor's instruction, or with slicing-by-8 tables.
 *
 * The instruction has a latency of three cycles and a throughput of one, so a long message is taken as three streams side by
 * side and their checksums are joined: a checksum is linear, so that of AB is that of A followed by zeros as long as B, plus
 * that of B. Following by a fixed number of zeros is a linear map of 32 bits, four tables of 256. All tables are built once, by
 * whichever thread comes first.
 */
#include "edgeml.h"

#include <pthread.h>
#include <string.h>

#define POLYNOMIAL 0x82f63b78u /* Castagnoli, reflected */

#if defined(__x86_64__)
#include <cpuid.h>
#include <nmmintrin.h>
#define HARDWARE "sse4.2"
#ifdef __clang__ /* has a name of its own for these instructions */
#define WITH_CRC "sse4.2,crc32"
#else
#define WITH_CRC "sse4.2"
#endif

static int hardware_present(void) { /* __builtin_cpu_supports is not in every compiler's library */
  static _Atomic int known; /* 0: not asked yet, as asking is slow */
  unsigned a, b, c, d;
  if (!known) known = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_SSE4_2) ? 1 : -1;
  return known > 0;
}

__attribute__((target(WITH_CRC))) static uint32_t hardware(uint32_t crc, const uint8_t *p, size_t n) {
  uint64_t state = crc;
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t word;
    memcpy(&word, p, 8);
    state = _mm_crc32_u64(state, word);
  }
  crc = (uint32_t)state;
  for (; n > 0; p++, n--) crc = _mm_crc32_u8(crc, *p);
  return crc;
}

/* Three streams of `n` bytes (a multiple of 8) that lie one after the other. */
__attribute__((target(WITH_CRC))) static void hardware_three(uint32_t crcs[3], const uint8_t *p, size_t n) {
  uint64_t a = crcs[0], b = crcs[1], c = crcs[2];
  for (const uint8_t *end = p + n; p < end; p += 8) {
    uint64_t words[3];
    memcpy(&words[0], p, 8), memcpy(&words[1], p + n, 8), memcpy(&words[2], p + 2 * n, 8);
    a = _mm_crc32_u64(a, words[0]), b = _mm_crc32_u64(b, words[1]), c = _mm_crc32_u64(c, words[2]);
  }
  crcs[0] = (uint32_t)a, crcs[1] = (uint32_t)b, crcs[2] = (uint32_t)c;
}
#elif defined(__aarch64__)
#include <arm_acle.h>
#define HARDWARE "armv8"
#ifdef __APPLE__
static int hardware_present(void) { return 1; } /* since the first 64-bit one that a supported system runs on */
#else
#include <sys/auxv.h>
#define EDGEML_HWCAP_CRC32 (1ul << 7)

static int hardware_present(void) { return (getauxval(AT_HWCAP) & EDGEML_HWCAP_CRC32) != 0; }
#endif

__attribute__((target("+crc"))) static uint32_t hardware(uint32_t crc, const uint8_t *p, size_t n) {
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t word;
    memcpy(&word, p, 8);
    crc = __crc32cd(crc, word);
  }
  for (; n > 0; p++, n--) crc = __crc32cb(crc, *p);
  return crc;
}

/* Three streams of `n` bytes (a multiple of 8) that lie one after the other. */
__attribute__((target("+crc"))) static void hardware_three(uint32_t crcs[3], const uint8_t *p, size_t n) {
  uint32_t a = crcs[0], b = crcs[1], c = crcs[2];
  for (const uint8_t *end = p + n; p < end; p += 8) {
    uint64_t words[3];
    memcpy(&words[0], p, 8), memcpy(&words[1], p + n, 8), memcpy(&words[2], p + 2 * n, 8);
    a = __crc32cd(a, words[0]), b = __crc32cd(b, words[1]), c = __crc32cd(c, words[2]);
  }
  crcs[0] = a, crcs[1] = b, crcs[2] = c;
}
#else
#define HARDWARE "table"

static int hardware_present(void) { return 0; }
static uint32_t hardware(uint32_t crc, const uint8_t *p, size_t n) { (void)p, (void)n; return crc; }
static void hardware_three(uint32_t crcs[3], const uint8_t *p, size_t n) { (void)crcs, (void)p, (void)n; }
#endif

static uint32_t table[8][256];
static pthread_once_t table_once = PTHREAD_ONCE_INIT;

static void table_build(void) {
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ ((crc & 1) ? POLYNOMIAL : 0);
    table[0][i] = crc;
  }
  for (uint32_t i = 0; i < 256; i++)
    for (int k = 1; k < 8; k++) table[k][i] = (table[k - 1][i] >> 8) ^ table[0][table[k - 1][i] & 255];
}

static uint32_t software(uint32_t crc, const uint8_t *p, size_t n) {
  pthread_once(&table_once, table_build);
  for (; n >= 8; p += 8, n -= 8) {
    uint32_t low = crc ^ ((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
    crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^ table[3][p[4]] ^
          table[2][p[5]] ^ table[1][p[6]] ^ table[0][p[7]];
  }
  for (; n > 0; p++, n--) crc = (crc >> 8) ^ table[0][(crc ^ *p) & 255];
  return crc;
}

uint32_t edgeml_crc32c_table(uint32_t crc, const void *data, size_t n); /* the oracle, for tests */
uint32_t edgeml_crc32c_table(uint32_t crc, const void *data, size_t n) { return ~software(~crc, data, n); }

/* ---- three streams ---- */

enum { STREAM = 2048 }; /* bytes of each before they are joined */

static uint32_t zeros_one[4][256], zeros_two[4][256]; /* followed by STREAM and by 2 * STREAM zeros */
static pthread_once_t zeros_once = PTHREAD_ONCE_INIT;

static void zeros_build_for(uint32_t out[4][256], size_t length) {
  static const uint8_t nothing[STREAM];
  for (int byte = 0; byte < 4; byte++)
    for (uint32_t value = 0; value < 256; value++) {
      uint32_t crc = value << 8 * byte;
      for (size_t done = 0; done < length; done += STREAM) crc = hardware(crc, nothing, STREAM);
      out[byte][value] = crc;
    }
}

static void zeros_build(void) {
  zeros_build_for(zeros_one, STREAM);
  zeros_build_for(zeros_two, 2 * STREAM);
}

static uint32_t follow(uint32_t map[4][256], uint32_t crc) {
  return map[0][crc & 255] ^ map[1][crc >> 8 & 255] ^ map[2][crc >> 16 & 255] ^ map[3][crc >> 24];
}

static uint32_t streams(uint32_t crc, const uint8_t *p, size_t n) {
  pthread_once(&zeros_once, zeros_build);
  for (; n >= 3 * STREAM; p += 3 * STREAM, n -= 3 * STREAM) {
    uint32_t crcs[3] = {crc, 0, 0};
    hardware_three(crcs, p, STREAM);
    crc = follow(zeros_two, crcs[0]) ^ follow(zeros_one, crcs[1]) ^ crcs[2];
  }
  return hardware(crc, p, n);
}

uint32_t edgeml_crc32c(uint32_t crc, const void *data, size_t n) {
  if (!hardware_present()) return ~software(~crc, data, n);
  return n < 3 * STREAM ? ~hardware(~crc, data, n) : ~streams(~crc, data, n);
}

const char *edgeml_crc32c_name(void) { return hardware_present() ? HARDWARE : "table"; }
