/* The bundle's header and index, written from the format text alone. No number of the file is used before it was checked, no
 * sum can wrap (sides are at most 2^24, places at most 2^46), and nothing is allocated from a length that was not bounded. */
#define _GNU_SOURCE
#include "edgeml_bundle.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "edgeml.h"
#include "sha256.h"

#define HEADER_BYTES 4096u
#define HEADER_USED 120u
#define RECORD_BYTES 128u
#define MAX_FILE_BYTES (1ull << 46)
#define MAX_PAGES 1000000ull
#define MAX_MANIFEST_BYTES (64ull << 20)
#define MAX_SIDE (1u << 24)
#define MAX_EXPERTS 65536u
#define CHUNK_BYTES 65536u

enum { MAGIC_BYTES = 8, VERSION = 1, F32 = 1, INT8 = 2, INT4 = 3 };
static const uint8_t magic[MAGIC_BYTES] = {'E', 'D', 'G', 'E', 'M', 'L', '\r', '\n'};

struct edgeml_bundle {
  int fd;
  uint64_t alignment, file_length, index_offset, index_length, manifest_offset, manifest_length;
  uint8_t id[32];
  uint8_t *index;
  char *manifest;
};

static uint16_t u16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static uint32_t u32(const uint8_t *p) { return (uint32_t)u16(p) | (uint32_t)u16(p + 2) << 16; }
static uint64_t u64(const uint8_t *p) { return (uint64_t)u32(p) | (uint64_t)u32(p + 4) << 32; }
static uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

static int all_zero(const uint8_t *p, size_t n) {
  while (n > 0 && *p == 0) p++, n--;
  return n == 0;
}

/* ---- faults ---- */

static int fail(edgeml_bundle_fault *fault, int status, int64_t page, const char *sentence) {
  if (fault) *fault = (edgeml_bundle_fault){status, status == EDGEML_BUNDLE_IO ? errno : 0, page, -1, sentence};
  return status;
}

static int bad(edgeml_bundle_fault *fault, int64_t page, const char *sentence) { return fail(fault, EDGEML_BUNDLE_BAD, page, sentence); }

const char *edgeml_bundle_fault_text(const edgeml_bundle_fault *fault, char *out, size_t room) {
  char page[40] = "", row[40] = "", cause[100] = "";
  if (fault->page >= 0) snprintf(page, sizeof page, "page %lld: ", (long long)fault->page);
  if (fault->row >= 0) snprintf(row, sizeof row, "row %lld: ", (long long)fault->row);
  if (fault->error) snprintf(cause, sizeof cause, " (%s)", strerror(fault->error));
  snprintf(out, room, "%s%s%s%s", page, row, fault->sentence, cause);
  return out;
}

/* ---- reading ---- */

