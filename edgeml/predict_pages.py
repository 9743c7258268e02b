"""A mixture's pages over some requests, as a small simulation: what is found in memory, what is read, and how long that takes.

It follows the rules at the heads of native/src/experts.c and pager.h: residents first, as many loads on their way as keep the
readers busy, the farthest and least used page given up, a few pages of the next site read ahead. One thread computes, and the medium
answers reads one after another, each no sooner than a single read takes. Time is a number that is added up: nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeml.policy import PAGE_USE

__all__ = ["Medium", "Paged", "Pager", "draw_choices", "inclusion"]

READERS, AHEAD = 3, 4  # as `native.Context` has them
_LOGISTIC = 1.702  # log(u / (1 - u)) of u = Phi(z) is about this times z


@dataclass(frozen=True)
class Medium:
    """How pages come in: seconds of one read by itself, and seconds between two reads where several are on their way."""

    alone_s: float
    following_s: float


@dataclass
class Paged:
    """What one request cost: seconds of all of it, seconds waited for pages, pages found, missed, and read."""

    seconds: float = 0.0
    waited_s: float = 0.0
    hits: float = 0
    misses: float = 0
    read: float = 0


@dataclass
class Pager:
    """Slots and pages of one bundle. Page = site * most experts of a site + expert."""

    sites: int
    slots: int
    medium: Medium
    readers: int = READERS
    ahead: int = AHEAD
    now: float = 0.0
    _disk_free: float = 0.0
    _ready: dict[int, float] = field(default_factory=dict)  # page in a slot -> when it is there
    _of_site: list[set[int]] = field(default_factory=list)
    _frequency: dict[int, int] = field(default_factory=dict)
    _read_ahead: set[int] = field(default_factory=set)
    _pinned: set[int] = field(default_factory=set)
    _site: int = 0

    def __post_init__(self) -> None:
        self._of_site = [set() for _ in range(self.sites)]
        self._site_of: dict[int, int] = {}

    @property
    def held(self) -> int:
        """Pages in slots."""
        return len(self._ready)

    def request(self, visits: Sequence[dict[int, float]], every: Sequence[Sequence[int]], shared_s: float, other_s: float) -> Paged:
        """One request: for each site the pages it uses with the seconds that each computes, and all its pages. `shared_s`: what a
        visit computes without routed pages; `other_s`: what lies before each visit, besides."""
        paged, began = Paged(), self.now
        for site, (used, pages) in enumerate(zip(visits, every, strict=True)):
            self.now += other_s
            self._visit(site, used, pages, every[(site + 1) % self.sites], shared_s, paged)
        paged.seconds = self.now - began
        return paged

    def _visit(self, site: int, used: dict[int, float], pages: Sequence[int], after: Sequence[int], shared_s: float, paged: Paged) -> None:
        self._site = site
        for page in pages:
            self._site_of[page] = site
            count = self._frequency.get(page, 0)
            self._frequency[page] = count - (count >> 2) + (PAGE_USE if page in used else 0)
        there = [page for page in used if self._ready.get(page, self.now + 1) <= self.now]
        absent = [page for page in used if page not in set(there)]
        paged.hits += len(there)
        paged.misses += len(absent)
        paged.read += sum(page in self._read_ahead for page in used)
        self._read_ahead.difference_update(used)
        self._pinned = set(there)
        self._loaded = 0
        waiting = [page for page in absent if not self._start(page, paged)]
        left = self.ahead
        left = self._ahead(after, left) if not waiting else left
        todo = list(used)
        self.now += shared_s
        while todo:
            done = next((page for page in todo if page in self._pinned and self._ready[page] <= self.now), None)
            if done is not None:
                if waiting and self._start(waiting[0], paged):
                    waiting.pop(0)
                self.now += used[done]
                todo.remove(done)
                self._pinned.discard(done)
                self._loaded -= done in absent
            elif not waiting or not self._start(waiting[0], paged):
                coming = [self._ready[page] for page in todo if page in self._pinned]
                coming = coming or [when for when in self._ready.values() if when > self.now] or [self.now]
                paged.waited_s += max(min(coming) - self.now, 0.0)
                self.now = max(min(coming), self.now)
                continue
            if waiting and self._start(waiting[0], paged):
                waiting.pop(0)
            if not waiting:
                left = self._ahead(after, left)

    def _start(self, page: int, paged: Paged) -> bool:
        """Pin a page and see that it comes; False where it has to wait."""
        if page not in self._ready:
            if len(self._ready) >= self.slots and (self._loaded > self.readers or not self._give_up(None)):
                return False
            self._load(page)
            paged.read += 1
        self._pinned.add(page)
        self._loaded += 1
        return True

    def _load(self, page: int) -> None:
        self._disk_free = max(self.now + self.medium.alone_s, self._disk_free + self.medium.following_s)
        self._ready[page] = self._disk_free
        self._of_site[self._site_of[page]].add(page)

    def _ahead(self, after: Sequence[int], left: int) -> int:
        """Read up to `left` pages of the next site while readers are idle; returns how many are still allowed."""
        while left and sum(when > self.now for when in self._ready.values()) < self.readers:
            wanted = [page for page in after if page not in self._ready and self._frequency.get(page, 0) >= 2 * PAGE_USE]
            if not wanted:
                return 0
            best = max(wanted, key=lambda page: self._frequency[page])
            if len(self._ready) >= self.slots and not self._give_up(best):
                return left
            self._load(best)
            self._read_ahead.add(best)
            left -= 1
        return left

    def _distance(self, site: int) -> int:
        return (site - self._site) % self.sites or self.sites

    def _give_up(self, instead: int | None) -> bool:
        """Free the slot of the page that is farthest from its next use and least used; for a hint, of one that ranks below it."""
        nearest = 0 if instead is None else self._distance(self._site_of[instead])
        for step in range(self.sites, nearest, -1):
            site = (self._site + step) % self.sites
            free = [page for page in self._of_site[site] if page not in self._pinned and self._ready[page] <= self.now]
            if free:
                gone = min(free, key=lambda page: (self._frequency[page], page))
                self._of_site[site].remove(gone)
                del self._ready[gone]
                self._read_ahead.discard(gone)
                return True
        return False


def inclusion(usage: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """How likely a token chooses each expert: top_k x usage (E,), at most 1, what is above going to the others."""
    chance = np.zeros(len(usage))
    for _ in range(len(usage)):
        free = chance < 1
        left, weight = top_k - (~free).sum(), usage[free].sum()
        if not free.any() or left <= 0:
            break
        chance[free] = left * usage[free] / weight if weight > 0 else left / free.sum()
        if (chance <= 1).all():
            break
        chance = np.where(chance > 1, 1.0, np.where(free, 0.0, chance))
    return np.clip(chance, 0.0, 1.0)


def draw_choices(chance: NDArray[np.float64], top_k: int, tokens: int, agreement: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """How many of a text's tokens choose each expert (E,), `top_k` different ones a token, each with about its `chance`.

    Pareto sampling (Rosen 1997): the smallest of log(u / (1 - u)) - log(p / (1 - p)). `agreement` in [0, 1] is the share of a text's
    own taste in u's variance: 0, tokens choose independently of each other; 1, all tokens of a text choose alike.
    """
    odds = np.log(np.clip(chance, 1e-9, 1 - 1e-9)) - np.log1p(-np.clip(chance, 1e-9, 1 - 1e-9))
    text, token = rng.standard_normal(len(chance)), rng.standard_normal((tokens, len(chance)))
    keys = _LOGISTIC * (agreement**0.5 * text + (1 - agreement) ** 0.5 * token) - odds
    chosen = np.argpartition(keys, top_k - 1, axis=1)[:, :top_k] if top_k < len(chance) else np.tile(np.arange(len(chance)), (tokens, 1))
    return np.bincount(chosen.ravel(), minlength=len(chance)).astype(np.int64)
