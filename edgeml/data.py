"""Data directories: `DOMAIN/TASK/{train,validation,test}.jsonl.gz` beside a `task.json`, or one task's directory.

A row is `{"text": str, "label": int}` with an optional `text_pair`. Files are untrusted: every fault is a
`DataError` that names the file and the line. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeml.errors import DataError

__all__ = ["SPLITS", "Row", "TaskData", "find_tasks", "majority_label", "parse_row", "read_task"]

SPLITS = ("train", "validation", "test")
METRICS = ("accuracy", "macro_f1")
LINE_LIMIT = 1 << 20


@dataclass(frozen=True)
class Row:
    """One sample. `label` is an index into the task's labels, None when the file has none."""

    text: str
    pair: str | None = None
    label: int | None = None


@dataclass(frozen=True)
class TaskData:
    """A task as its directory describes it."""

    name: str
    domain: str
    labels: tuple[str, ...]
    metric: str
    pair: bool
    licence: str | None
    path: Path

    def rows(self, split: str, limit: int | None = None) -> list[Row]:
        """All rows of a split, or the first `limit`."""
        if split not in SPLITS:
            raise DataError(f"there is no split '{split}': choose one of {', '.join(SPLITS)}")
        for suffix in (".jsonl.gz", ".jsonl"):
            file = self.path / f"{split}{suffix}"
            if file.is_file():
                rows = []
                for row in _read_rows(file, len(self.labels), self.pair):
                    rows.append(row)
                    if limit is not None and len(rows) >= limit:
                        break
                return rows
        raise DataError(f"{self.path}: no {split}.jsonl.gz or {split}.jsonl there")


def parse_row(document: Any, where: str, classes: int | None = None, pair: bool = False) -> Row:
    """Check one decoded JSON row; `classes` bounds the label, `pair` demands `text_pair`."""
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise DataError(f'{where}: expected an object with a string "text"')
    second = document.get("text_pair")
    if second is not None and not isinstance(second, str):
        raise DataError(f'{where}: "text_pair" must be a string')
    if pair and second is None:
        raise DataError(f'{where}: this is a pair task, "text_pair" is missing')
    label = document.get("label")
    if classes is not None and (type(label) is not int or not 0 <= label < classes):
        raise DataError(f'{where}: "label" must be an integer from 0 to {classes - 1}, not {label!r}')
    return Row(document["text"], second, label if type(label) is int else None)


def read_task(path: Path) -> TaskData:
    """Read one task directory's `task.json`."""
    file = path / "task.json"
    try:
        document = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{file}: not a JSON document in UTF-8 ({error})") from error
    try:
        labels = tuple(str(label) for label in document["labels"])
        metric = str(document["metric"])
        task = TaskData(
            name=str(document["name"]),
            domain=str(document["domain"]),
            labels=labels,
            metric=metric,
            pair=bool(document.get("pair", False)),
            licence=document.get("licence"),
            path=path,
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: the key {error} is missing or has the wrong type") from error
    if metric not in METRICS or not labels:
        raise DataError(f"{file}: metric must be one of {', '.join(METRICS)} and labels must not be empty")
    return task


def find_tasks(root: Path, names: list[str] | None = None) -> list[TaskData]:
    """Tasks below `root` (itself a task, or domains of tasks), sorted; `names` are `task` or `domain/task`."""
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; give a data directory (DOMAIN/TASK/task.json) or one task's")
    if (root / "task.json").is_file():
        found = [read_task(root)]
    else:
        found = [read_task(file.parent) for file in sorted(root.glob("*/*/task.json")) + sorted(root.glob("*/task.json"))]
    if names is None:
        if not found:
            raise DataError(f"{root}: no task.json found in it, nor in its DOMAIN/TASK folders")
        return found
    chosen = []
    for name in names:
        matches = [task for task in found if name in (task.name, f"{task.domain}/{task.name}")]
        if len(matches) != 1:
            raise DataError(f"{root}: {len(matches)} tasks are called '{name}', expected one")
        chosen.append(matches[0])
    return chosen


def majority_label(rows: list[Row]) -> int:
    """The commonest label, the lowest index on a tie: what chance (architecture: scores) predicts."""
    counts: dict[int, int] = {}
    for row in rows:
        if row.label is not None:
            counts[row.label] = counts.get(row.label, 0) + 1
    if not counts:
        raise DataError("no labelled row to take the commonest label from")
    return min(counts, key=lambda label: (-counts[label], label))


def _read_rows(file: Path, classes: int, pair: bool) -> Iterator[Row]:
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            while line := stream.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise DataError(f"{file}:{number}: the line is longer than {LINE_LIMIT} bytes")
                if line.strip():
                    yield parse_row(json.loads(line.decode("utf-8")), f"{file}:{number}", classes, pair)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}:{number + 1}: cannot be read ({error})") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file}:{number}: not a JSON row in UTF-8 ({error})") from error
