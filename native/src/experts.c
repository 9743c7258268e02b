/* Computing on weights: linear layers and one site's experts.
 *
 * A call takes its tokens in chunks of CHUNK_TOKENS. Tokens are sorted by expert; an expert's tokens are cut into jobs, and any
 * thread takes any job whose page is resident. Every job writes rows of its own, and the rows are added up at the end in the
 * order of the format, so neither the order in which pages arrive nor the number of threads can change a bit.
 *
 * Pages that are resident are pinned first; then reads begin for absent ones as far as there are slots; the others are deferred
 * until a page of this call is done with. Only the calling thread waits for a slot, and only when the call holds no pin.
 *
 * Where a read must take another page's slot, a call has only as many pages on their way as keep the readers busy. A page of
 * this call that is done with is the farthest from its next use of all, so the reads that follow take its slot and leave what
 * the coming sites have (a cycle of 24 pages over 12 slots: 37 % hits instead of 24 %; Belady 48 %, least recently used 0 %).
 */
#include <string.h>

#include "context.h"

typedef struct call {
  edgeml_context *context;
  edgeml_request *request;
  const site *site;
  uint32_t site_number;
  scratch *scratch;
  const float *x, *weights;
  const int64_t *ids;
  float *out;
  uint32_t tokens, k, job_count, next_job, running, deferred;
  int in_line; /* the calling thread waits for a slot, without the lock */
  atomic_uint next_token;
  edgeml_fault fault;
} call;

static size_t blocks_of(size_t k) { return (k + TILE_COLS - 1) / TILE_COLS; }

/* n rows of inputs in whichever form the matrix takes. */
typedef struct inputs {
  const float *x;
  quantized q;
  size_t n;
} inputs;

static void apply(const edgeml_kernels *kernels, const uint8_t *data, const matrix *m, const inputs *in, size_t begin, size_t end, float *y,
                  size_t ldy) {
  const float *bias = m->has_bias ? (const float *)(const void *)(data + m->bias) : NULL;
  const uint8_t *tiles = data + m->tiles;
  if (m->type == WEIGHT_F32)
    kernels->matmul_f32(tiles, m->rows, m->cols, begin, end, in->x, in->n, bias, y, ldy);
  else if (m->type == WEIGHT_INT8)
    kernels->matmul_int8(tiles, m->rows, m->cols, begin, end, in->q.q, in->q.scale, in->q.qsum, in->n, bias, y, ldy);
  else
    kernels->matmul_int4(tiles, m->rows, m->cols, begin, end, in->q.q, in->q.scale, in->q.qsum, in->n, bias, y, ldy);
}

/* ---- linear ---- */

enum { LINEAR_ROWS = 64 }; /* per piece of work */

typedef struct linear_call {
  const edgeml_kernels *kernels;
  const page *page;
  events *events;
  uint32_t number;
  inputs in;
  float *y;
  atomic_uint next;
} linear_call;

static void linear_body(void *argument, int worker) {
  linear_call *c = argument;
  const matrix *m = &c->page->matrices[0];
  uint64_t since = worker ? events_begin(c->events) : 0;
  for (;;) {
    size_t begin = (size_t)atomic_fetch_add(&c->next, 1) * LINEAR_ROWS, end = begin + LINEAR_ROWS;
    if (begin >= m->rows) break;
    apply(c->kernels, c->page->data, m, &c->in, begin, end < m->rows ? end : m->rows, c->y, m->rows);
  }
  events_end(c->events, (edgeml_event){since, 0, c->in.n, 0, EDGEML_EVENT_PART, NO_SITE, c->number, UINT32_MAX});
}

int edgeml_linear(edgeml_context *context, uint32_t number, const float *x, size_t n, float *y) {
  if (number >= context->pager.page_count || context->pager.pages[number].kind != KIND_LINEAR) return EDGEML_BAD_ARGUMENT;
  const page *p = &context->pager.pages[number];
  const matrix *m = &p->matrices[0];
  edgeml_request *request = request_current(context);
  uint64_t begin = events_begin(&context->pager.events);
  scratch *s = scratch_take(context, request);
  for (size_t done = 0; done < n; done += CHUNK_TOKENS) {
    linear_call c = {.kernels = context->kernels, .page = p, .y = y + done * m->rows, .events = &context->pager.events, .number = number};
    c.in = (inputs){x + done * m->cols, s->in, n - done < CHUNK_TOKENS ? n - done : CHUNK_TOKENS};
    if (m->type != WEIGHT_F32) context->kernels->quantize(c.in.x, c.in.n, m->cols, s->in.q, s->in.scale, s->in.qsum);
    pool_run(&context->pool, linear_body, &c);
  }
  scratch_return(context, request, s);
  events_end(&context->pager.events, (edgeml_event){begin, 0, n, 0, EDGEML_EVENT_LINEAR, NO_SITE, number, UINT32_MAX});
  return EDGEML_OK;
}

