"""Scores against values worked out by hand, and what must hold for any labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeml.errors import DataError, UsageError
from edgeml.metrics import accuracy, bootstrap, chance, macro_f1, retention, score

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
    value, excluded = retention([0.7, 0.55], [0.5, 0.25], [0.9, 0.65])
    assert value == pytest.approx((0.2 + 0.3) / (0.4 + 0.4))
    assert excluded == []


def test_retention_leaves_out_tasks_near_chance_and_says_which() -> None:
    value, excluded = retention([0.9, 0.5], [0.5, 0.5], [0.9, 0.55])
    assert value == pytest.approx(1.0)
    assert excluded == [1]


def test_retention_of_nothing_is_null() -> None:
    assert retention([0.5], [0.5], [0.5]) == (None, [0])


@given(LABELS)
def test_metrics_stay_in_bounds_and_perfection_is_one(rows: list[tuple[int, int]]) -> None:
    labels, predictions = zip(*rows, strict=True)
    for name in ("accuracy", "macro_f1"):
        assert 0 <= score(name, labels, predictions) <= 1
        assert score(name, labels, labels) == 1


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
