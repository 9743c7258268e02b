"""Scores against values worked out by hand, and what must hold for any labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeml.errors import DataError, UsageError
from edgeml.metrics import (
    Interval,
    accuracy,
    bootstrap,
    chance,
    drawn_scores,
    from_tally,
    interval_of,
    macro_f1,
    one_hot,
    retention,
    score,
    tally,
)

LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


def test_accuracy_by_hand() -> None:
    assert accuracy([0, 1, 2, 2], [0, 1, 1, 2]) == 0.75


def test_macro_f1_by_hand() -> None:
    """Class 0: TP 1, FP 0, FN 1 -> 2/3; class 1: TP 1, FP 1, FN 0 -> 2/3."""
    assert macro_f1([0, 0, 1], [0, 1, 1]) == pytest.approx(2 / 3)


def test_macro_f1_counts_only_classes_that_occur() -> None:
    """Predicting class 9 costs class 0 a hit, but 9 itself is no class of the data."""
    assert macro_f1([0, 0, 1, 1], [0, 9, 1, 1]) == pytest.approx((2 / 3 + 1) / 2)


def test_chance_is_the_metric_of_the_commonest_label() -> None:
    assert chance("accuracy", [0, 0, 0, 1], 0) == 0.75
    assert chance("macro_f1", [0, 0, 0, 1], 0) == pytest.approx((6 / 7) / 2)


def test_retention_is_a_ratio_of_sums() -> None:
    (one, two), excluded = retention([[0.9, 0.65], [0.7, 0.55], [0.9, 0.25]], [0.5, 0.25])
    assert one == pytest.approx((0.2 + 0.3) / (0.4 + 0.4))
    assert two == pytest.approx(0.4 / 0.8)
    assert excluded == []


def test_retention_leaves_out_tasks_near_chance_and_says_which() -> None:
    (value,), excluded = retention([[0.9, 0.55], [0.9, 0.5]], [0.5, 0.5])
    assert value == pytest.approx(1.0)
    assert excluded == [1]


def test_retention_of_nothing_is_null() -> None:
    assert retention([[0.5], [0.5]], [0.5]) == ([None], [0])


def test_retention_of_what_is_no_table_is_a_sentence() -> None:
    with pytest.raises(UsageError, match="scores must be"):
        retention([0.5], [0.5])
    with pytest.raises(DataError, match="not a number"):
        retention([[0.5], [float("nan")]], [0.5])


@given(LABELS)
def test_metrics_stay_in_bounds_and_perfection_is_one(rows: list[tuple[int, int]]) -> None:
    labels, predictions = zip(*rows, strict=True)
    for name in ("accuracy", "macro_f1"):
        assert 0 <= score(name, labels, predictions) <= 1
        assert score(name, labels, labels) == 1


@given(LABELS)
def test_counts_give_the_same_metrics(rows: list[tuple[int, int]]) -> None:
    labels, predictions = zip(*rows, strict=True)
    counts = one_hot(labels, predictions, 5)
    for name in ("accuracy", "macro_f1"):
        assert from_tally(name, counts.sum(0)) == pytest.approx(score(name, labels, predictions), abs=1e-12)


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "miou", "edge_f1"])
def test_drawn_scores_are_scores_of_drawn_examples(metric: str) -> None:
    """Against the same draws, example by example."""
    rng = np.random.default_rng(0)
    if metric in ("accuracy", "macro_f1"):
        labels, answers = rng.integers(0, 3, 40), [rng.integers(0, 3, 40) for _ in range(2)]
        counts = [one_hot(labels, one, 3) for one in answers]
    else:
        labels, answers = rng.integers(0, 2, (40, 3, 3)), [rng.integers(0, 2, (40, 3, 3)) for _ in range(2)]
        counts = [tally(labels, one, 2) for one in answers]
    found = drawn_scores(metric, counts, [7, 8], 300)
    assert found.shape == (300, 2)
    drawing = np.random.default_rng([7, 8])
    for draw in found:
        rows = drawing.integers(0, 40, 40)
        assert draw == pytest.approx([score(metric, labels[rows], one[rows], 2) for one in answers])


def test_a_label_out_of_range_is_a_sentence() -> None:
    with pytest.raises(DataError, match="outside 0 to 1"):
        one_hot([0, 2], [0, 1], 2)


def test_an_interval_that_is_mostly_undefined_is_none() -> None:
    assert interval_of(None, [0.5], 3) is None
    assert interval_of(0.5, [None] * 100, 30) == Interval(0.5, None, None, 30)
    assert interval_of(0.5, [None, *[0.5] * 99], 30) == Interval(0.5, 0.5, 0.5, 30)
    assert interval_of(0.5, [0.5], 30, True).as_json()["near_clip"] is True  # type: ignore[union-attr]
    assert "near_clip" not in Interval(0.5, None, None, 3).as_json()


@given(LABELS, st.permutations(range(5)))
def test_metrics_do_not_depend_on_the_names_of_classes(rows: list[tuple[int, int]], names: list[int]) -> None:
    labels, predictions = zip(*rows, strict=True)
    renamed = [names[y] for y in labels], [names[p] for p in predictions]
    for name in ("accuracy", "macro_f1"):
        assert score(name, labels, predictions) == pytest.approx(score(name, *renamed))


def test_bootstrap_is_seeded_and_surrounds_the_value() -> None:
    right = np.arange(200) % 4 != 0
    interval = bootstrap(lambda rows: float(right[rows[0]].mean()), [200], seed=1, resamples=300)
    assert interval == bootstrap(lambda rows: float(right[rows[0]].mean()), [200], seed=1, resamples=300)
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low < interval.value == 0.75 < interval.high
    assert interval.as_json()["n"] == 200


def test_no_interval_below_thirty_examples() -> None:
    interval = bootstrap(lambda rows: 0.5, [200, 29], seed=1)
    assert (interval.low, interval.high) == (None, None)


@pytest.mark.parametrize(("labels", "predictions"), [([], []), ([1], [1, 2]), ([[1]], [[1]])])
def test_misshapen_input_is_a_sentence(labels: list[int], predictions: list[int]) -> None:
    with pytest.raises(DataError, match="as long as each other"):
        accuracy(labels, predictions)


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(UsageError, match="'bleu'"):
        score("bleu", [1], [1])
