/* Contexts: opening and closing, requests, figures. A context is found by a number, not by a pointer, because the number
 * travels through a session configuration as text: a stale one finds nothing instead of freed memory. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "context.h"

_Static_assert(sizeof(size_t) == 8, "sizes are computed in 64 bits");

static pthread_mutex_t contexts_lock = PTHREAD_MUTEX_INITIALIZER;
static edgeml_context *contexts;
static uint64_t last_handle;

static _Thread_local edgeml_request *current_request;

const char *edgeml_status_text(int status) {
  switch (status) {
#define X(name, number, sentence) \
  case number: return sentence;
    EDGEML_STATUS_MAP(X)
#undef X
    default: return "an unknown status";
  }
}

edgeml_context *context_of(uint64_t handle) {
  pthread_mutex_lock(&contexts_lock);
  edgeml_context *c = contexts;
  while (c && c->handle != handle) c = c->next;
  if (c) atomic_fetch_add(&c->users, 1);
  pthread_mutex_unlock(&contexts_lock);
  return c;
}

uint64_t edgeml_handle(const edgeml_context *context) { return context->handle; }

/* ---- opening ---- */

typedef struct parsed {
  page *pages;
  uint32_t page_count;
  site *sites;
  extent extent;
  edgeml_plan_result plan;
} parsed;

static void parsed_free(const edgeml_options *o, parsed *p) {
  sites_free(p->sites, o->site_count);
  free(p->pages);
}

static int parse(const edgeml_options *o, parsed *out) {
  *out = (parsed){0};
  if (o->threads < 1 || o->threads > 256 || o->readers < 1 || o->readers > 16 || o->requests < 1 || o->requests > 256)
    return EDGEML_BAD_ARGUMENT;
  int status = pages_parse(o->index, o->index_bytes, &out->pages, &out->page_count);
  if (!status) status = sites_copy(o, out->pages, out->page_count, &out->sites);
  if (!status) status = plan_pages(out->pages, out->page_count, out->sites, o->site_count, &out->plan);
  if (status) {
    parsed_free(o, out);
    return status;
  }
  out->extent = extent_of(out->sites, o->site_count, out->pages, out->page_count);
  out->plan.scratch_bytes = scratch_layout(&out->extent, o->threads, NULL, NULL) * o->requests + row_cache_bytes(out->pages, out->page_count);
  return EDGEML_OK;
}

int edgeml_plan(const edgeml_options *options, edgeml_plan_result *out) {
  parsed p;
  int status = parse(options, &p);
  if (status) return status;
  *out = p.plan;
  parsed_free(options, &p);
  return EDGEML_OK;
}

