"""Scores, chance and retention: the one definition that every gate uses.

A task's score is its own metric in [0, 1]. Chance is the same metric for always predicting the commonest class of the training
split. Retention over several tasks is a ratio of sums, sum(score - chance) / sum(reference - chance), over the tasks whose
reference is at least 0.1 above chance: a mean of ratios would let the task with the smallest denominator decide. Intervals are
percentiles of a paired bootstrap over examples: every variant is scored on the same drawn rows.

Of maps, an example is an image: `tally` counts its pixels once, and the sums of any drawn images give the metric (`from_tally`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeml.errors import DataError, UsageError

__all__ = [
    "DENSE_METRICS",
    "METRICS",
    "Interval",
    "accuracy",
    "bootstrap",
    "chance",
    "edge_f1",
    "from_tally",
    "macro_f1",
    "miou",
    "retention",
    "score",
    "tally",
]

ABOVE_CHANCE = 0.1
RESAMPLES = 1000
DENSE_METRICS = ("miou", "edge_f1")
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


def miou(labels: ArrayLike, predictions: ArrayLike, classes: int, void: int | None = None) -> float:
    """Unweighted mean over the classes that occur in `labels` of IoU = TP / (TP + FP + FN), over all pixels together.

    Integer arrays of one shape; pixels labelled `void` are left out, whatever was predicted there. Class ids are below `classes`.
    """
    return from_tally("miou", tally(*_one_image(labels, predictions), classes, void).sum(0))


def edge_f1(labels: ArrayLike, predictions: ArrayLike, void: int | None = None) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) of the class edge (1), pixel by pixel; 0 where neither has an edge.

    Integer or boolean arrays of one shape: predictions are `probabilities >= 0.5`. Pixels labelled `void` are left out.
    """
    return from_tally("edge_f1", tally(*_one_image(labels, predictions), 2, void).sum(0))


def tally(labels: ArrayLike, predictions: ArrayLike, classes: int, void: int | None = None) -> NDArray[np.int64]:
    """Pixels by image and class, (n, classes, 3): rightly predicted, occurring, predicted. Integer arrays (n, h, w).

    Sums over images are those of the images together. Raises `DataError` for other shapes and for class ids out of range.
    """
    y, p = np.asarray(labels), np.asarray(predictions)
    for name, values in (("labels", y), ("predictions", p)):
        if values.dtype.kind not in "biu":
            raise DataError(f"{name} of a map must be whole numbers, not {values.dtype}")
    if y.ndim != 3 or y.shape != p.shape or y.size == 0:
        raise DataError(f"labels and predictions must be maps of one shape and not empty, not {y.shape} and {p.shape}")
    counts = np.zeros((len(y), classes, 3), np.int64)
    for number, (truth, said) in enumerate(zip(y.reshape(len(y), -1), p.reshape(len(y), -1), strict=True)):
        scored = slice(None) if void is None else truth != void
        truth, said = truth[scored].astype(np.int64), said[scored].astype(np.int64)
        if len(truth) and (min(truth.min(), said.min()) < 0 or max(truth.max(), said.max()) >= classes):
            raise DataError(f"image {number} has a class id outside 0 to {classes - 1}")
        for column, values in enumerate((truth[truth == said], truth, said)):
            counts[number, :, column] = np.bincount(values, minlength=classes)
    return counts


def from_tally(metric: str, counts: NDArray[np.int64]) -> float:
    """`miou` or `edge_f1` of summed counts (classes, 3). Raises `UsageError` for another metric."""
    if metric not in DENSE_METRICS:
        raise UsageError(f"there is no metric '{metric}' of maps: choose one of {', '.join(DENSE_METRICS)}")
    right, occurring, predicted = counts[:, 0], counts[:, 1], counts[:, 2]
    if metric == "edge_f1":
        return float(2 * right[1] / max(occurring[1] + predicted[1], 1))
    there = occurring > 0
    return float(np.mean(right[there] / (occurring + predicted - right)[there])) if there.any() else 0.0


METRICS: Mapping[str, Callable[[ArrayLike, ArrayLike], float]] = {"accuracy": accuracy, "macro_f1": macro_f1}


def score(metric: str, labels: ArrayLike, predictions: ArrayLike, classes: int | None = None, void: int | None = None) -> float:
    """A metric by its name; `classes` and `void` are for maps. Raises `UsageError` for a metric that is not known."""
    if metric == "edge_f1":
        return edge_f1(labels, predictions, void)
    if metric == "miou":
        known = int(max(np.max(labels), np.max(predictions))) + 1 if classes is None else classes
        return miou(labels, predictions, known, void)
    if metric not in METRICS:
        raise UsageError(f"there is no metric '{metric}': choose one of {', '.join((*METRICS, *DENSE_METRICS))}")
    return METRICS[metric](labels, predictions)


def chance(metric: str, labels: ArrayLike, commonest: int, classes: int | None = None, void: int | None = None) -> float:
    """The metric's value on `labels` for always predicting `commonest`, the commonest label of the training split."""
    y = np.asarray(labels)
    return score(metric, y, np.full(y.shape, commonest), classes, void)


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


def _one_image(labels: ArrayLike, predictions: ArrayLike) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Maps of any number of axes as those of a single image (1, 1, pixels)."""
    y, p = np.asarray(labels), np.asarray(predictions)
    if y.shape != p.shape or y.size == 0:
        raise DataError(f"labels and predictions must be of one shape and not empty, not {y.shape} and {p.shape}")
    return y.reshape(1, 1, -1), p.reshape(1, 1, -1)


def _checked(labels: ArrayLike, predictions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    y, p = np.asarray(labels), np.asarray(predictions)
    if y.ndim != 1 or y.shape != p.shape or y.size == 0:
        raise DataError(f"labels and predictions must be as long as each other and not empty, not {y.shape} and {p.shape}")
    return y, p
