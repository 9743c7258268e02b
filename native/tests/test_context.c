/* A context on a file made here: same bits at every budget and thread count, four threads at once, leases, a damaged page. Runs
 * under the address, undefined-behaviour and thread sanitizers. */
#include "context_fixture.h"

static void same_bits(const fixture *f) {
  static const uint32_t budgets[] = {ROUTED, ROUTED / 2, ROUTED / 4, 1};
  uint32_t expected[SITES] = {0};
  inputs in;
  for (int b = 0; b < 4; b++)
    for (uint32_t threads = 1; threads <= 3; threads++) {
      edgeml_context *c = open_with(f, budgets[b], threads, (int)threads & 1);
      for (uint32_t round = 0; round < 3; round++)
        for (uint32_t s = 0; s < SITES; s++) {
          draw(&in, s);
          uint32_t got = answer(c, NULL, s, &in);
          if (!expected[s]) expected[s] = got;
          assert(got == expected[s]);
        }
      assert(edgeml_close(c) == EDGEML_OK);
    }
}

static void *work(void *argument) {
  user *u = argument;
  inputs in;
  for (uint32_t round = 0; round < 30; round++) {
    edgeml_request request;
    uint32_t site = (round + u->number) % SITES, first = site * EXPERTS, pages[EXPERTS];
    assert(edgeml_request_begin(u->context, &request) == EDGEML_OK);
    draw(&in, site);
    if (u->number % 2) {
      for (uint32_t i = 0; i < EXPERTS; i++) pages[i] = first + i;
      assert(edgeml_request_lease(&request, pages, EXPERTS) == EDGEML_OK);
    }
    assert(answer(u->context, &request, site, &in) == u->expected[site]);
    if (round % 5 == 0) edgeml_advise(u->context, pages, 0, 0, 1);
    float out[TOKENS * 70];
    assert(edgeml_linear(u->context, LINEAR, in.x, TOKENS, out) == EDGEML_OK);
    edgeml_request_end(&request);
    edgeml_stats stats;
    edgeml_get_stats(u->context, &stats);
  }
  return NULL;
}

static void threads_at_once(const fixture *f, uint32_t slots) {
  uint32_t expected[SITES];
  inputs in;
  edgeml_context *c = open_with(f, slots, 2, 1), *other = open_with(f, 1, 1, 0);
  for (uint32_t s = 0; s < SITES; s++) draw(&in, s), expected[s] = answer(other, NULL, s, &in);
  pthread_t threads[4];
  user users[4];
  for (uint32_t i = 0; i < 4; i++) {
    users[i] = (user){f, c, expected, i};
    assert(pthread_create(&threads[i], NULL, work, &users[i]) == 0);
  }
  for (int i = 0; i < 200; i++) edgeml_advise(c, (const uint32_t[]){(uint32_t)i % ROUTED}, 1, i % 3 - 1, 1);
  for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
  assert(edgeml_close(other) == EDGEML_OK && edgeml_close(c) == EDGEML_OK);
}

static void damage(const fixture *f) {
  uint8_t byte;
  inputs in;
  float out[TOKENS * HIDDEN];
  draw(&in, 0);
  edgeml_context *c = open_with(f, ROUTED, 2, 0);
  assert(pread(f->fd, &byte, 1, (off_t)f->offset[2] + 9) == 1);
  byte ^= 1;
  assert(pwrite(f->fd, &byte, 1, (off_t)f->offset[2] + 9) == 1);
  for (int again = 0; again < 2; again++) {
    edgeml_request request;
    edgeml_request_begin(c, &request);
    assert(edgeml_close(c) == EDGEML_BUSY);
    assert(edgeml_experts(c, &request, 0, in.x, in.ids, in.weights, TOKENS, TOP_K, out) == EDGEML_CHECKSUM);
    assert(request.fault.page == 2 && request.fault.status == EDGEML_CHECKSUM && request.fault.offset == f->offset[2]);
    edgeml_request_end(&request);
  }
  answer(c, NULL, 1, &in);
  assert(edgeml_close(c) == EDGEML_OK);
  byte ^= 1;
  assert(pwrite(f->fd, &byte, 1, (off_t)f->offset[2] + 9) == 1);
}

static void rows(const fixture *f) {
  int64_t ids[] = {0, ROW_COUNT - 1, 0}, bad = ROW_COUNT;
  float out[3 * HIDDEN];
  edgeml_context *c = open_with(f, 1, 1, 0);
  assert(edgeml_embed_rows(c, NULL, ROWS, ids, 3, out) == EDGEML_OK);
  assert(memcmp(out, out + 2 * HIDDEN, HIDDEN * sizeof(float)) == 0);
  assert(edgeml_embed_rows(c, NULL, ROWS, &bad, 1, out) == EDGEML_BAD_ARGUMENT);
  assert(edgeml_embed_rows(c, NULL, LINEAR, ids, 1, out) == EDGEML_BAD_ARGUMENT);
  assert(edgeml_close(c) == EDGEML_OK);
}

