#include "pool.h"

#include <sched.h>
#include <stdlib.h>

#define SPINS 4000u

struct pool_seat {
  pool *pool;
  int worker;
};

static void pause_cpu(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Take a seat of what runs now; 0 where all are taken or the caller needs nobody any more. */
static int take_seat(pool *p) {
  unsigned left = atomic_load(&p->seats_left);
  while (left && !atomic_compare_exchange_weak(&p->seats_left, &left, left - 1)) continue;
  return left > 0;
}

/* Wait until the generation is no longer `seen`; returns 0 when stopping. */
static int await_work(pool *p, unsigned seen) {
  for (unsigned spin = 0; spin < SPINS; spin++) {
    if (atomic_load(&p->generation) != seen || atomic_load(&p->stopping)) return !atomic_load(&p->stopping);
    pause_cpu();
  }
  pthread_mutex_lock(&p->lock);
  atomic_fetch_add(&p->sleepers, 1);
  while (atomic_load(&p->generation) == seen && !atomic_load(&p->stopping)) pthread_cond_wait(&p->wake, &p->lock);
  atomic_fetch_sub(&p->sleepers, 1);
  pthread_mutex_unlock(&p->lock);
  return !atomic_load(&p->stopping);
}

static void *worker_main(void *argument) {
  struct pool_seat *seat = argument;
  pool *p = seat->pool;
  for (unsigned seen = 0; await_work(p, seen);) {
    seen++;
    if (!take_seat(p)) continue; /* too late: the others have done it */
    p->body(p->argument, seat->worker);
    atomic_fetch_sub(&p->running, 1);
  }
  return NULL;
}

int pool_open(pool *p, int threads) {
  *p = (pool){.threads = threads};
  pthread_mutex_init(&p->owner, NULL);
  pthread_mutex_init(&p->lock, NULL);
  pthread_cond_init(&p->wake, NULL);
  p->workers = calloc((size_t)threads, sizeof *p->workers);
  p->seats = calloc((size_t)threads, sizeof *p->seats);
  if (!p->workers || !p->seats) return 1;
  for (int i = 1; i < threads; i++) {
    p->seats[i] = (struct pool_seat){p, i};
    if (pthread_create(&p->workers[i], NULL, worker_main, &p->seats[i])) return 1;
    p->started++;
  }
  return 0;
}

static void wake_sleepers(pool *p) {
  /* A worker raises `sleepers` before it looks at the generation for the last time, so one of the two sees the other. */
  if (!atomic_load(&p->sleepers)) return;
  pthread_mutex_lock(&p->lock);
  pthread_cond_broadcast(&p->wake);
  pthread_mutex_unlock(&p->lock);
}

void pool_close(pool *p) {
  atomic_store(&p->stopping, 1);
  pthread_mutex_lock(&p->lock);
  pthread_cond_broadcast(&p->wake);
  pthread_mutex_unlock(&p->lock);
  for (int i = 1; i <= p->started; i++) pthread_join(p->workers[i], NULL);
  free(p->workers);
  free(p->seats);
  pthread_cond_destroy(&p->wake);
  pthread_mutex_destroy(&p->lock);
  pthread_mutex_destroy(&p->owner);
}

static _Thread_local struct {
  pool_lender *run;
  void *lender;
} lent;

void pool_lend(pool_lender *run, void *lender) { lent.run = run, lent.lender = lender; }

void pool_run(pool *p, void (*body)(void *argument, int worker), void *argument) {
  if (p->threads > 1 && lent.run) {
    lent.run(lent.lender, body, p->threads, argument);
    return;
  }
  if (p->threads == 1 || pthread_mutex_trylock(&p->owner)) {
    body(argument, 0);
    return;
  }
  p->body = body, p->argument = argument;
  atomic_store(&p->running, (unsigned)p->threads - 1);
  atomic_store(&p->seats_left, (unsigned)p->threads - 1);
  atomic_fetch_add(&p->generation, 1);
  wake_sleepers(p);
  body(argument, 0);
  /* Nobody waits for a worker that has not woken yet. One that took a seat, of whichever generation it thinks, is waited for, and
   * body and argument stay until it is done. */
  atomic_fetch_sub(&p->running, atomic_exchange(&p->seats_left, 0));
  for (unsigned spin = 0; atomic_load(&p->running); spin++) {
    if (spin < SPINS) pause_cpu();
    else sched_yield();
  }
  pthread_mutex_unlock(&p->owner);
}
