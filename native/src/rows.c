/* Rows of embedding tables, read one by one through a small direct-mapped cache: a table is never resident. Each row carries
 * its own checksum, because its page is never read whole. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "context.h"

static uint32_t load_u32(const uint8_t *p) {
  return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static edgeml_fault read_row_once(const edgeml_context *c, uint32_t number, uint64_t row, uint8_t *to) {
  const page *p = &c->pager.pages[number];
  edgeml_fault fault = {.page = number, .offset = p->offset + row * p->stride};
  int error = 0;
  fault.status = pager_read_plain(c->pager.fd, to, p->stride, fault.offset, &error);
  fault.error = error;
  if (!fault.status && edgeml_crc32c(0, to, p->stride - 4) != load_u32(to + p->stride - 4)) fault.status = EDGEML_CHECKSUM;
  return fault;
}

static edgeml_fault read_row(edgeml_context *c, uint32_t number, uint64_t row, uint8_t *to) {
  edgeml_fault fault = read_row_once(c, number, row, to);
  if (!fault.status) return fault;
  __atomic_add_fetch(&c->pager.retries, 1, __ATOMIC_RELAXED);
#ifdef POSIX_FADV_DONTNEED
  posix_fadvise(c->pager.fd, (off_t)fault.offset, (off_t)c->pager.pages[number].stride, POSIX_FADV_DONTNEED);
#endif
  return read_row_once(c, number, row, to);
}

static void unpack_row(const page *p, const uint8_t *bytes, float *out) {
  uint32_t cols = p->matrices[0].cols;
  if (p->matrices[0].type == WEIGHT_F32) {
    memcpy(out, bytes, cols * sizeof(float));
    return;
  }
  float scale;
  memcpy(&scale, bytes, sizeof scale);
  for (uint32_t i = 0; i < cols; i++) out[i] = scale * (float)(int8_t)bytes[4 + i];
}

/* Ask for all that is missing before the first is waited for: a device answers many small reads in little more time than one. */
static void advise_rows(const edgeml_context *c, const page *p, const row_cache *cache, const int64_t *ids, size_t n) {
#ifdef POSIX_FADV_WILLNEED
  for (size_t i = 0; i < n && n > 1; i++) {
    if (ids[i] < 0 || ids[i] >= (int64_t)p->matrices[0].rows || cache->row[ids[i] % cache->entries] == ids[i]) continue;
    posix_fadvise(c->pager.fd, (off_t)(p->offset + (uint64_t)ids[i] * p->stride), (off_t)p->stride, POSIX_FADV_WILLNEED);
  }
#endif
}

int edgeml_embed_rows(edgeml_context *context, edgeml_request *request, uint32_t number, const int64_t *ids, size_t n, float *out) {
  edgeml_fault fault = {.page = UINT32_MAX};
  if (number >= context->pager.page_count || context->pager.pages[number].kind != KIND_ROWS) {
    fault.status = EDGEML_BAD_ARGUMENT, fault.value = number;
  } else {
    const page *p = &context->pager.pages[number];
    row_cache *cache = &context->rows[number];
    uint64_t begin = events_begin(&context->pager.events);
    pthread_mutex_lock(&cache->lock);
    advise_rows(context, p, cache, ids, n);
    for (size_t i = 0; i < n && !fault.status; i++) {
      if (ids[i] < 0 || ids[i] >= (int64_t)p->matrices[0].rows) {
        fault.status = EDGEML_BAD_ARGUMENT, fault.value = ids[i];
        break;
      }
      uint32_t row = (uint32_t)ids[i], entry = row % cache->entries;
      uint8_t *bytes = cache->bytes + entry * p->stride;
      if (cache->row[entry] != row) {
        cache->row[entry] = UINT32_MAX;
        fault = read_row(context, number, row, bytes);
        if (fault.status) break;
        cache->row[entry] = row;
      }
      unpack_row(p, bytes, out + i * p->matrices[0].cols);
    }
    pthread_mutex_unlock(&cache->lock);
    events_end(&context->pager.events, (edgeml_event){begin, 0, n, 0, EDGEML_EVENT_ROWS, NO_SITE, number, UINT32_MAX});
  }
  if (request && fault.status) request->fault = fault;
  return fault.status;
}