/* ---- one job ---- */

static void gather(const call *c, const job *j, const worker_scratch *w, inputs *in) {
  size_t hidden = c->site->hidden, blocks = blocks_of(hidden);
  const quantized *from = &c->scratch->in;
  for (size_t i = 0; i < in->n; i++) {
    size_t token = c->scratch->token_of[j->begin + i];
    if (w->x) memcpy(w->x + i * hidden, c->x + token * hidden, hidden * sizeof(float));
    memcpy(w->in.q + i * blocks * TILE_COLS, from->q + token * blocks * TILE_COLS, blocks * TILE_COLS);
    memcpy(w->in.scale + i * blocks, from->scale + token * blocks, blocks * sizeof(float));
    memcpy(w->in.qsum + i * blocks, from->qsum + token * blocks, blocks * sizeof(int32_t));
  }
  in->x = w->x, in->q = w->in;
}

static void compute(const call *c, const job *j, const worker_scratch *w) {
  const edgeml_kernels *kernels = c->context->kernels;
  const page *p = &c->context->pager.pages[j->expert->page];
  const uint8_t *data = p->data + j->expert->sub * p->stride;
  size_t hidden = c->site->hidden, blocks = blocks_of(hidden), width = p->matrices[0].rows;
  inputs in = {.n = j->end - j->begin}, mid = {.x = w->h, .q = w->mid, .n = in.n};
  float *y = c->scratch->routed + j->begin * hidden;
  if (j->shared >= 0) { /* over consecutive tokens: nothing to gather */
    in.x = c->x + j->begin * hidden;
    in.q = (quantized){c->scratch->in.q + j->begin * blocks * TILE_COLS, c->scratch->in.scale + j->begin * blocks,
                       c->scratch->in.qsum + j->begin * blocks};
    y = c->scratch->shared + ((size_t)j->shared * CHUNK_TOKENS + j->begin) * hidden;
  } else {
    gather(c, j, w, &in);
  }
  apply(kernels, data, &p->matrices[0], &in, 0, width, w->h, width);
  if (p->matrix_count == 3) {
    apply(kernels, data, &p->matrices[1], &in, 0, width, w->gate, width);
    kernels->activate((int)p->activation, w->gate, in.n * width);
    for (size_t i = 0; i < in.n * width; i++) w->h[i] *= w->gate[i];
  } else {
    kernels->activate((int)p->activation, w->h, in.n * width);
  }
  const matrix *down = &p->matrices[p->matrix_count - 1];
  if (down->type != WEIGHT_F32) kernels->quantize(w->h, in.n, width, w->mid.q, w->mid.scale, w->mid.qsum);
  apply(kernels, data, down, &mid, 0, hidden, y, hidden);
}

/* ---- sorting tokens into jobs ---- */

static void add_jobs(call *c, const edgeml_expert_ref *expert, int32_t in_use, int32_t shared, uint32_t begin, uint32_t end) {
  for (; begin < end; begin += JOB_TOKENS) {
    uint32_t stop = end - begin < JOB_TOKENS ? end : begin + JOB_TOKENS;
    c->scratch->jobs[c->job_count++] = (job){expert, begin, stop, in_use, shared, 0};
    if (in_use != NO_USE) c->scratch->uses[in_use].jobs++;
  }
}

static void sort_tokens(call *c) {
  scratch *s = c->scratch;
  const site *at = c->site;
  uint32_t rows = c->tokens * c->k;
  memset(s->first, 0, (at->expert_count + 2ul) * sizeof *s->first);
  memset(s->uses, 0, at->page_count * sizeof *s->uses);
  for (uint32_t i = 0; i < rows; i++)
    if (c->ids[i] >= 0) s->first[c->ids[i] + 2]++;
  for (uint32_t e = 0; e < at->expert_count; e++) s->first[e + 2] += s->first[e + 1];
  for (uint32_t i = 0; i < rows; i++) {
    if (c->ids[i] < 0) continue;
    s->row_of[i] = s->first[c->ids[i] + 1]++;
    s->token_of[s->row_of[i]] = i / c->k;
  }
  for (uint32_t i = 0; i < at->shared_count; i++) add_jobs(c, &at->shared[i], NO_USE, (int32_t)i, 0, c->tokens);
  for (uint32_t e = 0; e < at->expert_count; e++)
    add_jobs(c, &at->experts[e], (int32_t)at->use_of[e], -1, s->first[e], s->first[e + 1]);
}

/* ---- pages; all with the pager's lock held ---- */

static page *page_of(const call *c, uint32_t in_use) { return &c->context->pager.pages[c->site->pages[in_use]]; }

