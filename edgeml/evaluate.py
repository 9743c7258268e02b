"""What is to be evaluated: data matched with a bundle's tasks, and the experts a variant keeps. Knows no session.

A task's chance is its metric for always predicting the commonest label of the *training* split, taken on the evaluated rows; of a
table without splits that is the table's own commonest label. Scores and everything that follows from them stand in `domains`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.data import Row, TaskData, majority_label
from edgeml.domains import Sheet, Table, variant_figures
from edgeml.errors import DataError, UsageError
from edgeml.image_data import ImageRows, ImageSet, ImageTask, commonest_label
from edgeml.manifest import ImageStages, Manifest, Task
from edgeml.metrics import tally
from edgeml.predictions import Question
from edgeml.preprocess import check_text
from edgeml.router import ResidentSet, share_of, usage_of

__all__ = [
    "answer_rows",
    "image_questions",
    "kept_set",
    "match_images",
    "match_tasks",
    "read_labelled",
    "report",
    "seen_domains",
    "tally_maps",
    "tasks_of",
    "text_question",
]

CHUNK_ROWS = 512

Labels = NDArray[np.int64]


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
    rows, train = task.rows(split, limit, check_text), task.rows("train")
    for name, found in ((split, rows), ("train", train)):
        if not found:
            raise DataError(f"{task.path}: the split '{name}' has no rows")
    return rows, majority_label(train)


def answer_rows(
    answer: Callable[[list[Row]], Labels], rows: Sequence[Row], where: str, tick: Callable[[int], None], first: int = 0
) -> Labels:
    """Predicted label indices (n,) of the rows from `first`, asked for in chunks; `tick` gets the rows done since the last call."""
    parts = [np.zeros(0, np.int64)]
    for start in range(first, len(rows), CHUNK_ROWS):
        chunk = list(rows[start : start + CHUNK_ROWS])
        try:
            parts.append(answer(chunk))
        except DataError as error:
            raise DataError(f"{where}, rows from {start}: {error}") from None
        tick(len(chunk))
    return np.concatenate(parts)


def text_question(task: TaskData, split: str, limit: int | None) -> tuple[Question, list[Row]]:
    """A task to be asked, and its rows. Raises `DataError` for an empty split."""
    rows, commonest = read_labelled(task, split, limit)
    told = json.dumps([[row.text, row.pair, row.label] for row in rows]).encode()
    labels = np.array([row.label for row in rows], np.int64)
    digest = hashlib.sha256(told).hexdigest()[:16]
    return Question(task.name, task.domain, task.metric, len(task.labels), commonest, digest, labels), rows


def image_questions(images: ImageSet, tasks: Sequence[ImageTask], split: str, limit: int | None) -> tuple[list[Question], ImageRows]:
    """A set's tasks to be asked, and its images. Raises `DataError` for an empty split."""
    rows, train = images.rows(split, limit), images.rows("train")
    if not len(rows.images):
        raise DataError(f"{images.path}: the split '{split}' has no images")
    questions = []
    for task in tasks:
        labels, commonest = rows.labels[task.name], commonest_label(train.labels[task.name], task.void)
        digest = hashlib.sha256(rows.images.tobytes() + labels.tobytes()).hexdigest()[:16]
        truth = labels.astype(np.int64)
        if task.kind != "classification":
            truth = tally_maps(task, labels, np.full_like(labels, commonest))
        questions.append(Question(task.name, images.name, task.metric, len(task.labels), commonest, digest, truth))
    return questions, rows


def seen_domains(manifest: Manifest, given: Sequence[str] | None, domains_of: Mapping[str, str]) -> list[str] | None:
    """The domains whose data the exporter saw: `given`, or those of the tasks that the bundle's provenance lists; None if it lists none.

    `domains_of` says of each task of the data its domain; a task of the provenance that is not there has the bundle's.
    """
    if given is not None:
        return sorted(set(given))
    listed = manifest.provenance.get("data")
    if not isinstance(listed, Mapping) or not listed:
        return None
    named = {task.name: task.domain for task in manifest.tasks} | dict(domains_of)
    named |= {domain: domain for domain in named.values()}  # of images, provenance lists sets
    return sorted({named[str(name)] for name in listed if str(name) in named})


def kept_set(manifest: Manifest, task: str, share: float, seed: int | None, used_by: Sequence[str] = ()) -> ResidentSet:
    """Keep at most `share` of each site's routed experts and forbid the others: the most used ones, or random ones where there is a `seed`.

    Usage is the task's own, or the mean over the tasks `used_by`. Raises `UsageError` where a site would be left without any expert,
    and for a task without recorded usage.
    """
    order = _by_usage(manifest, used_by or [task]) if seed is None else _at_random(manifest, task, seed)
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


def tasks_of(manifest: Manifest, domain: str, domains_of: Mapping[str, str]) -> list[str]:
    """The tasks of a domain whose usage the bundle records; `domains_of` says of each task of the data its domain, the bundle of others.

    Raises `UsageError` listing the domains where there is none.
    """
    known = {task.name: domains_of.get(task.name, task.domain) for task in manifest.tasks if task.name in manifest.usage}
    found = [name for name, own in known.items() if own == domain]
    if not found:
        listed = _listed(sorted(set(known.values()))) or "none"
        raise UsageError(f"the bundle records no usage of a domain '{domain}', so no experts can be kept for it; it has {listed}")
    return found


def _by_usage(manifest: Manifest, names: Sequence[str]) -> list[Labels]:
    usages = [usage_of(manifest, name) for name in names]
    return [np.argsort(-np.mean(site, axis=0), kind="stable") for site in zip(*usages, strict=True)]


def _at_random(manifest: Manifest, task: str, seed: int) -> list[Labels]:
    """A stream for each task, so that a task's draw does not depend on which others are evaluated."""
    rng = np.random.default_rng([seed, zlib.crc32(task.encode("utf-8"))])
    return [rng.permutation(len(site.experts)) for site in manifest.sites]


def report(sheets: Sequence[Sheet]) -> dict[str, Any]:
    """The figures of one variant, the last of the sheets' answers; where there are two, the first are the reference's."""
    last = len(sheets[0].answers) - 1
    found = variant_figures(Table(sheets), last, last > 0)
    return {key: value for key, value in found.items() if key != "domains"}


def _listed(names: Any, most: int = 8) -> str:
    found = [str(name) for name in names]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
