/* The pager: see pager.h for its rules. Reading happens on reader threads, decisions on the threads that ask. */
#define _GNU_SOURCE /* O_DIRECT */
#include "pager.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE_USE (1u << 20)
#define FREE_SLOT UINT32_MAX

static uint64_t round_page(uint64_t bytes) { return (bytes + OS_PAGE - 1) / OS_PAGE * OS_PAGE; }

/* ---- reading ---- */

static int read_all(int fd, uint8_t *to, uint64_t want, uint64_t need, uint64_t offset, int *error) {
  uint64_t done = 0;
  while (done < need) {
    ssize_t got = pread(fd, to + done, want - done, (off_t)(offset + done));
    if (got > 0) {
      done += (uint64_t)got;
    } else if (got == 0) {
      return EDGEML_TRUNCATED;
    } else if (errno != EINTR) {
      *error = errno;
      return EDGEML_READ_FAILED;
    }
  }
  return EDGEML_OK;
}

int pager_read_plain(int fd, uint8_t *to, uint64_t length, uint64_t offset, int *error) {
  return read_all(fd, to, length, length, offset, error);
}

static int read_once(pager *pg, const page *p, uint8_t *to, int direct, int *error) {
  if (!direct) return read_all(pg->fd, to, p->length, p->length, p->offset, error);
  int status = read_all(pg->direct_fd, to, round_page(p->length), p->length, p->offset, error);
  if (status == EDGEML_READ_FAILED && *error == EINVAL) { /* this file system takes O_DIRECT at open and refuses it here */
    __atomic_store_n(&pg->direct, 0, __ATOMIC_RELAXED);
    *error = 0;
    status = read_all(pg->fd, to, p->length, p->length, p->offset, error);
  }
  return status;
}

static edgeml_fault read_checked(pager *pg, const page *p, uint8_t *to, int direct) {
  edgeml_fault fault = {.page = (uint32_t)(p - pg->pages), .offset = p->offset};
  int error = 0;
  fault.status = read_once(pg, p, to, direct, &error);
  fault.error = error;
  if (fault.status != EDGEML_OK) return fault;
  uint64_t begin = events_begin(&pg->events);
  if (edgeml_crc32c(0, to, p->length) != p->crc) fault.status = EDGEML_CHECKSUM;
  events_end(&pg->events, (edgeml_event){begin, 0, p->length, 0, EDGEML_EVENT_CHECKSUM, p->site, fault.page, UINT32_MAX});
  return fault;
}

edgeml_fault pager_read(pager *pg, const page *p, uint8_t *to) {
  edgeml_fault fault = read_checked(pg, p, to, __atomic_load_n(&pg->direct, __ATOMIC_RELAXED));
  if (fault.status == EDGEML_OK) return fault;
  __atomic_add_fetch(&pg->retries, 1, __ATOMIC_RELAXED);
#ifdef POSIX_FADV_DONTNEED
  posix_fadvise(pg->fd, (off_t)p->offset, (off_t)p->length, POSIX_FADV_DONTNEED); /* a damaged cached copy must not come back */
#endif
  return read_checked(pg, p, to, pg->direct_fd >= 0);
}

/* ---- the rule ---- */

static uint32_t distance(const pager *pg, const page *p) {
  uint32_t ahead = (p->site + pg->site_count - pg->current_site) % pg->site_count;
  return ahead ? ahead : pg->site_count;
}

/* Whether `a` is given up before `b`, ids aside: negative, 0 for a tie, positive. */
static int compare(const pager *pg, const page *a, const page *b) {
  if (a->priority != b->priority) return a->priority < b->priority ? -1 : 1;
  uint32_t da = distance(pg, a), db = distance(pg, b);
  if (da != db) return da > db ? -1 : 1;
  if (a->frequency != b->frequency) return a->frequency < b->frequency ? -1 : 1;
  return 0;
}

