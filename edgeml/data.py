"""Data directories: `DOMAIN/TASK/{train,validation,test}.jsonl.gz` beside a `task.json`, or one task's directory; or one table.

A row is `{"text": str, "label": int}` with an optional `text_pair`. A table is a CSV, TSV or JSON lines file with a column of texts
and one of labels, by name or by index, for one task of a bundle; it has no splits. Files are untrusted: every fault is a
`DataError` that names the file and the line. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeml.errors import DataError

__all__ = ["SPLITS", "Columns", "Row", "TableData", "TaskData", "find_tasks", "majority_label", "parse_row", "read_task"]

SPLITS = ("train", "validation", "test")
METRICS = ("accuracy", "macro_f1")
LINE_LIMIT = 1 << 20

#: Raises for a text that cannot be answered, given where it stands.
Check = Callable[[str, str], None]


def _unchecked(text: str, where: str) -> None:
    """Any text."""


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

    def rows(self, split: str, limit: int | None = None, check: Check = _unchecked) -> list[Row]:
        """All rows of a split, or the first `limit`. Each text is given to `check`, with where it stands."""
        if split not in SPLITS:
            raise DataError(f"there is no split '{split}': choose one of {', '.join(SPLITS)}")
        for suffix in (".jsonl.gz", ".jsonl"):
            file = self.path / f"{split}{suffix}"
            if file.is_file():
                rows = []
                for document, where in _json_rows(file):
                    rows.append(_checked(parse_row(document, where, len(self.labels), self.pair), where, check))
                    if limit is not None and len(rows) >= limit:
                        break
                return rows
        raise DataError(f"{self.path}: no {split}.jsonl.gz or {split}.jsonl there")


@dataclass(frozen=True)
class Columns:
    """What a table's columns are called; in JSON lines these are keys."""

    text: str = "text"
    pair: str = "text_pair"
    label: str = "label"


@dataclass(frozen=True)
class TableData(TaskData):
    """A task whose rows stand in one file, all of them in every split."""

    columns: Columns = field(default_factory=Columns)

    def rows(self, split: str, limit: int | None = None, check: Check = _unchecked) -> list[Row]:
        """All rows, or the first `limit`. Raises `DataError` naming the line of a label that is none of the task's."""
        index = {label: number for number, label in enumerate(self.labels)}
        found = []
        for document, where in _table(self.path, self.columns, self.pair):
            text, pair, label = (document.get(column) for column in (self.columns.text, self.columns.pair, self.columns.label))
            if not isinstance(text, str) or (self.pair and not isinstance(pair, str)):
                raise DataError(f"{where}: '{self.columns.pair if isinstance(text, str) else self.columns.text}' must be a text")
            number = index.get(label) if isinstance(label, str) else label
            if number is None and isinstance(label, str) and label.strip().isascii() and label.strip().isdigit():
                number = int(label) if len(label) < 10 else None
            if type(number) is not int or not 0 <= number < len(self.labels):
                some = ", ".join(self.labels[:6]) + (" ..." if len(self.labels) > 6 else "")
                raise DataError(f"{where}: the label {label!r:.60} is none of task '{self.name}'s {len(self.labels)} ({some})")
            found.append(_checked(Row(text, pair if self.pair and isinstance(pair, str) else None, number), where, check))
            if limit is not None and len(found) >= limit:
                break
        if not found:
            raise DataError(f"{self.path}: it has no rows; give one labelled text a line")
        return found


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
    except (ValueError, RecursionError) as error:
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


def _checked(row: Row, where: str, check: Check) -> Row:
    for text in (row.text, *([] if row.pair is None else [row.pair])):
        check(text, where)
    return row


def _json_rows(file: Path) -> Iterator[tuple[Any, str]]:
    """Each line's document, and where it stands."""
    for number, line in _lines(file):
        try:
            document = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError
            raise DataError(f"{file}:{number}: not a JSON row in UTF-8 ({error})") from error
        yield document, f"{file}:{number}"


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1."""
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            while line := stream.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise DataError(f"{file}:{number}: the line is longer than {LINE_LIMIT} bytes")
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}:{number + 1}: cannot be read ({error})") from error


def _table(file: Path, columns: Columns, pair: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a table as objects, and where each stands."""
    if file.suffix in (".csv", ".tsv"):
        yield from _csv_rows(file, [columns.text, columns.label, *([columns.pair] if pair else [])])
        return
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{file}: a table is a .csv, .tsv, .jsonl or .jsonl.gz file; rename it")
    for document, where in _json_rows(file):
        if not isinstance(document, dict):
            raise DataError(f'{where}: expected an object with "{columns.text}" and "{columns.label}"')
        yield document, where


def _csv_rows(file: Path, wanted: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    number = 0
    try:
        with file.open("r", encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            there = list(reader.fieldnames or ())
            for column in wanted:
                if there.count(column) != 1:
                    named = ", ".join(map(str, there[:12])) or "none"
                    many = there.count(column) or "no"
                    raise DataError(f"{file}: {many} column '{column}'; it has {named}; see --text-column, --pair-column, --label-column")
            number = 1
            for document in reader:
                number = reader.line_num
                if None in document or None in document.values():
                    raise DataError(f"{file}:{number}: the row has not the {len(there)} cells of the first line")
                yield document, f"{file}:{number}"
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:  # of a block of many lines
        number = next(number for number, line in _lines(file) if line != line.decode("utf-8", "ignore").encode())
        raise DataError(f"{file}:{number}: not UTF-8; save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{file}:{number + 1}: not a row of a table ({error})") from None
