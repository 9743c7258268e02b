/* libedgeml: the native side of edgeml. C11, no Python, no JSON, no allocation between open and close.
 *
 * How it is used, from simple to whole:
 *   1. Checksums: edgeml_crc32c.
 *   2. Kernels on packed weights, for tests and probes: the section "kernels".
 *   3. A bundle's weights under a memory budget: fill edgeml_options, edgeml_plan says what it would hold, edgeml_open holds
 *      it. Then edgeml_linear, edgeml_experts and edgeml_embed_rows compute, paging experts in as they are needed.
 *   4. Bucketed attention, on arrays of the caller: the section "attention".
 *   5. The same as operators of onnxruntime: load this library with register_custom_ops_library and set the session
 *      configuration entry "edgeml.context" to the decimal edgeml_handle of the context.
 *
 * Every function that can fail returns a status; results go through pointers. Pointers handed in stay the caller's. Functions
 * may be called from any thread unless they say otherwise; a request belongs to the thread that began it. Nothing of a context
 * may be used in a forked child: its threads are not there.
 * The layout of the index, of pages and of weight tiles is the bundle's format (the head of edgeml/bundle.py).
 */
#ifndef EDGEML_H
#define EDGEML_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#ifdef EDGEML_SHARED /* while the shared library is compiled: what is declared here is exported */
#pragma GCC visibility push(default)
#endif

/* ---- status ---- */

#define EDGEML_STATUS_MAP(X)                                                   \
  X(OK, 0, "done")                                                             \
  X(NO_MEMORY, 1, "not enough memory, threads or file descriptors")            \
  X(BAD_INDEX, 2, "the index breaks the format")                               \
  X(BAD_ARGUMENT, 3, "an argument is outside its range")                       \
  X(READ_FAILED, 4, "reading failed")                                          \
  X(TRUNCATED, 5, "the file ends too early: it was cut after it was opened")   \
  X(CHECKSUM, 6, "the checksum is wrong")                                      \
  X(NOT_LEASED, 7, "a page outside the request's leased set was asked for")    \
  X(NEVER_FITS, 8, "the set of pages is larger than the slots that there are") \
  X(BUSY, 9, "requests or graphs still use it")                                \
  X(NO_SUCH_ISA, 10, "this processor has no such kernels")                     \
  X(NESTED, 11, "this thread has a request already")

typedef enum edgeml_status {
#define X(name, number, sentence) EDGEML_##name = number,
  EDGEML_STATUS_MAP(X)
#undef X
} edgeml_status;

/* The sentence of a status; static, never NULL. */
const char *edgeml_status_text(int status);

/* What went wrong. `page` is UINT32_MAX where no page is meant; `value` is the offending number of a BAD_ARGUMENT. */
typedef struct edgeml_fault {
  int32_t status;   /* edgeml_status */
  int32_t error;    /* errno of a failed read, else 0 */
  uint32_t page;
  uint64_t offset;  /* bytes from the file's start */
  int64_t value;
} edgeml_fault;

/* ---- checksum ---- */

/* CRC-32C of `n` bytes at `data`, continuing from `crc` (0 for a new message): crc(ab) = crc(b, crc(a)).
 * Allocates nothing, cannot fail. `data` may be NULL when `n` is 0. */
uint32_t edgeml_crc32c(uint32_t crc, const void *data, size_t n);

/* "sse4.2", "armv8" or "table": how edgeml_crc32c computes on this machine. The string is static. */
const char *edgeml_crc32c_name(void);

/* ---- kernels ---- */

/* Names of the kernel sets that this processor can run, into `names` as far as there is room: "scalar" first, the preferred one
 * last. Returns how many there are. The strings are static. All sets give the same bits. */
size_t edgeml_backends(const char **names, size_t room);

/* y (n, rows) = packed matrix (rows, cols) of weight type 1 (f32), 2 (int8) or 3 (int4) times x (n, cols), plus bias (rows, or
 * NULL), with the kernel set `isa` (NULL: the preferred one). Errors: BAD_ARGUMENT where `tiles_bytes` is not the size of such a
 * matrix or a dimension is outside 1 to 2^24; NO_SUCH_ISA; NO_MEMORY. */
int edgeml_apply_matrix(const char *isa, int type, const void *tiles, size_t tiles_bytes, size_t rows, size_t cols, const float *x,
                        size_t n, const float *bias, float *y);