static page *find_victim(pager *pg) {
  page *worst = NULL;
  for (uint32_t slot = 0; slot < pg->slots; slot++) {
    if (pg->slot_page[slot] == FREE_SLOT) continue;
    page *p = &pg->pages[pg->slot_page[slot]];
    if (p->state != PAGE_RESIDENT || p->pins) continue;
    int order = worst ? compare(pg, p, worst) : -1;
    if (order < 0 || (order == 0 && p < worst)) worst = p;
  }
  return worst;
}

static void give_slot_back(pager *pg, page *p) {
  pg->slot_page[p->slot] = FREE_SLOT;
  pg->slot_of_free[pg->free_count++] = p->slot;
  p->slot = NO_SLOT, p->data = NULL;
}

static void evict(pager *pg, page *p) {
  p->state = PAGE_ABSENT, p->ahead = 0;
  give_slot_back(pg, p);
  pg->evictions++;
}

/* Put an absent page into a free slot and queue its read. */
static void start_load(pager *pg, page *p, int demanded) {
  p->slot = pg->slot_of_free[--pg->free_count];
  pg->slot_page[p->slot] = (uint32_t)(p - pg->pages);
  p->state = PAGE_LOADING, p->queued = 1, p->demanded = (uint8_t)demanded, p->turn = pg->next_turn++;
  pg->queued_count++, pg->loading_count++;
  pthread_cond_signal(&pg->work);
}

/* ---- acquiring ---- */

void pager_count(pager *pg, page *p, edgeml_request *request) {
  edgeml_counters *counters[3] = {&pg->total, &pg->sites[p->site], request ? &request->counters : NULL};
  for (int i = 0; i < 3; i++) {
    if (counters[i]) (p->state == PAGE_RESIDENT ? counters[i]->hits++ : counters[i]->misses++);
  }
  uint64_t now = events_begin(&pg->events);
  uint32_t kind = p->state == PAGE_RESIDENT ? EDGEML_EVENT_HIT : EDGEML_EVENT_MISS;
  events_end(&pg->events, (edgeml_event){now, now, 0, 0, kind, p->site, (uint32_t)(p - pg->pages), UINT32_MAX});
}

static void count_bytes(pager *pg, const page *p, edgeml_request *request) {
  pg->total.page_in_bytes += p->length, pg->sites[p->site].page_in_bytes += p->length;
  if (request) request->counters.page_in_bytes += p->length;
}

static int start_in_turn(pager *pg, page *p, edgeml_request *request) {
  if (p->state == PAGE_ABSENT) {
    if (pg->free_count == 0) {
      page *victim = find_victim(pg);
      if (!victim) return 0;
      evict(pg, victim);
    }
    start_load(pg, p, 1);
    count_bytes(pg, p, request);
  }
  if (p->ahead && request) request->counters.page_in_bytes += p->length;
  p->ahead = 0;
  p->demanded = 1;
  p->pins++;
  return 1;
}

int pager_try_start(pager *pg, page *p, edgeml_request *request) {
  if (p->state == PAGE_ABSENT && pg->next_ticket != pg->served_ticket) return 0;
  return start_in_turn(pg, p, request);
}

static void take_turn(pager *pg) {
  uint64_t ticket = pg->next_ticket++;
  while (ticket != pg->served_ticket) pthread_cond_wait(&pg->changed, &pg->lock);
}

static void end_turn(pager *pg) {
  pg->served_ticket++;
  pthread_cond_broadcast(&pg->changed);
}

static void count_wait(pager *pg, edgeml_request *request, uint32_t site, uint64_t since) {
  uint64_t waited = now_ns() - since;
  if (events_begin(&pg->events))
    events_add(&pg->events,
               (edgeml_event){since, 0, 0, 0, site == NO_SITE ? EDGEML_EVENT_LEASE : EDGEML_EVENT_WAIT, site, UINT32_MAX, UINT32_MAX});
  pg->total.page_wait_ns += waited;
  if (site != NO_SITE) pg->sites[site].page_wait_ns += waited;
  if (request) request->counters.page_wait_ns += waited;
}