/* Exactly n bytes, in as many reads as it takes. */
static int read_all(int fd, void *to, uint64_t n, uint64_t offset, int64_t page, edgeml_bundle_fault *fault) {
  uint8_t *p = to;
  while (n > 0) {
    ssize_t got = pread(fd, p, n < 1u << 30 ? (size_t)n : 1u << 30, (off_t)offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail(fault, EDGEML_BUNDLE_IO, page, "reading failed; check the medium");
    if (got == 0) return bad(fault, page, "the file ends too early: it was cut after it was opened");
    p += got, offset += (uint64_t)got, n -= (uint64_t)got;
  }
  return EDGEML_BUNDLE_OK;
}

/* `n` bytes that have this SHA-256, in memory of their own. */
static int read_hashed(int fd, uint64_t n, uint64_t offset, const uint8_t hash[32], const char *damaged, void *out, edgeml_bundle_fault *fault) {
  uint8_t *data = malloc(n ? (size_t)n : 1), found[32];
  if (!data) return fail(fault, EDGEML_BUNDLE_NO_MEMORY, -1, "not enough memory");
  int status = read_all(fd, data, n, offset, -1, fault);
  if (!status) {
    sha256 s;
    sha256_begin(&s);
    sha256_add(&s, data, (size_t)n);
    sha256_end(&s, found);
    if (memcmp(found, hash, 32)) status = bad(fault, -1, damaged);
  }
  if (status) free(data);
  else memcpy(out, &data, sizeof data);
  return status;
}

/* ---- header ---- */

static int check_extents(const edgeml_bundle *b, edgeml_bundle_fault *fault) {
  if (b->file_length > MAX_FILE_BYTES) return bad(fault, -1, "header: a file length above the limit");
  if (b->index_length % RECORD_BYTES || b->index_length > MAX_PAGES * RECORD_BYTES)
    return bad(fault, -1, "header: the index is not a whole number of at most 1000000 records");
  if (b->manifest_length < 2 || b->manifest_length > MAX_MANIFEST_BYTES) return bad(fault, -1, "header: the manifest must have 2 bytes to 64 MiB");
  if (b->index_offset < b->alignment || b->index_offset > MAX_FILE_BYTES || b->index_offset % b->alignment)
    return bad(fault, -1, "header: the index does not begin at a page boundary");
  if (b->manifest_offset != b->index_offset + b->index_length) return bad(fault, -1, "header: the manifest does not begin where the index ends");
  if (b->file_length != b->manifest_offset + b->manifest_length) return bad(fault, -1, "header: the file does not end where the manifest ends");
  return EDGEML_BUNDLE_OK;
}

static int parse_header(const uint8_t *h, size_t n, edgeml_bundle *b, edgeml_bundle_fault *fault) {
  if (n >= 7 && !memcmp(h, "EDGEML\n", 7)) return bad(fault, -1, "its line ends were converted on the way; transfer it again in binary mode");
  if (memcmp(h, magic, n < MAGIC_BYTES ? n : MAGIC_BYTES)) return bad(fault, -1, "this is not an edgeml bundle (the first 8 bytes are not the format's)");
  if (n < HEADER_BYTES) return bad(fault, -1, "truncated: the file ends within the header; copy it again");
  if (edgeml_crc32c(0, h, HEADER_USED) != u32(h + HEADER_USED)) return bad(fault, -1, "the header is damaged (its checksum is wrong); copy the file again");
  if (u32(h + 8) > VERSION) return bad(fault, -1, "the file has a newer version of the format; install a newer edgeml");
  if (u32(h + 8) != VERSION) return bad(fault, -1, "the file has an unknown version of the format; export it again");
  if (!all_zero(h + HEADER_USED + 4, HEADER_BYTES - HEADER_USED - 4)) return bad(fault, -1, "the unused part of the header is not zero");
  b->alignment = u32(h + 12), b->file_length = u64(h + 16), b->index_offset = u64(h + 24), b->index_length = u64(h + 32);
  b->manifest_offset = u64(h + 72), b->manifest_length = u64(h + 80);
  if (b->alignment < HEADER_BYTES || b->alignment > 1u << 20 || b->alignment & (b->alignment - 1))
    return bad(fault, -1, "header: the alignment must be a power of two from 4096 to 1048576");
  return check_extents(b, fault);
}

/* ---- index ---- */

static uint64_t matrix_bytes(uint8_t type, uint32_t rows, uint32_t cols) {
  const uint64_t tile = type == F32 ? 2048 : type == INT8 ? 544 : 288;
  return round_up(rows, 16) / 16 * (round_up(cols, 32) / 32) * tile;
}

/* Bytes of one expert or linear layer: each part begins on a line of 64. */
static uint64_t expert_bytes(const edgeml_bundle_page *p) {
  uint64_t end = 0;
  for (uint32_t i = 0; i < p->matrix_count; i++) {
    end = round_up(end + matrix_bytes(p->matrices[i].type, p->matrices[i].rows, p->matrices[i].cols), 64);
    if (p->matrices[i].has_bias) end += 4 * round_up(p->matrices[i].rows, 16);
  }
  return end;
}

static const char *parse_matrices(const uint8_t *record, edgeml_bundle_page *p) {
  p->matrix_count = 0;
  for (uint32_t i = 0; i < 3; i++) {
    const uint8_t *d = record + 80 + 16 * i;
    p->matrices[i].type = d[0], p->matrices[i].has_bias = d[1], p->matrices[i].rows = u32(d + 4), p->matrices[i].cols = u32(d + 8);
    if (d[0] == 0) {
      if (!all_zero(d, 16)) return "a matrix is absent but has fields that are not zero";
      continue;
    }
    if (p->matrix_count != i) return "a matrix follows an absent one";
    if (d[0] > INT4) return "a matrix has an unknown type";
    if (d[1] > 1 || u16(d + 2) || u32(d + 12)) return "a matrix has a field outside its range";
    if (u32(d + 4) < 1 || u32(d + 4) > MAX_SIDE || u32(d + 8) < 1 || u32(d + 8) > MAX_SIDE) return "a matrix has a side outside 1 to 2^24";
    p->matrix_count++;
  }
  return NULL;
}

static const char *check_expert(const edgeml_bundle_page *p) {
  if (p->count < 1 || p->count > MAX_EXPERTS) return "a page holds 1 to 65536 experts";
  if (p->matrix_count < 2) return "an expert has 2 or 3 matrices";
  const uint32_t last = p->matrix_count - 1, width = p->matrices[0].rows, hidden = p->matrices[0].cols;
  if (p->matrices[last].rows != hidden || p->matrices[last].cols != width) return "its matrices do not fit each other";
  if (last == 2 && (p->matrices[1].rows != width || p->matrices[1].cols != hidden)) return "its matrices do not fit each other";
  return NULL;
}

/* Whether kind, matrices, count, stride and length agree. */
static const char *check_shape(const edgeml_bundle_page *p) {
  static const char *const disagree = "its count, stride and length are not what its matrices give";
  const uint64_t rows = p->matrices[0].rows, cols = p->matrices[0].cols;
  const uint8_t type = p->matrices[0].type, biased = p->matrices[0].has_bias;
  if (p->kind != EDGEML_PAGE_EXPERT && p->activation) return "only experts have an activation";
  if (p->kind == EDGEML_PAGE_ONNX || p->kind == EDGEML_PAGE_TOKENIZER || p->kind == EDGEML_PAGE_JSON)
    return p->matrix_count || p->count || p->stride ? "this kind has no matrices, count or stride" : NULL;
  if (p->kind == EDGEML_PAGE_EXPERT) {
    const char *problem = check_expert(p);
    if (problem) return problem;
    const uint64_t stride = expert_bytes(p); /* at most 2^53 */
    return p->stride == stride && stride <= MAX_FILE_BYTES && p->length == stride * p->count ? NULL : disagree;
  }
  if (p->matrix_count != 1) return "this kind has one matrix";
  if (p->kind == EDGEML_PAGE_TENSOR) {
    if (type != F32 || biased) return "a tensor is f32 without a bias";
    return p->count == 0 && p->stride == 0 && p->length == 4 * rows * cols ? NULL : disagree;
  }
  if (p->kind == EDGEML_PAGE_ROWS) {
    if (type == INT4 || biased) return "rows are int8 or f32 without a bias";
    const uint64_t stride = type == INT8 ? cols + 8 : 4 * cols + 4;
    return p->count == 1 && p->stride == stride && p->length == rows * stride ? NULL : disagree;
  }
  return p->count == 1 && p->stride == expert_bytes(p) && p->length == p->stride ? NULL : disagree;
}

static const char *parse_record(const uint8_t *r, uint32_t number, edgeml_bundle_page *p) {
  *p = (edgeml_bundle_page){.kind = u16(r + 4), .offset = u64(r + 8), .length = u64(r + 16), .crc32c = u32(r + 24),
                            .activation = u32(r + 64), .count = u32(r + 68), .stride = u64(r + 72)};
  memcpy(p->sha256, r + 32, 32);
  if (u32(r) != number) return "its record carries another id";
  if (u16(r + 6) || u32(r + 28)) return "a reserved field is not zero";
  if (p->kind < EDGEML_PAGE_ONNX || p->kind > EDGEML_PAGE_JSON || p->kind == 6) return "unknown page kind";
  if (p->activation > 3) return "unknown activation";
  if (p->length < 1) return "it is empty";
  const char *problem = parse_matrices(r, p);
  return problem ? problem : check_shape(p);
}

static int check_index(const edgeml_bundle *b, edgeml_bundle_fault *fault) {
  uint64_t expected = b->alignment;
  const uint32_t count = edgeml_bundle_page_count(b);
  for (uint32_t i = 0; i < count; i++) {
    edgeml_bundle_page p;
    const char *problem = parse_record(b->index + (size_t)i * RECORD_BYTES, i, &p);
    if (problem) return bad(fault, i, problem);
    if (p.offset != expected) return bad(fault, i, "it does not begin where the pages before it end");
    if (p.offset > b->index_offset || p.length > b->index_offset - p.offset) return bad(fault, i, "it reaches past the pages' end");
    expected = round_up(p.offset + p.length, b->alignment);
  }
  return expected == b->index_offset ? EDGEML_BUNDLE_OK : bad(fault, -1, "the index does not begin where the pages end");
}

/* ---- opening ---- */

static int read_tables(edgeml_bundle *b, edgeml_bundle_fault *fault) {
  struct stat info;
  uint8_t header[HEADER_BYTES];
  if (fstat(b->fd, &info)) return fail(fault, EDGEML_BUNDLE_IO, -1, "its size cannot be asked for");
  if (S_ISDIR(info.st_mode)) return bad(fault, -1, "this is a directory; a bundle is one .edgeml file");
  if (!S_ISREG(info.st_mode)) return bad(fault, -1, "this is not a regular file; a bundle is one .edgeml file");
  const uint64_t size = (uint64_t)info.st_size;
  if (size == 0) return bad(fault, -1, "the file is empty; copy or export it again");
  const size_t there = size < HEADER_BYTES ? (size_t)size : HEADER_BYTES;
  int status = read_all(b->fd, header, there, 0, -1, fault);
  if (!status) status = parse_header(header, there, b, fault);
  if (status) return status;
  if (size < b->file_length) return bad(fault, -1, "truncated: the file is shorter than its header says; copy it again");
  if (size > b->file_length) return bad(fault, -1, "bytes follow the bundle's end; copy the file again");
  memcpy(b->id, header + 40, 32);
  status = read_hashed(b->fd, b->index_length, b->index_offset, b->id, "the index is damaged (its checksum is wrong); copy the file again", &b->index, fault);
  if (!status) status = check_index(b, fault);
  if (status) return status;
  return read_hashed(b->fd, b->manifest_length, b->manifest_offset, header + 88,
                     "the manifest is damaged (its checksum is wrong); copy the file again", &b->manifest, fault);
}

/* Takes the descriptor over. */
static int open_owned(int fd, edgeml_bundle **out, edgeml_bundle_fault *fault) {
  edgeml_bundle *b = calloc(1, sizeof *b);
  if (!b) {
    close(fd);
    return fail(fault, EDGEML_BUNDLE_NO_MEMORY, -1, "not enough memory");
  }
  b->fd = fd;
  int status = read_tables(b, fault);
  if (status) edgeml_bundle_close(b);
  else *out = b;
  return status;
}

static int fail_open(edgeml_bundle_fault *fault) {
  switch (errno) {
    case ENOENT: case ENOTDIR: return bad(fault, -1, "no such file; check the path of the bundle");
    case EACCES: case EPERM: return bad(fault, -1, "no permission to read it; check its owner and mode");
    case ELOOP: return bad(fault, -1, "this is a symbolic link, which could be swapped unnoticed; give the file it points to");
    case ENAMETOOLONG: case ENXIO: return bad(fault, -1, "it cannot be opened");
    default: return fail(fault, EDGEML_BUNDLE_IO, -1, "it cannot be opened; check the medium");
  }
}

int edgeml_bundle_open(const char *path, edgeml_bundle **out, edgeml_bundle_fault *fault) {
  *out = NULL;
  int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); /* a pipe must not make us wait */
  return fd < 0 ? fail_open(fault) : open_owned(fd, out, fault);
}

