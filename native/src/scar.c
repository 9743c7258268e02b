/* Bucketed attention: which queries meet which keys.
 *
 * A query's keys are the global tokens, those of its domain (if it is sure of it) and those of its cluster. Two orders of the
 * tokens, made by counting sort, put them side by side:
 *
 *     by domain    the global tokens, then those sure of no domain, then domain after domain; by number inside each
 *     by cluster   without the global tokens: cluster after cluster; inside each by domain, then by number
 *
 * and two passes go through them in pieces of up to 256 queries, which any thread takes for any head:
 *
 *     1. in the order by cluster: a query meets its cluster, less the keys of its domain
 *     2. in the order by domain: a query meets the global tokens and its domain; a global token meets everything
 *
 * so every allowed pair is met once and nothing of size tokens x tokens is made. Between the passes a query's state waits in `y`
 * and in working memory. Where over half of all pairs are allowed, one pass over all keys in their own order, with a mask, takes
 * the place of both. The sorted orders also count the pairs, so the choice costs nothing. Sequences of a batch are planned and
 * computed one after the other: what one of them gets does not depend on the others.
 */
#include "scar.h"

#include <stdatomic.h>
#include <string.h>

#include "context.h"

enum { MOST_IDS = 1 << 20, MOST_TOKENS = 1 << 24, MOST_HEADS = 1 << 16, MOST_SIZE = 1 << 12, CACHE_LINE = 64 };
#define DENSE_ABOVE 0.5
#define LOG2_E 1.44269504f

/* Some queries and their keys, as ranges of an order. */
typedef struct piece {
  uint32_t query, query_end, key, key_end;
} piece;

typedef struct pieces {
  piece *all;
  uint32_t count;
} pieces;

/* One sequence of the batch. */
typedef struct plan {
  const edgeml_attention *in;
  const uint32_t *cluster;           /* (tokens) */
  uint32_t *domain;                  /* (tokens): NO_DOMAIN where not sure */
  uint32_t *by_domain, *by_cluster;  /* (tokens) */
  uint32_t *first;                   /* counts, then places, of a counting sort */
  pieces in_domains, in_clusters;
  uint32_t real_tokens, global_tokens; /* not padded; of them, global */
  float *most, *sum;                 /* (heads, tokens) */
  float *work;                       /* (threads, work_floats) */
  size_t work_floats;
} plan;

/* One pass over the pieces of some heads, on every thread. */
typedef struct pass {
  const plan *plan;
  const edgeml_kernels *kernels;
  const pieces *pieces;
  const uint32_t *order;
  size_t sequence, head, head_end;
  unsigned mask;
  int with_globals, last;            /* the global tokens come before each piece's keys; it is the queries' last pass */
  atomic_size_t next;
} pass;

/* ---- working memory ---- */

static int add_bytes(size_t *total, size_t count, size_t size) {
  size_t bytes;
  if (__builtin_mul_overflow(count, size, &bytes) || __builtin_add_overflow(*total, bytes + CACHE_LINE, total)) return 1;
  *total = *total / CACHE_LINE * CACHE_LINE;
  return 0;
}

/* Clusters, or domains (two in the published mask) after two buckets of other tokens; and one for the end. */
static size_t sort_counts(const edgeml_attention *in) { return (in->clusters > in->domains ? in->clusters : in->domains) + 4ul; }

/* A piece begins in every bucket of an order, or MOST_QUERIES after another. */
static size_t most_pieces(const edgeml_attention *in) { return in->tokens + in->tokens / MOST_QUERIES + 1; }

static int valid(const edgeml_attention *in) {
  size_t all;
  if (in->heads < 1 || in->heads > MOST_HEADS || in->head_size < 1 || in->head_size > MOST_SIZE || in->tokens > MOST_TOKENS) return 0;
  if (in->clusters < 1 || in->clusters > MOST_IDS || in->domains < 1 || in->domains > MOST_IDS) return 0;
  if (in->threshold != in->threshold || (in->published && (in->causal || in->global_tokens))) return 0;
  return !__builtin_mul_overflow(in->heads * in->head_size * (in->tokens + 1), in->batch, &all) && all <= (size_t)1 << 60;
}

