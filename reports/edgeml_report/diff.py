"""Which part of a bundle lost the quality of a reference: errors of activations, and what comes back when each part is restored.

An error is |a - r| / |r|, Euclidean over all values of all rows, `a` of the bundle and `r` of the reference, padding left out. For
every part in the order in which a request meets it:

    alone_error     of what it makes of the reference's inputs: the damage done here
    error           of what it makes as the request meets it, damage done before included
    state_error     of the sum that takes it up, which is what goes on; where this grows, quality goes
    same_choices    of experts: the share of the choices that are the reference's
    restored_error  of the logits (what heads make before softmax or sigmoid, which hide errors of sure answers; of others the answer),
                    when this part alone is the reference's, and `gain` the mean score that this brings, with its interval

Parts correct and hide each other, so neither errors nor gains add up. `worst` is the stage or site that leaves the least error of the
logits when restored, if that is less than there was.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.manifest import KINDS
from edgeml.metrics import BOOTSTRAP_SEED, FEWEST_EXAMPLES, Interval, drawn_scores, from_tally, interval_of
from edgeml.result import checked_answer
from edgeml_report.diff_graph import Graph, logits
from edgeml_report.diff_images import image_parts
from edgeml_report.diff_parts import Pair, Part
from edgeml_report.diff_run import Errors, Machine, Opened, Tensors, forward, write_mixture
from edgeml_report.diff_texts import text_parts

__all__ = ["Asked", "compare"]

#: Labels of an answer that are shown.
TOP = 3

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Asked:
    """Inputs that some tasks answer: `batches()` gives the rows of each batch and its tensors. `counts(task, answers)` compares answers
    with labels, as `metrics` counts them: (rows, classes, 3); None where there are no labels. `metrics`: the tasks' metrics."""

    tasks: tuple[str, ...]
    rows: int
    batches: Callable[[], Iterator[tuple[NDArray[np.intp], Tensors]]]
    counts: Callable[[str, NDArray[Any]], NDArray[np.integer[Any]]] | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Answers:
    """Of a task in the order of its rows: its logits, and what is made of them (scores, vectors, maps of classes)."""

    raw: dict[str, NDArray[Any]] = field(default_factory=dict)
    said: dict[str, NDArray[Any]] = field(default_factory=dict)
    draws: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def compare(pair: Pair, asked: Sequence[Asked], progress: Callable[[int], Any]) -> dict[str, Any]:
    """The document of a diff, see above. `progress(rows)` is a context manager that yields what takes rows that are done."""
    with ExitStack() as stack:
        parts = _parts(pair, asked, stack)
        rows = sum(one.rows * len(one.tasks) for one in asked)
        restored = [part for part in parts if part.restorable]
        differs = any(not part.same for part in parts)
        with progress((2 + differs) * rows + sum(_rows(part, asked) for part in restored)) as tick:
            whole, lossy = (_answers(stack.enter_context(_machine(one)), asked, tick) for one in (pair.reference, pair.bundle))
            errors = _activations(pair, parts, asked, stack, tick) if differs else None
            told = [_told(pair, part, asked, errors, whole, lossy, tick) for part in parts] if errors is not None else []
    error = _error(asked, lossy, whole)
    found = {
        "rows": sum(one.rows for one in asked),
        "tasks": [task for one in asked for task in one.tasks],
        "score": _mean(asked, lossy),
        "reference_score": _mean(asked, whole),
        "lost": _gain(asked, whole, lossy),
        "error": error,
        "worst": _worst(told, error),
        "why": "; ".join(dict.fromkeys(pair.why)) or None,
        "parts": told,
        "by_task": [_task(pair, one, task, lossy, whole) for one in asked for task in one.tasks],
    }
    if all(one.counts is None for one in asked):
        found["answers"] = [moved for one in asked for task in one.tasks for moved in _moved(pair, one, task, lossy, whole)]
    return found


def _parts(pair: Pair, asked: Sequence[Asked], stack: ExitStack) -> list[Part]:
    """Those that the tasks in question depend on."""
    wanted = {task for one in asked for task in one.tasks}
    pair.tasks = [task for task in pair.tasks if task in wanted]
    if not pair.on_images:
        return text_parts(pair, stack)
    return image_parts(pair, stack, lambda task: next(next(one.batches())[1] for one in asked if task in one.tasks))


def _rows(part: Part, asked: Sequence[Asked]) -> int:
    return sum(one.rows for one in asked for task in one.tasks if task in part.tasks)


def _machine(opened: Opened, models: Mapping[str, bytes] | None = None) -> Machine:
    """The stages with some models exchanged; heads tell their logits as `head/NAME`."""
    told: dict[str, list[str]] = {}
    for task in opened.manifest.tasks:
        head, answer = task.stages.head, KINDS[task.kind][0]
        model = (models or {}).get(head) or opened.graph(head)
        inner = logits(Graph.parse(model, f"{opened.bundle.path}: stage '{head}'"), answer)
        if inner != answer:
            told[head] = [inner]
    return Machine(opened, models, told)


