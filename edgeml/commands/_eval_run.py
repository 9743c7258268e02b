"""Running what `edgeml eval` evaluates: every variant answers every row that the predictions do not have yet.

Rows are asked for in chunks in the order of the data, each written to the predictions when it is answered. Nobody waits for one
row, so what counts is rows a second. A chunk is ordered by length and cut into batches (by the session), so that little is padding;
where everything is in memory, two streams of batches with half the threads each answer it, because a thread of its own for each batch
beats all threads on one; and freed memory is kept for the next batch. An answer depends on none of this.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgeml
from edgeml.bundle import Bundle
from edgeml.commands._eval_settings import Setting
from edgeml.commands._options import notes, progress
from edgeml.data import Row
from edgeml.errors import DataError
from edgeml.evaluate import answer_rows, kept_set, tally_maps
from edgeml.image_data import ImageRows, ImageTask
from edgeml.manifest import load_manifest
from edgeml.measure import Timing
from edgeml.predictions import Part, Predictions, Question, Variant, key_of
from edgeml.result import Result
from edgeml.router import ResidentSet
from edgeml.session import Session
from edgeml.session import open as open_session
from edgeml.store import plan_budget, resolve_threads

__all__ = ["Images", "Texts", "ask_texts", "keep_freed_memory", "plan_streams", "routing_counts", "run_variant"]

#: Images answered at a time, so that the progress bar moves and maps become counts soon.
CHUNK_IMAGES = 64
#: Rows of a task whose routing is followed.
TRACED_ROWS = 64
#: glibc's mallopt: blocks up to the largest size it allows come from the heap, and the heap keeps this much when they are freed.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, HEAP_BLOCK_BYTES = 256 << 20, 32 << 20

Labels = NDArray[np.int64]
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Texts:
    """A task on texts: its question and rows."""

    question: Question
    rows: Sequence[Row]

    @property
    def questions(self) -> list[Question]:
        return [self.question]


@dataclass(frozen=True)
class Images:
    """Images, and the tasks that one pass of the backbone answers on them, each with its question."""

    tasks: Sequence[ImageTask]
    questions: Sequence[Question]
    rows: ImageRows


def run_variant(
    setting: Setting,
    groups: Sequence[Texts | Images],
    predictions: Predictions,
    seen: Sequence[str] | None,
    threads: int | None,
    quiet: bool,
) -> tuple[Variant, Timing]:
    """Answer all rows under a setting, and say what that cost; those that `predictions` has are not asked again."""
    timing, parts = Timing(), dict[str, Part]()
    keep_freed_memory()
    each, streams = plan_streams(setting, threads, all(isinstance(group, Texts) for group in groups))
    with open_session(setting.bundle, threads=each, **setting.opening) as session:
        notes(session.notes, quiet)
        settings = session.settings() | {"threads": each * streams, "streams": streams}
        settings |= {} if setting.kept is None else setting.kept.as_json()
        with progress(sum(len(q) for group in groups for q in group.questions), setting.name, quiet) as tick:
            for group in groups:
                begun = {q.name: _begin(session, setting, q, settings, predictions, seen) for q in group.questions}
                done = min(map(len, begun.values()))
                tick(done * len(begun))
                if done < len(group.questions[0]):
                    for name in begun:
                        session.load(name)
                    if isinstance(group, Texts):
                        _answer_texts(session, setting, group, begun[group.question.name], predictions, timing, streams, tick)
                    else:
                        _answer_images(session, group, begun, predictions, timing, tick)
                parts |= begun
    return Variant(setting.name, setting.role, parts), timing


def _begin(
    session: Session,
    setting: Setting,
    question: Question,
    settings: Mapping[str, Any],
    predictions: Predictions,
    seen: Sequence[str] | None,
) -> Part:
    """The part of the predictions for a task, under everything that can change an answer."""
    resident = _resident(session, setting, question.name)
    alike = {
        "tool_version": edgeml.__version__,
        **{key: settings[key] for key in ("bundle_id", "variant", "residency", "memory_budget_bytes")},
        "experts": None if resident is None else zlib.crc32(resident.mask.tobytes()),
    }
    head = {
        "predictions": 1,
        "key": key_of(question, alike),
        "variant": setting.name,
        "role": setting.role,
        "task": question.name,
        "domain": question.domain,
        "metric": question.metric,
        "classes": question.classes,
        "commonest": question.commonest,
        "rows": len(question),
        "data": question.digest,
        "settings": dict(settings),
        "domains_seen": None if seen is None else list(seen),
    }
    return predictions.part(head)


def _resident(session: Session, setting: Setting, task: str) -> ResidentSet | None:
    """The experts that a task may use, None where it may use all."""
    if setting.kept is not None:
        return kept_set(session.manifest, task, setting.kept.share, setting.kept.seed, setting.kept.used_by)
    masked = setting.residency == "masked" and session.manifest.sites
    return session.resident_set(task) if masked else None


def _answer_texts(
    session: Session, setting: Setting, group: Texts, part: Part, predictions: Predictions, timing: Timing, streams: int, tick: Tick
) -> None:
    name, resident = part.head["task"], None if setting.kept is None else _resident(session, setting, part.head["task"])

    def ask(rows: list[Row]) -> Labels:
        predicted = ask_texts(session, name, resident, timing, rows, streams)
        predictions.add(part, group.question.truth[len(part) : len(part) + len(rows)], predicted)
        return predicted

    answer_rows(ask, group.rows, f"task '{name}'", tick, len(part))


def plan_streams(setting: Setting, threads: int | None, texts: bool) -> tuple[int, int]:
    """Threads for each stream of batches, and how many streams: two where there are threads for them and nothing is paged."""
    available = resolve_threads(threads)
    if not texts or available < 2:
        return available, 1
    with Bundle.open(setting.bundle) as bundle:
        complete = plan_budget(bundle, load_manifest(bundle), setting.opening["memory"], available).complete
    return (available // 2, 2) if complete else (available, 1)


def keep_freed_memory() -> None:
    """Let the C library keep what a batch frees for the next: giving it back and taking it anew costs a tenth of the time."""
    with suppress(AttributeError, OSError):  # another C library has no such call, and no such cost
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def ask_texts(session: Session, task: str, resident: ResidentSet | None, timing: Timing, rows: Sequence[Row], streams: int = 1) -> Labels:
    """Predicted label indices (n,) of the rows. A round of the timing is one text at its share of its batch's time."""
    if streams > 1 and len(rows) > 1:
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row].text) - len(rows[row].pair or ""))
        pieces = [order[first::streams] for first in range(streams)]
        with ThreadPoolExecutor(streams) as pool, suppress(DataError):  # below, the whole says which row is at fault
            results = list(pool.map(lambda piece: _run(session, task, resident, [rows[row] for row in piece]), pieces))
            predicted = np.empty(len(rows), np.int64)
            for piece, result in zip(pieces, results, strict=True):
                predicted[piece] = _labels(result)
                _count(timing, result)
            return predicted
    result = _run(session, task, resident, rows)
    _count(timing, result)
    return _labels(result)


