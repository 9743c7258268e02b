/* A reader of bundles for programs without Python: the header and the binary index, checked as the format demands (the head of
 * edgeml/bundle.py), and the pages' bytes. The manifest is handed out as the bytes it is, its SHA-256 checked: it is JSON, and
 * every host has a parser of its own. That parser must refuse keys that occur twice; what is in it stands in docs/phones.md.
 *
 *   edgeml_bundle *bundle;
 *   edgeml_bundle_fault fault;
 *   if (edgeml_bundle_open("model.edgeml", &bundle, &fault)) { char text[200]; puts(edgeml_bundle_fault_text(&fault, text, 200)); }
 *   options.fd = edgeml_bundle_fd(bundle), options.index = edgeml_bundle_index(bundle, &options.index_bytes);  // for edgeml_open
 *
 * The file is opened once and never through a link, so nothing can be swapped between the check and the use; it must not be
 * written to while it is open (replacing it is fine). An open bundle may be used by several threads.
 */
#ifndef EDGEML_BUNDLE_H
#define EDGEML_BUNDLE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#ifdef EDGEML_SHARED
#pragma GCC visibility push(default)
#endif

typedef struct edgeml_bundle edgeml_bundle;

/* Whose fault it is: the file's, the medium's or the machine's, the caller's. */
typedef enum edgeml_bundle_status {
  EDGEML_BUNDLE_OK,
  EDGEML_BUNDLE_BAD,       /* no bundle, another version of the format, or damaged: copy or export it again */
  EDGEML_BUNDLE_IO,        /* opening or reading failed; `error` is errno */
  EDGEML_BUNDLE_NO_MEMORY,
  EDGEML_BUNDLE_ARGUMENT   /* there is no such page */
} edgeml_bundle_status;

typedef struct edgeml_bundle_fault {
  int status, error;
  int64_t page;         /* -1 where no page is meant */
  int64_t row;          /* of a page of rows whose own checksum is wrong, else -1 */
  const char *sentence; /* static */
} edgeml_bundle_fault;

/* "page 3: the checksum of row 5 is wrong" into `out`, cut to `room` bytes with the final zero; returns `out`. */
const char *edgeml_bundle_fault_text(const edgeml_bundle_fault *fault, char *out, size_t room);

/* Open and check everything but the pages' contents. On failure *out is NULL and `fault`, which may be NULL, says why. */
int edgeml_bundle_open(const char *path, edgeml_bundle **out, edgeml_bundle_fault *fault);

/* The same for a descriptor, which is duplicated. It must be of a regular file that begins with the bundle's first byte. */
int edgeml_bundle_open_fd(int fd, edgeml_bundle **out, edgeml_bundle_fault *fault);

void edgeml_bundle_close(edgeml_bundle *bundle); /* NULL is allowed */

int edgeml_bundle_fd(const edgeml_bundle *bundle);                                  /* the bundle's own */
const void *edgeml_bundle_index(const edgeml_bundle *bundle, size_t *bytes);        /* valid until close */
const char *edgeml_bundle_manifest(const edgeml_bundle *bundle, size_t *bytes);     /* UTF-8 as written, no final zero; until close */
const uint8_t *edgeml_bundle_id(const edgeml_bundle *bundle);                       /* 32 bytes, the SHA-256 of the index */
uint32_t edgeml_bundle_page_count(const edgeml_bundle *bundle);

enum { /* kinds of pages */
  EDGEML_PAGE_ONNX = 1, EDGEML_PAGE_EXPERT, EDGEML_PAGE_LINEAR, EDGEML_PAGE_ROWS, EDGEML_PAGE_TENSOR,
  EDGEML_PAGE_TOKENIZER = 7, EDGEML_PAGE_JSON = 8
};

typedef struct edgeml_bundle_page {
  uint64_t offset, length, stride;                                     /* bytes; stride from one expert or row to the next */
  uint32_t kind, crc32c, activation, count, matrix_count;
  struct { uint8_t type, has_bias; uint32_t rows, cols; } matrices[3]; /* type 1 f32, 2 int8, 3 int4 */
  uint8_t sha256[32];
} edgeml_bundle_page;

/* A page's record. ARGUMENT where there is none. */
int edgeml_bundle_get_page(const edgeml_bundle *bundle, uint32_t page, edgeml_bundle_page *out);

/* A page's `length` bytes to `to`, checked against its CRC-32C; read once more, past the cache, where that is wrong. */
int edgeml_bundle_read(const edgeml_bundle *bundle, uint32_t page, void *to, edgeml_bundle_fault *fault);

/* Check every byte: pages, rows, padding. Takes as long as reading the file. */
int edgeml_bundle_verify(const edgeml_bundle *bundle, edgeml_bundle_fault *fault);

#ifdef EDGEML_SHARED
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#endif
