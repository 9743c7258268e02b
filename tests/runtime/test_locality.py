"""SRP and the segment cache against brute force, the null, intervals; and replays against caches kept as plain sets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from edgeml.errors import UsageError
from edgeml.locality import chosen_mask, null, srp, srp_interval, window_counts
from edgeml.policy import PagerModel, Use
from edgeml.replay import POLICIES, replay, sch, uses_of

CASES = range(500)


def random_trace(seed: int) -> tuple[np.ndarray, int]:
    """A trace (tokens, sites, k) of random size and stickiness, some choices missing, and its number of experts."""
    rng = np.random.default_rng(seed)
    tokens, sites, experts = int(rng.integers(1, 24)), int(rng.integers(1, 4)), int(rng.integers(2, 8))
    k, sticky = int(rng.integers(1, experts + 1)), rng.random()
    trace = np.empty((tokens, sites, k), np.int64)
    for token, site in itertools.product(range(tokens), range(sites)):
        repeated = token > 0 and rng.random() < sticky
        trace[token, site] = trace[token - 1, site] if repeated else rng.permutation(experts)[:k]
    trace[rng.random(trace.shape) < rng.choice([0, 0.2])] = -1
    return trace, experts


def brute_srp(trace: np.ndarray, experts: int, m: int) -> float | None:
    """The definition, window by window: the best F1 of 'the expert is in for the whole window' over one threshold."""
    tokens, sites, _ = trace.shape
    counts = [
        sum(expert in trace[token, site].tolist() for token in range(start, start + m))
        for site in range(sites)
        for start in range(tokens - m + 1)
        for expert in range(experts)
    ]
    if not sum(counts):
        return None
    scores = []
    for threshold in range(m + 1):
        chosen = [count for count in counts if count >= threshold]
        scores.append(2 * sum(chosen) / (m * len(chosen) + sum(counts)))
    return max(scores)


def brute_sch(trace: np.ndarray, m: int, capacity: int) -> int:
    """Hits of a cache as a plain list: a token is looked up whole, then its choices enter one by one."""
    choices = [[(site, int(e)) for site, ids in enumerate(token) for e in ids if e >= 0] for token in trace]
    cache: list[tuple[int, int]] = []
    last: dict[tuple[int, int], int] = {}
    hits = clock = 0
    for number, token in enumerate(choices):
        hits += sum(page in cache or (page not in last and len(cache) < capacity) for page in token)
        for place, page in enumerate(token):
            if page in cache:
                cache.remove(page)
            if len(cache) == capacity:
                coming = token[place + 1 :] + [other for later in choices[number + 1 : number + m] for other in later]
                cache.remove(min(cache, key=lambda held: (coming.count(held), last[held])))
            cache.append(page)
            last[page] = clock = clock + 1
    return hits


@pytest.mark.parametrize("block", range(5))
def test_srp_is_the_definition(block: int) -> None:
    for seed in CASES[block::5]:
        trace, experts = random_trace(seed)
        for m in (1, 2, 4, 7):
            counts = sum((window_counts(chosen_mask(trace[:, s], experts), m) for s in range(trace.shape[1])), np.zeros(m + 1, np.int64))
            found, wanted = srp(counts), brute_srp(trace, experts, m)
            assert (found is None) == (wanted is None)
            assert found is None or found[0] == pytest.approx(wanted, abs=1e-12)
            assert found is None or m > 1 or found[0] == 1


@pytest.mark.parametrize("block", range(5))
def test_sch_is_a_cache_that_sees_ahead(block: int) -> None:
    for seed in CASES[block::5]:
        trace, experts = random_trace(seed)
        for m in (1, 3, 16):
            positions = sch(trace, experts, m)
            for capacity in (1, 2, 3, experts, experts * trace.shape[1]):
                assert np.count_nonzero(positions < capacity) == brute_sch(trace, m, capacity), (seed, m, capacity)


def best_hits(pages: list[tuple[int, ...]], capacity: int) -> int:
    """The most hits any cache can have, by trying everything."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for use in pages:
        following: dict[frozenset[int], int] = {}
        for held, hits in states.items():
            now, others = hits + len(held & set(use)), held - set(use)
            room = capacity - len(use)
            for kept in itertools.combinations(sorted(others), min(room, len(others))):
                state = frozenset(kept) | frozenset(use)
                following[state] = max(following.get(state, -1), now)
        states = following
    return max(states.values())


