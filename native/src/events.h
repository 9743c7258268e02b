/* A log of what the threads of a context did and when: off by default, and then one test of a flag for each thing that could be
 * noted. On, each is one entry of a ring that was made beforehand, written under a lock of the ring's own. Entries that find the
 * ring full are lost, and counted. */
#ifndef EDGEML_EVENTS_H
#define EDGEML_EVENTS_H

#include <pthread.h>
#include <stdatomic.h>

#include "edgeml.h"

typedef struct events {
  atomic_int on;
  pthread_mutex_t lock; /* of everything below */
  edgeml_event *ring;   /* (room) */
  uint32_t room, first, count;
  uint64_t lost;
} events;

/* Nanoseconds of CLOCK_MONOTONIC. */
uint64_t now_ns(void);

void events_open(events *log);
void events_close(events *log);
void events_add(events *log, edgeml_event event);

/* When something begins that may have to be noted: 0 while nothing is. */
static inline uint64_t events_begin(events *log) { return atomic_load_explicit(&log->on, memory_order_relaxed) ? now_ns() : 0; }

/* It ends on this thread, now where `event.end_ns` is 0. `event.begin_ns` is what events_begin said. */
static inline void events_end(events *log, edgeml_event event) {
  if (event.begin_ns) events_add(log, event);
}

#endif
