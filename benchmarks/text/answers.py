"""Predictions on labelled rows, kept as files so that a run can be resumed, and what they say about two variants of a model.

Differences are in points (hundredths of a score). Their intervals are a paired bootstrap over examples: both variants are scored
on the same drawn rows, drawn separately for every task (`edgeml.metrics.bootstrap`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchlib import MODEL, ROOT, parser, shared_text
from numpy.typing import NDArray

from edgeml.data import Row, TaskData, find_tasks
from edgeml.domains import Sheet
from edgeml.evaluate import answer_rows, match_tasks, read_labelled
from edgeml.manifest import Manifest
from edgeml.metrics import Interval, bootstrap, score
from edgeml.router import ResidentSet
from edgeml.session import Session

Labels = NDArray[np.int64]
SEED = 0


def text_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark that scores the text model against its uncompressed mixture."""
    made = parser(description)
    committed = ROOT / "examples" / "multitask_text" / "mixture.safetensors"
    made.add_argument("--bundle", type=Path, default=MODEL)
    made.add_argument("--data", type=Path, default=shared_text())
    made.add_argument("--mixture", default=str(committed) if committed.is_file() else "none", help="as in quality.py, or none")
    made.add_argument("--limit", type=int, help="at most this many rows a task, for trials (default: the whole test split)")
    made.add_argument("--cache", type=Path, default=ROOT / "runs" / "predictions", help="where predictions are kept")
    made.add_argument("--threads", type=int)
    return made


@dataclass(frozen=True)
class Questions:
    """A task's labelled rows; `commonest` is the training split's commonest label, `digest` names the rows."""

    task: TaskData
    rows: list[Row]
    labels: Labels
    commonest: int
    digest: str

    def score(self, predicted: Labels, rows: Labels | slice = slice(None)) -> float:
        """The task's own metric, on some of its rows."""
        return score(self.task.metric, self.labels[rows], predicted[rows])

    def sheet(self, *answers: Labels) -> Sheet:
        """The task with its answers, the reference's first."""
        return Sheet.of_labels(self.task.name, self.task.domain, self.task.metric, self.labels, self.commonest, answers)


def read_questions(root: Path, manifest: Manifest, where: str, limit: int | None) -> list[Questions]:
    """The test rows (all, or the first `limit`) of every classification the bundle knows."""
    names = [f"{task.domain}/{task.name}" for task in manifest.tasks if task.kind == "classification"]
    matched, _ = match_tasks(find_tasks(root, names), manifest, where)
    found = []
    for task in matched:
        rows, commonest = read_labelled(task, "test", limit)
        content = json.dumps([[row.text, row.pair, row.label] for row in rows]).encode()
        labels = np.array([row.label for row in rows], np.int64)
        found.append(Questions(task, rows, labels, commonest, hashlib.sha256(content).hexdigest()[:12]))
    return found


class Cache:
    """Predicted labels by model and rows: FOLDER/KEY/TASK-DIGEST.npy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, questions: Questions, compute: Callable[[], Labels], tick: Callable[[int], None]) -> Labels:
        """What is kept, or what `compute` gives. `compute` ticks by itself; what was kept is ticked here."""
        file = self.folder / key / f"{questions.task.name}-{questions.digest}.npy"
        if file.is_file():
            kept: Labels = np.load(file, allow_pickle=False)
            tick(len(questions.rows))
            return kept
        predicted = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npy")
        np.save(part, predicted)
        part.replace(file)
        return predicted


def bundle_answers(
    session: Session, questions: Questions, cache: Cache, variant: str, resident: ResidentSet | None, tick: Callable[[int], None]
) -> Labels:
    """What the bundle answers, with the experts of `resident` where that is given; `variant` names it in the cache."""
    name = questions.task.name

    def ask(rows: list[Row]) -> Labels:
        inputs = {"pairs": [(row.text, row.pair or "") for row in rows]} if questions.task.pair else {"texts": [row.text for row in rows]}
        scores = session.run(name, **inputs, resident=resident).scores
        assert scores is not None
        predicted: Labels = scores.argmax(-1).astype(np.int64)
        return predicted

    kept = "" if resident is None else f"-{zlib.crc32(resident.mask.tobytes()):08x}"
    key = f"bundle-{session.bundle.id[:16]}-{variant}{kept}"
    return cache.get(key, questions, lambda: answer_rows(ask, questions.rows, f"task '{name}'", tick), tick)


def mean_difference(questions: Sequence[Questions], first: Sequence[Sequence[Labels]], second: Sequence[Sequence[Labels]]) -> Interval:
    """Mean over the tasks of score(first) - score(second), in points, with its interval.

    For each task a list of predictions, whose scores are averaged: one, or one for each seed. Only as many rows as the
    shortest prediction has are used.
    """

    def difference(rows: Sequence[Labels]) -> float:
        parts = [
            np.mean([task.score(p, drawn) for p in one]) - np.mean([task.score(p, drawn) for p in two])
            for task, one, two, drawn in zip(questions, first, second, rows, strict=True)
        ]
        return 100 * float(np.mean(parts))

    sizes = [min(len(p) for p in (*one, *two)) for one, two in zip(first, second, strict=True)]
    return bootstrap(difference, sizes, SEED)


def task_difference(questions: Questions, first: Labels, second: Labels) -> tuple[Interval, float]:
    """score(first) - score(second) of one task, in points: its interval, and its standard error, the spread of the resamples."""
    drawn: list[float] = []

    def difference(rows: Sequence[Labels]) -> float:
        drawn.append(100 * (questions.score(first, rows[0]) - questions.score(second, rows[0])))
        return drawn[-1]

    found = bootstrap(difference, [min(len(first), len(second))], SEED)
    return found, float(np.std(drawn[1:])) if drawn[1:] else float("nan")  # the first call is for the whole
