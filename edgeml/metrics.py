"""Scores, chance and retention: the one definition that every gate uses.

A task's score is its own metric in [0, 1]. Chance is the same metric for always predicting the commonest class of the training
split. Retention over several tasks is a ratio of sums, sum(score - chance) / sum(reference - chance), over the tasks whose
reference is at least 0.1 above chance: a mean of ratios would let the task with the smallest denominator decide. Intervals are
percentiles of a paired bootstrap over examples: every variant is scored on the same drawn rows.

Every metric is a function of counts summed over examples: by class how often it was rightly predicted, how often it occurs, how
often it was predicted. `tally` (of maps, where an example is an image) and `one_hot` (of labels) count each example once, and the
sums over any drawn examples give the metric (`from_tally`); `drawn_scores` does so for a thousand draws at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeml.errors import DataError, UsageError
from edgeml.indices import cdtr, corrected, dsi, dsi_route, forgetting, gg

__all__ = [
    "DENSE_METRICS",
    "METRICS",
    "Interval",
    "accuracy",
    "bootstrap",
    "cdtr",
    "chance",
    "corrected",
    "drawn_scores",
    "dsi",
    "dsi_route",
    "edge_f1",
    "forgetting",
    "from_tally",
    "gg",
    "interval_of",
    "macro_f1",
    "miou",
    "one_hot",
    "retention",
    "score",
    "tally",
]

ABOVE_CHANCE = 0.1
RESAMPLES = 1000
BOOTSTRAP_SEED = 0
#: Resamples that are multiplied at a time, for memory's sake.
CHUNK = 250
#: A statistic that is undefined on more than this share of the resamples has no interval.
MOST_UNDEFINED = 0.05
DENSE_METRICS = ("miou", "edge_f1")
FEWEST_EXAMPLES = 30


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval over `n` examples; `low` and `high` are None below 30 examples.

    `near_clip`: a score in it is so near chance that the bootstrap is known to fail, and the interval is not to be trusted.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    near_clip: bool = False

    def as_json(self) -> dict[str, float | int | bool | None]:
        """The form that `--json` promises; `near_clip` is there only where it is true."""
        flag = {"near_clip": True} if self.near_clip else {}
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n, **flag}


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
    return float(from_tally("miou", tally(*_one_image(labels, predictions), classes, void).sum(0)))


def edge_f1(labels: ArrayLike, predictions: ArrayLike, void: int | None = None) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) of the class edge (1), pixel by pixel; 0 where neither has an edge.

    Integer or boolean arrays of one shape: predictions are `probabilities >= 0.5`. Pixels labelled `void` are left out.
    """
    return float(from_tally("edge_f1", tally(*_one_image(labels, predictions), 2, void).sum(0)))


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


def one_hot(labels: ArrayLike, predictions: ArrayLike, classes: int) -> NDArray[np.int8]:
    """What `tally` is for maps, for labels: integer arrays (n,) as counts (n, classes, 3) of 0 and 1.

    Raises `DataError` for other shapes, and for a label or prediction outside 0 to classes - 1.
    """
    y, p = _checked(labels, predictions)
    if min(y.min(), p.min()) < 0 or max(y.max(), p.max()) >= classes:
        raise DataError(f"a label or prediction lies outside 0 to {classes - 1}")
    counts, rows = np.zeros((len(y), classes, 3), np.int8), np.arange(len(y))
    counts[rows, y, 0] = y == p
    counts[rows, y, 1] = 1
    counts[rows, p, 2] = 1
    return counts


def from_tally(metric: str, counts: ArrayLike) -> NDArray[np.float64]:
    """A metric of summed counts (..., classes, 3), shape (...). Raises `UsageError` for another metric."""
    right, occurring, predicted = (np.asarray(counts, np.float64)[..., column] for column in range(3))
    there = occurring > 0
    if metric == "accuracy":
        return np.asarray(right.sum(-1) / np.maximum(occurring.sum(-1), 1))
    if metric == "edge_f1":
        return np.asarray(2 * right[..., 1] / np.maximum(occurring + predicted, 1)[..., 1])
    if metric == "macro_f1":
        shares = 2 * right / np.maximum(occurring + predicted, 1)
    elif metric == "miou":
        shares = right / np.maximum(occurring + predicted - right, 1)
    else:
        raise UsageError(f"there is no metric '{metric}': choose one of {', '.join((*METRICS, *DENSE_METRICS))}")
    return np.asarray((shares * there).sum(-1) / np.maximum(there.sum(-1), 1))


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


def retention(scores: ArrayLike, chance: ArrayLike) -> tuple[list[float | None], list[int]]:
    """Each variant's ratio of sums over tasks, and the indices of tasks left out because the reference is less than 0.1 above chance.

    `scores` (1 + V, tasks) in [0, 1], the reference first; `chance` (tasks,). None, not 0, where no task remains.
    """
    s, c = (np.asarray(values, np.float64) for values in (scores, chance))
    if s.ndim != 2 or c.shape != s.shape[1:]:
        raise UsageError(f"scores must be (1 + variants, tasks) and chance (tasks,), not {s.shape} and {c.shape}")
    if not (np.isfinite(s).all() and np.isfinite(c).all()):
        raise DataError("a score or a chance is not a number")
    kept = s[0] - c >= ABOVE_CHANCE
    excluded = [int(index) for index in np.flatnonzero(~kept)]
    gained = (s - c)[:, kept].sum(-1)
    return [float(variant / gained[0]) if kept.any() else None for variant in gained[1:]], excluded


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


def drawn_scores(
    metric: str, counts: Sequence[NDArray[np.integer]], seed: Sequence[int], resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """A task's metric for several variants on the same drawn examples, (resamples, variants). `counts`: each (n, classes, 3)."""
    n = len(counts[0])
    rng, found = np.random.default_rng(seed), np.empty((resamples, len(counts)))
    if metric == "accuracy":  # of which the classes are no concern
        counts = [one.sum(1, keepdims=True) for one in counts]
    flat = [one.reshape(n, -1).astype(np.float64) for one in counts]
    for start in range(0, resamples, CHUNK):
        part = slice(start, min(start + CHUNK, resamples))
        times = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(part.stop - start)]).astype(np.float64)
        for variant, one in enumerate(flat):
            found[part, variant] = from_tally(metric, (times @ one).reshape(len(times), *counts[variant].shape[1:]))
    return found


def interval_of(value: float | None, drawn: Sequence[float | None], n: int, near_clip: bool = False) -> Interval | None:
    """A figure with the 2.5th to 97.5th percentile of its resamples, None of None; resamples where it is undefined are left out."""
    if value is None:
        return None
    there = [one for one in drawn if one is not None]
    if len(there) < (1 - MOST_UNDEFINED) * len(drawn) or not there:
        return Interval(value, None, None, n, near_clip)
    low, high = np.percentile(there, [2.5, 97.5])
    return Interval(value, float(low), float(high), n, near_clip)


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