/* Whether the call may have one more page on its way. */
static int may_start(const call *c, const page *p) {
  const pager *pg = &c->context->pager;
  if (p->state != PAGE_ABSENT || pg->free_count) return 1;
  uint32_t on_their_way = 0;
  for (uint32_t u = 0; u < c->site->page_count; u++) on_their_way += c->scratch->uses[u].pinned && c->scratch->uses[u].loaded;
  return on_their_way <= pg->reader_count;
}

static int try_start(call *c, use *in_use, page *p) {
  int absent = p->state == PAGE_ABSENT;
  if (!may_start(c, p) || !pager_try_start(&c->context->pager, p, c->request)) return 0;
  in_use->pinned = 1, in_use->loaded = (uint32_t)absent;
  return 1;
}

static void read_ahead(const call *c) {
  const site *next = &c->context->sites[(c->site_number + 1) % c->context->site_count];
  if (c->deferred || (c->request && c->request->leased)) return; /* a lease holds all that its request may use */
  pager_read_ahead(&c->context->pager, next->pages, next->page_count);
}

static void pin_pages(call *c) {
  pager *pg = &c->context->pager;
  for (uint32_t u = 0; u < c->site->page_count; u++) {
    if (c->scratch->uses[u].jobs && c->request && c->request->leased && !pager_leased(c->request, c->site->pages[u]))
      c->fault = (edgeml_fault){.status = EDGEML_NOT_LEASED, .page = c->site->pages[u], .offset = page_of(c, u)->offset};
  }
  if (c->fault.status) return;
  pager_visit(pg, c->site_number, c->site->pages, c->site->page_count);
  for (int absent = 0; absent < 2; absent++) { /* residents first, so that none of them is given up for the others */
    for (uint32_t u = 0; u < c->site->page_count; u++) {
      use *in_use = &c->scratch->uses[u];
      page *p = page_of(c, u);
      if (!in_use->jobs || in_use->pinned || (p->state != PAGE_RESIDENT) != absent) continue;
      pager_count(pg, p, c->request);
      pager_needs(p);
      c->deferred += !try_start(c, in_use, p);
    }
  }
  read_ahead(c);
}

static int start_deferred(call *c, int wait) {
  if (c->in_line) return 0; /* a page that somebody else reads meanwhile must not be pinned twice */
  for (uint32_t u = 0; c->deferred && u < c->site->page_count; u++) {
    use *in_use = &c->scratch->uses[u];
    if (!in_use->jobs || in_use->pinned) continue;
    if (!wait && !try_start(c, in_use, page_of(c, u))) return 0;
    if (wait) {
      c->in_line = 1;
      pager_start(&c->context->pager, page_of(c, u), c->request);
      c->in_line = 0, in_use->pinned = in_use->loaded = 1;
    }
    c->deferred--;
    read_ahead(c);
    return 1;
  }
  return 0;
}

static void finish_job(call *c, const job *j) {
  c->running--;
  if (j->use != NO_USE && --c->scratch->uses[j->use].jobs == 0) {
    c->scratch->uses[j->use].pinned = 0;
    pager_unpin(&c->context->pager, page_of(c, (uint32_t)j->use));
  }
  if (!c->deferred) return; /* else whoever waits for running jobs has to look again */
  start_deferred(c, 0);
  pthread_cond_broadcast(&c->context->pager.changed);
}

/* A job that can run now, or NULL; `loading` says whether a page of the call is on its way. A failed page ends the call. */
static job *next_ready(call *c, int *loading) {
  *loading = 0;
  while (c->next_job < c->job_count && c->scratch->jobs[c->next_job].started) c->next_job++;
  for (uint32_t i = c->next_job; i < c->job_count; i++) {
    job *j = &c->scratch->jobs[i];
    if (j->started) continue;
    if (j->use == NO_USE) return j;
    if (!c->scratch->uses[j->use].pinned) continue;
    const page *p = page_of(c, (uint32_t)j->use);
    if (p->state == PAGE_RESIDENT) return j;
    if (p->state == PAGE_LOADING) *loading = 1;
    if (p->state == PAGE_FAILED && !c->fault.status) {
      c->fault = p->fault;
      pthread_cond_broadcast(&c->context->pager.changed);
    }
  }
  return NULL;
}

/* A thread besides the calling one waits: no request's time. */
static void wait_beside(const call *c) {
  pager *pg = &c->context->pager;
  uint64_t begin = events_begin(&pg->events);
  pthread_cond_wait(&pg->changed, &pg->lock);
  events_end(&pg->events, (edgeml_event){begin, 0, 0, 0, EDGEML_EVENT_WAIT, c->site_number, UINT32_MAX, UINT32_MAX});
}