int edgeml_bundle_open_fd(int fd, edgeml_bundle **out, edgeml_bundle_fault *fault) {
  *out = NULL;
  int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  return own < 0 ? fail(fault, EDGEML_BUNDLE_IO, -1, "the descriptor cannot be duplicated") : open_owned(own, out, fault);
}

void edgeml_bundle_close(edgeml_bundle *b) {
  if (!b) return;
  close(b->fd);
  free(b->index);
  free(b->manifest);
  free(b);
}

/* ---- an open bundle ---- */

int edgeml_bundle_fd(const edgeml_bundle *b) { return b->fd; }
const uint8_t *edgeml_bundle_id(const edgeml_bundle *b) { return b->id; }
uint32_t edgeml_bundle_page_count(const edgeml_bundle *b) { return (uint32_t)(b->index_length / RECORD_BYTES); }

const void *edgeml_bundle_index(const edgeml_bundle *b, size_t *bytes) {
  *bytes = (size_t)b->index_length;
  return b->index;
}

const char *edgeml_bundle_manifest(const edgeml_bundle *b, size_t *bytes) {
  *bytes = (size_t)b->manifest_length;
  return b->manifest;
}

int edgeml_bundle_get_page(const edgeml_bundle *b, uint32_t page, edgeml_bundle_page *out) {
  if (page >= edgeml_bundle_page_count(b)) return EDGEML_BUNDLE_ARGUMENT;
  parse_record(b->index + (size_t)page * RECORD_BYTES, page, out);
  return EDGEML_BUNDLE_OK;
}