static void requests(const fixture *f) {
  edgeml_context *c = open_with(f, EXPERTS, 1, 0);
  edgeml_request request = {0}, other;
  uint32_t pages[] = {0, 1}, linear = LINEAR;
  int64_t bad = EXPERTS;
  float x[HIDDEN] = {0}, weight = 1, out[HIDDEN];
  assert(edgeml_request_lease(&request, pages, 2) == EDGEML_BAD_ARGUMENT); /* not begun */
  assert(edgeml_request_begin(c, &request) == EDGEML_OK);
  assert(edgeml_request_begin(c, &other) == EDGEML_NESTED);
  assert(edgeml_experts(c, &request, 0, x, &bad, &weight, 1, 1, out) == EDGEML_BAD_ARGUMENT && request.fault.value == EXPERTS);
  assert(edgeml_request_lease(&request, &linear, 1) == EDGEML_BAD_ARGUMENT && request.fault.value == LINEAR);
  assert(edgeml_request_lease(&request, pages, 2) == EDGEML_OK); /* an earlier fault is no obstacle */
  assert(edgeml_request_lease(&request, pages, 2) == EDGEML_BAD_ARGUMENT);
  edgeml_request_end(&request);
  edgeml_request_end(&request);
  assert(c->pager.pages[0].pins == 0 && c->idle_count == c->scratch_count);
  assert(edgeml_close(c) == EDGEML_OK);
}

/* Four threads note events while a fifth takes them: none is lost unseen, those of a thread nest, and off means off. */
typedef struct taker {
  edgeml_context *context;
  atomic_int *stop;
  uint64_t taken;
} taker;

static void *take(void *argument) {
  taker *t = argument;
  static edgeml_event events[256];
  for (int last = 0; !last;) {
    last = atomic_load(t->stop);
    uint64_t lost;
    for (uint32_t n; (n = edgeml_events_take(t->context, events, 256, &lost));) t->taken += n;
  }
  return NULL;
}

static void events_of_threads(const fixture *f) {
  uint32_t expected[SITES];
  inputs in;
  edgeml_context *c = open_with(f, EXPERTS, 2, 1);
  for (uint32_t s = 0; s < SITES; s++) draw(&in, s), expected[s] = answer(c, NULL, s, &in);
  pthread_t threads[5];
  user users[4];
  atomic_int stop = 0;
  taker t = {c, &stop, 0};
  uint64_t lost = 1;
  assert(edgeml_events_start(c, 1 << 16) == EDGEML_OK);
  for (uint32_t i = 0; i < 4; i++) {
    users[i] = (user){f, c, expected, i};
    assert(pthread_create(&threads[i], NULL, work, &users[i]) == 0);
  }
  assert(pthread_create(&threads[4], NULL, take, &t) == 0);
  for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
  atomic_store(&stop, 1);
  pthread_join(threads[4], NULL);
  edgeml_event event;
  assert(edgeml_events_take(c, &event, 0, &lost) == 0 && lost == 0 && t.taken > 4 * 30 * 2);
  edgeml_events_stop(c);
  assert(edgeml_close(c) == EDGEML_OK);
}

static void events_ring(const fixture *f) {
  static edgeml_event events[4096];
  inputs in;
  uint64_t lost = 7;
  edgeml_context *c = open_with(f, 2, 1, 0);
  draw(&in, 0);
  answer(c, NULL, 0, &in);
  assert(edgeml_events_take(c, events, 4096, &lost) == 0 && lost == 0); /* never begun */
  assert(edgeml_events_start(c, 0) == EDGEML_BAD_ARGUMENT && edgeml_events_start(c, (1u << 24) + 1) == EDGEML_BAD_ARGUMENT);
  assert(edgeml_events_start(c, 4096) == EDGEML_OK);
  edgeml_evict_all(c);
  answer(c, NULL, 0, &in);
  edgeml_settle(c);
  edgeml_events_stop(c);
  uint32_t n = edgeml_events_take(c, events, 4096, &lost), of[EDGEML_EVENT_PART + 1] = {0};
  assert(n > 0 && lost == 0);
  const edgeml_event *site = NULL;
  for (uint32_t i = 0; i < n; i++) {
    assert(events[i].kind >= EDGEML_EVENT_SITE && events[i].kind <= EDGEML_EVENT_PART && events[i].thread);
    assert(events[i].begin_ns && events[i].begin_ns <= events[i].end_ns && events[i].site == 0);
    of[events[i].kind]++;
    if (events[i].kind == EDGEML_EVENT_SITE) site = &events[i];
  }
  assert(site && of[EDGEML_EVENT_SITE] == 1 && site->value == TOKENS && of[EDGEML_EVENT_MISS] == EXPERTS && of[EDGEML_EVENT_HIT] == 0);
  assert(of[EDGEML_EVENT_READ] >= EXPERTS && of[EDGEML_EVENT_CHECKSUM] == of[EDGEML_EVENT_READ] && of[EDGEML_EVENT_JOB] > EXPERTS);
  for (uint32_t i = 0; i < n; i++) {
    if (events[i].kind == EDGEML_EVENT_READ) assert(events[i].thread != site->thread && events[i].value && events[i].page < EXPERTS);
    else if (events[i].thread == site->thread) assert(events[i].begin_ns >= site->begin_ns && events[i].end_ns <= site->end_ns);
  }
  answer(c, NULL, 0, &in);
  assert(edgeml_events_take(c, events, 4096, &lost) == 0); /* off */
  assert(edgeml_events_start(c, 3) == EDGEML_OK);
  answer(c, NULL, 0, &in);
  edgeml_events_stop(c);
  assert(edgeml_events_take(c, events, 2, &lost) == 2 && lost > 3); /* what came first is kept, the rest counted */
  assert(edgeml_events_take(c, events, 2, &lost) == 1 && edgeml_events_take(c, events, 2, &lost) == 0);
  assert(edgeml_close(c) == EDGEML_OK);
}

