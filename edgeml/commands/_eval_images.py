"""The part of `edgeml eval` that answers image data: every task of a set from one pass of the backbone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgeml.bundle import Bundle
from edgeml.commands._options import notes, progress
from edgeml.errors import DataError, UsageError
from edgeml.evaluate import Answered, AnsweredMaps, Labels, match_images, tally_maps
from edgeml.image_data import ImageRows, ImageSet, ImageTask, commonest_label
from edgeml.manifest import load_manifest
from edgeml.measure import Timing
from edgeml.session import Session
from edgeml.session import open as open_session

#: Images answered at a time, so that the progress bar moves and maps become counts soon.
CHUNK_IMAGES = 64

Matched = list[tuple[ImageSet, list[ImageTask]]]
Scored = Answered | AnsweredMaps


def evaluate_images(
    bundle: str,
    sets: Sequence[ImageSet],
    names: Sequence[str] | None,
    split: str,
    limit: int | None,
    reference: str | None,
    opening: dict[str, Any],
    quiet: bool,
) -> tuple[list[Scored], Timing, dict[str, Any]]:
    """The tasks with their answers, what they cost, and the record's settings with the names of `skipped` tasks."""
    matched, skipped = _match(bundle, _asked(sets, names))
    if reference is not None and (missing := _match(reference, [replace(images, tasks=tuple(tasks)) for images, tasks in matched])[1]):
        raise UsageError(f"the reference {reference} has no task '{missing[0]}'; choose others with --tasks")
    rows = [images.rows(split, limit) for images, _ in matched]
    for (images, _), found in zip(matched, rows, strict=True):
        if not len(found.images):
            raise DataError(f"{images.path}: the split '{split}' has no images")
    settings: dict[str, Any] = {"split": split, "limit": limit, "reference_bundle_id": None, "skipped": skipped}
    with open_session(bundle, **opening) as session:
        notes(session.notes, quiet)
        timing = Timing()
        predicted = _predict(session, matched, rows, timing, "evaluating", quiet)
        settings |= session.settings()
    others: dict[str, Labels] = {}
    if reference is not None:
        with open_session(reference, threads=opening["threads"]) as session:
            others = _predict(session, matched, rows, Timing(), "the reference", quiet)
            settings["reference_bundle_id"] = session.bundle.id
    scored: list[Scored] = []
    for (images, tasks), found in zip(matched, rows, strict=True):
        train = images.rows("train")
        for task in tasks:
            common = commonest_label(train.labels[task.name], task.void)
            scored.append(_scored(images, task, found.labels[task.name], predicted[task.name], common, others.get(task.name)))
    return scored, timing, settings


def image_lines(scored: Sequence[Scored]) -> Iterator[bytes]:
    """JSON lines: task, row, label, predicted; of maps the image's own score."""
    for task in scored:
        for row in range(len(task)):
            line: dict[str, Any] = {"task": task.name, "row": row}
            if isinstance(task, Answered):
                line |= {"label": int(task.labels[row]), "predicted": int(task.predicted[row])}
            else:
                line["score"] = task.score(np.array([row]))
            yield json.dumps(line, separators=(",", ":")).encode("utf-8") + b"\n"


def _match(bundle: str, sets: Sequence[ImageSet]) -> tuple[Matched, list[str]]:
    with Bundle.open(bundle) as opened:
        return match_images(sets, load_manifest(opened), bundle)


def _asked(sets: Sequence[ImageSet], names: Sequence[str] | None) -> list[ImageSet]:
    if names is None:
        return list(sets)
    chosen = {name: [(images, task) for images in sets for task in images.tasks if _is(name, images, task)] for name in names}
    for name, found in chosen.items():
        if len(found) != 1:
            raise DataError(f"{len(found)} tasks of the image data are called '{name}', expected one")
    kept = {(images.path, task.name) for ((images, task),) in chosen.values()}
    asked = [replace(images, tasks=tuple(task for task in images.tasks if (images.path, task.name) in kept)) for images in sets]
    return [images for images in asked if images.tasks]


def _is(name: str, images: ImageSet, task: ImageTask) -> bool:
    return name in (task.name, f"{images.name}/{task.name}")


def _predict(session: Session, matched: Matched, rows: Sequence[ImageRows], timing: Timing, label: str, quiet: bool) -> dict[str, Labels]:
    """By task: predicted label indices (n,), or the counts of `tally_maps`."""
    predicted: dict[str, Labels] = {}
    with progress(sum(len(found.images) for found in rows), label, quiet) as tick:
        for (_, tasks), found in zip(matched, rows, strict=True):
            for task in tasks:
                session.load(task.name)
            predicted |= _predict_set(session, tasks, found, timing, tick)
    return predicted


def _predict_set(
    session: Session, tasks: Sequence[ImageTask], rows: ImageRows, timing: Timing, tick: Callable[[int], None]
) -> dict[str, Labels]:
    parts: dict[str, list[Labels]] = {task.name: [] for task in tasks}
    for first in range(0, len(rows.images), CHUNK_IMAGES):
        chunk = slice(first, first + CHUNK_IMAGES)
        results = session.run_many([task.name for task in tasks], list(rows.images[chunk]))
        for task in tasks:
            result = results[task.name]
            if result.maps is not None:
                parts[task.name].append(tally_maps(task, rows.labels[task.name][chunk], result.maps))
            elif result.scores is not None:
                parts[task.name].append(result.scores.argmax(-1).astype(np.int64))
        timing.warm.add(result.latency_s, result.counters)
        timing.warm.latency_s[-1:] = result.row_s
        tick(len(result.row_s))
    return {name: np.concatenate(found) for name, found in parts.items()}


def _scored(images: ImageSet, task: ImageTask, labels: Any, predicted: Labels, commonest: int, reference: Labels | None) -> Scored:
    if task.kind == "classification":
        return Answered(task.name, images.name, task.metric, labels.astype(np.int64), predicted, commonest, reference)
    always = tally_maps(task, labels, np.full_like(labels, commonest))
    return AnsweredMaps(task.name, images.name, task.metric, predicted, always, reference)
