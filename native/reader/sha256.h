/* SHA-256 (FIPS 180-4), plain: a bundle's index and manifest are hashed once, its pages only by verify. */
#ifndef EDGEML_SHA256_H
#define EDGEML_SHA256_H

#include <stddef.h>
#include <stdint.h>

typedef struct sha256 {
  uint32_t state[8];
  uint64_t bytes;
  uint8_t block[64];
} sha256;

void sha256_begin(sha256 *s);
void sha256_add(sha256 *s, const void *data, size_t n);
void sha256_end(sha256 *s, uint8_t out[32]);

#endif