/* Hands out the parts of `memory`, or measures them; 0 where they are too large. */
static size_t divide_scratch(const edgeml_attention *in, size_t threads, uint8_t *memory, plan *p) {
  uint8_t *base = (uint8_t *)(((uintptr_t)memory + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
  size_t used = 0, work_floats = (attend_work_floats(in->head_size) + 15) / 16 * 16;
#define PART(member, count)                                                           \
  do {                                                                                \
    if (memory) p->member = (void *)(base + used);                                   \
    if (add_bytes(&used, count, sizeof *p->member)) return 0;                         \
  } while (0)
  PART(domain, in->tokens);
  PART(by_domain, in->tokens);
  PART(by_cluster, in->tokens);
  PART(first, sort_counts(in));
  PART(in_domains.all, most_pieces(in));
  PART(in_clusters.all, most_pieces(in));
  PART(most, in->heads * in->tokens);
  PART(sum, in->heads * in->tokens);
  PART(work, threads * work_floats);
#undef PART
  if (memory) p->work_floats = work_floats;
  return used + CACHE_LINE;
}

size_t edgeml_attention_scratch(const edgeml_context *context, const edgeml_attention *attention) {
  size_t threads = context ? (size_t)context->pool.threads : 1;
  return valid(attention) ? divide_scratch(attention, threads, NULL, NULL) : 0;
}

/* ---- sorting ---- */

static int padded_out(const edgeml_attention *in, size_t token) { return in->pad && !in->published && in->pad[token]; }

/* Domains as they count: in the published mask a domain is whether the token is sure. Returns 1 at an id outside its range. */
static int read_domains(plan *p, size_t sequence, edgeml_fault *fault) {
  const edgeml_attention *in = p->in;
  size_t at = sequence * in->tokens;
  for (size_t t = 0; t < in->tokens; t++) {
    if (padded_out(in, at + t)) continue;
    int64_t cluster = in->cluster[at + t], domain = in->domain[at + t];
    int sure = in->confidence[at + t] > in->threshold; /* NaN is not */
    int bad_cluster = cluster < 0 || cluster >= in->clusters;
    if (bad_cluster || domain < 0 || domain >= in->domains) {
      *fault = (edgeml_fault){.status = EDGEML_BAD_ARGUMENT, .page = UINT32_MAX, .value = bad_cluster ? cluster : domain};
      return 1;
    }
    p->domain[t] = in->published ? (uint32_t)sure : sure ? (uint32_t)domain : NO_DOMAIN;
  }
  return 0;
}

static uint32_t domain_bucket(const plan *p, uint32_t token) {
  if (token < p->in->global_tokens) return 0;
  return p->domain[token] == NO_DOMAIN ? 1 : p->domain[token] + 2;
}

static void sort_by_domain(plan *p, size_t sequence) {
  const edgeml_attention *in = p->in;
  size_t buckets = sort_counts(in);
  p->real_tokens = p->global_tokens = 0;
  memset(p->first, 0, buckets * sizeof *p->first);
  for (uint32_t t = 0; t < in->tokens; t++) {
    if (padded_out(in, sequence * in->tokens + t)) continue;
    p->real_tokens++, p->global_tokens += t < in->global_tokens;
    p->first[domain_bucket(p, t) + 1]++;
  }
  for (size_t b = 1; b < buckets; b++) p->first[b] += p->first[b - 1];
  for (uint32_t t = 0; t < in->tokens; t++)
    if (!padded_out(in, sequence * in->tokens + t)) p->by_domain[p->first[domain_bucket(p, t)]++] = t;
}

/* The stable sort of the other order keeps that order inside each cluster. */
static void sort_by_cluster(plan *p) {
  memset(p->first, 0, sort_counts(p->in) * sizeof *p->first);
  for (uint32_t i = p->global_tokens; i < p->real_tokens; i++) p->first[p->cluster[p->by_domain[i]] + 1]++;
  for (uint32_t c = 1; c <= p->in->clusters; c++) p->first[c] += p->first[c - 1];
  for (uint32_t i = p->global_tokens; i < p->real_tokens; i++) p->by_cluster[p->first[p->cluster[p->by_domain[i]]]++] = p->by_domain[i];
}

/* ---- buckets ---- */

/* The end of the bucket of by_domain that begins at `begin`. */
static uint32_t domain_end(const plan *p, uint32_t begin) {
  uint32_t end = begin, bucket = domain_bucket(p, p->by_domain[begin]);
  while (end < p->real_tokens && domain_bucket(p, p->by_domain[end]) == bucket) end++;
  return end;
}

/* The end of the run of by_cluster from `begin` that has one cluster, or one cluster and domain. */
static uint32_t cluster_end(const plan *p, uint32_t begin, int one_domain) {
  uint32_t end = begin, t = p->by_cluster[begin], count = p->real_tokens - p->global_tokens;
  while (end < count && p->cluster[p->by_cluster[end]] == p->cluster[t] && (!one_domain || p->domain[p->by_cluster[end]] == p->domain[t]))
    end++;
  return end;
}

/* Pairs among n tokens. */
static uint64_t pairs_of(const plan *p, uint64_t n) { return p->in->causal ? n * (n + 1) / 2 : n * n; }

/* Allowed pairs: those of every cluster and of every domain, less those of both; and those of the global tokens. */
static uint64_t count_pairs(const plan *p) {
  uint64_t g = p->global_tokens, others = p->real_tokens - g, pairs = pairs_of(p, g) + (p->in->causal ? 1 : 2) * g * others;
  for (uint32_t i = p->global_tokens, end; i < p->real_tokens; i = end) {
    end = domain_end(p, i);
    if (p->domain[p->by_domain[i]] != NO_DOMAIN) pairs += pairs_of(p, end - i);
  }
  for (uint32_t i = 0, end; i < others; i = end) end = cluster_end(p, i, 0), pairs += pairs_of(p, end - i);
  for (uint32_t i = 0, end; i < others; i = end) {
    end = cluster_end(p, i, 1);
    if (p->domain[p->by_cluster[i]] != NO_DOMAIN) pairs -= pairs_of(p, end - i);
  }
  return pairs;
}

static void add_pieces(pieces *p, uint32_t query, uint32_t query_end, uint32_t key, uint32_t key_end, int earlier_only) {
  for (uint32_t next; query < query_end; query = next) {
    next = query_end - query < MOST_QUERIES ? query_end : query + MOST_QUERIES;
    p->all[p->count++] = (piece){query, next, key, earlier_only && next < key_end ? next : key_end};
  }
}

/* Pass 2. Tokens sure of no domain have met everything where none is global, but have to be finished. */
static void plan_domains(plan *p) {
  uint32_t g = p->global_tokens;
  p->in_domains.count = 0;
  add_pieces(&p->in_domains, 0, g, g, p->in->causal ? g : p->real_tokens, 0);
  for (uint32_t i = g, end; i < p->real_tokens; i = end) {
    int sure = p->domain[p->by_domain[i]] != NO_DOMAIN;
    end = domain_end(p, i);
    add_pieces(&p->in_domains, i, end, sure ? i : end, end, sure && p->in->causal);
  }
}

/* Pass 1. A cluster of one domain is left to pass 2. */
static void plan_clusters(plan *p) {
  uint32_t count = p->real_tokens - p->global_tokens;
  p->in_clusters.count = 0;
  for (uint32_t i = 0, end; i < count; i = end) {
    end = cluster_end(p, i, 0);
    if (p->domain[p->by_cluster[i]] == NO_DOMAIN || cluster_end(p, i, 1) < end) add_pieces(&p->in_clusters, i, end, i, end, 0);
  }
}

/* ---- computing ---- */

static void run_piece(const pass *s, const piece *c, size_t head, float *work) {
  const plan *p = s->plan;
  const edgeml_attention *in = p->in;
  size_t all = in->heads * in->tokens * in->head_size, at = s->sequence * all;
  size_t stride = in->token_major ? in->heads * in->head_size : in->head_size;
  at += head * (in->token_major ? in->head_size : in->tokens * in->head_size);
  uint32_t tokens[MOST_KEYS], globals = s->with_globals ? p->global_tokens : 0, count = globals + c->key_end - c->key;
  attend a = {
      .q = in->q + at, .k = in->k + at, .v = in->v + at, .y = in->y + at, .stride = stride, .size = in->head_size, .scale = in->scale,
      .most = p->most + head * in->tokens, .sum = p->sum + head * in->tokens, .queries = s->order + c->query,
      .query_count = c->query_end - c->query, .keys = tokens, .cluster = p->cluster, .domain = p->domain,
      .global_tokens = in->global_tokens, .mask = s->mask, .work = work};
  uint32_t done = 0;
  do {
    a.key_count = count - done < MOST_KEYS ? count - done : MOST_KEYS;
    for (uint32_t i = 0; i < a.key_count; i++, done++) tokens[i] = s->order[done < globals ? done : c->key + done - globals];
    a.last = s->last && done == count;
    s->kernels->attend(&a);
  } while (done < count);
}

static void pass_body(void *argument, int worker) {
  pass *s = argument;
  size_t count = s->pieces->count, total = (s->head_end - s->head) * count;
  float *work = s->plan->work + (size_t)worker * s->plan->work_floats;
  for (size_t i; (i = atomic_fetch_add(&s->next, 1)) < total;) run_piece(s, &s->pieces->all[i % count], s->head + i / count, work);
}

static void run_pass(const plan *p, const edgeml_kernels *kernels, pool *threads, pass s) {
  s.plan = p, s.kernels = kernels;
  s.mask |= p->in->causal ? MASK_LATER : 0;
  if (s.pieces->count) pool_run(threads, pass_body, &s);
}

static void run_dense(plan *p, const edgeml_kernels *kernels, pool *threads, size_t sequence) {
  uint32_t count = 0;
  for (uint32_t t = 0; t < p->in->tokens; t++)
    if (!padded_out(p->in, sequence * p->in->tokens + t)) p->by_domain[count++] = t;
  p->in_domains.count = 0;
  add_pieces(&p->in_domains, 0, count, 0, count, p->in->causal);
  pass all = {.pieces = &p->in_domains, .order = p->by_domain, .sequence = sequence, .head_end = p->in->heads, .last = 1};
  all.mask = MASK_UNRELATED;
  run_pass(p, kernels, threads, all);
}

/* Both passes of a head for each thread, then of the next ones: what pass 1 has read is still in a cache for pass 2. */
static void run_buckets(plan *p, const edgeml_kernels *kernels, pool *threads, size_t sequence) {
  int more = p->global_tokens || (p->real_tokens && p->domain[p->by_domain[p->real_tokens - 1]] != NO_DOMAIN);
  size_t heads = p->in->heads, together = (size_t)threads->threads;
  pass first = {.pieces = &p->in_clusters, .order = p->by_cluster, .sequence = sequence, .mask = MASK_SAME_DOMAIN, .last = !more};
  pass second = {.pieces = &p->in_domains, .order = p->by_domain, .sequence = sequence, .with_globals = 1, .last = 1};
  plan_clusters(p);
  plan_domains(p);
  for (size_t h = 0; h < heads; h += together) {
    first.head = second.head = h, first.head_end = second.head_end = heads - h < together ? heads : h + together;
    run_pass(p, kernels, threads, first);
    if (more) run_pass(p, kernels, threads, second);
  }
}

/* No query has a state yet, and padded ones never will. */
static void begin_sequence(const plan *p, size_t sequence) {
  const edgeml_attention *in = p->in;
  for (size_t i = 0; i < in->heads * in->tokens; i++) p->most[i] = LOWEST, p->sum[i] = 0;
  for (size_t t = 0; t < in->tokens; t++)
    for (size_t h = 0; h < in->heads && padded_out(in, sequence * in->tokens + t); h++) {
      size_t row = in->token_major ? (sequence * in->tokens + t) * in->heads + h : (sequence * in->heads + h) * in->tokens + t;
      memset(in->y + row * in->head_size, 0, in->head_size * sizeof *in->y);
    }
}

static int attend_all(const edgeml_attention *in, const edgeml_kernels *kernels, pool *threads, void *memory, edgeml_fault *fault) {
  plan p = {.in = in};
  divide_scratch(in, (size_t)threads->threads, memory, &p);
  for (size_t b = 0; b < in->batch; b++) /* all ids before the first result */
    if (read_domains(&p, b, fault)) return fault->status;
  for (size_t b = 0; b < in->batch; b++) {
    p.cluster = (const uint32_t *)in->cluster + b * in->tokens;
    read_domains(&p, b, fault);
    sort_by_domain(&p, b);
    sort_by_cluster(&p);
    double density = in->tokens ? (double)count_pairs(&p) / ((double)in->tokens * (double)in->tokens) : 0;
    if (in->density) in->density[b] = (float)density;
    begin_sequence(&p, b);
    if (density > DENSE_ABOVE) run_dense(&p, kernels, threads, b);
    else run_buckets(&p, kernels, threads, b);
  }
  return EDGEML_OK;
}

/* 1 / sqrt(n) by Newton's method, so that no library of functions is needed. */
static float inverse_root(size_t n) {
  double root = 64;
  for (int i = 0; i < 12; i++) root = (root + (double)n / root) / 2;
  return (float)(1 / root);
}

int edgeml_scar_attention(edgeml_context *context, const char *isa, const edgeml_attention *attention, void *memory, edgeml_fault *fault) {
  edgeml_fault unused;
  pool alone = {.threads = 1};
  if (!fault) fault = &unused;
  *fault = (edgeml_fault){.page = UINT32_MAX};
  const edgeml_kernels *kernels = context && !isa ? context->kernels : edgeml_kernels_get(isa);
  if (!kernels) return fault->status = EDGEML_NO_SUCH_ISA;
  if (!edgeml_attention_scratch(context, attention) || !memory) return fault->status = EDGEML_BAD_ARGUMENT;
  edgeml_attention in = *attention;
  in.scale = (in.scale != 0 ? in.scale : inverse_root(in.head_size)) * LOG2_E;
  return attend_all(&in, kernels, context ? &context->pool : &alone, memory, fault);
}