static void experts_body(void *argument, int worker) {
  call *c = argument;
  pager *pg = &c->context->pager;
  int loading;
  pthread_mutex_lock(&pg->lock);
  for (;;) {
    job *j = next_ready(c, &loading);
    if (c->fault.status || c->next_job == c->job_count) break;
    if (j) {
      j->started = 1;
      c->running++;
      start_deferred(c, 0);
      pthread_mutex_unlock(&pg->lock);
      uint64_t begin = events_begin(&pg->events);
      compute(c, j, &c->scratch->workers[worker]);
      events_end(&pg->events, (edgeml_event){begin, 0, j->end - j->begin, 0, EDGEML_EVENT_JOB, c->site_number, j->expert->page,
                                             j->expert->sub});
      pthread_mutex_lock(&pg->lock);
      finish_job(c, j);
    } else if (start_deferred(c, 0)) {
      continue;
    } else if (loading || c->running) {
      if (worker) wait_beside(c);
      else pager_wait(pg, c->request, c->site_number);
    } else if (worker) {
      break; /* what is left needs a slot: the calling thread's business */
    } else {
      start_deferred(c, 1);
    }
  }
  pthread_mutex_unlock(&pg->lock);
}

static void unpin_rest(call *c) {
  for (uint32_t u = 0; u < c->site->page_count; u++)
    if (c->scratch->uses[u].pinned) pager_unpin(&c->context->pager, page_of(c, u));
}

/* ---- adding up ---- */

static void combine_body(void *argument, int worker) {
  call *c = argument;
  const edgeml_kernels *kernels = c->context->kernels;
  size_t hidden = c->site->hidden;
  events *log = &c->context->pager.events;
  uint64_t begin = worker ? events_begin(log) : 0;
  for (uint32_t t; (t = atomic_fetch_add(&c->next_token, 1)) < c->tokens;) {
    float *out = c->out + t * hidden;
    memset(out, 0, hidden * sizeof *out);
    for (uint32_t i = 0; i < c->site->shared_count; i++)
      kernels->axpy(out, 1.0f, c->scratch->shared + ((size_t)i * CHUNK_TOKENS + t) * hidden, hidden);
    for (uint32_t j = 0; j < c->k; j++) {
      uint32_t at = t * c->k + j;
      if (c->ids[at] >= 0) kernels->axpy(out, c->weights[at], c->scratch->routed + c->scratch->row_of[at] * hidden, hidden);
    }
  }
  events_end(log, (edgeml_event){begin, 0, c->tokens, 0, EDGEML_EVENT_PART, c->site_number, UINT32_MAX, UINT32_MAX});
}

static void run_chunk(call *c) {
  edgeml_context *context = c->context;
  context->kernels->quantize(c->x, c->tokens, c->site->hidden, c->scratch->in.q, c->scratch->in.scale, c->scratch->in.qsum);
  sort_tokens(c);
  pthread_mutex_lock(&context->pager.lock);
  pin_pages(c);
  pthread_mutex_unlock(&context->pager.lock);
  if (!c->fault.status) pool_run(&context->pool, experts_body, c);
  if (!c->fault.status) {
    pool_run(&context->pool, combine_body, c);
    return;
  }
  pthread_mutex_lock(&context->pager.lock);
  unpin_rest(c);
  pthread_mutex_unlock(&context->pager.lock);
}

int edgeml_experts(edgeml_context *context, edgeml_request *request, uint32_t number, const float *x, const int64_t *ids,
                   const float *weights, size_t n, size_t k, float *out) {
  edgeml_fault fault = {.page = UINT32_MAX};
  const site *at = number < context->site_count ? &context->sites[number] : NULL;
  if (!at || k > at->top_k) fault.status = EDGEML_BAD_ARGUMENT, fault.value = at ? (int64_t)k : (int64_t)number;
  for (size_t i = 0; !fault.status && i < n * k; i++)
    if (ids[i] < -1 || ids[i] >= (int64_t)at->expert_count) fault.status = EDGEML_BAD_ARGUMENT, fault.value = ids[i];
  if (!fault.status) {
    uint64_t begin = events_begin(&context->pager.events);
    scratch *s = scratch_take(context, request);
    for (size_t done = 0; done < n && !fault.status; done += CHUNK_TOKENS) {
      call c = {.context = context, .request = request, .site = at, .site_number = number, .scratch = s, .k = (uint32_t)k};
      c.x = x + done * at->hidden, c.ids = ids + done * k, c.weights = weights + done * k, c.out = out + done * at->hidden;
      c.tokens = n - done < CHUNK_TOKENS ? (uint32_t)(n - done) : CHUNK_TOKENS;
      run_chunk(&c);
      fault = c.fault;
    }
    scratch_return(context, request, s);
    events_end(&context->pager.events, (edgeml_event){begin, 0, n, 0, EDGEML_EVENT_SITE, number, UINT32_MAX, UINT32_MAX});
  }
  if (request && fault.status) request->fault = fault;
  return fault.status;
}