/* Replace n values by their activation: 0 none, 1 gelu, 2 relu, 3 silu. Errors: BAD_ARGUMENT, NO_SUCH_ISA. */
int edgeml_apply_activation(const char *isa, int activation, float *y, size_t n);

/* ---- context ---- */

typedef struct edgeml_context edgeml_context;

/* Where an expert lies: the `sub`-th of page `page`. */
typedef struct edgeml_expert_ref {
  uint32_t page, sub;
} edgeml_expert_ref;

/* A place where experts are chosen. Arrays are read during open only. */
typedef struct edgeml_site {
  const edgeml_expert_ref *experts; /* routed: pageable */
  const edgeml_expert_ref *shared;  /* always active: pinned */
  uint32_t expert_count, shared_count;
  uint32_t hidden;                  /* width of the site's input and output, floats */
  uint32_t top_k;                   /* most experts per token */
} edgeml_site;

typedef struct edgeml_options {
  int fd;                 /* the open bundle; duplicated, so the caller may close its own */
  int direct;             /* 1: read pages with O_DIRECT where the file system allows it */
  const void *index;      /* the index bytes of a validated bundle; read during open only */
  size_t index_bytes;
  const edgeml_site *sites;
  uint32_t site_count;
  uint32_t slots;         /* pages that may be resident besides the pinned ones; at least 1 when there are routed experts */
  uint32_t threads;       /* that compute, the caller's included: 1 to 256 */
  uint32_t readers;       /* threads that read: 1 to 16 */
  uint32_t requests;      /* calls that may compute and leases that may be held at once: 1 to 256; more of them wait */
  const char *isa;        /* name of a kernel set, NULL for the best */
  uint32_t ahead;         /* pages of the next site that idle readers may read during a call; 0: none */
} edgeml_options;

/* Bytes that a context holds. The budget is pinned + slots x slot + scratch. */
typedef struct edgeml_plan_result {
  uint64_t pinned_bytes;
  uint64_t slot_bytes;      /* 0 without routed experts */
  uint64_t scratch_bytes;   /* for options.threads and options.requests */
  uint64_t pageable_bytes;  /* all routed pages in slots */
  uint32_t pageable_pages;
} edgeml_plan_result;

/* What edgeml_open with these options would hold; `fd`, `slots` and `isa` are not looked at. Errors: BAD_INDEX, BAD_ARGUMENT,
 * NO_MEMORY (also where the sizes are beyond 64 bits). */
int edgeml_plan(const edgeml_options *options, edgeml_plan_result *out);

/* Open: allocates everything, starts the threads, reads and checks the pinned pages. On failure *out is NULL and `fault` (may
 * be NULL) says which page. Errors: those of edgeml_plan, NO_SUCH_ISA, READ_FAILED, TRUNCATED, CHECKSUM. */
int edgeml_open(const edgeml_options *options, edgeml_context **out, edgeml_fault *fault);

/* Stop the threads and free everything. BUSY, and nothing done, while requests run or an onnxruntime session has operators of
 * this context. NULL is allowed. Calls outside requests are not seen: the caller sees to it that none is running. */
int edgeml_close(edgeml_context *context);

/* A number that names this context in the process, for "edgeml.context". Never 0, never used twice. */
uint64_t edgeml_handle(const edgeml_context *context);

/* ---- requests ---- */

/* Counters of routed experts: hits and misses in page acquisitions, bytes of pages read into slots, nanoseconds spent waiting for
 * pages. A page that was read ahead is a hit once it is there; its bytes are the request's that asks for it first. What is pinned
 * and rows of embedding tables are not counted. */
typedef struct edgeml_counters {
  uint64_t hits, misses, page_in_bytes, page_wait_ns;
} edgeml_counters;

/* One call for one task. The caller provides the memory and leaves the fields alone while the request runs. */
typedef struct edgeml_request {
  edgeml_context *context;
  edgeml_counters counters;
  edgeml_fault fault;       /* of the call that failed last; status 0 where none did */
  const uint32_t *lease;    /* pages pinned for this request, ascending; the caller's until end */
  uint32_t lease_count;
  int32_t leased;           /* 1: only leased pages may be used, even where there are none */
  void *scratch;            /* working memory kept for a leased request, so that no holder of pins waits for any */
} edgeml_request;

/* Begin a request and make it the calling thread's current one: operators running on this thread are counted for it. Errors:
 * NESTED while the thread has a current one, of any context. */
int edgeml_request_begin(edgeml_context *context, edgeml_request *request);

