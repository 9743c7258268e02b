/* What a context will hold: sites as given, pinned and pageable pages, and the layout of working memory. Everything is sized
 * here, before anything large is allocated, so that a budget can be judged without opening. */
#include <stdlib.h>
#include <string.h>

#include "context.h"

#define ROW_CACHE_ENTRIES 1024u

static size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }
static uint32_t max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }

static int by_number(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return (x > y) - (x < y);
}

static int refs_copy(const edgeml_expert_ref *refs, uint32_t count, uint32_t hidden, const page *pages, uint32_t page_count,
                     edgeml_expert_ref **out) {
  *out = malloc((count + 1ul) * sizeof **out);
  if (!*out) return EDGEML_NO_MEMORY;
  for (uint32_t i = 0; i < count; i++) {
    if (refs[i].page >= page_count) return EDGEML_BAD_ARGUMENT;
    const page *p = &pages[refs[i].page];
    if (p->kind != KIND_EXPERT || refs[i].sub >= p->count || p->matrices[0].cols != hidden) return EDGEML_BAD_ARGUMENT;
    (*out)[i] = refs[i];
  }
  return EDGEML_OK;
}

static int find_pages(site *s) {
  s->pages = malloc((s->expert_count + 1ul) * sizeof *s->pages);
  s->use_of = malloc((s->expert_count + 1ul) * sizeof *s->use_of);
  if (!s->pages || !s->use_of) return EDGEML_NO_MEMORY;
  for (uint32_t e = 0; e < s->expert_count; e++) s->pages[e] = s->experts[e].page;
  qsort(s->pages, s->expert_count, sizeof *s->pages, by_number);
  for (uint32_t e = 0; e < s->expert_count; e++)
    if (e == 0 || s->pages[e] != s->pages[s->page_count - 1]) s->pages[s->page_count++] = s->pages[e];
  for (uint32_t e = 0; e < s->expert_count; e++) {
    const uint32_t *found = bsearch(&s->experts[e].page, s->pages, s->page_count, sizeof *s->pages, by_number);
    s->use_of[e] = (uint32_t)(found - s->pages);
  }
  return EDGEML_OK;
}

static int site_copy(const edgeml_site *from, uint32_t number, page *pages, uint32_t page_count, site *to) {
  *to = (site){.expert_count = from->expert_count, .shared_count = from->shared_count, .hidden = from->hidden, .top_k = from->top_k};
  if (from->hidden < 1 || from->hidden > 1u << 24 || from->expert_count > 1u << 20 || from->shared_count > 256 || from->top_k > 1u << 10)
    return EDGEML_BAD_ARGUMENT;
  int status = refs_copy(from->experts, from->expert_count, from->hidden, pages, page_count, &to->experts);
  if (!status) status = refs_copy(from->shared, from->shared_count, from->hidden, pages, page_count, &to->shared);
  if (!status) status = find_pages(to);
  for (uint32_t i = 0; !status && i < to->page_count; i++) {
    page *p = &pages[to->pages[i]];
    if (p->site != NO_SITE) return EDGEML_BAD_ARGUMENT; /* eviction needs one distance a page */
    p->site = number;
  }
  return status;
}

int sites_copy(const edgeml_options *options, page *pages, uint32_t page_count, site **out) {
  *out = NULL;
  if (options->site_count > 1u << 16) return EDGEML_BAD_ARGUMENT;
  site *sites = calloc(options->site_count + 1ul, sizeof *sites);
  int status = sites ? EDGEML_OK : EDGEML_NO_MEMORY;
  for (uint32_t i = 0; !status && i < options->site_count; i++)
    status = site_copy(&options->sites[i], i, pages, page_count, &sites[i]);
  if (status) sites_free(sites, options->site_count);
  else *out = sites;
  return status;
}

void sites_free(site *sites, uint32_t count) {
  for (uint32_t i = 0; sites && i < count; i++) {
    free(sites[i].experts);
    free(sites[i].shared);
    free(sites[i].pages);
    free(sites[i].use_of);
  }
  free(sites);
}

static void extend_by(extent *x, const page *p) {
  x->width = max_u32(x->width, p->matrices[0].rows);
  x->gated |= p->matrix_count == 3;
  for (uint32_t i = 0; i < p->matrix_count; i++) x->floats |= p->matrices[i].type == WEIGHT_F32;
}

