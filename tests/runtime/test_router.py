"""Resident sets: nothing but usage and capacity decides, and a mask forbids exactly what is not in the set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeml.errors import UsageError
from edgeml.manifest import ExpertRef, Manifest, Site
from edgeml.router import resident_set, usage_of


def manifest(usage: dict[str, tuple[tuple[float, ...], ...]] | None = None, together: int = 1) -> Manifest:
    """Two sites of six experts, top-2; `together` experts share a page."""
    sites = tuple(
        Site(f"s{n}", 32, tuple(ExpertRef(n * 6 + e // together, e % together) for e in range(6)), (), 2, "sigmoid", "logits", False)
        for n in range(2)
    )
    return Manifest({}, {}, (), sites, (), usage or {}, (), {}, {})


USAGE = ((0.5, 0.3, 0.1, 0.1, 0.0, 0.0), (0.1, 0.1, 0.1, 0.2, 0.2, 0.3))


def test_each_site_first_keeps_its_most_used() -> None:
    assert resident_set(manifest(), USAGE, 4).pages == (0, 1, 9, 11)


def test_then_the_most_used_anywhere_follow() -> None:
    assert resident_set(manifest(), USAGE, 5).pages == (0, 1, 9, 10, 11)


def test_no_capacity_masks_everything() -> None:
    chosen = resident_set(manifest(), USAGE, 0)
    assert chosen.pages == ()
    assert np.isneginf(chosen.mask).all()


def test_experts_of_one_page_come_together() -> None:
    chosen = resident_set(manifest(together=2), USAGE, 1)
    assert chosen.pages == (0,)
    assert (chosen.mask[0] == 0).tolist() == [True, True, False, False, False, False]


def test_a_task_without_usage_is_refused_with_a_way_out() -> None:
    with pytest.raises(UsageError, match="--residency exact"):
        usage_of(manifest(), "banking77")
    assert usage_of(manifest({"banking77": USAGE}), "banking77") == USAGE


@given(st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=2, max_size=2), st.integers(0, 14))
def test_the_capacity_is_kept_and_the_mask_agrees(usage: list[list[float]], capacity: int) -> None:
    bundle = manifest()
    chosen = resident_set(bundle, usage, capacity)
    assert len(chosen.pages) == min(capacity, 12)
    for number, site in enumerate(bundle.sites):
        for index, expert in enumerate(site.experts):
            assert (chosen.mask[number, index] == 0) == (expert.page in chosen.pages)


@given(st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=2, max_size=2), st.integers(0, 11))
def test_a_larger_set_contains_the_smaller(usage: list[list[float]], capacity: int) -> None:
    smaller, larger = (set(resident_set(manifest(), usage, size).pages) for size in (capacity, capacity + 1))
    assert smaller <= larger