/* Pin `count` pages (ascending, routed) until the request ends, paging in those that are absent. Waits, in order of arrival, for
 * other leases to end. Operators that onnxruntime runs on other threads than the request's do not have the lease and may wait for
 * it: run graphs sequentially. Errors: BAD_ARGUMENT (also a request that is not running or has a lease), NEVER_FITS, READ_FAILED,
 * TRUNCATED, CHECKSUM; then nothing is pinned. */
int edgeml_request_lease(edgeml_request *request, const uint32_t *pages, uint32_t count);

/* Give up the lease and unset the thread's current request, on the thread that began it. Counters and fault stay readable. A
 * second call does nothing. */
void edgeml_request_end(edgeml_request *request);

/* ---- computing; `request` NULL: counted for the context alone ---- */

/* y (n, rows) = page's matrix times x (n, cols) + bias; takes the working memory of the thread's current request if it has a lease.
 * Errors: BAD_ARGUMENT. */
int edgeml_linear(edgeml_context *context, uint32_t page, const float *x, size_t n, float *y);

/* out (n, hidden): shared experts, then for j < k the expert ids[j] (-1: none) times weights[j], added in this order whatever
 * the order in which pages arrive. ids (n, k), weights (n, k). Errors: BAD_ARGUMENT (value: the bad id), NOT_LEASED, READ_FAILED,
 * TRUNCATED, CHECKSUM; a fault is also kept in `request`. */
int edgeml_experts(edgeml_context *context, edgeml_request *request, uint32_t site, const float *x, const int64_t *ids,
                   const float *weights, size_t n, size_t k, float *out);

/* out (n, cols): rows `ids` of a rows page. Errors: BAD_ARGUMENT (value: the bad id), READ_FAILED, TRUNCATED, CHECKSUM. */
int edgeml_embed_rows(edgeml_context *context, edgeml_request *request, uint32_t page, const int64_t *ids, size_t n, float *out);

/* ---- attention ---- */

/* Bucketed sparse attention. Of tokens i and j that are not padded, query i meets key j where
 *
 *     i == j, or either of them is among the first `global_tokens`, or both have one cluster,
 *     or both have one domain and a confidence above `threshold` each (NaN is not above);
 *
 * if `causal`, only where j <= i. y_i is the sum of v_j times the softmax, over the keys it meets, of scale * (q_i . k_j); of a
 * padded token it is 0. Cost grows with the pairs that meet, and nothing of size tokens x tokens is made. Where more than half
 * of tokens^2 pairs meet, everything is computed under a mask instead.
 *
 * `published` gives the mask of the SCAR paper's code: query i meets key j where both have one cluster, or are both above the
 * threshold, or both not; padding is attended to like everything else, and `causal` and `global_tokens` must be 0.
 *
 * Fields that are not set are 0. Arrays are the caller's, read (y and density: written) during the call only; y overlaps none.
 */
typedef struct edgeml_attention {
  const float *q, *k, *v;                   /* (batch, heads, tokens, head_size) */
  float *y;                                 /* the same */
  int32_t token_major;                      /* 1: all four are (batch, tokens, heads, head_size) */
  size_t batch, heads, tokens, head_size;   /* heads up to 2^16, tokens up to 2^24, head_size up to 2^12 */
  const int32_t *cluster, *domain;          /* (batch, tokens), in [0, clusters) and [0, domains) where not padded */
  const float *confidence;                  /* (batch, tokens) */
  const uint8_t *pad;                       /* (batch, tokens): not 0 where padded; NULL: nowhere */
  uint32_t clusters, domains;               /* 1 to 2^20 */
  uint32_t global_tokens;
  float threshold, scale;                   /* scale 0: 1 / sqrt(head_size) */
  int32_t causal, published;
  float *density;                           /* (batch): pairs that meet / tokens^2; or NULL */
} edgeml_attention;

/* Bytes of working memory that edgeml_scar_attention wants for this call; only the sizes are looked at. 0 where they are out of
 * range or do not fit together. */
size_t edgeml_attention_scratch(const edgeml_context *context, const edgeml_attention *attention);

/* Compute y and density. `scratch` has edgeml_attention_scratch bytes for the same context, at any address. With a context its
 * threads compute, else (NULL) the calling thread alone. `isa` names a kernel set; NULL: the context's, or the preferred one.
 * Any number of calls may run at once, each with scratch of its own. A result depends neither on the threads nor on the kernel
 * set, and that of a sequence not on the others of its batch. What is not finite reaches only the rows that meet it (a value only
 * those that give it a weight above 0). Errors: BAD_ARGUMENT (fault->value: the id outside its range;
 * then nothing is written), NO_SUCH_ISA. `fault` may be NULL. Allocates nothing. */