void pager_wait(pager *pg, edgeml_request *request, uint32_t site) {
  uint64_t since = now_ns();
  pthread_cond_wait(&pg->changed, &pg->lock);
  count_wait(pg, request, site, since);
}

void pager_start(pager *pg, page *p, edgeml_request *request) {
  uint64_t since = now_ns();
  take_turn(pg);
  while (!start_in_turn(pg, p, request)) pthread_cond_wait(&pg->changed, &pg->lock);
  end_turn(pg);
  count_wait(pg, request, p->site, since);
}

void pager_unpin(pager *pg, page *p) {
  if (--p->pins) return;
  pthread_cond_broadcast(&pg->changed);
  if (pg->ahead_left) pthread_cond_signal(&pg->work); /* there may be a victim now */
}

/* ---- leases ---- */

int pager_leased(const edgeml_request *request, uint32_t number) {
  uint32_t low = 0, high = request->lease_count;
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    if (request->lease[middle] == number) return 1;
    if (request->lease[middle] < number) low = middle + 1;
    else high = middle;
  }
  return 0;
}

/* Slots that the set could have now: free ones and those of unpinned residents outside it; less what it still needs. */
static int lease_fits(pager *pg, const edgeml_request *request) {
  uint32_t room = pg->free_count, need = 0;
  for (uint32_t i = 0; i < request->lease_count; i++) need += pg->pages[request->lease[i]].state == PAGE_ABSENT;
  for (uint32_t slot = 0; slot < pg->slots && room < need; slot++) {
    uint32_t number = pg->slot_page[slot];
    if (number == FREE_SLOT) continue;
    const page *p = &pg->pages[number];
    room += p->state == PAGE_RESIDENT && !p->pins && !pager_leased(request, number);
  }
  return room >= need;
}

static void pin_lease(pager *pg, edgeml_request *request) {
  for (int absent = 0; absent < 2; absent++) { /* residents first, so that none of them is given up for the others */
    for (uint32_t i = 0; i < request->lease_count; i++) {
      page *p = &pg->pages[request->lease[i]];
      if ((p->state == PAGE_ABSENT) != absent) continue;
      if (p->state != PAGE_RESIDENT) pager_count(pg, p, request);
      if (p->state == PAGE_FAILED) p->pins++;
      else start_in_turn(pg, p, request);
    }
  }
}

int pager_lease(pager *pg, edgeml_request *request) {
  edgeml_fault fault = {.status = EDGEML_OK};
  uint32_t paged = 0;
  for (uint32_t i = 0; i < request->lease_count; i++) paged += !pg->pages[request->lease[i]].pinned;
  if (paged > pg->slots) return EDGEML_NEVER_FITS;
  uint64_t since = now_ns();
  take_turn(pg);
  while (!lease_fits(pg, request)) pthread_cond_wait(&pg->changed, &pg->lock);
  pin_lease(pg, request);
  end_turn(pg);
  for (uint32_t i = 0; i < request->lease_count; i++) {
    page *p = &pg->pages[request->lease[i]];
    while (p->state == PAGE_LOADING) pthread_cond_wait(&pg->changed, &pg->lock);
    if (p->state == PAGE_FAILED && !fault.status) fault = p->fault;
  }
  count_wait(pg, request, NO_SITE, since);
  if (fault.status) {
    request->fault = fault;
    pager_unlease(pg, request);
  }
  return fault.status;
}

void pager_unlease(pager *pg, edgeml_request *request) {
  for (uint32_t i = 0; i < request->lease_count; i++) pager_unpin(pg, &pg->pages[request->lease[i]]);
  request->lease_count = 0;
}

/* ---- hints ---- */