def _answers(machine: Machine, asked: Sequence[Asked], tick: Tick, tasks: Sequence[str] | None = None) -> _Answers:
    """Of all tasks, or those of `tasks`."""
    found = _Answers()
    where = str(machine.opened.bundle.path)
    for one in asked:
        names = [task for task in one.tasks if tasks is None or task in tasks]
        pieces: dict[str, list[tuple[NDArray[np.intp], NDArray[Any], NDArray[Any]]]] = {task: [] for task in names}
        for rows, inputs in one.batches() if names else ():
            made = forward(machine, names, inputs)
            for name in names:
                task = machine.opened.task(name)
                said = checked_answer(task, made[name], len(rows), where)
                inner = next((value for key, value in made[name].items() if key.startswith("head/")), made[name][KINDS[task.kind][0]])
                pieces[name].append((rows, inner, said))
            tick(len(rows) * len(names))
        for name in names:
            order = np.argsort(np.concatenate([rows for rows, _, _ in pieces[name]]))
            found.raw[name] = np.concatenate([raw for _, raw, _ in pieces[name]])[order]
            found.said[name] = np.concatenate([said for _, _, said in pieces[name]])[order]
    return found


def _activations(pair: Pair, parts: Sequence[Part], asked: Sequence[Asked], stack: ExitStack, tick: Tick) -> Errors:
    """Of each part: under its name as the request meets it, and with `alone/`, `state/` or `choices/` in front."""
    errors = Errors()
    own, other = (
        stack.enter_context(Machine(opened, told=told)) for opened, told in zip((pair.bundle, pair.reference), pair.told, strict=True)
    )
    for one in asked:
        for rows, inputs in one.batches():
            ours, theirs = (forward(machine, one.tasks, inputs) for machine in (own, other))
            for part in parts:
                mask = inputs.get("mask") if part.tokens else None
                for task in part.places.keys() & set(one.tasks):
                    named: list[tuple[str, tuple[str, str] | None]] = [(part.name, keys) for keys in part.places[task]]
                    for name, keys in (*named, (f"state/{part.name}", part.state), (f"choices/{part.name}", part.choices)):
                        if keys is not None:
                            errors.add(name, ours[task].get(keys[0]), theirs[task][keys[1]], mask)
                    if part.alone is not None and not part.same:
                        made = part.alone(task, theirs[task])
                        for value, keys in zip(made, part.places[task], strict=True):
                            errors.add(f"alone/{part.name}", value, theirs[task][keys[1]], mask)
            tick(len(rows) * len(one.tasks))
    return errors


def _told(pair: Pair, part: Part, asked: Sequence[Asked], errors: Errors, whole: _Answers, lossy: _Answers, tick: Tick) -> dict[str, Any]:
    """A part's entry; restoring it runs the tasks that depend on it once more."""
    back = None
    if part.restorable:
        with _restored(pair, part) as machine:
            again = _answers(machine, asked, tick, part.tasks)
        kept = {task: drawn for task, drawn in lossy.draws.items() if task not in again.raw}
        back = _Answers(lossy.raw | again.raw, lossy.said | again.said, kept)
    return {
        "name": part.name,
        "kind": part.kind,
        "within": part.within,
        "same": part.same,
        "pages": len(part.pages) + len(part.models) if part.within is None else 0,
        "bytes": None if part.bytes is None else part.bytes[0],
        "reference_bytes": None if part.bytes is None else part.bytes[1],
        "alone_error": 0.0 if part.same else errors.of(f"alone/{part.name}"),
        "error": errors.of(part.name),
        "state_error": errors.of(f"state/{part.name}"),
        "same_choices": errors.same(f"choices/{part.name}"),
        "restored_error": None if back is None else _error(asked, back, whole),
        "gain": None if back is None else _gain(asked, lossy, back),
    }


@contextmanager
def _restored(pair: Pair, part: Part) -> Iterator[Machine]:
    """The bundle with this part of the reference: a file of its own where that is weights."""
    if not part.pages:
        with _machine(pair.bundle, part.models) as machine:
            yield machine
        return
    with tempfile.TemporaryDirectory(prefix="edgeml-diff-") as folder:
        path = write_mixture(Path(folder, "mixture.edgeml"), pair.bundle.bundle, pair.reference.bundle, part.pages)
        with Opened.open(path, pair.bundle.variant, pair.bundle.threads) as opened, _machine(opened, part.models) as machine:
            yield machine


