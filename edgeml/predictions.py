"""A file of predictions: what a long evaluation has answered so far, so that it goes on where it stopped, or is scored again.

JSON lines, appended as answers come. A head opens a part, the answers of one variant to one task; its rows follow:

    {"predictions": 1, "key": K, "variant": name, "role": R, "task": name, "domain", "metric", "classes", "commonest", "rows": n,
     "data": digest of the rows, "settings": {...}, "domains_seen": [...] or null}
    {"variant": name, "task": name, "row": 0, "label": 3, "predicted": 5}
    {"variant": name, "task": name, "row": 0, "always": [...], "counts": [...]}      of maps: counts (classes, 3) in one list

Answers are known by their key, a digest of the bundle's identity, of the settings that can change an answer, of the task and of its
rows: what was answered under other settings is never taken for them. Heads with one key share their rows, which are in order; of two
heads of one variant, role and task the later counts. A last line without its end is what an interruption left, and is dropped;
anything else that breaks these rules is refused with its line.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.domains import Sheet
from edgeml.errors import DataError, DeviceError, UsageError
from edgeml.strict_json import StrictJsonError, decode_object

__all__ = ["Part", "Predictions", "Question", "Variant", "key_of", "sheets_of", "variants_of"]

VERSION = 1
ROLES = ("reference", "variant", "specialised", "none")
LINE_LIMIT = 1 << 20

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """One task's examples: `truth` labels (n,), or of maps the counts (n, classes, 3) of always naming the `commonest` class.

    `digest` names the rows, whatever was asked about them.
    """

    name: str
    domain: str
    metric: str
    classes: int
    commonest: int
    digest: str
    truth: Array

    def __len__(self) -> int:
        return len(self.truth)

    def sheet(self, answers: Sequence[Array]) -> Sheet:
        """The task with its answers, each (n,) or (n, classes, 3), the reference's first."""
        if self.truth.ndim == 1:
            return Sheet.of_labels(self.name, self.domain, self.metric, self.truth, self.commonest, answers)
        return Sheet(self.name, self.domain, self.metric, self.truth, tuple(answers))


@dataclass
class Part:
    """The answers of one variant to one task, as many as there are so far. `head` is the part's first line."""

    head: Mapping[str, Any]
    truth: list[Any] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def dense(self) -> bool:
        """Whether the answers are counts of maps."""
        return self.head["metric"] in ("miou", "edge_f1")

    @property
    def complete(self) -> bool:
        return bool(len(self) == self.head["rows"])

    @property
    def predicted(self) -> Array:
        """Answers (n,), or counts (n, classes, 3)."""
        return self._array(self.answers)

    @property
    def question(self) -> Question:
        """The task as it was asked."""
        head = self.head
        return Question(
            head["task"], head["domain"], head["metric"], head["classes"], head["commonest"], head["data"], self._array(self.truth)
        )

    def _array(self, values: Sequence[Any]) -> Array:
        shape = (len(values), self.head["classes"], 3) if self.dense else (len(values),)
        return np.array(values, np.int64).reshape(shape)


