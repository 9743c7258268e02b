"""Inputs that commands read: texts from options, a file of JSON lines or standard input; and which tasks answer them or images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO

from edgeml.data import LINE_LIMIT, Row, parse_row
from edgeml.errors import DataError, UsageError
from edgeml.manifest import ImageStages, Manifest, Task
from edgeml.preprocess import check_text
from edgeml.session import find_task

__all__ = ["any_rows", "choose_task", "choose_tasks", "given_rows", "no_task_named", "on_images", "read_rows"]


def choose_task(manifest: Manifest, name: str | None, where: str) -> Task:
    """The task that was asked for, or the only one there is. Raises `UsageError` listing the tasks."""
    if name is not None:
        return find_task(manifest, name, where)
    if len(manifest.tasks) == 1:
        return manifest.tasks[0]
    names = sorted(task.name for task in manifest.tasks)
    raise UsageError(f"{where} answers {len(names)} tasks, choose one with --task" + (f": {', '.join(names)}" if names else ""))


def choose_tasks(manifest: Manifest, names: str | None, where: str, images: bool) -> list[Task]:
    """The tasks of a request: one; or, on images, those of a list such as `digit,garment`, by default all, for one backbone pass.

    `images` says that images were given. Raises `UsageError` for tasks that take texts beside others, or with images.
    """
    there = [task for task in manifest.tasks if on_images(task)]
    if names is None and images and there:
        return there
    if names is None or "," not in names:
        chosen = [choose_task(manifest, names, where)]
    else:
        chosen = [find_task(manifest, name.strip(), where) for name in dict.fromkeys(names.split(","))]
    for task in chosen:
        if not on_images(task) and (images or len(chosen) > 1):
            raise UsageError(f"task '{task.name}' takes texts" + (", not images" if images else ": name one task"))
    return chosen


def on_images(task: Task) -> bool:
    """Whether a task takes images."""
    return isinstance(task.stages, ImageStages)


def no_task_named(manifest: Manifest, name: str | None, images: bool) -> bool:
    """Whether it is for the bundle's router to find the task: none was named, there are several, and there is a router."""
    return name is None and not images and manifest.router is not None and len(manifest.tasks) > 1


def any_rows(texts: Sequence[str], text_pairs: Sequence[str], source: str | None) -> Iterator[Row]:
    """As `given_rows` where no task says whether it wants pairs: those of `--text` are all of one form, a file's rows of either."""
    if bool(texts) == (source is not None):
        raise UsageError('give either --text "..." or --input FILE')
    if source is not None:
        if text_pairs:
            raise UsageError("--text-pair goes with --text; in a file it is the key text_pair")
        return read_rows(source, None)
    if text_pairs and len(texts) != len(text_pairs):
        raise UsageError("add a --text-pair for each --text, or for none")
    rows = [Row(text, text_pairs[number] if text_pairs else None) for number, text in enumerate(texts)]
    for number, row in enumerate(rows):
        _check(row, "--text" if len(rows) == 1 else f"--text number {number + 1}")
    return iter(rows)


def given_rows(task: Task, texts: Sequence[str], text_pairs: Sequence[str], source: str | None) -> Iterator[Row]:
    """The rows to answer, checked, from `--text`, `--text-pair` and `--input`. Raises `UsageError`, and `DataError` naming the row."""
    if bool(texts) == (source is not None):
        raise UsageError('give either --text "..." or --input FILE')
    if source is not None:
        if text_pairs:
            raise UsageError("--text-pair goes with --text; in a file it is the key text_pair")
        return read_rows(source, task.pair)
    if task.pair and len(texts) != len(text_pairs):
        raise UsageError(f"task '{task.name}' judges pairs of texts: add a --text-pair for each --text")
    if not task.pair and text_pairs:
        raise UsageError(f"task '{task.name}' takes single texts: leave out --text-pair")
    rows = [Row(text, text_pairs[number] if task.pair else None) for number, text in enumerate(texts)]
    for number, row in enumerate(rows):
        _check(row, "--text" if len(rows) == 1 else f"--text number {number + 1}")
    return iter(rows)


def read_rows(source: str, pair: bool | None) -> Iterator[Row]:
    """Rows of a JSON lines file, or of standard input for `-`, as they are asked for; None for `pair` takes rows of either form.

    Raises `DataError` naming the line.
    """
    with _opened(source) as stream:
        number = 0
        while line := _line(stream, f"{source}:{number + 1}"):
            number += 1
            if line.strip():
                yield _row(line, f"{source}:{number}", pair)
        if not number:
            raise DataError(f"{source}: it is empty; give one JSON row a line")


def _opened(source: str) -> IO[bytes] | nullcontext[IO[bytes]]:
    if source == "-":
        if sys.stdin is None:
            raise DataError("-: there is no standard input")
        return nullcontext(sys.stdin.buffer)
    try:
        return Path(source).open("rb")
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _line(stream: IO[bytes], where: str) -> bytes:
    try:
        line = stream.readline(LINE_LIMIT + 1)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})") from None
    if len(line) > LINE_LIMIT:
        raise DataError(f"{where}: the line is longer than {LINE_LIMIT} bytes")
    return line


def _row(line: bytes, where: str, pair: bool | None) -> Row:
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f'{where}: not a JSON row such as {{"text": "..."}} ({error})') from None
    row = parse_row(document, where, pair=bool(pair))
    if pair is False and row.pair is not None:
        raise DataError(f"{where}: this task takes single texts, not pairs")
    _check(row, where)
    return row


def _check(row: Row, where: str) -> None:
    check_text(row.text, where)
    if row.pair is not None:
        check_text(row.pair, f"{where} (second text)")