int edgeml_scar_attention(edgeml_context *context, const char *isa, const edgeml_attention *attention, void *scratch,
                          edgeml_fault *fault);

/* ---- hints and figures ---- */

/* Give pages a priority (0 at open; lowest is evicted first). With `load`, absent ones are also read, each into a free slot or
 * over a page that the eviction rule ranks strictly worse; never waits. Errors: BAD_ARGUMENT. */
int edgeml_advise(edgeml_context *context, const uint32_t *pages, uint32_t count, int32_t priority, int load);

/* Wait until no read is under way. */
void edgeml_settle(edgeml_context *context);

/* Give up every page that is resident and unpinned. */
void edgeml_evict_all(edgeml_context *context);

typedef struct edgeml_stats {
  edgeml_counters total;
  uint64_t evictions, retries, failures;
  uint64_t pinned_bytes, slot_bytes, scratch_bytes;
  uint32_t slots, resident;
  int32_t direct;            /* 1 while pages are read with O_DIRECT */
  const char *isa;
} edgeml_stats;

void edgeml_get_stats(edgeml_context *context, edgeml_stats *out);

/* Counters of each site, (site_count). */
void edgeml_get_site_stats(edgeml_context *context, edgeml_counters *out);

/* Ids of up to `room` resident pages, ascending; returns how many there are. */
uint32_t edgeml_get_resident(edgeml_context *context, uint32_t *out, uint32_t room);

/* Rows and columns of matrix `number` (0 to 2) of a page. Errors: BAD_ARGUMENT where there is none. */
int edgeml_get_matrix(const edgeml_context *context, uint32_t page, uint32_t number, uint32_t *rows, uint32_t *cols);

/* ---- events: what each thread did, for profiles ---- */

/* JOB: an expert on some tokens. WAIT: a thread of a call has nothing to do until a page comes. READ: a reader fetches a page;
 * CHECKSUM within it. HIT and MISS: a call acquires a page; they take no time. PART: another thread than the caller's works on a
 * LINEAR or adds up what experts answered. LEASE: a request waits for its set. */
typedef enum edgeml_event_kind {
  EDGEML_EVENT_SITE = 1,
  EDGEML_EVENT_JOB,
  EDGEML_EVENT_WAIT,
  EDGEML_EVENT_LEASE,
  EDGEML_EVENT_READ,
  EDGEML_EVENT_CHECKSUM,
  EDGEML_EVENT_HIT,
  EDGEML_EVENT_MISS,
  EDGEML_EVENT_LINEAR,
  EDGEML_EVENT_ROWS,
  EDGEML_EVENT_PART
} edgeml_event_kind;

typedef struct edgeml_event {
  uint64_t begin_ns, end_ns; /* of CLOCK_MONOTONIC */
  uint64_t value;            /* tokens of SITE, JOB, LINEAR and ROWS, bytes of READ and CHECKSUM */
  uint32_t thread;           /* the system's number of the thread */
  uint32_t kind;             /* edgeml_event_kind */
  uint32_t site, page, sub;  /* UINT32_MAX where none is meant */
} edgeml_event;

/* Note events from now on, in a new ring with room for this many (1 to 2^24); those of an earlier one are dropped. Errors:
 * BAD_ARGUMENT, NO_MEMORY. */
int edgeml_events_start(edgeml_context *context, uint32_t room);

/* Move up to `room` events out of the ring, in the order in which they ended; returns how many. `lost`: those that found the ring
 * full since it began. Allowed at any time, also after stop. */
uint32_t edgeml_events_take(edgeml_context *context, edgeml_event *out, uint32_t room, uint64_t *lost);

/* Note no more: what began before may still be noted when it ends. The ring stays until the next start or close. */
void edgeml_events_stop(edgeml_context *context);

/* ---- onnxruntime ---- */

/* What register_custom_ops_library calls: adds the operators of the context named by the entry "edgeml.context" to an
 * OrtSessionOptions. `base` is an OrtApiBase, the result an OrtStatus: NULL when fine. */
void *RegisterCustomOps(void *options, const void *base);

#ifdef EDGEML_SHARED
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#endif
