"""Caches replayed on a trace: how often the pages a token needs are there, for every capacity at once.

A use is one visit of a site: the pages it needs together. Its pages are looked up in the cache as the visit finds it; then all
of them are held, and where that is more than the capacity, pages that this use does not need are given up: those with the
smallest key, ties by the smallest page. A policy is nothing but these keys, one array a use, and no key depends on what is
held. So a single order of the pages serves every capacity, and a replay costs one sort a use. Every page that is used must
pass through the cache, as a pager's slots demand: nothing is bypassed.

`sch` is the published measure of the same kind, which tests a whole token before it changes anything.

Policies: the past is known to `lru`, `lfu` and `pager`; the future, `lookahead` tokens or all of it, to `lookahead` and `belady`.
`pager` is the rule of `policy.PagerModel` without priorities, leases and hints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import UsageError
from edgeml.policy import PAGE_USE

__all__ = ["POLICIES", "Replayed", "Trace", "Uses", "belady", "lfu", "lookahead", "lru", "pager", "replay", "sch", "uses_of"]

Ints = NDArray[np.int64]
#: The experts that tokens choose, (tokens, sites, k) int64; -1 where none was chosen. An expert is chosen once a site at most.
Trace = Ints
Keys = Iterator[Ints]


@dataclass(frozen=True)
class Uses:
    """The visits of a trace in order, each with its pages; page number = site * experts + expert; visit i is of site i mod sites."""

    pages: Sequence[Ints]
    sites: int
    experts: int

    @property
    def width(self) -> int:
        """How many pages there are."""
        return self.sites * self.experts


@dataclass(frozen=True)
class Replayed:
    """Of each capacity, as the replay was given them: lookups that found their page, and loads that took a free slot."""

    requests: int
    hits: Ints
    filled: Ints

    def rate(self, warm: bool) -> NDArray[np.float64]:
        """Hit rate of each capacity; `warm` counts a load into a free slot as a hit, as if the cache had begun full of the right pages."""
        return (self.hits + (self.filled if warm else 0)) / max(self.requests, 1)

    def __add__(self, other: Replayed) -> Replayed:
        return Replayed(self.requests + other.requests, self.hits + other.hits, self.filled + other.filled)


def uses_of(trace: Trace, experts: int) -> Uses:
    """The visits of a trace: token by token, and site after site within a token."""
    sites = trace.shape[1]
    pages = trace + experts * np.arange(sites)[None, :, None]
    visits = [np.sort(row[keep]) for token, kept in zip(pages, trace >= 0, strict=True) for row, keep in zip(token, kept, strict=True)]
    return Uses(visits, sites, experts)


def replay(uses: Uses, policy: Callable[[Uses], Keys], capacities: Sequence[int]) -> Replayed:
    """Replay a policy from an empty cache. Raises `UsageError` for a capacity that a single use does not fit."""
    sizes = np.asarray(capacities, np.int64)
    if len(sizes) and sizes.min() < max(map(len, uses.pages), default=0):
        raise UsageError(f"a cache of {sizes.min()} cannot hold the pages of one use")
    resident = np.zeros((len(sizes), uses.width), bool)
    hits, filled, held = (np.zeros(len(sizes), np.int64) for _ in range(3))
    for pages, keys in zip(uses.pages, policy(uses), strict=True):
        found = resident[:, pages].sum(1)
        hits += found
        resident[:, pages] = True
        held += len(pages) - found
        over = np.maximum(held - sizes, 0)
        filled += len(pages) - found - over
        if over.any():
            _give_up(resident, pages, keys, over)
            held -= over
    return Replayed(sum(map(len, uses.pages)), hits, filled)


def _give_up(resident: NDArray[np.bool_], pages: Ints, keys: Ints, over: Ints) -> None:
    """Of each row of `resident` clear the `over` pages with the smallest keys, none of `pages`."""
    kept = keys.copy()
    kept[pages] = np.iinfo(np.int64).max  # last in the order, and never reached: a capacity holds a use
    order = kept.argsort(kind="stable")
    held = resident[:, order]
    resident[:, order] = held & (held.cumsum(1) > over[:, None])


def lru(uses: Uses) -> Keys:
    """Least recently used."""
    last = np.full(uses.width, -1, np.int64)
    for now, pages in enumerate(uses.pages):
        last[pages] = now
        yield last


def lfu(uses: Uses) -> Keys:
    """Least frequently used since the beginning, ties by the least recent."""
    frequency, last = np.zeros(uses.width, np.int64), np.zeros(uses.width, np.int64)
    for now, pages in enumerate(uses.pages):
        frequency[pages] += 1
        last[pages] = now
        yield frequency * len(uses.pages) + last


def pager(uses: Uses) -> Keys:
    """The pager's own: the farthest site first, then the lowest frequency, which fades at each visit of its site."""
    site, frequency = np.arange(uses.width) // uses.experts, np.zeros(uses.width, np.int64)
    for now, pages in enumerate(uses.pages):
        own = site == now % uses.sites
        frequency[own] -= frequency[own] >> 2
        frequency[pages] += PAGE_USE
        ahead = (site - now - 1) % uses.sites + 1
        yield frequency - ahead * (8 * PAGE_USE)