def _error(asked: Sequence[Asked], answers: _Answers, whole: _Answers, only: str | None = None) -> float | None:
    """Of the logits of all tasks together, or of one; None where maps are of other sizes."""
    errors = Errors()
    for name in (task for one in asked for task in one.tasks if only in (None, task)):
        errors.add("", answers.raw[name], whole.raw[name])
    return errors.of("")


def _score(one: Asked, task: str, answers: _Answers) -> float | None:
    """The task's metric, None without labels."""
    return None if one.counts is None else float(from_tally(one.metrics[task], one.counts(task, answers.said[task]).sum(0)))


def _mean(asked: Sequence[Asked], answers: _Answers) -> float | None:
    """Mean score over the tasks, None without labels."""
    scores = [score for one in asked for task in one.tasks if (score := _score(one, task, answers)) is not None]
    return float(np.mean(scores)) if scores else None


def _gain(asked: Sequence[Asked], before: _Answers, after: _Answers) -> dict[str, Any] | None:
    """How much better the mean score is after than before, with its paired bootstrap; None without labels."""
    first, last = _mean(asked, before), _mean(asked, after)
    if first is None or last is None:
        return None
    n, few = sum(one.rows * len(one.tasks) for one in asked), min(one.rows for one in asked) < FEWEST_EXAMPLES
    draws = [_draws(one, task, after) - _draws(one, task, before) for one in asked for task in one.tasks] if not few else []
    found = Interval(last - first, None, None, n) if few else interval_of(last - first, list(np.mean(draws, axis=0)), n)
    return None if found is None else found.as_json()


def _draws(one: Asked, task: str, answers: _Answers) -> NDArray[np.float64]:
    """The task's metric on the same thousand draws of its rows, whatever the answers."""
    if task not in answers.draws:
        assert one.counts is not None
        counts = one.counts(task, answers.said[task])
        answers.draws[task] = drawn_scores(one.metrics[task], [counts], [BOOTSTRAP_SEED, zlib.crc32(task.encode())])[:, 0]
    return answers.draws[task]


def _worst(told: Sequence[Mapping[str, Any]], error: float | None) -> str | None:
    """The stage or site that leaves the least error when restored, None where none brings anything back."""
    left = {part["name"]: part["restored_error"] for part in told if part["restored_error"] is not None and part["within"] is None}
    worst = min(left, key=lambda name: left[name], default=None)
    return worst if worst is not None and error is not None and left[worst] < error else None


def _task(pair: Pair, one: Asked, task: str, lossy: _Answers, whole: _Answers) -> dict[str, Any]:
    own, other = (_score(one, task, answers) for answers in (lossy, whole))
    return {
        "task": task,
        "metric": one.metrics.get(task),
        "rows": one.rows,
        "score": own,
        "reference_score": other,
        "error": _error([one], lossy, whole, task),
        "changed": None if pair.bundle.task(task).kind == "embedding" else _changed(pair, task, lossy.said[task], whole.said[task]),
    }


def _changed(pair: Pair, task: str, own: NDArray[Any], other: NDArray[Any]) -> float:
    """The share of answers, of maps of pixels, that are others."""
    kind = pair.bundle.task(task).kind
    if kind == "classification":
        own, other = own.argmax(-1), other.argmax(-1)
    elif kind == "edge":
        own, other = own >= 0.5, other >= 0.5
    return float(np.mean(own != other))


def _moved(pair: Pair, one: Asked, name: str, lossy: _Answers, whole: _Answers) -> Iterator[dict[str, Any]]:
    """How each answer moved: the likeliest labels of either with their probabilities, of maps their shares of the pixels."""
    task = pair.bundle.task(name)
    for row in range(one.rows):
        shares = [_shares(pair, name, answers.said[name][row]) for answers in (lossy, whole)]
        kept = [label for side in shares for label in sorted(side, key=lambda label: -side[label])[:TOP]]
        moved = {"task": name, "input": row, "changed": None, "error": None}
        if task.kind != "embedding":
            moved["changed"] = _changed(pair, name, lossy.said[name][row : row + 1], whole.said[name][row : row + 1])
        single = Errors()
        single.add("", lossy.raw[name][row : row + 1], whole.raw[name][row : row + 1])
        moved["error"] = single.of("")
        named = dict.fromkeys(sorted(kept, key=lambda label: -shares[1][label]))
        yield moved | {"reference": {label: shares[1][label] for label in named}, "bundle": {label: shares[0][label] for label in named}}


def _shares(pair: Pair, name: str, answer: NDArray[Any]) -> dict[str, float]:
    task = pair.bundle.task(name)
    if not task.dense:
        return {label: float(value) for label, value in zip(task.labels, answer, strict=False)}
    values = (answer >= 0.5).astype(np.uint8) if task.kind == "edge" else answer
    counts = np.bincount(values.ravel(), minlength=len(task.labels)) / values.size
    return {label: float(counts[number]) for number, label in enumerate(task.labels) if number != task.void}
