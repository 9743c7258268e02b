/* Compute threads that share the work of one call.
 *
 * pool_run calls `body(argument, worker)` on the calling thread, worker 0, and on those of the pool that wake before it is done,
 * and returns when all of them have returned: nobody waits for a thread that is still asleep. Bodies take pieces of work from a
 * common counter or list, so the number that take part changes nothing but time: a caller that finds the pool taken by another simply
 * runs the body alone.
 *
 * Waiting workers spin for some microseconds, because waking a sleeping thread costs more than a small layer, then sleep.
 *
 * pool_lend makes the calling thread's pool_run use somebody else's threads instead, until it is called again with NULL. Inside
 * onnxruntime those are awake already, and two pools would take each other's processors.
 */
#ifndef EDGEML_POOL_H
#define EDGEML_POOL_H

#include <pthread.h>
#include <stdatomic.h>

typedef struct pool {
  int threads; /* the caller's included */
  pthread_t *workers;
  pthread_mutex_t owner; /* held by the call that has the pool */
  pthread_mutex_t lock;  /* for sleeping */
  pthread_cond_t wake;
  atomic_uint generation, running, seats_left;
  atomic_int sleepers, stopping;
  void (*body)(void *argument, int worker);
  void *argument;
  int started;
  struct pool_seat *seats;
} pool;

/* 0, or 1 when memory or threads are lacking; pool_close is due in both cases. */
int pool_open(pool *pool, int threads);
void pool_close(pool *pool);
/* Runs body(argument, i) for every i below count, each once, on whatever threads, and returns when all have returned. */
typedef void pool_lender(void *lender, void (*body)(void *argument, int worker), int count, void *argument);
void pool_lend(pool_lender *run, void *lender);
void pool_run(pool *pool, void (*body)(void *argument, int worker), void *argument);

#endif
