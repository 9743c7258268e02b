/* What an open bundle holds on the native side: pages, kernels, threads, working memory. */
#ifndef EDGEML_CONTEXT_H
#define EDGEML_CONTEXT_H

#include "kernels.h"
#include "pager.h"
#include "pool.h"

enum { CHUNK_TOKENS = 128, JOB_TOKENS = 32, NO_USE = -1 };

/* A site as the operators see it. */
typedef struct site {
  edgeml_expert_ref *experts, *shared;
  uint32_t expert_count, shared_count, hidden, top_k;
  uint32_t *pages;     /* (page_count): distinct pages of the routed experts, ascending */
  uint32_t *use_of;    /* (expert_count): index into `pages` of each expert's page */
  uint32_t page_count;
} site;

/* A part of one expert's work: up to JOB_TOKENS of its tokens. */
typedef struct job {
  const edgeml_expert_ref *expert;
  uint32_t begin, end; /* rows of the call's sorted list; tokens themselves for a shared expert */
  int32_t use;         /* index into the call's uses; NO_USE for a shared expert */
  int32_t shared;      /* which shared expert, else -1 */
  uint32_t started;
} job;

/* A page that a call needs: pinned while jobs of it remain, or deferred until a slot is free. */
typedef struct use {
  uint32_t jobs;       /* that remain */
  uint32_t pinned;
  uint32_t loaded;     /* pinned for a read that this call began */
} use;

/* Quantized inputs of n rows: q (n, k32), scale and qsum (n, k32 / 32). */
typedef struct quantized {
  int8_t *q;
  float *scale;
  int32_t *qsum;
} quantized;

/* Of one thread: gathered inputs and hidden activations of JOB_TOKENS tokens. */
typedef struct worker_scratch {
  quantized in, mid;
  float *x, *h, *gate;
} worker_scratch;

/* Of one operator call that computes. */
typedef struct scratch {
  quantized in;        /* of CHUNK_TOKENS rows */
  float *routed;       /* (CHUNK_TOKENS x top_k, hidden): experts' outputs, sorted by expert */
  float *shared;       /* (shared_count, CHUNK_TOKENS, hidden) */
  uint32_t *token_of;  /* (CHUNK_TOKENS x top_k): token of each sorted row */
  uint32_t *row_of;    /* (CHUNK_TOKENS x top_k): sorted row of each (token, j) */
  uint32_t *first;     /* (experts + 1): first sorted row of each expert */
  job *jobs;
  use *uses;
  worker_scratch *workers;
} scratch;

/* Largest sizes over all sites and pages: what a scratch must have room for. */
typedef struct extent {
  uint32_t hidden, width, columns, experts, shared, top_k, pages;
  int gated, floats;
} extent;

typedef struct row_cache {
  pthread_mutex_t lock;
  uint32_t *row;       /* (entries): row number, or UINT32_MAX */
  uint8_t *bytes;      /* (entries, stride) */
  uint32_t entries;
} row_cache;

struct edgeml_context {
  uint64_t handle;
  const edgeml_kernels *kernels;
  pager pager;
  pool pool;
  site *sites;
  uint32_t site_count;
  uint8_t *pinned;     /* arena of pinned pages */
  uint64_t pinned_bytes, scratch_bytes;
  row_cache *rows;     /* (page_count): of rows pages; entries 0 for others */
  extent extent;
  scratch *scratches;
  void *scratch_memory;
  uint32_t scratch_count, idle_count, *idle;
  pthread_mutex_t idle_lock;
  pthread_cond_t idle_changed;
  atomic_uint users;   /* requests that run and operators in onnxruntime sessions */
  struct edgeml_context *next;
};

/* plan.c: sites, sizes, working memory. */
int sites_copy(const edgeml_options *options, page *pages, uint32_t page_count, site **out);
void sites_free(site *sites, uint32_t count);
extent extent_of(const site *sites, uint32_t site_count, const page *pages, uint32_t page_count);
int plan_pages(page *pages, uint32_t page_count, const site *sites, uint32_t site_count, edgeml_plan_result *out);
uint64_t row_cache_bytes(const page *pages, uint32_t page_count);
uint64_t scratch_layout(const extent *extent, uint32_t threads, scratch *scratch, uint8_t *base);

/* context.c */
scratch *scratch_take(edgeml_context *context, edgeml_request *request);
void scratch_return(edgeml_context *context, edgeml_request *request, scratch *scratch);
edgeml_request *request_current(const edgeml_context *context);
edgeml_context *context_of(uint64_t handle); /* counted among its users, so that it does not close; NULL where there is none */

#endif
