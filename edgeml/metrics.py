"""Scores, chance and retention: the one definition that every gate uses.

A task's score is its own metric in [0, 1]. Chance is the same metric for always predicting the commonest class of the training
split. Retention over several tasks is a ratio of sums, sum(score - chance) / sum(reference - chance), over the tasks whose
reference is at least 0.1 above chance: a mean of ratios would let the task with the smallest denominator decide. Intervals are
percentiles of a paired bootstrap over examples: every variant is scored on the same drawn rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeml.errors import DataError, UsageError

__all__ = ["METRICS", "Interval", "accuracy", "bootstrap", "chance", "macro_f1", "retention", "score"]

ABOVE_CHANCE = 0.1
RESAMPLES = 1000
FEWEST_EXAMPLES = 30


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval over `n` examples; `low` and `high` are None below 30 examples."""

    value: float
    low: float | None
    high: float | None
    n: int

    def as_json(self) -> dict[str, float | int | None]:
        """The form that `--json` promises."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Share of right predictions. Integer arrays (n,)."""
    y, p = _checked(labels, predictions)
    return float(np.mean(y == p))


def macro_f1(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Unweighted mean over the classes that occur in `labels` of F1 = 2 TP / (2 TP + FP + FN). Integer arrays (n,)."""
    y, p = _checked(labels, predictions)
    classes = np.unique(y)
    right = np.array([np.count_nonzero((y == c) & (p == c)) for c in classes])
    occurring = np.array([np.count_nonzero(y == c) for c in classes])
    predicted = np.array([np.count_nonzero(p == c) for c in classes])
    return float(np.mean(2 * right / (occurring + predicted)))


METRICS: Mapping[str, Callable[[ArrayLike, ArrayLike], float]] = {"accuracy": accuracy, "macro_f1": macro_f1}


def score(metric: str, labels: ArrayLike, predictions: ArrayLike) -> float:
    """A metric by its name. Raises `UsageError` for one that is not known."""
    if metric not in METRICS:
        raise UsageError(f"there is no metric '{metric}': choose one of {', '.join(METRICS)}")
    return METRICS[metric](labels, predictions)


def chance(metric: str, labels: ArrayLike, commonest: int) -> float:
    """The metric's value on `labels` for always predicting `commonest`, the commonest label of the training split."""
    y = np.asarray(labels)
    return score(metric, y, np.full(y.shape, commonest))


def retention(scores: ArrayLike, chances: ArrayLike, reference: ArrayLike) -> tuple[float | None, list[int]]:
    """Ratio of sums over tasks, and the indices of tasks left out because their reference is less than 0.1 above chance.

    `scores`, `chances`, `reference` (tasks,) in [0, 1]. None, not 0, where no task remains.
    """
    s, c, r = (np.asarray(values, np.float64) for values in (scores, chances, reference))
    if not s.shape == c.shape == r.shape:
        raise UsageError(f"scores, chances and reference must have one value a task, not {s.shape}, {c.shape} and {r.shape}")
    kept = r - c >= ABOVE_CHANCE
    excluded = [int(index) for index in np.flatnonzero(~kept)]
    if not kept.any():
        return None, excluded
    return float((s - c)[kept].sum() / (r - c)[kept].sum()), excluded


def bootstrap(
    statistic: Callable[[Sequence[NDArray[np.int64]]], float], sizes: Sequence[int], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Paired bootstrap: `statistic` gets one array of row numbers a task and scores every variant on these same rows.

    `sizes` are the tasks' numbers of examples. The interval is the 2.5th to 97.5th percentile over the resamples; it is left
    out (None) when any task has fewer than 30 examples.
    """
    whole = [np.arange(size) for size in sizes]
    value, total = statistic(whole), int(sum(sizes))
    if not sizes or min(sizes) < FEWEST_EXAMPLES:
        return Interval(value, None, None, total)
    rng = np.random.default_rng(seed)
    drawn = [statistic([rng.integers(0, size, size) for size in sizes]) for _ in range(resamples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high), total)


def _checked(labels: ArrayLike, predictions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    y, p = np.asarray(labels), np.asarray(predictions)
    if y.ndim != 1 or y.shape != p.shape or y.size == 0:
        raise DataError(f"labels and predictions must be as long as each other and not empty, not {y.shape} and {p.shape}")
    return y, p
