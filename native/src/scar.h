/* The inner part of bucketed attention: some queries of one head against some keys, by an online softmax.
 *
 * For each query the running state is the greatest score so far, the sum of weights 2^(score - greatest), and in `y` the sum of
 * weighted values. Keys are taken in chunks: scores, the new greatest, the old sums times 2^(old - new), then the
 * chunk's weights and values added in the order of the keys. Scores are sums over the vector's floats in order; a
 * product that is added to something is fused with the addition.
 *
 * Nothing here depends on how wide the vectors of an instruction set are, so all tables give the same bits. What a query gets
 * does not depend on the queries beside it either, so any division of the work among threads gives them too.
 *
 * A value that is not finite is left out where its weight is 0: what a mask hides, or what comes later, cannot spoil a row.
 */
#ifndef EDGEML_SCAR_H
#define EDGEML_SCAR_H

#include <stddef.h>
#include <stdint.h>

/* Queries are taken in tiles, keys in chunks, of 64; up to 16 more that would be left over are taken along. */
enum { TILE = 64, MOST_IN_TILE = 80, MOST_QUERIES = 512, MOST_KEYS = 512, MOST_CHUNKS = MOST_KEYS / TILE };
enum { VECTOR_STEP = 16 };        /* floats; vectors are padded to multiples of it */
#define NO_DOMAIN UINT32_MAX      /* of a token that is not sure of its domain */
#define LOWEST (-3.402823466e38f) /* the greatest score before the first */

enum { /* which pairs a call must look at one by one */
  MASK_LATER = 1,       /* leave out keys after the query */
  MASK_SAME_DOMAIN = 2, /* leave out keys of the query's domain: they have been counted */
  MASK_UNRELATED = 4    /* leave out keys that share neither cluster nor domain, unless one of the two is a global token */
};

typedef struct attend {
  const float *q, *k, *v;          /* of the head: token t's vector lies at t * stride */
  float *y;                        /* the same */
  float *most, *sum;               /* by token: LOWEST and 0 before the first call, when `y` need not be set */
  size_t stride, size;             /* floats: from token to token, of a vector */
  float scale;                     /* of scores, whose powers of two are weights: log2(e) is in it */
  const uint32_t *queries, *keys;  /* token numbers */
  size_t query_count, key_count;   /* at most MOST_QUERIES and MOST_KEYS */
  const uint32_t *cluster, *domain; /* by token */
  uint32_t global_tokens;
  unsigned mask;
  int last;                        /* divide by the sum of weights in the end */
  float *work;                     /* attend_work_floats(size) floats, on a cache line */
} attend;

static inline size_t tile_of(size_t left) { return left <= MOST_IN_TILE ? left : TILE; }

static inline size_t padded(size_t size) { return (size + VECTOR_STEP - 1) / VECTOR_STEP * VECTOR_STEP; }

/* Keys and values; a tile's queries, sums and weights; its state and factors. */
static inline size_t attend_work_floats(size_t size) {
  return (2 * MOST_KEYS + 2 * MOST_IN_TILE) * padded(size) + MOST_IN_TILE * MOST_IN_TILE + 3 * MOST_IN_TILE;
}

/* ---- what a mask has to do with a tile of queries and a chunk of keys ---- */

typedef struct extremes {
  uint32_t first, last;           /* token numbers */
  uint32_t low_domain, high_domain;
} extremes;

static inline extremes extremes_of(const attend *a, const uint32_t *tokens, size_t n) {
  extremes x = {UINT32_MAX, 0, UINT32_MAX, 0};
  for (size_t i = 0; i < n && a->mask; i++) {
    uint32_t t = tokens[i], d = a->domain[t];
    x.first = t < x.first ? t : x.first, x.last = t > x.last ? t : x.last;
    x.low_domain = d < x.low_domain ? d : x.low_domain, x.high_domain = d > x.high_domain ? d : x.high_domain;
  }
  return x;
}

enum { SKIP = -1, WHOLE = 0 };

/* SKIP: no pair is allowed; WHOLE: all are; else the masks that must be looked at. */
static inline int mask_of(const attend *a, const extremes *q, const extremes *k) {
  unsigned mask = a->mask;
  if (mask == WHOLE) return WHOLE;
  if (mask & MASK_LATER) {
    if (k->first > q->last) return SKIP;
    if (k->last <= q->first) mask &= ~(unsigned)MASK_LATER;
  }
  if (mask & MASK_SAME_DOMAIN) {
    int one = q->low_domain == q->high_domain && k->low_domain == q->low_domain && k->high_domain == q->low_domain;
    if (one && q->low_domain != NO_DOMAIN) return SKIP;
    if (one || k->low_domain > q->high_domain || k->high_domain < q->low_domain) mask &= ~(unsigned)MASK_SAME_DOMAIN;
  }
  return (int)mask;
}

/* One pair, in full. */
static inline int allowed(const attend *a, unsigned mask, uint32_t query, uint32_t key) {
  int same = a->domain[query] == a->domain[key] && a->domain[query] != NO_DOMAIN;
  if (mask & MASK_LATER && key > query) return 0;
  if (mask & MASK_SAME_DOMAIN && same) return 0;
  if (!(mask & MASK_UNRELATED)) return 1;
  return same || a->cluster[query] == a->cluster[key] || query < a->global_tokens || key < a->global_tokens;
}

void edgeml_attend_scalar(const attend *a);
void edgeml_attend_avx2(const attend *a);
void edgeml_attend_avx512(const attend *a);
void edgeml_attend_neon(const attend *a);

#endif
