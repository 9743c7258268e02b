/* Pages, slots and who may give them up: the state that every paged expert goes through.
 *
 *     absent -> loading -> resident -> absent          loading -> failed (quarantined for good)
 *
 * Rules:
 *   1. All of it changes under one lock; nothing is read from the file and nothing is computed while it is held.
 *   2. A page with pins is not given up. Whoever pins a page unpins it as soon as its work on it is done.
 *   3. Nobody waits for a slot while holding pins outside a lease, and a leased request uses leased pages only. So the holders
 *      of all pins always finish, and waiting for a slot always ends.
 *   4. Waiting for slots is first come, first served: while somebody waits, nobody takes a slot in passing.
 *
 * Eviction, among residents without pins: lowest priority first, then the largest distance to the next use, then the lowest
 * frequency, then the smallest id. Layers are visited in a cycle, so the next use of a page is known from its site: the distance
 * is (site - current site) modulo the number of sites, and that number itself for pages of the current site, which come last.
 * Frequency: each call at a site takes a quarter from all pages of the site and adds PAGE_USE to those it needs, so that old calls
 * fade in the site's own time. edgeml/policy.py is the same table in Python.
 *
 * Reading ahead. Between two sites onnxruntime computes, and near the end of a site some readers have nothing left to do. They
 * then take pages of the site that comes next: those that about every other visit of their site used lately, the most used first,
 * and no more than `ahead` of them, so that few slots move from site to site and the others stay where the rule above put them.
 * It wants a victim that ranks below the page, never waits, and steps back while somebody waits for a slot. The bytes count for
 * the request that asks for the page first, and for none where nobody does.
 */
#ifndef EDGEML_PAGER_H
#define EDGEML_PAGER_H

#include <pthread.h>

#include "edgeml.h"
#include "events.h"

#define NO_SITE UINT32_MAX
#define NO_SLOT UINT32_MAX
#define OS_PAGE 4096u /* O_DIRECT wants addresses, offsets and lengths in multiples of it */

enum page_kind { KIND_ONNX = 1, KIND_EXPERT, KIND_LINEAR, KIND_ROWS, KIND_TENSOR, KIND_TOKENIZER = 7, KIND_JSON = 8 };
enum page_state { PAGE_ABSENT, PAGE_LOADING, PAGE_RESIDENT, PAGE_FAILED };

typedef struct matrix {
  uint8_t type, has_bias; /* type 0: there is no such matrix */
  uint32_t rows, cols;
  size_t tiles, bias;     /* bytes from the expert's start */
} matrix;

typedef struct page {
  uint64_t offset, length, stride; /* bytes */
  uint32_t crc, kind, activation, count;
  matrix matrices[3];
  uint32_t matrix_count;
  uint32_t site;          /* of a routed page, else NO_SITE */
  uint8_t pinned;         /* held from open to close, in the pinned arena */
  uint8_t queued;         /* waits for a reader */
  uint8_t demanded;       /* somebody needs it now: read before hints */
  uint8_t state;          /* enum page_state */
  uint8_t ahead;          /* read ahead and not asked for since */
  uint32_t slot;          /* while loading or resident, else NO_SLOT */
  uint32_t pins;
  uint32_t frequency;     /* fading count of the calls that needed it, at most 4 x PAGE_USE */
  int32_t priority;
  uint64_t turn;          /* order of queueing */
  const uint8_t *data;    /* the page's bytes while resident or pinned */
  edgeml_fault fault;     /* of a failed page */
} page;

typedef struct pager {
  pthread_mutex_t lock;
  pthread_cond_t changed; /* a read ended, a pin or a slot was given up, a ticket was served */
  pthread_cond_t work;    /* a page was queued, or stopping */
  page *pages;
  uint32_t page_count, site_count, current_site;
  uint8_t *arena;
  uint64_t slot_bytes;
  uint32_t slots;
  uint32_t *slot_page;    /* (slots): the page that has the slot, or UINT32_MAX */
  uint32_t *slot_of_free; /* stack of free slots */
  uint32_t free_count, queued_count, loading_count;
  uint64_t next_ticket, served_ticket, next_turn;
  int fd, direct_fd;      /* direct_fd: -1 where the file system has no O_DIRECT */
  int direct, stopping;
  pthread_t readers[16];
  uint32_t reader_count;
  uint32_t ahead;         /* pages that may be read ahead between two visits */
  const uint32_t *next_pages; /* (next_count): pages of the site that comes next */
  uint32_t next_count, ahead_left;
  edgeml_counters total, *sites;
  uint64_t evictions, retries, failures;
  events events;          /* of the whole context; with a lock of its own */
} pager;

/* Parse and check the index; *out is malloc'ed, (index_bytes / 128). BAD_INDEX or NO_MEMORY. */
int pages_parse(const void *index, size_t index_bytes, page **out, uint32_t *count);

/* `pages` has sites filled in. Owns `fd` and `pages` from here on, also when it fails: pager_close frees them. */
int pager_open(pager *pager, int fd, int direct, page *pages, uint32_t count, uint32_t sites, uint64_t slot_bytes, uint32_t slots,
               uint32_t readers, uint32_t ahead);
void pager_close(pager *pager);

/* Read a page to `to` (room for its length rounded up to OS_PAGE), check it, once more past the cache if that fails. No lock. */
edgeml_fault pager_read(pager *pager, const page *page, uint8_t *to);

/* Read `length` bytes at `offset` through the page cache. Returns EDGEML_OK, READ_FAILED (*error is errno) or TRUNCATED. */
int pager_read_plain(int fd, uint8_t *to, uint64_t length, uint64_t offset, int *error);

/* The rest needs the lock. `request` may be NULL. */

/* A call at `site`, whose pages these are, begins; and: it needs this one. */
void pager_visit(pager *pager, uint32_t site, const uint32_t *pages, uint32_t count);
void pager_needs(page *page);

/* The call's pages are all on their way: readers with nothing to do may turn to `pages`, those of the site that comes next,
 * until the next visit. The list outlives the pager. */
void pager_read_ahead(pager *pager, const uint32_t *pages, uint32_t count);

/* Count an acquisition: a hit where the page is resident. */
void pager_count(pager *pager, page *page, edgeml_request *request);

/* Pin an absent or loading page and see that it loads. 0 where no slot can be had now; then nothing changed. */
int pager_try_start(pager *pager, page *page, edgeml_request *request);

/* The same, waiting for a slot. The caller holds no pins outside a lease. */
void pager_start(pager *pager, page *page, edgeml_request *request);

void pager_unpin(pager *pager, page *page);

/* Wait for `changed` and add the time to the request's waits. */
void pager_wait(pager *pager, edgeml_request *request, uint32_t site);

int pager_lease(pager *pager, edgeml_request *request);
void pager_unlease(pager *pager, edgeml_request *request);
int pager_leased(const edgeml_request *request, uint32_t page);

/* These take the lock themselves; page numbers are valid and routed. */
void pager_advise(pager *pager, const uint32_t *pages, uint32_t count, int32_t priority, int load);
void pager_settle(pager *pager);
void pager_evict_all(pager *pager);

#endif
