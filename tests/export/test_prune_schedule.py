"""The tolerance schedule reaches the bound exactly, and widths stay multiples of the alignment."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch_pruning", reason="the extra `export` is not installed")

from edgeml_export.prune.schedule import next_width, order, tolerances, widths
from edgeml_export.prune.search import furthest

from edgeml.errors import UsageError


@pytest.mark.parametrize(("groups", "ratio"), [(20, 1.052), (40, 0.990), (60, 0.977), (100, 0.971)])
def test_lambda_as_worked_out_by_hand(groups: int, ratio: float) -> None:
    """delta_0 = 0.05 and a bound of 5 over L groups: the quotient of two neighbours."""
    schedule = tolerances(5, groups, 0.05)
    assert schedule[1] / schedule[0] == pytest.approx(ratio, abs=5e-4)


@pytest.mark.parametrize(("bound", "delta0"), [(1.05, None), (1.2, None), (1.2, 0.05), (5.0, 0.01), (1.1, 0.1)])
def test_product_is_the_bound(bound: float, delta0: float | None) -> None:
    schedule = tolerances(bound, 7, delta0)
    assert math.prod(1 + delta for delta in schedule) == pytest.approx(bound, rel=1e-9)
    assert math.prod(1 + delta for delta in schedule) <= bound * (1 + 1e-12)


def test_without_delta0_all_are_equal() -> None:
    assert len({round(delta, 15) for delta in tolerances(1.1, 5)}) == 1


@pytest.mark.parametrize(("bound", "delta0"), [(0.99, None), (float("nan"), None), (float("inf"), None), (1.1, 0.2), (1.1, 0.0)])
def test_a_schedule_that_cannot_be(bound: float, delta0: float | None) -> None:
    with pytest.raises(UsageError):
        tolerances(bound, 4, delta0)


def test_costly_groups_get_the_larger_tolerance_either_way() -> None:
    savings = {"cheap": 1.0, "dear": 9.0, "middle": 5.0}
    assert order(savings, [0.3, 0.2, 0.1]) == ["dear", "middle", "cheap"]
    assert order(savings, [0.1, 0.2, 0.3]) == ["cheap", "middle", "dear"]


@pytest.mark.parametrize(
    ("channels", "align", "allowed"), [(32, 8, [24, 16, 8]), (30, 8, [24, 16, 8]), (8, 8, []), (5, 8, []), (3, 1, [2, 1]), (1, 1, [])]
)
def test_widths_are_multiples_and_never_below_align(channels: int, align: int, allowed: list[int]) -> None:
    assert widths(channels, align) == allowed


@pytest.mark.parametrize(
    ("channels", "align", "width"),
    [(256, 8, 224), (32, 8, 24), (24, 8, 16), (16, 8, 8), (8, 8, 0), (9, 8, 8), (7, 1, 6), (1, 1, 0)],
)
def test_the_next_width_is_an_eighth_further(channels: int, align: int, width: int) -> None:
    assert next_width(channels, align) == width


@pytest.mark.parametrize("last", range(12))
def test_furthest_finds_every_answer(last: int) -> None:
    for answer in range(last + 1):
        assert furthest(lambda n, answer=answer: n <= answer, last) == answer
