"""What a device learned about a bundle: one small file beside it, never in it.

The file is `edgeml-ID.usage`, where ID is the first 32 digits of the bundle's identity. It lies in the folder that `state` or
EDGEML_STATE names, otherwise next to the bundle. Two parts:

    one line      "edgeml usage 1 " and the SHA-256 of what follows, in hexadecimal
    then          a JSON object in UTF-8, canonical (sorted keys, no spaces)

    {"bundle": ID in full, "reading": [bytes, seconds], "computing": [tokens, seconds],
     "tasks": {name: {"tokens": n, "choices": [[count of expert e at site s] for s in sites], "distances": [...]}},
     "transfer": null, or {"domains": [...], "sets": [[page ...] ...], "scores": [[...] ...], "reference": [...],
                           "baseline": [...] or null, "examples": [...], "by": "labels" or "agreement"}}

`choices` are counts of what tokens chose when nothing was masked, halved together with `tokens` when they grow old, so no whole
numbers. `distances` are those of the latest segments from the task's own pattern, at most 64. Rates are of this device: bytes read
against seconds waited for them, tokens against seconds computed. `transfer` is `resident.Transfer` of at least two of the bundle's
domains, at most 256; a set's pages ascend and are those of routed experts. A newer one takes its place.

A writer MUST replace the file as a whole (sibling, fsync, rename). It first reads the file again and adds to it, so that what another
process saved meanwhile stays. A reader MUST check everything before it uses anything, as the file may come from anywhere:

- A file of another bundle, or of a newer edgeml, is refused and left alone.
- A damaged file (another checksum, tasks or shapes that the bundle has not, numbers that cannot be) is reported and set aside under
  the name with `.damaged` behind it, and learning begins afresh.
- A file that cannot be written costs what would have been learned, and nothing else.

Nothing here changes an answer that does not depend on a resident set; and deleting the file is always safe.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from edgeml.bundle_writer import write_file
from edgeml.errors import DataError, EdgemlError, InputError, UsageError
from edgeml.manifest import Manifest
from edgeml.manifest_reader import is_number
from edgeml.resident import Meter, Transfer, Watched, all_pages
from edgeml.strict_json import StrictJsonError, decode_object, encode_object

__all__ = ["Learned", "LearnedTask", "load", "place_of", "save"]

HEAD, VERSION = b"edgeml usage ", 1
SIZE_LIMIT = 64 << 20
DISTANCES, DOMAINS = 64, 256
#: Where the past begins to fade: tokens of a task, bytes read, tokens computed.
TASK_WINDOW, READ_WINDOW, COMPUTE_WINDOW = float(1 << 20), float(1 << 28), float(1 << 12)
MOST = 1e15


class Damaged(InputError):
    """The file breaks a rule of the format, so that nothing in it is used."""


@dataclass
class LearnedTask:
    """Of one task: what it chose, and how far its latest segments were from its pattern."""

    watched: Watched
    distances: list[float] = field(default_factory=list)

    def segment(self, distance: float) -> None:
        """Keep a segment's distance."""
        self.distances = [*self.distances, distance][-DISTANCES:]


@dataclass
class Learned:
    """Everything a sidecar holds. `tasks` has only tasks of which something was seen."""

    tasks: dict[str, LearnedTask] = field(default_factory=dict)
    reading: Meter = field(default_factory=lambda: Meter(window=READ_WINDOW))
    computing: Meter = field(default_factory=lambda: Meter(window=COMPUTE_WINDOW))
    transfer: Transfer | None = None

    def task(self, manifest: Manifest, name: str) -> LearnedTask:
        """That of a task of the bundle, begun when first asked for."""
        if name not in self.tasks:
            self.tasks[name] = LearnedTask(Watched.of(manifest.sites, TASK_WINDOW))
        return self.tasks[name]

    def add(self, manifest: Manifest, other: Learned) -> None:
        """Add what was learned elsewhere or meanwhile."""
        for name, theirs in other.tasks.items():
            mine = self.task(manifest, name)
            mine.watched.merge(theirs.watched)
            for distance in theirs.distances:
                mine.segment(distance)
        self.reading.add(other.reading.amount, other.reading.seconds)
        self.computing.add(other.computing.amount, other.computing.seconds)
        self.transfer = other.transfer or self.transfer