static int prefetch(pager *pg, page *p) {
  if (p->state != PAGE_ABSENT || pg->next_ticket != pg->served_ticket) return 0;
  if (pg->free_count == 0) {
    page *victim = find_victim(pg);
    if (!victim || compare(pg, victim, p) >= 0) return 0;
    evict(pg, victim);
  }
  start_load(pg, p, 0);
  count_bytes(pg, p, NULL);
  return 1;
}

void pager_advise(pager *pg, const uint32_t *pages, uint32_t count, int32_t priority, int load) {
  pthread_mutex_lock(&pg->lock);
  for (uint32_t i = 0; i < count; i++) pg->pages[pages[i]].priority = priority;
  for (uint32_t i = 0; load && i < count; i++) prefetch(pg, &pg->pages[pages[i]]);
  pthread_mutex_unlock(&pg->lock);
}

/* ---- visits, and reading ahead of the next one ---- */

void pager_visit(pager *pg, uint32_t site, const uint32_t *pages, uint32_t count) {
  pg->current_site = site;
  pg->ahead_left = 0;
  for (uint32_t i = 0; i < count; i++) pg->pages[pages[i]].frequency -= pg->pages[pages[i]].frequency >> 2;
}

void pager_needs(page *p) { p->frequency += PAGE_USE; }

void pager_read_ahead(pager *pg, const uint32_t *pages, uint32_t count) {
  pg->next_pages = pages, pg->next_count = count, pg->ahead_left = pg->ahead;
  if (pg->ahead_left && !pg->queued_count) pthread_cond_broadcast(&pg->work);
}

/* Queue one page of the next site; 0 where none deserves it or none can be given up for it. */
static int start_ahead(pager *pg) {
  page *best = NULL;
  if (!pg->ahead_left) return 0;
  for (uint32_t i = 0; i < pg->next_count; i++) {
    page *p = &pg->pages[pg->next_pages[i]];
    if (p->state != PAGE_ABSENT || p->frequency < 2 * PAGE_USE) continue;
    if (!best || p->frequency > best->frequency) best = p;
  }
  if (!best) pg->ahead_left = 0;
  if (!best || !prefetch(pg, best)) return 0;
  best->ahead = 1;
  pg->ahead_left--;
  return 1;
}

void pager_settle(pager *pg) {
  pthread_mutex_lock(&pg->lock);
  while (pg->loading_count) pthread_cond_wait(&pg->changed, &pg->lock);
  pthread_mutex_unlock(&pg->lock);
}

void pager_evict_all(pager *pg) {
  pthread_mutex_lock(&pg->lock);
  for (uint32_t slot = 0; slot < pg->slots; slot++) {
    if (pg->slot_page[slot] == FREE_SLOT) continue;
    page *p = &pg->pages[pg->slot_page[slot]];
    if (p->state == PAGE_RESIDENT && !p->pins) evict(pg, p);
  }
  pthread_cond_broadcast(&pg->changed);
  pthread_mutex_unlock(&pg->lock);
}

/* ---- readers ---- */

static page *next_queued(pager *pg) {
  page *best = NULL;
  for (uint32_t slot = 0; slot < pg->slots; slot++) {
    if (pg->slot_page[slot] == FREE_SLOT) continue;
    page *p = &pg->pages[pg->slot_page[slot]];
    if (!p->queued) continue;
    if (!best || p->demanded > best->demanded || (p->demanded == best->demanded && p->turn < best->turn)) best = p;
  }
  return best;
}

