/* The instruction against the tables, the published check value, and chaining at every cut. */
#include "edgeml.h"

#include <stdio.h>
#include <stdlib.h>

uint32_t edgeml_crc32c_table(uint32_t crc, const void *data, size_t n);

static int failures;

static void expect(int condition, const char *what, size_t n) {
  if (!condition) {
    printf("FAILED %s at %zu bytes\n", what, n);
    failures++;
  }
}

int main(void) {
  expect(edgeml_crc32c(0, "123456789", 9) == 0xe3069283u, "check value", 9);
  expect(edgeml_crc32c_table(0, "123456789", 9) == 0xe3069283u, "check value of the tables", 9);
  expect(edgeml_crc32c(0, NULL, 0) == 0, "the empty message", 0);
  enum { SHORT = 300, LONGEST = 20000 }; /* short ones all, then long enough for three streams and more */
  uint8_t *data = malloc(LONGEST);
  if (data == NULL) return 1;
  uint32_t state = 1;
  for (size_t i = 0; i < LONGEST; i++) data[i] = (uint8_t)((state = state * 1664525u + 1013904223u) >> 24);
  for (size_t n = 0; n <= LONGEST; n += n < SHORT ? 1 : 509) {
    const uint8_t *start = data + (LONGEST - n); /* every alignment, and the last byte at the end of the block */
    uint32_t whole = edgeml_crc32c(0, start, n);
    expect(whole == edgeml_crc32c_table(0, start, n), "instruction against tables", n);
    expect(whole == edgeml_crc32c(edgeml_crc32c(0, start, n / 3), start + n / 3, n - n / 3), "chaining", n);
  }
  free(data);
  printf("crc32c (%s): %s\n", edgeml_crc32c_name(), failures ? "failed" : "ok");
  return failures != 0;
}
