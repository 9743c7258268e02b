"""Records: what every command that measures writes, one JSON object a line, so that reports and gates read one format.

A Record says on what it was measured (`device`, `backend`, `threads`, budget, residency), with which bundle, and what came of it:
kind "bench" in keys of its own, every other kind in one object that is called like the kind. docs/record.schema.json is the format,
docs/metrics.md the meaning, unit and formula of each key. What was not measured is null.

A file is only ever appended to, a whole line at a time, so that several commands may share one and a run that is stopped loses
nothing but its own last record. Another schema's records are refused, not guessed at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import edgeml
from edgeml.errors import DataError, DeviceError
from edgeml.measure import SCHEMA, environment
from edgeml.strict_json import StrictJsonError, decode_object, encode_object

__all__ = ["KINDS", "Record", "append", "checked_path", "complete", "read"]

KINDS = ("bench", "device", "diff", "eval", "profile", "routing", "run")
LONGEST = 64 << 20  # bytes of a line: a record of more is none

Record = dict[str, Any]


def complete(kind: str, settings: Mapping[str, Any], **own: Any) -> Record:
    """A record of `kind` from a session's `settings()` (or another record's keys) and what the command measured."""
    first = {"schema": SCHEMA, "kind": kind, "tool_version": edgeml.__version__}
    return first | {key: value for key, value in settings.items() if key not in first} | {"device": environment()} | own


def append(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Add one line to the file, which is made if it is not there. Raises `DeviceError` when that cannot be done, and adds nothing."""
    line = encode_object(record) + b"\n"
    try:
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            if file.write(line) != len(line):
                os.ftruncate(file.fileno(), before)
                raise DeviceError(f"{path}: the disk is full; nothing was added")
    except OSError as error:
        raise DeviceError(f"{path}: the record cannot be written ({error.strerror}); name another --records file") from None


def read(path: str | os.PathLike[str]) -> list[Record]:
    """All records of a file, in its order. Raises `DataError` with the line of the first that is none of ours."""
    found: list[Record] = []
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(LONGEST + 1):
                number += 1
                if line.strip():
                    found.append(_checked(line, f"{path}, line {number}"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); `--records FILE` of edgeml bench or eval writes such a file") from None
    return found


def checked_path(path: Path) -> Path:
    """The path, once its folder is there and what it holds are records: told before anything is measured. Raises `DataError` otherwise."""
    if not path.absolute().parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent} to write records into; make it first")
    if path.exists():
        read(path)
    return path


def _checked(line: bytes, where: str) -> Record:
    if len(line) > LONGEST:
        raise DataError(f"{where}: longer than any record is; this is another kind of file")
    try:
        record = decode_object(line)
    except StrictJsonError as error:
        raise DataError(f"{where}: not a record ({error}); take the line out, or measure again") from None
    schema, kind = record.get("schema"), record.get("kind")
    if schema != SCHEMA or isinstance(schema, bool):
        raise DataError(f"{where}: a record of schema {schema!s:.20}, and this edgeml reads {SCHEMA}; measure again")
    if kind not in KINDS:
        raise DataError(f"{where}: a record of no kind that is known ({kind!s:.40}); known are {', '.join(KINDS)}")
    return record
