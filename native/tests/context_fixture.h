/* A file of pages made here, a context on it, and calls with random tokens: what the tests of contexts share. A test's main makes one
 * fixture, and closes and removes its file at the end. */
#ifndef EDGEML_CONTEXT_FIXTURE_H
#define EDGEML_CONTEXT_FIXTURE_H

#undef NDEBUG
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "context.h"

#include "edgeml.h"

enum { HIDDEN = 48, WIDTH = 32, EXPERTS = 6, SITES = 3, TOP_K = 3, TOKENS = 40, ROUTED = SITES * EXPERTS };
enum { PAGES = ROUTED + SITES + 2, LINEAR = ROUTED + SITES, ROWS = LINEAR + 1, ROW_COUNT = 20, ALIGN = 4096 };

static _Thread_local uint32_t state = 1;
static inline uint32_t next(void) { return state = state * 1664525u + 1013904223u, state >> 8; }

static inline void put(uint8_t *to, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; i++) to[i] = (uint8_t)(value >> 8 * i);
}

static inline size_t up(size_t value, size_t to) { return (value + to - 1) / to * to; }

/* Random int4 tiles with scales of about 2^-6, and a small bias. */
static inline size_t fill_matrix(uint8_t *data, size_t at, size_t rows, size_t cols, int bias, uint8_t *descriptor) {
  size_t bytes = edgeml_matrix_bytes(WEIGHT_INT4, rows, cols);
  for (size_t i = 0; i < bytes; i++) data[at + i] = (uint8_t)next();
  for (size_t tile = 0; tile < bytes; tile += TILE_BYTES_INT4)
    for (size_t r = 0; r < 16; r++) put(data + at + tile + 256 + 2 * r, tile / TILE_BYTES_INT4 * 32 < cols * 2 ? 0x2400 : 0x2200, 2);
  put(descriptor, WEIGHT_INT4, 1), put(descriptor + 1, (uint64_t)bias, 1), put(descriptor + 4, rows, 4), put(descriptor + 8, cols, 4);
  at = up(at + bytes, 64);
  if (!bias) return at;
  for (size_t r = 0; r < rows; r++) {
    float value = (float)(next() % 100) / 100.0f;
    memcpy(data + at + 4 * r, &value, 4);
  }
  return at + 4 * up(rows, 16);
}

typedef struct fixture {
  char path[64];
  int fd;
  uint8_t index[PAGES * 128];
  uint64_t offset[PAGES];
  edgeml_expert_ref refs[PAGES];
  edgeml_site sites[SITES];
} fixture;

static inline void write_page(fixture *f, uint32_t number, uint64_t *offset, const uint8_t *data, size_t length) {
  uint8_t *r = f->index + 128 * number;
  put(r, number, 4), put(r + 8, *offset, 8), put(r + 16, length, 8), put(r + 24, edgeml_crc32c(0, data, length), 4);
  assert(pwrite(f->fd, data, length, (off_t)*offset) == (ssize_t)length);
  f->offset[number] = *offset;
  *offset = up(*offset + length, ALIGN);
  assert(ftruncate(f->fd, (off_t)*offset) == 0);
}

static inline void make(fixture *f) {
  static uint8_t data[1 << 16];
  uint64_t offset = ALIGN;
  memset(f, 0, sizeof *f);
  strcpy(f->path, "/tmp/edgeml-test-XXXXXX");
  f->fd = mkstemp(f->path);
  assert(f->fd >= 0);
  for (uint32_t i = 0; i < ROUTED + SITES; i++) {
    uint8_t *r = f->index + 128 * i;
    memset(data, 0, sizeof data);
    size_t length = fill_matrix(data, 0, WIDTH, HIDDEN, 1, r + 80);
    length = fill_matrix(data, length, HIDDEN, WIDTH, 0, r + 96);
    put(r + 4, 2, 2), put(r + 64, ACTIVATION_GELU, 4), put(r + 68, 1, 4), put(r + 72, length, 8);
    write_page(f, i, &offset, data, length);
    f->refs[i] = (edgeml_expert_ref){i, 0};
  }
  memset(data, 0, sizeof data);
  uint8_t *r = f->index + 128 * LINEAR;
  size_t length = fill_matrix(data, 0, 70, HIDDEN, 1, r + 80);
  put(r + 4, 3, 2), put(r + 68, 1, 4), put(r + 72, length, 8);
  write_page(f, LINEAR, &offset, data, length);
  r = f->index + 128 * ROWS;
  memset(data, 0, sizeof data);
  for (uint32_t row = 0; row < ROW_COUNT; row++) {
    uint8_t *at = data + row * (HIDDEN + 8);
    float scale = 0.5f;
    memcpy(at, &scale, 4);
    for (int i = 0; i < HIDDEN; i++) at[4 + i] = (uint8_t)next();
    put(at + 4 + HIDDEN, edgeml_crc32c(0, at, 4 + HIDDEN), 4);
  }
  put(r + 4, 4, 2), put(r + 68, 1, 4), put(r + 72, HIDDEN + 8, 8), put(r + 80, WEIGHT_INT8, 1), put(r + 84, ROW_COUNT, 4);
  put(r + 88, HIDDEN, 4);
  write_page(f, ROWS, &offset, data, ROW_COUNT * (HIDDEN + 8));
  for (uint32_t s = 0; s < SITES; s++)
    f->sites[s] = (edgeml_site){f->refs + s * EXPERTS, f->refs + ROUTED + s, EXPERTS, 1, HIDDEN, TOP_K};
}

static inline edgeml_context *open_with(const fixture *f, uint32_t slots, uint32_t threads, int direct) {
  edgeml_options o = {f->fd, direct, f->index, sizeof f->index, f->sites, SITES, slots, threads, 2, 2, NULL, 3};
  edgeml_context *c;
  edgeml_fault fault;
  int status = edgeml_open(&o, &c, &fault);
  if (status) fprintf(stderr, "open: %s, page %u\n", edgeml_status_text(status), fault.page);
  assert(status == EDGEML_OK);
  return c;
}

typedef struct inputs {
  float x[TOKENS * HIDDEN], weights[TOKENS * TOP_K];
  int64_t ids[TOKENS * TOP_K];
} inputs;

static inline void draw(inputs *in, uint32_t seed) {
  state = seed * 7919 + 1;
  for (int i = 0; i < TOKENS * HIDDEN; i++) in->x[i] = (float)(next() % 2001) / 1000.0f - 1.0f;
  for (int i = 0; i < TOKENS * TOP_K; i++) in->weights[i] = (float)(next() % 1000) / 1000.0f, in->ids[i] = (int64_t)(next() % (EXPERTS + 1)) - 1;
}

static inline uint32_t answer(edgeml_context *c, edgeml_request *request, uint32_t site, const inputs *in) {
  float out[TOKENS * HIDDEN];
  assert(edgeml_experts(c, request, site, in->x, in->ids, in->weights, TOKENS, TOP_K, out) == EDGEML_OK);
  return edgeml_crc32c(0, out, sizeof out);
}

typedef struct user {
  const fixture *fixture;
  edgeml_context *context;
  const uint32_t *expected;
  uint32_t number;
} user;

#endif
