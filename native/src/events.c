#define _GNU_SOURCE /* syscall */
#include "events.h"

#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "context.h"

static _Thread_local uint32_t thread_number;

uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void events_open(events *log) { pthread_mutex_init(&log->lock, NULL); }

void events_close(events *log) {
  free(log->ring);
  pthread_mutex_destroy(&log->lock);
}

void events_add(events *log, edgeml_event event) {
  if (!thread_number) thread_number = (uint32_t)syscall(SYS_gettid);
  event.thread = thread_number;
  if (!event.end_ns) event.end_ns = now_ns();
  pthread_mutex_lock(&log->lock);
  if (log->count < log->room) log->ring[(log->first + (uint64_t)log->count++) % log->room] = event;
  else log->lost++;
  pthread_mutex_unlock(&log->lock);
}

int edgeml_events_start(edgeml_context *context, uint32_t room) {
  events *log = &context->pager.events;
  if (!room || room > 1u << 24) return EDGEML_BAD_ARGUMENT;
  edgeml_event *ring = malloc(room * sizeof *ring);
  if (!ring) return EDGEML_NO_MEMORY;
  memset(ring, 0, room * sizeof *ring); /* its memory is there before the first event */
  pthread_mutex_lock(&log->lock);
  edgeml_event *old = log->ring;
  log->ring = ring, log->room = room, log->first = log->count = 0, log->lost = 0;
  atomic_store(&log->on, 1);
  pthread_mutex_unlock(&log->lock);
  free(old);
  return EDGEML_OK;
}

uint32_t edgeml_events_take(edgeml_context *context, edgeml_event *out, uint32_t room, uint64_t *lost) {
  events *log = &context->pager.events;
  pthread_mutex_lock(&log->lock);
  uint32_t taken = log->count < room ? log->count : room;
  for (uint32_t i = 0; i < taken; i++) out[i] = log->ring[(log->first + (uint64_t)i) % log->room];
  if (taken) log->first = (uint32_t)((log->first + (uint64_t)taken) % log->room);
  log->count -= taken;
  if (!log->count) log->first = 0; /* what was written before is still in the cache */
  *lost = log->lost;
  pthread_mutex_unlock(&log->lock);
  return taken;
}

void edgeml_events_stop(edgeml_context *context) { atomic_store(&context->pager.events.on, 0); }
