"""What a bundle scores on labelled data: the figures behind `edgeml eval`. Knows no session: it is handed a function that answers.

A task's chance is its metric for always predicting the commonest label of the *training* split, taken on the evaluated rows.
Retention compares with a reference on the same rows; its interval is a paired bootstrap over examples (`edgeml.metrics`); an
example of a task with maps is an image.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeml.data import Row, TaskData, majority_label
from edgeml.errors import DataError, UsageError
from edgeml.image_data import ImageSet, ImageTask
from edgeml.manifest import ImageStages, Manifest, Task
from edgeml.metrics import bootstrap, from_tally, retention, score, tally
from edgeml.router import ResidentSet, share_of, usage_of

__all__ = [
    "Answered",
    "AnsweredMaps",
    "answer_rows",
    "kept_set",
    "match_images",
    "match_tasks",
    "read_labelled",
    "report",
    "tally_maps",
]

CHUNK_ROWS = 512
BOOTSTRAP_SEED = 0

Labels = NDArray[np.int64]


class Scored(Protocol):
    """One task's examples with their answers, scored on any of its rows (a repeated row counts again)."""

    @property
    def name(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def compared(self) -> bool:
        """Whether there are a reference's answers."""

    def __len__(self) -> int: ...
    def score(self, rows: Labels | slice) -> float: ...
    def chance(self, rows: Labels | slice) -> float: ...
    def reference_score(self, rows: Labels | slice) -> float: ...


@dataclass(frozen=True)
class Answered:
    """One task's rows and answers, as label indices (n,). `commonest` is the training split's; `reference` (n,) or None."""

    name: str
    domain: str
    metric: str
    labels: Labels
    predicted: Labels
    commonest: int
    reference: Labels | None = None

    @property
    def compared(self) -> bool:
        return self.reference is not None

    def __len__(self) -> int:
        return len(self.labels)

    def score(self, rows: Labels | slice) -> float:
        return score(self.metric, self.labels[rows], self.predicted[rows])

    def chance(self, rows: Labels | slice) -> float:
        labels = self.labels[rows]
        return score(self.metric, labels, np.full_like(labels, self.commonest))

    def reference_score(self, rows: Labels | slice) -> float:
        assert self.reference is not None
        return score(self.metric, self.labels[rows], self.reference[rows])


@dataclass(frozen=True)
class AnsweredMaps:
    """One task with maps, as counts by image and class (n, classes, 3) that `tally_maps` made: of the answers, of always naming
    the commonest class, and of the reference's answers or None."""

    name: str
    domain: str
    metric: str
    predicted: Labels
    commonest: Labels
    reference: Labels | None = None

    @property
    def compared(self) -> bool:
        return self.reference is not None

    def __len__(self) -> int:
        return len(self.predicted)

    def score(self, rows: Labels | slice) -> float:
        return from_tally(self.metric, self.predicted[rows].sum(0))

    def chance(self, rows: Labels | slice) -> float:
        return from_tally(self.metric, self.commonest[rows].sum(0))

    def reference_score(self, rows: Labels | slice) -> float:
        assert self.reference is not None
        return from_tally(self.metric, self.reference[rows].sum(0))


def match_tasks(data: Sequence[TaskData], manifest: Manifest, where: str) -> tuple[list[TaskData], list[str]]:
    """The tasks of the data that the bundle answers, and the names of the others.

    Raises `DataError` when none is left, and when a task's labels or pairs are not those the bundle was made with.
    """
    known = {task.name: task for task in manifest.tasks if task.kind == "classification" and not isinstance(task.stages, ImageStages)}
    matched = [task for task in data if task.name in known]
    if not matched:
        raise DataError(
            f"{where} answers none of the {len(data)} tasks in the data ({_listed(task.name for task in data)}); it has {_listed(known)}"
        )
    names = [task.name for task in matched]
    for task in matched:
        if names.count(task.name) > 1:
            raise DataError(f"{task.path}: the data has two tasks called '{task.name}'; name one with --tasks DOMAIN/TASK")
        _check_same(task, known[task.name])
    return matched, [task.name for task in data if task.name not in known]


def _check_same(data: TaskData, task: Task) -> None:
    if data.pair != task.pair:
        raise DataError(f"{data.path}: the data has {'pairs' if data.pair else 'single texts'}, the bundle's task was made for the other")
    _check_labels(str(data.path), data.labels, task.labels)


def _check_labels(where: str, labels: Sequence[str], wanted: Sequence[str]) -> None:
    if tuple(labels) != tuple(wanted):
        if set(labels) == set(wanted):
            raise DataError(f"{where}: its labels are the bundle's in another order, so the numbers mean other labels")
        other = sorted(set(labels) ^ set(wanted))
        raise DataError(f"{where}: its {len(labels)} labels are not the bundle's {len(wanted)} (differing: {_listed(other)})")


def match_images(sets: Sequence[ImageSet], manifest: Manifest, where: str) -> tuple[list[tuple[ImageSet, list[ImageTask]]], list[str]]:
    """The image sets with those of their tasks that the bundle answers, and the names of the other tasks.

    Raises `DataError` when none is left, when two sets have a task of one name, and when kinds or labels differ from the bundle's.
    """
    known = {task.name: task for task in manifest.tasks if isinstance(task.stages, ImageStages)}
    matched: list[tuple[ImageSet, list[ImageTask]]] = []
    seen: dict[str, ImageSet] = {}
    for images in sets:
        tasks = [task for task in images.tasks if task.name in known]
        for task in tasks:
            if task.name in seen:
                raise DataError(f"{images.path}: the data has two tasks called '{task.name}'; name one with --tasks SET/TASK")
            seen[task.name] = images
            answered = known[task.name]
            if task.kind != answered.kind:
                raise DataError(f"{images.path}: '{task.array}' is a {task.kind}, the bundle's task '{task.name}' a {answered.kind}")
            _check_labels(f"{images.path}, task '{task.name}'", task.labels, answered.labels)
        matched += [(images, tasks)] if tasks else []
    if not matched:
        offered = _listed(task.name for images in sets for task in images.tasks)
        raise DataError(f"{where} answers none of the tasks in the image data ({offered}); on images it has {_listed(known) or 'none'}")
    return matched, [task.name for images in sets for task in images.tasks if task.name not in known]


def tally_maps(task: ImageTask, labels: NDArray[np.uint8], maps: NDArray[Any]) -> Labels:
    """Counts (n, classes, 3) of a task's answers, maps (n, h, w): an edge is a probability of at least 0.5, and a map that is
    coarser or finer than the labels gives each of their pixels its nearest."""
    answers = maps >= 0.5 if task.kind == "edge" else maps
    if answers.shape != labels.shape:
        rows, columns = (
            (np.arange(want) * 2 + 1) * have // (2 * want) for want, have in zip(labels.shape[1:], maps.shape[1:], strict=True)
        )
        answers = answers[:, rows[:, None], columns[None, :]]
    return tally(labels, answers, len(task.labels), task.void)


def read_labelled(task: TaskData, split: str, limit: int | None) -> tuple[list[Row], int]:
    """The rows to evaluate and the commonest label of the training split. Raises `DataError` for an empty split."""
    rows = task.rows(split, limit)
    if not rows:
        raise DataError(f"{task.path}: the split '{split}' has no rows")
    return rows, majority_label(task.rows("train"))


def answer_rows(answer: Callable[[list[Row]], Labels], rows: Sequence[Row], where: str, tick: Callable[[int], None]) -> Labels:
    """Predicted label indices (n,), asked for in chunks; `tick` gets the number of rows done since the last call."""
    parts = []
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = list(rows[start : start + CHUNK_ROWS])
        try:
            parts.append(answer(chunk))
        except DataError as error:
            raise DataError(f"{where}, rows from {start}: {error}") from None
        tick(len(chunk))
    return np.concatenate(parts)


def kept_set(manifest: Manifest, task: str, share: float, seed: int | None) -> ResidentSet:
    """Keep at most `share` of each site's routed experts, by the task's usage, or at random where there is a `seed`; forbid the others.

    Raises `UsageError` where a site would be left without any expert, and for a task without recorded usage.
    """
    order = _by_usage(manifest, task) if seed is None else _at_random(manifest, task, seed)
    width = max((len(site.experts) for site in manifest.sites), default=0)
    mask = np.full((len(manifest.sites), width), -np.inf, np.float32)
    pages: set[int] = set()
    for number, site in enumerate(manifest.sites):
        kept = order[number][: share_of(len(site.experts), share)]
        if not len(kept) and not site.shared:
            raise UsageError(f"site '{site.name}' has no shared expert, so at least one routed expert must be kept there")
        mask[number, kept] = 0
        pages.update(site.experts[expert].page for expert in kept)
    return ResidentSet(tuple(sorted(pages)), mask)


def _by_usage(manifest: Manifest, task: str) -> list[Labels]:
    return [np.argsort(-np.asarray(importance), kind="stable") for importance in usage_of(manifest, task)]


def _at_random(manifest: Manifest, task: str, seed: int) -> list[Labels]:
    """A stream for each task, so that a task's draw does not depend on which others are evaluated."""
    rng = np.random.default_rng([seed, zlib.crc32(task.encode("utf-8"))])
    return [rng.permutation(len(site.experts)) for site in manifest.sites]


def report(answered: Sequence[Scored]) -> dict[str, Any]:
    """The document's figures: tasks, means, and with references retention and the tasks it leaves out."""
    tasks = {task.name: _figures(task) for task in answered}
    document: dict[str, Any] = {
        "tasks": tasks,
        "mean": float(np.mean([task["score"] for task in tasks.values()])),
        "reference_mean": None,
        "retention": None,
        "excluded": [],
    }
    if all(task.compared for task in answered):
        document["reference_mean"] = float(np.mean([task["reference_score"] for task in tasks.values()]))
        document["retention"], document["excluded"] = _retention(answered, tasks)
    return document


def _figures(task: Scored) -> dict[str, Any]:
    everything = slice(None)
    return {
        "domain": task.domain,
        "metric": task.metric,
        "n": len(task),
        "chance": task.chance(everything),
        "score": task.score(everything),
        "reference_score": task.reference_score(everything) if task.compared else None,
    }


def _retention(answered: Sequence[Scored], tasks: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
    columns = ([task[key] for task in tasks.values()] for key in ("score", "chance", "reference_score"))
    value, left_out = retention(*columns)
    excluded = [answered[number].name for number in left_out]
    if value is None:
        return None, excluded
    kept = [task for number, task in enumerate(answered) if number not in left_out]

    def ratio(rows: Sequence[Labels]) -> float:
        gained = possible = 0.0
        for task, drawn in zip(kept, rows, strict=True):
            chance = task.chance(drawn)
            gained += task.score(drawn) - chance
            possible += task.reference_score(drawn) - chance
        return gained / possible if possible else 0.0  # a drawn sample on which the reference does no better than chance

    interval = bootstrap(ratio, [len(task) for task in kept], BOOTSTRAP_SEED)
    return interval.as_json(), excluded


def _listed(names: Any, most: int = 8) -> str:
    found = [str(name) for name in names]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