def test_belady_is_the_best_there_is() -> None:
    for seed in range(60):
        trace, experts = random_trace(seed)
        uses = uses_of(trace[:8], min(experts, 5) if trace.max() < 5 else experts)
        capacity = trace.shape[2] + seed % 3
        hits = replay(uses, POLICIES["belady"], [capacity]).hits[0]
        assert hits == best_hits([tuple(pages.tolist()) for pages in uses.pages], capacity), seed


def test_the_replayed_pager_is_the_pager() -> None:
    for seed in range(100):
        trace, experts = random_trace(seed)
        uses = uses_of(trace, experts)
        capacities = range(max(trace.shape[2], 1), uses.width + 1)
        replayed = replay(uses, POLICIES["pager"], list(capacities))
        for column, capacity in enumerate(capacities):
            model = PagerModel({page: page // experts for page in range(uses.width)}, uses.sites, capacity)
            for number, pages in enumerate(uses.pages):
                model.handle(Use(number % uses.sites, tuple(pages.tolist())))
            assert (replayed.hits[column], replayed.requests) == (model.hits, model.hits + model.misses), (seed, capacity)


def test_all_policies_agree_where_nothing_is_decided() -> None:
    trace, experts = random_trace(11)
    uses = uses_of(trace, experts)
    for name, policy in POLICIES.items():
        whole = replay(uses, policy, [uses.width])
        assert whole.rate(warm=True)[0] == 1, name
        assert whole.hits[0] + whole.filled[0] == whole.requests
    assert replay(uses_of(trace[:0], experts), POLICIES["lru"], [4]).rate(warm=False)[0] == 0


def test_a_cycle_longer_than_the_cache() -> None:
    """Where every token needs the same pages, recency never hits; distance does, as often as hindsight."""
    uses = uses_of(np.tile(np.arange(4), (50, 3, 1)), 4)
    rates = {name: replay(uses, policy, [8]).rate(warm=False)[0] for name, policy in POLICIES.items()}
    assert rates["lru"] == 0
    assert rates["pager"] > 0.9 * rates["belady"] > 0


def test_a_capacity_below_one_use_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot hold the pages of one use"):
        replay(uses_of(np.zeros((1, 1, 1), np.int64), 2), POLICIES["lru"], [0])


def test_the_null_is_binomial_and_above_choosing_everything() -> None:
    value = null(16, 8 / 64)
    assert value == pytest.approx(0.32, abs=0.005)
    assert value > 2 * (8 / 64) / (1 + 8 / 64)
    assert null(4, 1.0) == 1
    assert null(4, 0.0) is None
    assert null(256, 1e-4) is not None
    rng = np.random.default_rng(0)
    found = srp(window_counts(rng.random((40_000, 8)) < 0.2, 16))
    assert found is not None
    assert found[0] == pytest.approx(null(16, 0.2), abs=0.01)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(UsageError):
            null(4, wrong)


def test_intervals_are_over_texts() -> None:
    counts = np.stack([window_counts(chosen_mask(random_trace(seed)[0][:, 0], 8), 4) for seed in range(80)])
    interval = srp_interval(counts, 0)
    assert interval is not None
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low < interval.value < interval.high
    assert interval == srp_interval(counts, 0)
    assert interval.n == np.count_nonzero(counts.sum(1))
    few = srp_interval(counts[:8], 0)
    assert few is not None
    assert few.low is None
    assert srp_interval(np.zeros((40, 5), np.int64), 0) is None
    with pytest.raises(UsageError):
        window_counts(np.zeros((3, 2), bool), 0)
