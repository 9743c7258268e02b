/* Attention for a vector instruction set: everything but its instructions.
 *
 * A file defines LANES, and ROWS and COLUMNS (vectors) of the block of sums that fits its registers, includes this file, and
 * supplies
 *
 *     fused(a, b, c)   a * b + c rounded once
 *     larger(a, b)     a > b ? a : b
 *
 * Queries lie in lanes: a tile of them is turned, so that scores of a key are vectors over queries, and everything
 * that an online softmax does happens between vectors, never inside one. Scores (keys x queries) and weighted values (queries x
 * size) are the same product of a matrix read one number at a time and a matrix read by rows, so there is one routine for both.
 *
 * Keys and values of a call are copied into working memory first: in a model's tensors they are far apart, at distances that
 * make them collide in a cache.
 */
#ifndef EDGEML_SCAR_VECTOR_H
#define EDGEML_SCAR_VECTOR_H

#include "scar.h"

#include <string.h>

typedef float real __attribute__((vector_size(4 * LANES)));
typedef uint32_t word __attribute__((vector_size(4 * LANES)));

enum { AHEAD = 6, CACHE_LINE = 16 }; /* rows, floats */

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE real fused(real a, real b, real c);
INLINE real larger(real a, real b);

INLINE real load(const float *p) {
  real x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE void store(float *p, real x) { memcpy(p, &x, sizeof x); }

INLINE size_t lanes_of(size_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE real spread(float x) { return x - (real){0}; }

#include "scar_math.h"

/* ---- the product ---- */

/* c (rows, columns vectors) = c * factor + a b, sums in the order of i: a[r * a_row + i * a_step], b[i * b_step + ...]. Without
 * `factor` c starts from 0. */
INLINE void block(int rows, int columns, const float *a, size_t a_row, size_t a_step, const float *b, size_t b_step, size_t n,
                  const float *factor, float *c, size_t c_row) {
  real sum[2 * ROWS][COLUMNS]; /* rows x columns of it, all in registers */
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++)
    sum[r][v] = factor ? load(c + (size_t)r * c_row + v * LANES) * factor[r] : (real){0};
  for (size_t i = 0; i < n; i++, a += a_step, b += b_step) {
    real line[COLUMNS];
    UNROLL for (int v = 0; v < columns; v++) line[v] = load(b + v * LANES);
    UNROLL for (int r = 0; r < rows; r++) {
      real x = spread(a[(size_t)r * a_row]);
      UNROLL for (int v = 0; v < columns; v++) sum[r][v] = fused(x, line[v], sum[r][v]);
    }
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < columns; v++) store(c + (size_t)r * c_row + v * LANES, sum[r][v]);
}

typedef struct matrices {
  const float *a, *b, *factor;
  float *c;
  size_t a_row, a_step, b_step, c_row;
} matrices;

/* One vector wide it takes more rows: fewer sums than that would wait for each other. */
INLINE void strip(int columns, const matrices *m, size_t rows, size_t n, size_t column) {
  const int most = columns == 1 ? 2 * ROWS : ROWS;
  for (size_t r = 0; r < rows; r += (size_t)most) {
    const float *a = m->a + r * m->a_row, *b = m->b + column, *factor = m->factor ? m->factor + r : NULL;
    float *c = m->c + r * m->c_row + column;
    size_t left = rows - r < (size_t)most ? rows - r : (size_t)most;
#define BLOCK(count) block(count, columns, a, m->a_row, m->a_step, b, m->b_step, n, factor, c, m->c_row)
    if (left == 2 * ROWS) BLOCK(2 * ROWS);
    for (; left < 2 * ROWS && left > 0; left -= left < ROWS ? left : ROWS) {
      switch (left) {
        case 1: BLOCK(1); break;
        case 2: BLOCK(2); break;
        case 3: BLOCK(3); break;
        case 4: BLOCK(4); break;
        case 5: BLOCK(5); break;
        default: BLOCK(6);
      }
      a += ROWS * m->a_row, c += ROWS * m->c_row, factor = factor ? factor + ROWS : NULL;
    }
#undef BLOCK
  }
}

/* c (rows, width) = c * factor + a (rows, n) b (n, width); width is a multiple of LANES. */
INLINE void product(const matrices *m, size_t rows, size_t n, size_t width) {
  size_t column = 0;
  for (; width - column >= COLUMNS * LANES; column += COLUMNS * LANES) strip(COLUMNS, m, rows, n, column);
  for (; COLUMNS > 2 && width - column >= COLUMNS / 2 * LANES; column += COLUMNS / 2 * LANES) strip(COLUMNS / 2, m, rows, n, column);
  for (; column < width; column += LANES) strip(1, m, rows, n, column);
}

/* ---- working memory ---- */

typedef struct work {
  float *keys, *values;          /* (MOST_KEYS, padded size) */
  float *turned;                 /* (size, MOST_IN_TILE): queries, scaled */
  float *weights;                /* (MOST_IN_TILE, MOST_IN_TILE) */
  float *y;                      /* (MOST_IN_TILE, padded size) */
  float *most, *sum, *factor;    /* (MOST_IN_TILE) */
  size_t chunks;                 /* of keys; all but the last are TILE long */
  extremes extremes[MOST_CHUNKS];
  int finite[MOST_CHUNKS]; /* whether all of a chunk's values are */
} work;

INLINE void divide_work(const attend *a, work *w) {
  size_t size = padded(a->size);
  w->keys = a->work, w->values = w->keys + MOST_KEYS * size, w->turned = w->values + MOST_KEYS * size;
  w->y = w->turned + MOST_IN_TILE * size, w->weights = w->y + MOST_IN_TILE * size;
  w->most = w->weights + MOST_IN_TILE * MOST_IN_TILE, w->sum = w->most + MOST_IN_TILE, w->factor = w->sum + MOST_IN_TILE;
}

/* `size` floats, then zeros up to `end`. */
INLINE void copy(float *to, const float *from, size_t size, size_t end) {
  size_t i = 0;
  for (; size - i >= LANES; i += LANES) store(to + i, load(from + i));
  for (; i < end; i++) to[i] = i < size ? from[i] : 0.0f;
}

/* The same; returns bits that are all ones in some lane where one of the floats is not finite. */
INLINE word copy_checked(float *to, const float *from, size_t size) {
  word found = {0};
  copy(to, from, size, padded(size));
  for (size_t i = 0; i < padded(size); i += LANES) found |= ~less_mask(magnitude(load(to + i)), constant(INFINITY_BITS));
  return found;
}

/* Rows are scattered, so the processor does not see which one comes next. */
INLINE void prefetch(const float *rows, size_t stride, size_t size, const uint32_t *numbers, size_t i, size_t n) {
  if (i + AHEAD >= n) return;
  const float *row = rows + numbers[i + AHEAD] * stride;
  for (size_t line = 0; line < size; line += CACHE_LINE) __builtin_prefetch(row + line);
}

static void copy_keys(const attend *a, work *w) {
  size_t size = padded(a->size);
  w->chunks = 0;
  for (size_t begin = 0, end; begin < a->key_count; begin = end) {
    size_t c = w->chunks++;
    end = begin + tile_of(a->key_count - begin);
    word found = {0};
    for (size_t j = begin; j < end; j++) {
      prefetch(a->k, a->stride, a->size, a->keys, j, a->key_count);
      prefetch(a->v, a->stride, a->size, a->keys, j, a->key_count);
      copy(w->keys + j * size, a->k + a->keys[j] * a->stride, a->size, size);
      found |= copy_checked(w->values + j * size, a->v + a->keys[j] * a->stride, a->size);
    }
    w->finite[c] = 1;
    for (int lane = 0; lane < LANES; lane++) w->finite[c] &= !found[lane];
    w->extremes[c] = extremes_of(a, a->keys + begin, end - begin);
  }
}

typedef float four __attribute__((vector_size(16)));

/* Four floats of four queries, scaled, as four lanes of four rows. */
INLINE void turn_block(float *to, const float *const *from, size_t i, float scale) {
  four row[4], half[4];
  UNROLL for (int j = 0; j < 4; j++) memcpy(&row[j], from[j] + i, sizeof row[j]), row[j] *= scale;
  UNROLL for (int j = 0; j < 2; j++) {
    half[2 * j] = __builtin_shufflevector(row[2 * j], row[2 * j + 1], 0, 4, 1, 5);
    half[2 * j + 1] = __builtin_shufflevector(row[2 * j], row[2 * j + 1], 2, 6, 3, 7);
  }
  UNROLL for (int j = 0; j < 2; j++) {
    row[2 * j] = __builtin_shufflevector(half[j], half[j + 2], 0, 1, 4, 5);
    row[2 * j + 1] = __builtin_shufflevector(half[j], half[j + 2], 2, 3, 6, 7);
  }
  UNROLL for (int j = 0; j < 4; j++) memcpy(to + (i + (size_t)j) * MOST_IN_TILE, &row[j], sizeof row[j]);
}

/* Lanes up to `width` without a query repeat the last one. */
static void turn_queries(const attend *a, float *turned, const uint32_t *queries, size_t n, size_t width) {
  for (size_t j = 0; j < width; j += 4) {
    const float *from[4];
    size_t i = 0;
    for (size_t r = 0; r < 4; r++) from[r] = a->q + queries[j + r < n ? j + r : n - 1] * a->stride;
    for (; a->size - i >= 4; i += 4) turn_block(turned + j, from, i, a->scale);
    for (; i < a->size; i++)
      for (size_t r = 0; r < 4; r++) turned[i * MOST_IN_TILE + j + r] = from[r][i] * a->scale;
  }
}

/* ---- the softmax of a chunk ---- */

typedef struct lanes { /* what a mask must know of a tile's queries */
  uint32_t token[MOST_IN_TILE], cluster[MOST_IN_TILE], domain[MOST_IN_TILE];
} lanes;

static void gather_lanes(const attend *a, lanes *l, const uint32_t *queries, size_t n) {
  for (size_t j = 0; j < MOST_IN_TILE; j++) {
    uint32_t t = queries[j < n ? j : 0], d = a->domain[t];
    l->token[j] = t, l->cluster[j] = a->cluster[t], l->domain[j] = d == NO_DOMAIN ? NO_DOMAIN - 1 : d; /* equals no key's */
  }
}

INLINE word load_words(const uint32_t *p) {
  word x;
  memcpy(&x, p, sizeof x);
  return x;
}

INLINE word equal_mask(word a, uint32_t b) { return (word)(a == b); }

/* Scores of one key, where it is allowed; elsewhere minus infinity. */
INLINE real masked(const attend *a, unsigned mask, const lanes *l, size_t lane, uint32_t key, real score) {
  word token = load_words(l->token + lane), hidden = {0};
  word same = equal_mask(load_words(l->domain + lane), a->domain[key]);
  if (mask & MASK_SAME_DOMAIN) hidden |= same;
  if (mask & MASK_UNRELATED) {
    same |= equal_mask(load_words(l->cluster + lane), a->cluster[key]) | less_mask(token, constant(a->global_tokens));
    if (key >= a->global_tokens) hidden |= ~same;
  }
  if (mask & MASK_LATER) hidden |= less_mask(token, constant(key));
  return select_real(hidden, real_of(constant(SIGN_BIT | INFINITY_BITS)), score);
}

INLINE void soften(const attend *a, const work *w, size_t lane, const uint32_t *keys, size_t n, unsigned mask, const lanes *l) {
  real before = load(w->most + lane), most = before, sum;
  float *weights = w->weights + lane;
  for (size_t j = 0; j < n; j++) {
    real score = load(weights + j * MOST_IN_TILE);
    if (mask) store(weights + j * MOST_IN_TILE, score = masked(a, mask, l, lane, keys[j], score));
    most = larger(score, most);
  }
  real factor = power(before - most);
  sum = load(w->sum + lane) * factor;
  for (size_t j = 0; j < n; j++) {
    real weight = power(load(weights + j * MOST_IN_TILE) - most);
    sum = sum + weight;
    store(weights + j * MOST_IN_TILE, weight);
  }
  store(w->most + lane, most), store(w->sum + lane, sum), store(w->factor + lane, factor);
}

/* ---- a tile of queries ---- */

/* Where some values are not finite: those of weight 0 are left out. */
static void add_carefully(const work *w, size_t queries, size_t n, const float *values, size_t size) {
  for (size_t q = 0; q < queries; q++)
    for (size_t i = 0; i < size; i += LANES) {
      float *place = w->y + q * size + i;
      real y = load(place) * w->factor[q];
      for (size_t j = 0; j < n; j++) {
        float weight = w->weights[j * MOST_IN_TILE + q];
        if (weight != 0) y = fused(spread(weight), load(values + j * size + i), y);
      }
      store(place, y);
    }
}

static void add_chunk(const attend *a, const work *w, size_t c, size_t queries, unsigned mask, const lanes *l) {
  size_t size = padded(a->size), begin = c * TILE, n = tile_of(a->key_count - begin), width = lanes_of(queries);
  const float *values = w->values + begin * size;
  matrices scores = {w->keys + begin * size, w->turned, NULL, w->weights, size, 1, MOST_IN_TILE, MOST_IN_TILE};
  product(&scores, n, a->size, width);
  for (size_t lane = 0; lane < width; lane += LANES) {
    switch (mask) { /* a mask that is a constant costs less */
      case WHOLE: soften(a, w, lane, NULL, n, WHOLE, NULL); break;
      case MASK_SAME_DOMAIN: soften(a, w, lane, a->keys + begin, n, MASK_SAME_DOMAIN, l); break;
      case MASK_UNRELATED: soften(a, w, lane, a->keys + begin, n, MASK_UNRELATED, l); break;
      default: soften(a, w, lane, a->keys + begin, n, mask, l);
    }
  }
  matrices sums = {w->weights, values, w->factor, w->y, 1, MOST_IN_TILE, size, size};
  if (w->finite[c]) product(&sums, queries, n, size);
  else add_carefully(w, queries, n, values, size);
}

static void read_state(const attend *a, const work *w, const uint32_t *queries, size_t n) {
  size_t size = padded(a->size);
  for (size_t j = 0; j < MOST_IN_TILE; j++) {
    w->most[j] = j < n ? a->most[queries[j]] : LOWEST, w->sum[j] = j < n ? a->sum[queries[j]] : 0;
    if (j >= n) continue;
    if (w->most[j] == LOWEST) memset(w->y + j * size, 0, size * sizeof *w->y);
    else copy(w->y + j * size, a->y + queries[j] * a->stride, a->size, size);
  }
}

static void write_state(const attend *a, const work *w, const uint32_t *queries, size_t n) {
  size_t size = padded(a->size);
  for (size_t j = 0; j < n; j++) {
    float *from = w->y + j * size, *to = a->y + queries[j] * a->stride, inverse = 1.0f / w->sum[j];
    for (size_t i = 0; i < size && a->last; i += LANES) store(from + i, canonical(load(from + i) * inverse));
    copy(to, from, a->size, a->size);
    a->most[queries[j]] = w->most[j], a->sum[queries[j]] = w->sum[j];
  }
}

static void attend_tiles(const attend *a) {
  work w;
  lanes l;
  divide_work(a, &w);
  copy_keys(a, &w);
  for (size_t begin = 0, n; begin < a->query_count; begin += n) {
    const uint32_t *queries = a->queries + begin;
    n = tile_of(a->query_count - begin);
    extremes tile = extremes_of(a, queries, n);
    read_state(a, &w, queries, n);
    if (a->key_count) turn_queries(a, w.turned, queries, n, lanes_of(n));
    if (a->mask) gather_lanes(a, &l, queries, n);
    for (size_t c = 0; c < w.chunks; c++) {
      int mask = mask_of(a, &tile, &w.extremes[c]);
      if (mask != SKIP) add_chunk(a, &w, c, n, (unsigned)mask, &l);
    }
    write_state(a, &w, queries, n);
  }
}

#endif