static int load_pinned(edgeml_context *c, edgeml_fault *fault) {
  if (!c->pinned_bytes) return EDGEML_OK;
  void *arena = mmap(NULL, c->pinned_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (arena == MAP_FAILED) return EDGEML_NO_MEMORY;
  uint8_t *to = c->pinned = arena;
  for (uint32_t i = 0; i < c->pager.page_count; i++) {
    page *p = &c->pager.pages[i];
    if (!p->pinned) continue;
    *fault = pager_read(&c->pager, p, to);
    if (fault->status) return fault->status;
    p->data = to, p->state = PAGE_RESIDENT;
    to += (p->length + OS_PAGE - 1) / OS_PAGE * OS_PAGE;
  }
  return EDGEML_OK;
}

static int open_scratch(edgeml_context *c, uint32_t threads, uint32_t requests) {
  uint64_t each = scratch_layout(&c->extent, threads, NULL, NULL);
  c->scratches = calloc(requests, sizeof *c->scratches);
  c->idle = malloc(requests * sizeof *c->idle);
  if (!c->scratches || !c->idle || posix_memalign(&c->scratch_memory, 64, each * requests + 64)) return EDGEML_NO_MEMORY;
  for (uint32_t i = 0; i < requests; i++) {
    scratch_layout(&c->extent, threads, &c->scratches[i], (uint8_t *)c->scratch_memory + i * each);
    c->idle[i] = i;
  }
  c->scratch_count = c->idle_count = requests;
  return EDGEML_OK;
}

static int open_row_caches(edgeml_context *c) {
  c->rows = calloc(c->pager.page_count + 1ul, sizeof *c->rows);
  if (!c->rows) return EDGEML_NO_MEMORY;
  for (uint32_t i = 0; i < c->pager.page_count; i++) {
    const page *p = &c->pager.pages[i];
    if (p->kind != KIND_ROWS) continue;
    row_cache *r = &c->rows[i];
    pthread_mutex_init(&r->lock, NULL);
    r->entries = (uint32_t)(row_cache_bytes(p, 1) / p->stride);
    r->row = malloc(r->entries * sizeof *r->row);
    r->bytes = malloc(r->entries * p->stride);
    if (!r->row || !r->bytes) return EDGEML_NO_MEMORY;
    memset(r->row, 255, r->entries * sizeof *r->row);
  }
  return EDGEML_OK;
}

static void destroy(edgeml_context *c) {
  pool_close(&c->pool);
  for (uint32_t i = 0; c->rows && i < c->pager.page_count; i++) {
    if (c->rows[i].entries) pthread_mutex_destroy(&c->rows[i].lock);
    free(c->rows[i].row);
    free(c->rows[i].bytes);
  }
  free(c->rows);
  if (c->pinned) munmap(c->pinned, c->pinned_bytes);
  pager_close(&c->pager);
  sites_free(c->sites, c->site_count);
  free(c->scratches);
  free(c->scratch_memory);
  free(c->idle);
  pthread_cond_destroy(&c->idle_changed);
  pthread_mutex_destroy(&c->idle_lock);
  free(c);
}

int edgeml_open(const edgeml_options *o, edgeml_context **out, edgeml_fault *fault) {
  edgeml_fault unused;
  if (!fault) fault = &unused;
  *out = NULL, *fault = (edgeml_fault){.page = UINT32_MAX};
  const edgeml_kernels *kernels = edgeml_kernels_get(o->isa);
  if (!kernels) return fault->status = EDGEML_NO_SUCH_ISA;
  parsed p;
  int status = parse(o, &p), fd = -1;
  if (status) return fault->status = status;
  edgeml_context *c = calloc(1, sizeof *c);
  if (!c) status = EDGEML_NO_MEMORY;
  else if (p.plan.pageable_pages && o->slots < 1) status = EDGEML_BAD_ARGUMENT;
  else if ((fd = fcntl(o->fd, F_DUPFD_CLOEXEC, 0)) < 0) status = errno == EMFILE ? EDGEML_NO_MEMORY : EDGEML_BAD_ARGUMENT;
  if (status) {
    free(c);
    parsed_free(o, &p);
    return fault->status = status;
  }
  c->kernels = kernels, c->sites = p.sites, c->site_count = o->site_count, c->extent = p.extent;
  c->pinned_bytes = p.plan.pinned_bytes, c->scratch_bytes = p.plan.scratch_bytes;
  pthread_mutex_init(&c->idle_lock, NULL);
  pthread_cond_init(&c->idle_changed, NULL);
  uint32_t slots = o->slots < p.plan.pageable_pages ? o->slots : p.plan.pageable_pages;
  status = pager_open(&c->pager, fd, o->direct, p.pages, p.page_count, o->site_count, p.plan.slot_bytes, slots, o->readers, o->ahead);
  if (pool_open(&c->pool, (int)o->threads) && !status) status = EDGEML_NO_MEMORY;
  if (!status) status = open_scratch(c, o->threads, o->requests);
  if (!status) status = open_row_caches(c);
  if (!status) status = load_pinned(c, fault);
  if (status) {
    destroy(c);
    return fault->status = status;
  }
  pthread_mutex_lock(&contexts_lock);
  c->handle = ++last_handle, c->next = contexts, contexts = c;
  pthread_mutex_unlock(&contexts_lock);
  *out = c;
  return EDGEML_OK;
}

int edgeml_close(edgeml_context *context) {
  if (!context) return EDGEML_OK;
  pthread_mutex_lock(&contexts_lock);
  if (atomic_load(&context->users)) {
    pthread_mutex_unlock(&contexts_lock);
    return EDGEML_BUSY;
  }
  edgeml_context **link = &contexts;
  while (*link != context) link = &(*link)->next;
  *link = context->next;
  pthread_mutex_unlock(&contexts_lock);
  destroy(context);
  return EDGEML_OK;
}

/* ---- requests and working memory ---- */

scratch *scratch_take(edgeml_context *c, edgeml_request *request) {
  if (request && request->scratch) return request->scratch;
  pthread_mutex_lock(&c->idle_lock);
  while (!c->idle_count) pthread_cond_wait(&c->idle_changed, &c->idle_lock);
  scratch *s = &c->scratches[c->idle[--c->idle_count]];
  pthread_mutex_unlock(&c->idle_lock);
  return s;
}

void scratch_return(edgeml_context *c, edgeml_request *request, scratch *s) {
  if (request && request->scratch) return;
  pthread_mutex_lock(&c->idle_lock);
  c->idle[c->idle_count++] = (uint32_t)(s - c->scratches);
  pthread_cond_signal(&c->idle_changed);
  pthread_mutex_unlock(&c->idle_lock);
}

edgeml_request *request_current(const edgeml_context *context) {
  return current_request && current_request->context == context ? current_request : NULL;
}

int edgeml_request_begin(edgeml_context *context, edgeml_request *request) {
  if (current_request && current_request->context) return EDGEML_NESTED; /* a lease inside a lease would wait for itself */
  *request = (edgeml_request){.context = context, .fault = {.page = UINT32_MAX}};
  atomic_fetch_add(&context->users, 1);
  current_request = request;
  return EDGEML_OK;
}

int edgeml_request_lease(edgeml_request *request, const uint32_t *pages, uint32_t count) {
  if (!request->context || request->leased) return EDGEML_BAD_ARGUMENT;
  pager *pg = &request->context->pager;
  for (uint32_t i = 0; i < count; i++)
    if (pages[i] >= pg->page_count || pg->pages[pages[i]].site == NO_SITE || (i && pages[i] <= pages[i - 1])) {
      request->fault = (edgeml_fault){.status = EDGEML_BAD_ARGUMENT, .page = UINT32_MAX, .value = pages[i]};
      return EDGEML_BAD_ARGUMENT;
    }
  request->lease = pages, request->lease_count = count, request->leased = 1;
  request->scratch = scratch_take(request->context, NULL); /* before any pin: see pager.h, rule 3 */
  pthread_mutex_lock(&pg->lock);
  int status = pager_lease(pg, request);
  pthread_mutex_unlock(&pg->lock);
  if (status) {
    scratch *s = request->scratch;
    request->scratch = NULL, request->lease_count = 0, request->leased = 0;
    scratch_return(request->context, NULL, s);
  }
  return status;
}

void edgeml_request_end(edgeml_request *request) {
  edgeml_context *c = request->context;
  if (!c) return;
  if (request->leased) {
    pthread_mutex_lock(&c->pager.lock);
    pager_unlease(&c->pager, request);
    pthread_mutex_unlock(&c->pager.lock);
    scratch *s = request->scratch;
    request->scratch = NULL;
    scratch_return(c, NULL, s);
  }
  if (current_request == request) current_request = NULL;
  request->context = NULL;
  atomic_fetch_sub(&c->users, 1);
}

/* ---- hints and figures ---- */

int edgeml_advise(edgeml_context *context, const uint32_t *pages, uint32_t count, int32_t priority, int load) {
  const pager *pg = &context->pager;
  for (uint32_t i = 0; i < count; i++)
    if (pages[i] >= pg->page_count || pg->pages[pages[i]].site == NO_SITE) return EDGEML_BAD_ARGUMENT;
  pager_advise(&context->pager, pages, count, priority, load);
  return EDGEML_OK;
}

void edgeml_settle(edgeml_context *context) { pager_settle(&context->pager); }
void edgeml_evict_all(edgeml_context *context) { pager_evict_all(&context->pager); }

void edgeml_get_stats(edgeml_context *c, edgeml_stats *out) {
  pager *pg = &c->pager;
  pthread_mutex_lock(&pg->lock);
  *out = (edgeml_stats){.total = pg->total, .evictions = pg->evictions, .failures = pg->failures, .slots = pg->slots};
  for (uint32_t slot = 0; slot < pg->slots; slot++)
    out->resident += pg->slot_page[slot] != UINT32_MAX && pg->pages[pg->slot_page[slot]].state == PAGE_RESIDENT;
  pthread_mutex_unlock(&pg->lock);
  out->retries = __atomic_load_n(&pg->retries, __ATOMIC_RELAXED), out->direct = __atomic_load_n(&pg->direct, __ATOMIC_RELAXED);
  out->pinned_bytes = c->pinned_bytes, out->slot_bytes = pg->slot_bytes, out->scratch_bytes = c->scratch_bytes;
  out->isa = c->kernels->name;
}

void edgeml_get_site_stats(edgeml_context *context, edgeml_counters *out) {
  pthread_mutex_lock(&context->pager.lock);
  memcpy(out, context->pager.sites, context->site_count * sizeof *out);
  pthread_mutex_unlock(&context->pager.lock);
}

uint32_t edgeml_get_resident(edgeml_context *context, uint32_t *out, uint32_t room) {
  pager *pg = &context->pager;
  uint32_t count = 0;
  pthread_mutex_lock(&pg->lock);
  for (uint32_t i = 0; i < pg->page_count; i++) {
    if (pg->pages[i].site == NO_SITE || pg->pages[i].pinned || pg->pages[i].state != PAGE_RESIDENT) continue;
    if (count < room) out[count] = i;
    count++;
  }
  pthread_mutex_unlock(&pg->lock);
  return count;
}

int edgeml_get_matrix(const edgeml_context *context, uint32_t number, uint32_t which, uint32_t *rows, uint32_t *cols) {
  if (number >= context->pager.page_count || which > 2) return EDGEML_BAD_ARGUMENT;
  const matrix *m = &context->pager.pages[number].matrices[which];
  if (!m->type) return EDGEML_BAD_ARGUMENT;
  *rows = m->rows, *cols = m->cols;
  return EDGEML_OK;
}