int edgeml_bundle_read(const edgeml_bundle *b, uint32_t page, void *to, edgeml_bundle_fault *fault) {
  edgeml_bundle_page p;
  if (edgeml_bundle_get_page(b, page, &p)) return fail(fault, EDGEML_BUNDLE_ARGUMENT, page, "there is no page of that number");
  for (int attempt = 0; attempt < 2; attempt++) {
    int status = read_all(b->fd, to, p.length, p.offset, page, fault);
    if (status) return status;
    if (edgeml_crc32c(0, to, (size_t)p.length) == p.crc32c) return EDGEML_BUNDLE_OK;
#ifdef POSIX_FADV_DONTNEED
    posix_fadvise(b->fd, (off_t)p.offset, (off_t)p.length, POSIX_FADV_DONTNEED);
#endif
  }
  return bad(fault, page, "its checksum is wrong; copy the bundle again");
}

/* ---- verify ---- */

static int check_padding(const edgeml_bundle *b, uint64_t from, uint64_t to, uint8_t *chunk, edgeml_bundle_fault *fault) {
  while (from < to) {
    uint64_t n = to - from < CHUNK_BYTES ? to - from : CHUNK_BYTES;
    int status = read_all(b->fd, chunk, n, from, -1, fault);
    if (status) return status;
    if (!all_zero(chunk, (size_t)n)) return bad(fault, -1, "the padding between pages is not zero");
    from += n;
  }
  return EDGEML_BUNDLE_OK;
}