def _run(session: Session, task: str, resident: ResidentSet | None, rows: Sequence[Row]) -> Result:
    if session.task(task).pair:
        return session.run(task, pairs=[(row.text, row.pair or "") for row in rows], resident=resident)
    return session.run(task, texts=[row.text for row in rows], resident=resident)


def _answer_images(
    session: Session, group: Images, parts: Mapping[str, Part], predictions: Predictions, timing: Timing, tick: Tick
) -> None:
    done = min(map(len, parts.values()))
    for first in range(done, len(group.rows.images), CHUNK_IMAGES):
        chunk = slice(first, first + CHUNK_IMAGES)
        results = session.run_many([task.name for task in group.tasks], list(group.rows.images[chunk]))
        for task, question in zip(group.tasks, group.questions, strict=True):
            result, part = results[task.name], parts[task.name]
            found = _labels(result) if result.maps is None else tally_maps(task, group.rows.labels[task.name][chunk], result.maps)
            fresh = len(part) - first  # an interruption may have left one task ahead of another
            if fresh < len(found):
                predictions.add(part, question.truth[chunk][fresh:], found[fresh:])
        _count(timing, result)
        tick(len(result.row_s) * len(parts))


def _count(timing: Timing, result: Result) -> None:
    timing.warm.add(result.latency_s, result.counters)
    timing.warm.latency_s[-1:] = result.row_s


def _labels(result: Result) -> Labels:
    assert result.scores is not None  # only classifications are matched
    predicted: Labels = result.scores.argmax(-1).astype(np.int64)
    return predicted


def routing_counts(bundle: str, groups: Sequence[Texts | Images], threads: int | None, quiet: bool) -> NDArray[np.int64]:
    """How often tokens of each domain (sorted) chose each expert of all sites, (domains, experts), over each task's first rows.

    Raises `UsageError` where the bundle does not tell its choices.
    """
    texts = [group for group in groups if isinstance(group, Texts)]
    domains = sorted({group.question.domain for group in texts})
    with open_session(bundle, memory="100%", threads=threads) as session:
        sites = [len(site.experts) for site in session.manifest.sites]
        starts, counts = np.cumsum([0, *sites]), np.zeros((len(domains), sum(sites)), np.int64)
        with progress(sum(min(TRACED_ROWS, len(group.rows)) for group in texts), "routing", quiet) as tick:
            for group in texts:
                rows, name = group.rows[:TRACED_ROWS], group.question.name
                session.load(name)
                pair = session.task(name).pair
                follow = partial(session.trace, name)
                traces = follow(pairs=[(r.text, r.pair or "") for r in rows]) if pair else follow(texts=[r.text for r in rows])
                chosen = np.concatenate(traces)
                placed = (chosen + starts[:-1, None])[chosen >= 0]
                counts[domains.index(group.question.domain)] += np.bincount(placed, minlength=counts.shape[1])
                tick(len(rows))
    return counts