static void *reader_main(void *argument) {
  pager *pg = argument;
  pthread_mutex_lock(&pg->lock);
  for (;;) {
    while (!pg->queued_count && !pg->stopping && !start_ahead(pg)) pthread_cond_wait(&pg->work, &pg->lock);
    if (pg->stopping) break;
    page *p = next_queued(pg);
    uint8_t *to = pg->arena + p->slot * pg->slot_bytes;
    p->queued = 0, pg->queued_count--;
    pthread_mutex_unlock(&pg->lock);
    uint64_t begin = events_begin(&pg->events);
    edgeml_fault fault = pager_read(pg, p, to);
    events_end(&pg->events, (edgeml_event){begin, 0, p->length, 0, EDGEML_EVENT_READ, p->site, (uint32_t)(p - pg->pages), UINT32_MAX});
    pthread_mutex_lock(&pg->lock);
    pg->loading_count--;
    if (fault.status == EDGEML_OK) {
      p->state = PAGE_RESIDENT, p->data = to;
    } else {
      p->state = PAGE_FAILED, p->fault = fault;
      pg->failures++;
      give_slot_back(pg, p);
    }
    pthread_cond_broadcast(&pg->changed);
  }
  pthread_mutex_unlock(&pg->lock);
  return NULL;
}

/* ---- life ---- */

static int open_direct(int fd) {
#ifdef O_DIRECT
  char path[40];
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  return open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
#else
  (void)fd;
  return -1;
#endif
}

/* Huge pages where the system has them: a direct read of 576 KiB is then one or two pieces and not 144, which made reads on the
 * machine it was measured on 1.4 times as fast. */
static uint8_t *map_arena(uint64_t bytes) {
  void *arena = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (arena == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
  madvise(arena, bytes, MADV_HUGEPAGE);
#endif
  return arena;
}

int pager_open(pager *pg, int fd, int direct, page *pages, uint32_t count, uint32_t sites, uint64_t slot_bytes, uint32_t slots,
               uint32_t readers, uint32_t ahead) {
  *pg = (pager){.fd = fd, .pages = pages, .page_count = count, .site_count = sites ? sites : 1, .slot_bytes = slot_bytes, .slots = slots};
  pg->ahead = ahead;
  pthread_mutex_init(&pg->lock, NULL);
  pthread_cond_init(&pg->changed, NULL);
  pthread_cond_init(&pg->work, NULL);
  events_open(&pg->events);
  pg->direct_fd = open_direct(fd);
  pg->direct = direct && pg->direct_fd >= 0;
  pg->slot_page = malloc((slots + 1) * sizeof *pg->slot_page);
  pg->slot_of_free = malloc((slots + 1) * sizeof *pg->slot_of_free);
  pg->sites = calloc(pg->site_count, sizeof *pg->sites);
  uint64_t bytes = slot_bytes * slots;
  if (bytes) pg->arena = map_arena(bytes);
  if (!pg->slot_page || !pg->slot_of_free || !pg->sites || (bytes && !pg->arena)) return EDGEML_NO_MEMORY;
  for (uint32_t slot = 0; slot < slots; slot++) {
    pg->slot_page[slot] = FREE_SLOT;
    pg->slot_of_free[slot] = slots - 1 - slot; /* the first load goes to slot 0 */
  }
  pg->free_count = slots;
  for (; pg->reader_count < readers; pg->reader_count++)
    if (pthread_create(&pg->readers[pg->reader_count], NULL, reader_main, pg)) return EDGEML_NO_MEMORY;
  return EDGEML_OK;
}

void pager_close(pager *pg) {
  pthread_mutex_lock(&pg->lock);
  pg->stopping = 1;
  pthread_cond_broadcast(&pg->work);
  pthread_mutex_unlock(&pg->lock);
  for (uint32_t i = 0; i < pg->reader_count; i++) pthread_join(pg->readers[i], NULL);
  if (pg->arena) munmap(pg->arena, pg->slot_bytes * pg->slots);
  free(pg->slot_page);
  free(pg->slot_of_free);
  free(pg->sites);
  free(pg->pages);
  if (pg->direct_fd >= 0) close(pg->direct_fd);
  close(pg->fd);
  events_close(&pg->events);
  pthread_cond_destroy(&pg->work);
  pthread_cond_destroy(&pg->changed);
  pthread_mutex_destroy(&pg->lock);
}
