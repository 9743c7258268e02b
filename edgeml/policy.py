"""The pager's decisions as a table: events in, instructions out; no clock, no thread, no file. The oracle of native/src/pager.c.

Theory. Layers are visited in a cycle, so a page is next wanted when its site comes round again: that distance is known, where
recency says nothing (least-recently-used scores no hit at all when a cycle is longer than the cache). Among unpinned residents
the one to give up has the lowest priority, then the largest distance, then the lowest frequency, then the smallest id. Pages of
the site just visited are the farthest of all. Frequencies fade in their site's own time: a visit takes a quarter from all pages of
its site and adds one use to those it needs. Counts that fade slowly lose where routing drifts (benchmarks/routing/policy.py).

A page in use or leased is pinned. A hint may only take a free slot or that of a page which ranks strictly worse than itself.
Reads are taken to end before the next event; the native pager, driven so, must hold the same pages after every event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edgeml.errors import BudgetError, UsageError

__all__ = ["Advise", "Evict", "EvictAll", "Lease", "Load", "PagerModel", "Release", "Use"]

#: One use, as frequencies count it: whole numbers that a quarter can be taken from.
PAGE_USE = 1 << 20


@dataclass(frozen=True)
class Use:
    """An operator call at `site` that needs `pages`, all of that site."""

    site: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Advise:
    """A hint: these pages have this priority; with `load`, read the absent ones where there is room for them."""

    pages: tuple[int, ...]
    priority: int
    load: bool


@dataclass(frozen=True)
class Lease:
    """Pin these pages until `Release`."""

    pages: tuple[int, ...]


@dataclass(frozen=True)
class Release:
    """Give up the lease."""


@dataclass(frozen=True)
class EvictAll:
    """Give up every unpinned resident."""


@dataclass(frozen=True)
class Load:
    """Read a page into a slot."""

    page: int


@dataclass(frozen=True)
class Evict:
    """Give up a page's slot."""

    page: int


Event = Use | Advise | Lease | Release | EvictAll
Instruction = Load | Evict


@dataclass
class PagerModel:
    """State of the pages. `site_of` maps each routed page to its site; `handle` is the only way to change anything."""

    site_of: Mapping[int, int]
    sites: int
    slots: int
    resident: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)
    leased: tuple[int, ...] | None = None
    priority: dict[int, int] = field(default_factory=dict)
    frequency: dict[int, int] = field(default_factory=dict)
    current_site: int = 0
    hits: int = 0
    misses: int = 0

    def handle(self, event: Event) -> list[Instruction]:
        """Apply one event and return what is to be done, in order. A refused event raises and changes nothing."""
        match event:
            case Use():
                return self._use(event)
            case Advise():
                return self._advise(event)
            case Lease():
                return self._lease(event)
            case Release():
                self.pinned -= set(self.leased or ())
                self.leased = None
                return []
            case EvictAll():
                gone = sorted(self.resident - self.pinned)
                self.resident -= set(gone)
                return [Evict(page) for page in gone]

    def check(self) -> None:
        """Raise `AssertionError` where an invariant does not hold."""
        assert len(self.resident) <= self.slots, "more residents than slots"
        assert self.pinned <= self.resident, "a pinned page is not resident"
        assert self.pinned == set(self.leased or ()), "a pin outlived its event"

    def rank(self, page: int) -> tuple[int, int, int]:
        """The smallest rank is given up first."""
        ahead = (self.site_of[page] - self.current_site) % self.sites or self.sites
        return self.priority.get(page, 0), -ahead, self.frequency.get(page, 0)

    def _use(self, event: Use) -> list[Instruction]:
        pages = set(event.pages)
        if any(self.site_of[page] != event.site for page in pages):
            raise UsageError("a use is of pages of one site")
        if self.leased is not None and not pages <= set(self.leased):
            raise UsageError("a leased request uses leased pages only")
        if len(pages | self.pinned) > self.slots:
            raise BudgetError("the pages of one use do not fit the slots at once")
        self.current_site = event.site
        for page, site in self.site_of.items():
            if site == event.site:
                fading = self.frequency.get(page, 0)
                self.frequency[page] = fading - (fading >> 2) + PAGE_USE * (page in pages)
        instructions = self._pin(pages, count_hits=True)
        self.pinned = set(self.leased or ())
        return instructions

    def _lease(self, event: Lease) -> list[Instruction]:
        if self.leased is not None:
            raise UsageError("there is a lease already")
        if len(event.pages) > self.slots:
            raise BudgetError("the set is larger than the slots")
        self.leased = event.pages
        return self._pin(set(event.pages), count_hits=False)

    def _pin(self, pages: set[int], count_hits: bool) -> list[Instruction]:
        present = sorted(pages & self.resident)
        self.pinned |= set(present)
        if count_hits:
            for page in present:
                self._count(page, hit=True)
        instructions: list[Instruction] = []
        for page in sorted(pages - self.resident):
            self._count(page, hit=False)
            instructions += self._load(page, self._victim(self.resident - self.pinned))
            self.pinned.add(page)
        return instructions

    def _advise(self, event: Advise) -> list[Instruction]:
        for page in event.pages:
            self.priority[page] = event.priority
        instructions: list[Instruction] = []
        loading: set[int] = set()
        for page in event.pages:
            if not event.load or page in self.resident:
                continue
            victim = self._victim(self.resident - self.pinned - loading)
            if len(self.resident) == self.slots and (victim is None or self.rank(victim) >= self.rank(page)):
                continue
            instructions += self._load(page, victim)
            loading.add(page)
        return instructions

    def _load(self, page: int, victim: int | None) -> list[Instruction]:
        gone: list[Instruction] = []
        if len(self.resident) == self.slots:
            assert victim is not None, "no slot can be had"
            self.resident.remove(victim)
            gone.append(Evict(victim))
        self.resident.add(page)
        return [*gone, Load(page)]

    def _victim(self, pages: Iterable[int]) -> int | None:
        return min(pages, key=lambda page: (*self.rank(page), page), default=None)

    def _count(self, page: int, hit: bool) -> None:
        self.hits += hit
        self.misses += not hit