def place_of(bundle_path: Path, bundle_id: str, state: str | os.PathLike[str] | None = None) -> Path:
    """Where a bundle's sidecar is; `state` (or EDGEML_STATE) names the folder. Raises `UsageError` where that is no folder."""
    named = os.fspath(state) if state is not None else os.environ.get("EDGEML_STATE", "")
    folder = Path(named) if named else bundle_path.parent
    if named and not folder.is_dir():
        raise UsageError(f"{'EDGEML_STATE' if state is None else 'state'}: {named!r:.200} is no folder; make it, or name another")
    return folder / f"edgeml-{bundle_id[:32]}.usage"


def load(path: Path, bundle_id: str, manifest: Manifest) -> tuple[Learned | None, str | None]:
    """What a sidecar holds, and a sentence where something is wrong with it. No file: nothing learned, and no sentence.

    None in place of what it holds: this file is not ours to replace (another bundle's, a newer edgeml's, one that cannot be read).
    """
    try:
        return _read(path, bundle_id, manifest), None
    except Damaged as error:
        return Learned(), f"{error}; {_set_aside(path)}, and learning begins afresh"
    except EdgemlError as error:
        return None, f"{error}; nothing is learned meanwhile"


def save(path: Path, bundle_id: str, manifest: Manifest, fresh: Learned) -> None:
    """Add what was learned since loading to the file.

    Raises `InputError` for a file that is not ours, `UsageError` for a folder that is not there, `DeviceError` when writing fails.
    """
    try:
        kept = _read(path, bundle_id, manifest)
    except Damaged:
        _set_aside(path)
        kept = Learned()
    kept.add(manifest, fresh)
    body = encode_object(_document(bundle_id, kept))
    write_file(path, [HEAD, b"%d " % VERSION, hashlib.sha256(body).hexdigest().encode(), b"\n", body])


def _document(bundle_id: str, learned: Learned) -> dict[str, Any]:
    return {
        "bundle": bundle_id,
        "reading": [learned.reading.amount, learned.reading.seconds],
        "computing": [learned.computing.amount, learned.computing.seconds],
        "tasks": {
            name: {
                "tokens": task.watched.tokens,
                "choices": [[float(count) for count in counts] for counts in task.watched.choices],
                "distances": task.distances,
            }
            for name, task in learned.tasks.items()
        },
        "transfer": None if learned.transfer is None else asdict(learned.transfer),
    }


def _set_aside(path: Path) -> str:
    with suppress(OSError):
        os.replace(path, path.with_name(f"{path.name}.damaged"))
        return f"it was set aside as {path.name}.damaged"
    return "it could not be set aside"


def _read(path: Path, bundle_id: str, manifest: Manifest) -> Learned:
    """The checked content, nothing learned where there is no file."""
    try:
        # A pipe in the file's place must not make anyone wait for its other end.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{path}: this is no file")
            content = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        return Learned()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > SIZE_LIMIT:
        raise Damaged(f"{path}: larger than the limit of {SIZE_LIMIT >> 20} MiB")
    return _parse(content, str(path), bundle_id, manifest)


def _parse(content: bytes, where: str, bundle_id: str, manifest: Manifest) -> Learned:
    line, _, body = content.partition(b"\n")
    if not line.startswith(HEAD) or len(line) > 200:
        raise Damaged(f"{where}: this is no usage file of edgeml")
    version, _, digest = line.removeprefix(HEAD).partition(b" ")
    if version.isdigit() and int(version) > VERSION:
        raise DataError(f"{where}: its version is {int(version)}, and this edgeml reads {VERSION}; install a newer edgeml-runtime")
    if version != b"%d" % VERSION or digest != hashlib.sha256(body).hexdigest().encode():
        raise Damaged(f"{where}: its checksum does not fit its content")
    try:
        document = decode_object(body)
    except StrictJsonError as error:
        raise Damaged(f"{where}: {error}") from None
    if document.get("bundle") != bundle_id:
        raise DataError(f"{where}: this is the usage of another bundle; delete it or name another folder with EDGEML_STATE")
    _check_keys(document, {"bundle", "reading", "computing", "tasks", "transfer"}, where)
    reading, computing = (_meter(document[key], f"{where}: {key}", window) for key, window in
                          (("reading", READ_WINDOW), ("computing", COMPUTE_WINDOW)))  # fmt: skip
    tasks = document["tasks"]
    if not isinstance(tasks, dict):
        raise Damaged(f"{where}: tasks is no object")
    known = {task.name for task in manifest.tasks}
    for name in tasks:
        if name not in known:
            raise Damaged(f"{where}: the bundle has no task {name!r:.80}")
    found = {name: _task(entry, f"{where}: task '{name}'", manifest) for name, entry in tasks.items()}
    transfer = None if document["transfer"] is None else _transfer(document["transfer"], f"{where}: transfer", manifest)
    return Learned(found, reading, computing, transfer)


