"""Decisions about resident sets: importance per byte in a budget, patterns with a cut-off, drift on evidence, masks for deadlines."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeml.manifest import ExpertRef, Manifest, Preprocess, Site, Task, TaskStages
from edgeml.resident import (
    GENERAL,
    Drift,
    Forecast,
    Meter,
    Watched,
    all_pages,
    best_pages,
    blend,
    covered,
    cut_off,
    distance,
    expected_bytes,
    general_usage,
    key_of,
    mask_for_deadline,
    mean_usage,
    nearest,
)

EXPERTS = 6


def sites(top_k: int = 2, count: int = 2) -> tuple[Site, ...]:
    return tuple(
        Site(f"s{n}", 32, tuple(ExpertRef(n * EXPERTS + e, 0) for e in range(EXPERTS)), (), top_k, "sigmoid", "logits", False)
        for n in range(count)
    )


def task(name: str, domain: str) -> Task:
    stages = TaskStages("embed", None, "trunk", f"head_{name}")
    return Task(name, domain, "classification", False, ("a", "b"), None, None, stages, Preprocess("text", 0, 32))


USAGE = ((0.5, 0.3, 0.1, 0.1, 0.0, 0.0), (0.1, 0.1, 0.1, 0.2, 0.2, 0.3))
EVEN = ((1 / 6,) * 6,) * 2
rows = st.lists(st.floats(0, 1), min_size=EXPERTS, max_size=EXPERTS)
usages = st.lists(rows, min_size=2, max_size=2)
sizes = st.lists(st.integers(1, 50), min_size=12, max_size=12)


# ---- pages ----


@given(usages, sizes, st.integers(0, 700))
def test_the_budget_is_kept_and_nothing_that_fits_is_left(usage: list[list[float]], lengths: list[int], budget: int) -> None:
    cost = dict(enumerate(lengths))
    pages = best_pages(sites(), usage, cost, budget)
    spent = sum(cost[page] for page in pages)
    assert spent <= budget
    assert all(cost[page] > budget - spent for page in cost if page not in pages)
    assert list(pages) == sorted(set(pages))


@given(usages, st.integers(4, 12))
def test_each_site_keeps_its_top_k(usage: list[list[float]], capacity: int) -> None:
    pages = set(best_pages(sites(), usage, dict.fromkeys(range(12), 1), capacity))
    for number in range(2):
        best = sorted(range(EXPERTS), key=lambda e: (-usage[number][e], e))[:2]
        assert {number * EXPERTS + expert for expert in best} <= pages


@given(usages, sizes, st.integers(0, 300), st.sets(st.integers(0, 11)))
def test_only_pages_among_those_allowed(usage: list[list[float]], lengths: list[int], budget: int, among: set[int]) -> None:
    assert set(best_pages(sites(), usage, dict(enumerate(lengths)), budget, among)) <= among


def test_a_concentrated_site_keeps_fewer_than_a_diffuse_one() -> None:
    concentrated = ((0.6, 0.4, 0, 0, 0, 0), (0.2, 0.2, 0.2, 0.2, 0.1, 0.1))
    pages = best_pages(sites(), concentrated, dict.fromkeys(range(12), 1), 6)
    assert pages == (0, 1, 6, 7, 8, 9)


def test_importance_is_weighed_by_the_byte() -> None:
    usage = ((0.6, 0.3, 0.1, 0, 0, 0), (0.5, 0.3, 0.12, 0.08, 0, 0))
    cost = dict.fromkeys(range(12), 10) | {8: 40}
    assert best_pages(sites(), usage, cost, 50) == (0, 1, 2, 6, 7), "0.10 in 10 bytes goes before 0.12 in 40"


def test_what_is_already_there_costs_nothing() -> None:
    cost = dict.fromkeys(range(12), 10) | {5: 0, 11: 0}
    assert best_pages(sites(), USAGE, cost, 0) == (5, 11)


@given(usages, st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)))
def test_more_pages_cover_more(usage: list[list[float]], some: set[int], more: set[int]) -> None:
    normal = [[value / max(sum(row), 1e-9) for value in row] for row in usage]
    assert 0 <= covered(sites(), normal, some) <= covered(sites(), normal, some | more) + 1e-9 <= 1 + 2e-9
    assert covered((), (), some) == 1


# ---- usage ----


def test_domains_weigh_alike_in_the_general_pattern() -> None:
    tasks = (task("a", "one"), task("b", "one"), task("c", "two"))
    manifest = Manifest({}, {}, (), sites(), tasks, {}, (), {}, {})
    first, second, third = (((1.0, 0, 0, 0, 0, 0),) * 2, ((0, 1.0, 0, 0, 0, 0),) * 2, ((0, 0, 1.0, 0, 0, 0),) * 2)
    usage = general_usage(manifest, {"a": first, "b": second, "c": third})
    assert usage is not None
    assert usage[0] == [0.25, 0.25, 0.5, 0, 0, 0]
    assert general_usage(manifest, {}) is None
    assert mean_usage([first]) == [list(row) for row in first]


@given(st.floats(0, 1e9))
def test_blending_moves_from_the_recorded_to_the_seen(tokens: float) -> None:
    mixed = blend(USAGE, EVEN, tokens)
    assert all(math.isclose(sum(row), 1, rel_tol=1e-9) for row in mixed)
    for recorded, seen, value in zip(np.ravel(USAGE), np.ravel(EVEN), np.ravel(mixed), strict=True):
        assert min(recorded, seen) - 1e-12 <= value <= max(recorded, seen) + 1e-12


def test_nothing_seen_changes_nothing() -> None:
    assert blend(USAGE, EVEN, 0) == [list(row) for row in USAGE]
    assert blend(USAGE, ((0.0,) * 6, EVEN[1]), 1e9)[0] == list(USAGE[0]), "a site without any choice"
    assert np.allclose(blend(USAGE, EVEN, 1024), (np.array(USAGE) + EVEN) / 2)


def test_choices_are_counted_by_site_and_minus_one_is_none() -> None:
    watched = Watched.of(sites())
    assert watched.usage == [[0.0] * 6] * 2
    watched.add(np.array([[[0, 1], [5, -1]], [[0, 2], [-1, -1]]], np.int64))
    assert watched.tokens == 2
    assert watched.usage == [[0.5, 0.25, 0.25, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]]
    other = Watched.of(sites())
    other.merge(watched)
    assert (other.tokens, other.usage) == (watched.tokens, watched.usage)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_the_past_fades_beyond_the_window(parts: list[int]) -> None:
    watched = Watched.of(sites(), window=64)
    for tokens in parts:
        watched.add(np.zeros((tokens, 2, 2), np.int64))
        assert watched.tokens <= 64
        assert math.isclose(watched.choices[0].sum(), 2 * watched.tokens)


# ---- patterns ----


@given(usages, usages)
def test_a_distance_is_symmetric_and_within_bounds(one: list[list[float]], other: list[list[float]]) -> None:
    first, second = key_of(one), key_of(other)
    assert 0 <= distance(first, second) == distance(second, first) <= 1
    assert distance(first, first) < 1e-9 or not (first @ first)


def test_a_key_is_of_the_first_two_sites() -> None:
    assert key_of((*USAGE, *EVEN)).tolist() == [*USAGE[0], *USAGE[1]]
    assert key_of(()).tolist() == []
    assert distance(key_of(()), key_of(())) == 1


def one_hot(expert: int) -> tuple[tuple[float, ...], ...]:
    return (tuple(float(e == expert) for e in range(EXPERTS)),) * 2


def test_the_nearest_pattern_answers_only_within_the_cut_off() -> None:
    patterns = {"a": one_hot(0), "b": one_hot(1)}
    key = key_of(((0.9, 0.1, 0, 0, 0, 0),) * 2)
    assert nearest(patterns, key, 0.05) == "a"
    assert nearest(patterns, key, 0.001) == GENERAL
    assert nearest(patterns, key_of(one_hot(3)), cut_off(patterns)) == GENERAL
    assert nearest({}, key, 1) == GENERAL


def test_the_cut_off_comes_from_what_was_seen_once_there_is_enough() -> None:
    patterns = {"a": one_hot(0), "b": one_hot(1)}
    assert cut_off(patterns) == 0.5, "half of what is between the closest two"
    assert cut_off(patterns, [0.1] * 19) == 0.5
    assert cut_off(patterns, [0.1] * 20) == pytest.approx(0.1)
    assert cut_off({"a": one_hot(0)}) == 0.25


# ---- drift ----


def test_a_pattern_changes_only_when_another_is_closer_by_a_fifth_twice_in_a_row() -> None:
    drift = Drift("a")
    assert not drift.segment({"a": 0.10, "b": 0.09}, 1), "closer, but not by a fifth"
    assert not drift.segment({"a": 0.10, "b": 0.01}, 1)
    assert not drift.segment({"a": 0.01, "b": 0.10}, 1), "not in a row"
    assert not drift.segment({"a": 0.10, "b": 0.01}, 1)
    assert not drift.segment({"a": 0.10, "b": 0.05, "c": 0.01}, 1), "twice, but not by the same"
    assert drift.segment({"a": 0.10, "b": 0.05, "c": 0.01}, 1)
    assert drift.current == "c"


def test_a_stream_that_nothing_is_near_to_falls_back_to_the_general_pattern_and_returns() -> None:
    drift = Drift("a")
    assert not drift.segment({"a": 0.9}, 0.2)
    assert drift.segment({"a": 0.9}, 0.2)
    assert drift.current == GENERAL
    assert not drift.segment({"a": 0.1}, 0.2)
    assert drift.segment({"a": 0.1}, 0.2)
    assert drift.current == "a"


@given(st.lists(st.fixed_dictionaries({name: st.floats(0, 1) for name in "abc"}), max_size=30), st.floats(0, 1))
def test_it_never_changes_twice_without_two_segments_between(segments: list[dict[str, float]], limit: float) -> None:
    drift, changes = Drift("a"), []
    for number, distances in enumerate(segments):
        before = drift.current
        changed = drift.segment(distances, limit)
        assert changed == (drift.current != before)
        changes += [number] if changed else []
    assert all(later - earlier >= 2 for earlier, later in pairwise(changes))


# ---- deadlines ----


@given(usages, st.sets(st.integers(0, 11)), st.integers(0, 500))
def test_expected_reading_grows_with_tokens_and_ends_at_what_is_missing(usage: list[list[float]], held: set[int], tokens: int) -> None:
    normal = [[value / max(sum(row), 1e-9) for value in row] for row in usage]
    cost = {page: 100 + page for page in range(12)}
    few, many = (expected_bytes(sites(), normal, cost, held, count) for count in (tokens, tokens + 1))
    assert 0 <= few <= many + 1e-6
    assert many <= sum(length for page, length in cost.items() if page not in held) + 1e-6
    assert expected_bytes(sites(), normal, cost, all_pages(sites()), tokens) == 0


def test_one_token_reads_its_top_k() -> None:
    assert expected_bytes(sites(), EVEN, dict.fromkeys(range(12), 1), (), 1) == pytest.approx(4)


seconds = st.floats(0, 1e3)


@given(seconds, seconds, seconds, st.floats(-1e3, 1e3))
def test_a_mask_only_where_the_deadline_would_be_missed_and_reading_is_saved(
    compute_s: float, exact_s: float, masked_s: float, left_s: float
) -> None:
    if mask_for_deadline(Forecast(compute_s, exact_s, masked_s), left_s):
        assert compute_s + exact_s > left_s
        assert masked_s < exact_s
    elif masked_s < exact_s:
        assert compute_s + exact_s <= left_s


def test_a_rate_is_none_before_anything_was_measured_and_follows_the_present() -> None:
    meter = Meter(window=100)
    assert meter.rate is None
    meter.add(90, 9)
    assert meter.rate == 10
    for _ in range(20):
        meter.add(50, 1)
    assert meter.rate is not None
    assert 45 < meter.rate <= 50
    assert Meter(1, 0).rate is None
