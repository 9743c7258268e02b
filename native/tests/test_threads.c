/* Compute threads of a context, its own and lent ones: a worker that wakes too late, and the same bits in whatever order shares are
 * done. Runs under the address, undefined-behaviour and thread sanitizers. */
#include "context_fixture.h"

static void *lease_all_of(void *argument) {
  user *u = argument;
  uint32_t pages[EXPERTS];
  edgeml_request request;
  assert(edgeml_request_begin(u->context, &request) == EDGEML_OK);
  for (uint32_t i = 0; i < EXPERTS; i++) pages[i] = u->number * EXPERTS + i;
  assert(edgeml_request_lease(&request, pages, EXPERTS) == EDGEML_OK);
  edgeml_request_end(&request);
  return NULL;
}

static void *call_last_site(void *argument) {
  user *u = argument;
  inputs in;
  draw(&in, SITES - 1);
  for (int i = 0; i < TOKENS * TOP_K; i++) in.ids[i] = i ? -1 : 0;
  answer(u->context, NULL, SITES - 1, &in);
  return NULL;
}

static void await_tickets(edgeml_context *c, uint64_t count) {
  for (uint64_t seen = 0; seen < count; usleep(100)) {
    pthread_mutex_lock(&c->pager.lock);
    seen = c->pager.next_ticket;
    pthread_mutex_unlock(&c->pager.lock);
  }
}

/* A compute thread that wakes only while its call waits in the line for slots, when others have read the call's page: it must
 * not pin that page a second time. */
static void late_worker(const fixture *f) {
  edgeml_options o = {f->fd, 0, f->index, sizeof f->index, f->sites, SITES, EXPERTS, 2, 2, 8, NULL, 2};
  edgeml_context *c;
  edgeml_request first;
  uint32_t pages[EXPERTS] = {0, 1, 2, 3, 4, 5};
  pthread_t threads[3];
  user users[3] = {{f, NULL, NULL, SITES - 1}, {f, NULL, NULL, 1}, {f, NULL, NULL, 0}};
  assert(edgeml_open(&o, &c, NULL) == EDGEML_OK);
  while (atomic_load(&c->pool.sleepers) != 1) usleep(100);
  atomic_store(&c->pool.sleepers, 0); /* nobody wakes the worker now */
  assert(edgeml_request_begin(c, &first) == EDGEML_OK && edgeml_request_lease(&first, pages, EXPERTS) == EDGEML_OK);
  for (uint32_t i = 0; i < 3; i++) users[i].context = c;
  assert(pthread_create(&threads[0], NULL, lease_all_of, &users[0]) == 0); /* reads the page that the call needs */
  await_tickets(c, 2);
  pthread_mutex_lock(&c->pager.lock); /* the call's turn is the third, and the second is not over when the worker wakes */
  c->pager.next_ticket++;
  pthread_mutex_unlock(&c->pager.lock);
  assert(pthread_create(&threads[1], NULL, call_last_site, &users[1]) == 0);
  await_tickets(c, 4);
  edgeml_request_end(&first);
  pthread_join(threads[0], NULL);
  pthread_mutex_lock(&c->pool.lock);
  atomic_store(&c->pool.sleepers, 1);
  pthread_cond_broadcast(&c->pool.wake);
  pthread_mutex_unlock(&c->pool.lock);
  usleep(50000);
  pthread_mutex_lock(&c->pager.lock);
  c->pager.served_ticket++;
  pthread_cond_broadcast(&c->pager.changed);
  pthread_mutex_unlock(&c->pager.lock);
  pthread_join(threads[1], NULL);
  for (uint32_t i = 0; i < PAGES; i++) assert(c->pager.pages[i].pins == 0);
  assert(edgeml_close(c) == EDGEML_OK);
}

/* ---- threads that are lent ---- */

static void last_to_first(void *lender, void (*body)(void *argument, int worker), int count, void *argument) {
  ++*(int *)lender;
  for (int i = count; i--;) body(argument, i);
}

typedef struct seat {
  void (*body)(void *argument, int worker);
  void *argument;
  int worker;
} seat;

static void *sit(void *argument) {
  const seat *s = argument;
  return s->body(s->argument, s->worker), NULL;
}

/* The caller's own share is done elsewhere. */
static void all_elsewhere(void *lender, void (*body)(void *argument, int worker), int count, void *argument) {
  pthread_t threads[4];
  seat seats[4];
  ++*(int *)lender;
  for (int i = 0; i < count; i++) {
    seats[i] = (seat){body, argument, i};
    assert(pthread_create(&threads[i], NULL, sit, &seats[i]) == 0);
  }
  for (int i = 0; i < count; i++) pthread_join(threads[i], NULL);
}

/* Same bits with lent threads, in whatever order they come, with everything in memory and without. */
static void lent_threads(const fixture *f) {
  pool_lender *lenders[] = {last_to_first, all_elsewhere};
  inputs in;
  for (uint32_t slots = EXPERTS; slots <= ROUTED; slots += ROUTED - EXPERTS)
    for (int l = 0; l < 2; l++) {
      edgeml_context *c = open_with(f, slots, 4, 0);
      for (uint32_t seed = 0; seed < 6; seed++) {
        int lent = 0;
        edgeml_request request = {0};
        draw(&in, seed);
        uint32_t expected = answer(c, NULL, seed % SITES, &in);
        assert(edgeml_request_begin(c, &request) == EDGEML_OK);
        pool_lend(lenders[l], &lent);
        assert(answer(c, &request, seed % SITES, &in) == expected && lent > 0);
        pool_lend(NULL, NULL);
        edgeml_request_end(&request);
      }
      for (uint32_t i = 0; i < PAGES; i++) assert(c->pager.pages[i].pins == 0);
      assert(edgeml_close(c) == EDGEML_OK);
    }
}

int main(void) {
  static fixture f;
  make(&f);
  late_worker(&f);
  lent_threads(&f);
  close(f.fd);
  unlink(f.path);
  puts("threads: ok");
  return 0;
}