def key_of(question: Question, settings: Mapping[str, Any]) -> str:
    """What a part is known by. `settings`: everything that can change an answer."""
    told = json.dumps([question.name, question.metric, len(question), question.digest, dict(settings)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


class Predictions:
    """The parts of a file, and the file to append to; without a path all stays in memory. Use it as a context manager.

    Raises `DataError` naming the line of a file that breaks the rules, `UsageError` where it cannot be written or another process
    writes it.
    """

    def __init__(self, path: Path | None, writing: bool = True) -> None:
        self.path = path
        self.parts: dict[tuple[str, str, str], Part] = {}
        self._answers: dict[str, tuple[list[Any], list[Any]]] = {}
        self._fd: int | None = None
        self._current: Part | None = None
        if path is None:
            return
        try:
            self._fd = os.open(path, (os.O_RDWR | os.O_CREAT if writing else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
            if writing:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(self._fd, "rb", closefd=False) as stream:
                end = self._read(stream)
            if writing:
                os.ftruncate(self._fd, end)
                os.lseek(self._fd, end, os.SEEK_SET)
        except BlockingIOError:
            self.close()
            raise UsageError(f"{path}: another process is writing it; wait for that, or name another file") from None
        except OSError as error:
            self.close()
            what = ("written there", "choose a folder that exists") if writing else ("read", "name the file of an earlier --predictions")
            raise UsageError(f"{path}: cannot be {what[0]} ({error.strerror}); {what[1]}") from None
        except BaseException:
            self.close()
            raise

    def part(self, head: Mapping[str, Any]) -> Part:
        """The part with this head, begun where there is none; what was answered before under its key is in it."""
        found = self.parts.get(_place(head))
        if found is None or dict(found.head) != dict(head):
            found = self._begin(head)
            self._write([head])
        self._current = found
        return found

    def add(self, part: Part, truth: Array, answers: Array) -> None:
        """Append the next answers of a part. Raises `DeviceError` when the disk is full or fails."""
        lines: list[Mapping[str, Any]] = [] if self._current is part else [part.head]
        named = {"variant": part.head["variant"], "task": part.head["task"]}
        keys = ("always", "counts") if part.dense else ("label", "predicted")
        for one, two in zip(truth.reshape(len(truth), -1).tolist(), answers.reshape(len(answers), -1).tolist(), strict=True):
            values = (one, two) if part.dense else (one[0], two[0])
            lines.append(named | {"row": len(part), **dict(zip(keys, values, strict=True))})
            part.truth.append(values[0])
            part.answers.append(values[1])
        self._current = part
        self._write(lines)

    def close(self) -> None:
        """Give the file up; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if self._fd is None:
            return
        view = memoryview("".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines).encode())
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise DeviceError(f"{self.path}: cannot be written ({error.strerror}); what stands in it is kept") from None

    def _read(self, stream: Any) -> int:
        """Read all lines; returns where the last whole one ends."""
        number, end = 0, 0
        while line := stream.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT:
                raise DataError(f"{self.path}:{number}: the line is longer than {LINE_LIMIT} bytes")
            if not line.endswith(b"\n"):
                break
            end += len(line)
            where = f"{self.path}:{number}"
            try:
                document = decode_object(line)
            except StrictJsonError as error:
                raise DataError(f"{where}: {error}; this is no file of predictions, so name another") from None
            if "predictions" in document:
                self._head(document, where)
            elif self._current is None:
                raise DataError(f"{where}: this is no file of predictions of edgeml eval; name another")
            else:
                _row(self._current, document, where)
        self._current = None
        return end

    def _head(self, head: dict[str, Any], where: str) -> None:
        if head["predictions"] != VERSION:
            raise DataError(f"{where}: predictions of version {head['predictions']!r:.20}, and this edgeml reads {VERSION}; run eval again")
        for key, kind in HEAD.items():
            if not isinstance(head.get(key), kind) or isinstance(head.get(key), bool):
                raise DataError(f"{where}: the head of a part has no fitting '{key}'")
        for key, kinds in SETTINGS.items():
            if not isinstance(head["settings"].get(key), kinds):
                raise DataError(f"{where}: the settings of a part have no fitting '{key}'")
        if head["role"] not in ROLES or head["classes"] < 1 or head["rows"] < 1:
            raise DataError(f"{where}: the head of a part has a role, classes or rows that cannot be")
        self._current = self._begin(head)

    def _begin(self, head: Mapping[str, Any]) -> Part:
        truth, answers = self._answers.setdefault(head["key"], ([], []))
        found = self.parts[_place(head)] = Part(head, truth, answers)
        return found


def _place(head: Mapping[str, Any]) -> tuple[str, str, str]:
    return head["role"], head["variant"], head["task"]


HEAD = {
    "key": str,
    "variant": str,
    "role": str,
    "task": str,
    "domain": str,
    "metric": str,
    "classes": int,
    "commonest": int,
    "rows": int,
    "data": str,
    "settings": dict,
}


#: Settings that are shown; each may be missing.
SETTINGS = {
    **dict.fromkeys(("bundle", "bundle_id", "residency"), (str, NoneType)),
    **dict.fromkeys(("memory_budget_bytes", "pageable_pages", "graph_bytes"), (int, NoneType)),
    "experts_kept": (int, float, NoneType),
    "kept_for": (list, NoneType),
}


def _row(part: Part, row: Mapping[str, Any], where: str) -> None:
    if row.get("row") != len(part) or len(part) >= part.head["rows"] or row.get("task") != part.head["task"]:
        raise DataError(f"{where}: row {row.get('row')!r:.20} is not the next of task '{part.head['task']}', which has {len(part)}")
    classes = part.head["classes"]
    for key, kept in zip(("always", "counts") if part.dense else ("label", "predicted"), (part.truth, part.answers), strict=True):
        value = row.get(key)
        values = value if part.dense else [value]
        if not isinstance(values, list) or len(values) != (3 * classes if part.dense else 1) or not all(type(one) is int for one in values):
            raise DataError(f"{where}: '{key}' is not what an answer looks like")
        if min(values) < 0 or (not part.dense and values[0] >= classes):
            raise DataError(f"{where}: '{key}' is {values[0]}, outside 0 to {classes - 1}")
        kept.append(value)


@dataclass(frozen=True)
class Variant:
    """One variant's parts by task, under its name and role: "reference", "variant", "specialised" (for the domain it is named
    after) or "none" (without any specialised expert)."""

    name: str
    role: str
    parts: Mapping[str, Part]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings it ran with."""
        found: Mapping[str, Any] = next(iter(self.parts.values())).head["settings"]
        return found

    @property
    def seen(self) -> list[str] | None:
        """The domains that what made it saw, None where that is not known."""
        found = next(iter(self.parts.values())).head.get("domains_seen")
        return list(map(str, found)) if isinstance(found, list) else None


def variants_of(predictions: Predictions) -> list[Variant]:
    """The variants of a file in the order of their first heads. Raises `DataError` for a file without any."""
    found: dict[tuple[str, str], dict[str, Part]] = {}
    for (role, name, task), part in predictions.parts.items():
        found.setdefault((role, name), {})[task] = part
    if not found:
        raise DataError(f"{predictions.path}: there are no predictions in it")
    return [Variant(name, role, parts) for (role, name), parts in found.items()]


def sheets_of(variants: Sequence[Variant], where: str) -> list[Sheet]:
    """Sheets of the tasks that all variants answer, their answers in the order of `variants`.

    Raises `DataError` for a part that is not whole, for variants that answer other rows, and where no task is common to all.
    """
    first = variants[0]
    common = [task for task in first.parts if all(task in variant.parts for variant in variants)]
    if not common:
        raise DataError(f"{where}: {' and '.join(repr(variant.name) for variant in variants)} have no task in common")
    sheets = []
    for task in common:
        question = first.parts[task].question
        for variant in variants:
            part = variant.parts[task]
            if not part.complete:
                done = f"{len(part)} of {part.head['rows']} rows"
                raise DataError(f"{where}: '{variant.name}' has answered {done} of task '{task}'; run the same eval again to finish it")
            other = part.question
            if (other.digest, other.metric) != (question.digest, question.metric) or not np.array_equal(other.truth, question.truth):
                raise DataError(f"{where}: '{variant.name}' answered other rows of task '{task}' than '{first.name}': not to be compared")
        sheets.append(question.sheet([variant.parts[task].predicted for variant in variants]))
    return sheets
