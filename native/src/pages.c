/* The index: 128-byte records to page structs. The Python reader has validated it; this reader trusts no number all the same,
 * because what it lets through is used as a length. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "pager.h"

#define RECORD_BYTES 128u
#define MAX_PAGES 1000000u
#define MAX_SIDE (1u << 24)
#define MAX_COUNT 65536u
#define MAX_FILE_BYTES (1ull << 46)

static uint16_t u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static uint32_t u32(const uint8_t *p) { return (uint32_t)u16(p) | (uint32_t)u16(p + 2) << 16; }
static uint64_t u64(const uint8_t *p) { return (uint64_t)u32(p) | (uint64_t)u32(p + 4) << 32; }

static size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

/* Places of the parts of one expert or linear page; returns its size. Sides are at most 2^24, so nothing wraps in 64 bits. */
static uint64_t place_parts(page *p) {
  size_t position = 0;
  for (uint32_t i = 0; i < p->matrix_count; i++) {
    matrix *m = &p->matrices[i];
    m->tiles = position;
    position = round_up(position + edgeml_matrix_bytes(m->type, m->rows, m->cols), 64);
    m->bias = position;
    if (m->has_bias) position += 4 * round_up(m->rows, 16);
  }
  return position;
}

static int parse_matrices(const uint8_t *record, page *p) {
  for (uint32_t i = 0; i < 3; i++) {
    const uint8_t *d = record + 80 + 16 * i;
    matrix *m = &p->matrices[i];
    m->type = d[0], m->has_bias = d[1], m->rows = u32(d + 4), m->cols = u32(d + 8);
    if (m->type == 0) continue;
    if (i != p->matrix_count || m->type > 3 || m->has_bias > 1) return EDGEML_BAD_INDEX;
    if (m->rows < 1 || m->rows > MAX_SIDE || m->cols < 1 || m->cols > MAX_SIDE) return EDGEML_BAD_INDEX;
    p->matrix_count++;
  }
  return EDGEML_OK;
}

static int check_expert(page *p) {
  const matrix *up = &p->matrices[0], *down;
  if (p->matrix_count < 2 || p->count < 1 || p->count > MAX_COUNT || p->activation > 3) return EDGEML_BAD_INDEX;
  down = &p->matrices[p->matrix_count - 1];
  if (down->rows != up->cols || down->cols != up->rows) return EDGEML_BAD_INDEX;
  if (p->matrix_count == 3 && (p->matrices[1].rows != up->rows || p->matrices[1].cols != up->cols)) return EDGEML_BAD_INDEX;
  return place_parts(p) == p->stride && p->length == p->stride * p->count ? EDGEML_OK : EDGEML_BAD_INDEX;
}

static int check_shape(page *p) {
  const matrix *m = &p->matrices[0];
  switch (p->kind) {
    case KIND_EXPERT: return check_expert(p);
    case KIND_LINEAR: return p->matrix_count == 1 && place_parts(p) == p->length ? EDGEML_OK : EDGEML_BAD_INDEX;
    case KIND_ROWS:
      if (p->matrix_count != 1 || m->type > 2 || m->has_bias) return EDGEML_BAD_INDEX;
      if (p->stride != (m->type == 2 ? (uint64_t)m->cols + 8 : 4ull * m->cols + 4)) return EDGEML_BAD_INDEX;
      return p->length == p->stride * m->rows ? EDGEML_OK : EDGEML_BAD_INDEX;
    default: return EDGEML_OK; /* nothing native computes with it */
  }
}

static int parse_record(const uint8_t *r, uint32_t number, page *p) {
  if (u32(r) != number) return EDGEML_BAD_INDEX;
  p->kind = u16(r + 4), p->offset = u64(r + 8), p->length = u64(r + 16), p->crc = u32(r + 24);
  p->activation = u32(r + 64), p->count = u32(r + 68), p->stride = u64(r + 72);
  p->site = NO_SITE, p->slot = NO_SLOT;
  if (p->offset > MAX_FILE_BYTES || p->length < 1 || p->length > MAX_FILE_BYTES - p->offset || p->stride > MAX_FILE_BYTES)
    return EDGEML_BAD_INDEX;
  int status = parse_matrices(r, p);
  return status ? status : check_shape(p);
}

int pages_parse(const void *index, size_t index_bytes, page **out, uint32_t *count) {
  size_t n = index_bytes / RECORD_BYTES;
  if (index_bytes % RECORD_BYTES || n > MAX_PAGES) return EDGEML_BAD_INDEX;
  page *pages = calloc(n ? n : 1, sizeof *pages);
  if (!pages) return EDGEML_NO_MEMORY;
  uint64_t end = OS_PAGE; /* pages do not overlap, so all of them together are no longer than a file */
  for (size_t i = 0; i < n; i++) {
    int status = parse_record((const uint8_t *)index + i * RECORD_BYTES, (uint32_t)i, &pages[i]);
    if (status || pages[i].offset < end || pages[i].offset % OS_PAGE) {
      free(pages);
      return EDGEML_BAD_INDEX;
    }
    end = pages[i].offset + pages[i].length;
  }
  *out = pages, *count = (uint32_t)n;
  return EDGEML_OK;
}