def lookahead(tokens: int) -> Callable[[Uses], Keys]:
    """The fewest uses within this and the next `tokens - 1` tokens, ties by the least recent: what a predictor could give."""

    def keys(uses: Uses) -> Keys:
        ahead = tokens * uses.sites
        count, last = np.zeros(uses.width, np.int64), np.full(uses.width, -1, np.int64)
        for pages in uses.pages[:ahead]:
            count[pages] += 1
        for now, pages in enumerate(uses.pages):
            count[pages] -= 1
            last[pages] = now
            yield count * len(uses.pages) + last
            if (now + 1) % uses.sites == 0:  # a token later, another one comes into sight
                for coming in uses.pages[now + 1 + ahead - uses.sites : now + 1 + ahead]:
                    count[coming] += 1

    return keys


def belady(uses: Uses) -> Keys:
    """The farthest next use: the best there is, and only in hindsight."""
    never = len(uses.pages)
    following = np.full(uses.width, never, np.int64)
    after: list[Ints] = []
    for now in range(never - 1, -1, -1):
        pages = uses.pages[now]
        after.append(following[pages])
        following[pages] = now
    for now, pages in enumerate(uses.pages):
        following[pages] = after[never - 1 - now]
        yield -following


#: Name -> policy, as `edgeml routing` compares them.
POLICIES: dict[str, Callable[[Uses], Keys]] = {"lru": lru, "lfu": lfu, "lookahead-16": lookahead(16), "belady": belady, "pager": pager}


def sch(trace: Trace, experts: int, tokens: int) -> Ints:
    """The segment cache of the literature: where each choice stands in the stack of a cache that sees `tokens` tokens ahead.

    All sites of the trace share one cache. A cache of C pages hits where the position is below C; a first choice stands at the end
    of the stack, so it hits while there is room. All choices of a token are looked up before any of them is inserted. When one is,
    priority is (choices from the next one of this token to the end of `tokens` tokens, last use), and what is inserted always stays.
    Returns the positions (choices,) in order.
    """
    pages = _of_tokens(trace, experts)
    count, last = np.zeros(trace.shape[1] * experts, np.int64), np.full(trace.shape[1] * experts, -1, np.int64)
    for token in pages[:tokens]:
        count[token] += 1
    positions, stack, now = [], np.zeros(0, np.int64), 0
    for number, token in enumerate(pages):
        place = {int(page): position for position, page in enumerate(stack)}
        positions += [place.get(page, len(stack)) for page in token.tolist()]
        for page in token.tolist():
            count[page] -= 1
            last[page] = now = now + 1
            stack = _pushed(stack, page, count, last)
        if number + tokens < len(pages):
            count[pages[number + tokens]] += 1
    return np.array(positions, np.int64)


def _of_tokens(trace: Trace, experts: int) -> list[Ints]:
    """The pages of each token over all sites, in the order of sites."""
    pages = trace + experts * np.arange(trace.shape[1])[None, :, None]
    return [token[chosen] for token, chosen in zip(pages, trace >= 0, strict=True)]


def _pushed(stack: Ints, page: int, count: Ints, last: Ints) -> Ints:
    """The priority stack after a use of `page`: it goes on top, and what was above its place sinks until a better page stops it.

    Going down, the page with the lowest priority so far is carried on; where a lower one stands, the carried one takes its place.
    """
    found = np.flatnonzero(stack == page)
    above = stack[: int(found[0])] if len(found) else stack
    below = stack[len(above) + 1 :]
    if not len(above):
        return np.concatenate([[page], below])
    priority = count[above] * (int(last.max()) + 2) + last[above]
    lowest = np.minimum.accumulate(priority)
    drops = np.flatnonzero(np.append(True, lowest[1:] < lowest[:-1]))  # where the carried page changes; the first is picked up at 0
    sunk = above.copy()
    sunk[drops[1:]] = above[drops[:-1]]
    return np.concatenate([[page], sunk[1:], above[drops[-1:]], below])
