"""Reading ahead: what idle readers fetch for the site that comes next, what they leave alone, and whose bytes it is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from native_case import EXPERTS, HIDDEN, SITES, Case, make_case, random_call

from edgeml import native


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("native"))


def visit(context: native.Context, site: int, *experts: int) -> None:
    context.experts(site, np.ones((1, HIDDEN), np.float32), np.array([experts]), np.ones((1, len(experts)), np.float32))


def ahead_of(context: native.Context, site: int) -> set[int]:
    """Experts of the site that came in during a visit to the site before it."""
    context.evict_all()
    visit(context, site - 1, 0)
    context.settle()
    return {page - site * (EXPERTS + 1) for page in context.stats()["resident"]} & set(range(EXPERTS))


def test_idle_readers_fetch_what_the_next_site_mostly_uses(case: Case) -> None:
    with case.open(ahead=3) as context:
        for experts in 3 * ([0, 1, 2], [1, 2, 3], [0, 1, 2], [1, 4, 5]):
            visit(context, 1, *experts)
        visit(context, 1, 0, 1, 2)
        assert ahead_of(context, 1) == {0, 1, 2}, "in every, or in two or three of the last four visits; the others in one"
        assert ahead_of(context, 2) == set(), "never visited"


@pytest.mark.parametrize(("ahead", "expected"), [(0, set()), (1, {2}), (2, {1, 2})])
def test_no_more_than_allowed_is_read_ahead_and_the_most_used_first(case: Case, ahead: int, expected: set[int]) -> None:
    with case.open(ahead=ahead) as context:
        for experts in 2 * ([0, 1, 2], [1, 2], [2], [1, 2]):
            visit(context, 1, *experts)
        assert ahead_of(context, 1) == expected


def test_pages_read_ahead_count_for_the_request_that_asks_for_them(case: Case) -> None:
    with case.open(ahead=2) as context:
        for _ in range(3):
            visit(context, 1, 0, 1)
        assert ahead_of(context, 1) == {0, 1}
        before = context.stats()["page_in_bytes"]
        with context.request() as first:
            visit(context, 1, 0)
        with context.request() as second:
            visit(context, 1, 0)
        length = len(case.sources[EXPERTS + 1].data)
        assert (first.hits, first.misses, first.page_in_bytes) == (1, 0, length)
        assert (second.hits, second.misses, second.page_in_bytes) == (1, 0, 0)
        assert context.stats()["page_in_bytes"] == before, "they were counted when they were read"


def test_a_lease_is_not_read_ahead_of(case: Case) -> None:
    with case.open(ahead=3) as context:
        for _ in range(3):
            visit(context, 1, 0, 1)
        context.evict_all()
        with context.request() as request:
            request.lease([0])
            visit(context, 0, 0)
            context.settle()
            assert context.stats()["resident"] == [0]


def test_a_page_that_ranks_higher_is_not_given_up_for_one_read_ahead(case: Case) -> None:
    with case.open(slots=2, ahead=3) as context:
        for _ in range(3):
            visit(context, 1, 0, 1)
        context.set_priority([EXPERTS + 1, EXPERTS + 2], -1)
        context.evict_all()
        visit(context, 0, 0, 1)
        context.settle()
        assert set(context.stats()["resident"]) == {0, 1}


def test_reading_ahead_changes_no_bit_and_breaks_no_budget(case: Case) -> None:
    calls = [(number % SITES, *random_call(9, number)) for number in range(40)]
    with case.open(ahead=0) as context:
        expected = [context.experts(*call).tobytes() for call in calls]
    for slots in (1, 3, 7):
        with case.open(slots=slots, threads=2, ahead=5) as context, ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda call: context.experts(*call).tobytes(), calls)) == expected
            context.settle()
            assert len(context.stats()["resident"]) <= slots