static void no_descriptors(const fixture *f) {
  edgeml_options o = {f->fd, 0, f->index, sizeof f->index, f->sites, SITES, 1, 1, 1, 1, NULL, 0};
  edgeml_context *c;
  struct rlimit limit, none;
  assert(getrlimit(RLIMIT_NOFILE, &limit) == 0);
  none = (struct rlimit){(rlim_t)f->fd + 1, limit.rlim_max};
  assert(setrlimit(RLIMIT_NOFILE, &none) == 0);
  assert(edgeml_open(&o, &c, NULL) == EDGEML_NO_MEMORY);
  assert(setrlimit(RLIMIT_NOFILE, &limit) == 0);
  o.fd = 1 << 20;
  assert(edgeml_open(&o, &c, NULL) == EDGEML_BAD_ARGUMENT);
}

/* Sizes that the format allows and no machine has, chosen so that their products would wrap. */
static void absurd_sizes(void) {
  enum { MANY = 1 << 19 }; /* pages, and slots of 2^45 bytes for them */
  uint8_t *index = calloc(MANY, 128);
  edgeml_expert_ref *refs = calloc(MANY, sizeof *refs);
  edgeml_plan_result plan;
  uint64_t offset = ALIGN;
  assert(index && refs);
  for (uint32_t i = 0; i < MANY; i++) {
    uint8_t *r = index + 128ul * i;
    uint64_t type = i ? WEIGHT_INT4 : WEIGHT_F32, rows = i ? 1 : 1 << 22, cols = i ? 32 : 1 << 20;
    uint64_t length = up(edgeml_matrix_bytes((int)type, rows, cols), 64) + up(edgeml_matrix_bytes((int)type, cols, rows), 64);
    put(r, i, 4), put(r + 4, 2, 2), put(r + 8, offset, 8), put(r + 16, length, 8), put(r + 68, 1, 4), put(r + 72, length, 8);
    put(r + 80, type, 1), put(r + 84, rows, 4), put(r + 88, cols, 4);
    put(r + 96, type, 1), put(r + 100, cols, 4), put(r + 104, rows, 4);
    offset = up(offset + length, ALIGN);
    refs[i].page = i;
  }
  edgeml_site sites[] = {{refs, NULL, 1, 0, 1 << 20, 1}, {refs + 1, NULL, MANY - 1, 0, 32, 1}};
  edgeml_options o = {0, 0, index, 128ul * MANY, sites, 2, MANY, 1, 1, 1, NULL, 0};
  edgeml_context *c;
  assert(edgeml_plan(&o, &plan) == EDGEML_NO_MEMORY && edgeml_open(&o, &c, NULL) == EDGEML_NO_MEMORY);
  put(index + 128 + 8, ALIGN, 8); /* page 1 inside page 0 */
  assert(edgeml_plan(&o, &plan) == EDGEML_BAD_INDEX);
  free(index);
  free(refs);
}

/* Any byte of the index changed: refused or harmless, never a crash. */
static void broken_index(const fixture *f) {
  static uint8_t index[sizeof f->index];
  edgeml_plan_result plan;
  for (uint32_t at = 0; at < 128 * 3; at++)
    for (int bit = 0; bit < 8; bit++) {
      memcpy(index, f->index, sizeof index);
      index[at] ^= (uint8_t)(1 << bit);
      edgeml_options o = {f->fd, 0, index, sizeof index, f->sites, SITES, 1, 1, 1, 1, NULL, 0};
      int status = edgeml_plan(&o, &plan);
      assert(status == EDGEML_OK || status == EDGEML_BAD_INDEX || status == EDGEML_BAD_ARGUMENT);
    }
}

int main(void) {
  static fixture f;
  make(&f);
  same_bits(&f);
  threads_at_once(&f, ROUTED);
  threads_at_once(&f, EXPERTS);
  damage(&f);
  rows(&f);
  requests(&f);
  events_of_threads(&f);
  events_ring(&f);
  no_descriptors(&f);
  absurd_sizes();
  broken_index(&f);
  close(f.fd);
  unlink(f.path);
  puts("context: ok");
  return 0;
}