/* Where the checking of rows stands within a row: its bytes end with their own checksum. */
typedef struct row_check {
  uint64_t row, at;
  uint32_t crc;
  uint8_t stored[4];
} row_check;

static int rows_are_right(row_check *c, uint64_t stride, const uint8_t *p, size_t n) {
  while (n > 0) {
    const uint64_t body = stride - 4;
    size_t part = 1;
    if (c->at < body) {
      part = body - c->at < n ? (size_t)(body - c->at) : n;
      c->crc = edgeml_crc32c(c->crc, p, part);
    } else {
      c->stored[c->at - body] = *p;
    }
    c->at += part, p += part, n -= part;
    if (c->at < stride) continue;
    if (u32(c->stored) != c->crc) return 0;
    c->row++, c->at = 0, c->crc = 0;
  }
  return 1;
}

static int verify_page(const edgeml_bundle *b, uint32_t number, const edgeml_bundle_page *p, uint8_t *chunk, edgeml_bundle_fault *fault) {
  sha256 s;
  uint8_t hash[32];
  uint32_t crc = 0;
  row_check rows = {0};
  sha256_begin(&s);
  for (uint64_t done = 0; done < p->length;) {
    uint64_t n = p->length - done < CHUNK_BYTES ? p->length - done : CHUNK_BYTES;
    int status = read_all(b->fd, chunk, n, p->offset + done, number, fault);
    if (status) return status;
    crc = edgeml_crc32c(crc, chunk, (size_t)n);
    sha256_add(&s, chunk, (size_t)n);
    if (p->kind == EDGEML_PAGE_ROWS && !rows_are_right(&rows, p->stride, chunk, (size_t)n)) {
      bad(fault, number, "the row's own checksum is wrong");
      if (fault) fault->row = (int64_t)rows.row;
      return EDGEML_BUNDLE_BAD;
    }
    done += n;
  }
  sha256_end(&s, hash);
  return crc == p->crc32c && !memcmp(hash, p->sha256, 32) ? EDGEML_BUNDLE_OK : bad(fault, number, "its checksum is wrong; copy the bundle again");
}

int edgeml_bundle_verify(const edgeml_bundle *b, edgeml_bundle_fault *fault) {
  uint8_t *chunk = malloc(CHUNK_BYTES);
  if (!chunk) return fail(fault, EDGEML_BUNDLE_NO_MEMORY, -1, "not enough memory");
  uint64_t end = HEADER_BYTES;
  int status = EDGEML_BUNDLE_OK;
  for (uint32_t i = 0; i < edgeml_bundle_page_count(b) && !status; i++) {
    edgeml_bundle_page p;
    edgeml_bundle_get_page(b, i, &p);
    status = check_padding(b, end, p.offset, chunk, fault);
    if (!status) status = verify_page(b, i, &p, chunk, fault);
    end = p.offset + p.length;
  }
  if (!status) status = check_padding(b, end, b->index_offset, chunk, fault);
  free(chunk);
  return status;
}