extent extent_of(const site *sites, uint32_t site_count, const page *pages, uint32_t page_count) {
  extent x = {0};
  for (uint32_t i = 0; i < site_count; i++) {
    const site *s = &sites[i];
    x.hidden = max_u32(x.hidden, s->hidden), x.experts = max_u32(x.experts, s->expert_count);
    x.shared = max_u32(x.shared, s->shared_count), x.top_k = max_u32(x.top_k, s->top_k), x.pages = max_u32(x.pages, s->page_count);
    for (uint32_t e = 0; e < s->expert_count; e++) extend_by(&x, &pages[s->experts[e].page]);
    for (uint32_t e = 0; e < s->shared_count; e++) extend_by(&x, &pages[s->shared[e].page]);
  }
  x.columns = x.hidden;
  for (uint32_t i = 0; i < page_count; i++)
    if (pages[i].kind == KIND_LINEAR) x.columns = max_u32(x.columns, pages[i].matrices[0].cols);
  return x;
}

int plan_pages(page *pages, uint32_t page_count, const site *sites, uint32_t site_count, edgeml_plan_result *out) {
  for (uint32_t i = 0; i < site_count; i++)
    for (uint32_t e = 0; e < sites[i].shared_count; e++) pages[sites[i].shared[e].page].pinned = 1;
  for (uint32_t i = 0; i < page_count; i++) {
    page *p = &pages[i];
    uint64_t bytes = round_up(p->length, OS_PAGE);
    p->pinned |= p->kind == KIND_LINEAR;
    if (p->pinned) {
      out->pinned_bytes += bytes;
    } else if (p->site != NO_SITE) {
      out->pageable_pages++;
      if (bytes > out->slot_bytes) out->slot_bytes = bytes;
    }
  }
  /* One long page and many short ones: the only product that can wrap. */
  return __builtin_mul_overflow(out->slot_bytes, out->pageable_pages, &out->pageable_bytes) ? EDGEML_NO_MEMORY : EDGEML_OK;
}

uint64_t row_cache_bytes(const page *pages, uint32_t page_count) {
  uint64_t bytes = 0;
  for (uint32_t i = 0; i < page_count; i++) {
    if (pages[i].kind != KIND_ROWS) continue;
    uint32_t rows = pages[i].matrices[0].rows;
    bytes += (rows < ROW_CACHE_ENTRIES ? rows : ROW_CACHE_ENTRIES) * pages[i].stride;
  }
  return bytes;
}

/* Hands out pieces of one block, each on its own cache line; with base NULL it only measures. */
typedef struct cursor {
  uint8_t *base;
  uint64_t used;
} cursor;

static void *take(cursor *c, uint64_t count, size_t size) {
  void *place = c->base && count ? c->base + c->used : NULL;
  c->used = round_up(c->used + count * size, 64);
  return place;
}

static quantized take_quantized(cursor *c, uint64_t rows, uint64_t columns) {
  uint64_t blocks = round_up(columns, TILE_COLS) / TILE_COLS;
  quantized out = {take(c, rows * blocks * TILE_COLS, 1), NULL, NULL};
  out.scale = take(c, rows * blocks, sizeof(float));
  out.qsum = take(c, rows * blocks, sizeof(int32_t));
  return out;
}

uint64_t scratch_layout(const extent *x, uint32_t threads, scratch *s, uint8_t *base) {
  scratch ignored;
  if (!s) s = &ignored;
  cursor c = {base, 0};
  uint64_t rows = (uint64_t)CHUNK_TOKENS * x->top_k;
  s->in = take_quantized(&c, CHUNK_TOKENS, x->columns);
  s->routed = take(&c, rows * x->hidden, sizeof(float));
  s->shared = take(&c, (uint64_t)x->shared * CHUNK_TOKENS * x->hidden, sizeof(float));
  s->token_of = take(&c, rows, sizeof *s->token_of);
  s->row_of = take(&c, rows, sizeof *s->row_of);
  s->first = take(&c, x->experts + 2ull, sizeof *s->first);
  /* Every expert may end in a part of a job; shared experts run over the whole chunk. */
  s->jobs = take(&c, x->experts + rows / JOB_TOKENS + (uint64_t)x->shared * (CHUNK_TOKENS / JOB_TOKENS) + 1, sizeof *s->jobs);
  s->uses = take(&c, x->pages + 1ull, sizeof *s->uses);
  s->workers = take(&c, threads, sizeof *s->workers);
  for (uint32_t i = 0; i < threads; i++) {
    worker_scratch w;
    w.in = take_quantized(&c, JOB_TOKENS, x->hidden);
    w.mid = take_quantized(&c, JOB_TOKENS, x->width);
    w.x = take(&c, x->floats ? (uint64_t)JOB_TOKENS * x->hidden : 0, sizeof(float));
    w.h = take(&c, (uint64_t)JOB_TOKENS * x->width, sizeof(float));
    w.gate = take(&c, x->gated ? (uint64_t)JOB_TOKENS * x->width : 0, sizeof(float));
    if (base) s->workers[i] = w;
  }
  return c.used;
}