def _task(entry: Any, where: str, manifest: Manifest) -> LearnedTask:
    _check_keys(entry, {"tokens", "choices", "distances"}, where)
    tokens = _numbers([entry["tokens"]], f"{where}: tokens", 1, MOST)[0]
    if not isinstance(entry["choices"], list) or len(entry["choices"]) != len(manifest.sites):
        raise Damaged(f"{where}: choices is no list of {len(manifest.sites)} sites")
    choices = [
        np.array(_numbers(row, f"{where}: site '{site.name}'", len(site.experts), MOST))
        for row, site in zip(entry["choices"], manifest.sites, strict=True)
    ]
    for counts, site in zip(choices, manifest.sites, strict=True):
        if counts.sum() > tokens * site.top_k * (1 + 1e-9):
            raise Damaged(f"{where}: site '{site.name}' has more choices than its tokens can make")
    if not isinstance(entry["distances"], list) or len(entry["distances"]) > DISTANCES:
        raise Damaged(f"{where}: distances is no list of at most {DISTANCES}")
    distances = _numbers(entry["distances"], f"{where}: distances", len(entry["distances"]), 1)
    return LearnedTask(Watched(choices, tokens, TASK_WINDOW), distances)


def _transfer(entry: Any, where: str, manifest: Manifest) -> Transfer:
    _check_keys(entry, {each.name for each in fields(Transfer)}, where)
    names, sets, scores = entry["domains"], entry["sets"], entry["scores"]
    known = {task.domain for task in manifest.tasks}
    if not _is_list(names) or not 2 <= len(names) <= DOMAINS or len(set(map(str, names))) < len(names):
        raise Damaged(f"{where}: domains is no list of 2 to {DOMAINS} different names")
    if any(not isinstance(name, str) or name not in known for name in names):
        raise Damaged(f"{where}: it is about a domain that the bundle has not")
    if not _is_list(sets, len(names)) or not _is_list(scores, len(names)):
        raise Damaged(f"{where}: sets or scores is no list of {len(names)} rows")
    pages = all_pages(manifest.sites)
    for row in sets:
        if not _is_list(row) or any(type(page) is not int or page not in pages for page in row) or row != sorted(set(row)):
            raise Damaged(f"{where}: a set is no ascending list of pages of routed experts")
    examples = _numbers(entry["examples"], f"{where}: examples", len(names), MOST)
    if entry["by"] not in ("labels", "agreement") or any(count != int(count) for count in examples):
        raise Damaged(f"{where}: by is labels or agreement, and examples are whole numbers")

    def shares(row: Any) -> tuple[float, ...]:
        return tuple(_numbers(row, f"{where}: scores", len(names), 1))

    baseline = None if entry["baseline"] is None else shares(entry["baseline"])
    table = tuple(map(shares, scores))
    return Transfer(
        tuple(names), tuple(map(tuple, sets)), table, shares(entry["reference"]), baseline, tuple(map(int, examples)), entry["by"]
    )


def _is_list(value: Any, length: int | None = None) -> bool:
    return isinstance(value, list) and length in (None, len(value))


def _meter(value: Any, where: str, window: float) -> Meter:
    amount, seconds = _numbers(value, where, 2, MOST)
    return Meter(amount, seconds, window)


def _numbers(values: Any, where: str, count: int, most: float) -> list[float]:
    if not isinstance(values, list) or len(values) != count or not all(is_number(value) and 0 <= value <= most for value in values):
        raise Damaged(f"{where} is no list of {count} numbers from 0 to {most:g}")
    return [float(value) for value in values]


def _check_keys(document: Any, wanted: Mapping[str, Any] | set[str], where: str) -> None:
    if not isinstance(document, dict) or set(document) != set(wanted):
        raise Damaged(f"{where}: expected an object of {', '.join(sorted(wanted))}")
