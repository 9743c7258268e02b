/* libedgeml: the native side of edgeml. C11, no Python, no allocation after open.
 *
 * CRC-32C (Castagnoli) guards the bundle's header, every page, and every row of an embedding table: it is checked each time
 * a page comes in from flash, so it uses the processor's instruction where there is one.
 */
#ifndef EDGEML_H
#define EDGEML_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* CRC-32C of `n` bytes at `data`, continuing from `crc` (0 for a new message): crc(ab) = crc(b, crc(a)).
 * Allocates nothing, cannot fail, may be called from any thread. `data` may be NULL when `n` is 0. */
uint32_t edgeml_crc32c(uint32_t crc, const void *data, size_t n);

/* "sse4.2", "armv8" or "table": how edgeml_crc32c computes on this machine. The string is static. */
const char *edgeml_crc32c_name(void);

#ifdef __cplusplus
}
#endif

#endif
