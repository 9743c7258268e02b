"""Workloads: which requests come, and when; read from a TOML file, drawn with a seed, and driven through `Session.submit`.

    seed = 7                    # default 0: equal seeds give equal requests, at equal times
    requests = 500              # that are measured (default: --iterations); `warmup` more come first, left out
    warmup = 20

    [arrival]
    kind = "poisson"            # requests come whether or not the ones before are answered, at random, so many a second
    rate_per_s = 20             # also: kind = "bursts", burst = 8, which come together, at the same mean rate;
                                # or kind = "closed", concurrency = 4: the next one comes when one of 4 is answered

    [[mix]]                     # of each kind of request, as many as its weight says
    task = "banking77"
    weight = 3
    input = "questions.jsonl"   # JSON lines with text (and text_pair), beside this file; drawn from at random

    [[mix]]
    task = "snips"
    tokens = {distribution = "lognormal", median = 24, sigma = 0.6, least = 4, most = 128}
                                # random ids; also "uniform" with least and most, or a number
    rows = 2                    # inputs a request
    deadline_s = 0.5            # after which nobody wants the answer any more
    priority = 5

    [[mix]]
    task = "digit"              # on images: `images`, a list of files, or random ones

Where requests come by the clock, a latency counts from when its request was *meant* to come: if the machine, or whoever submits, is late,
whatever waits for that pays, as a user would. Counting from the submission would leave out just the worst moments.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeml.errors import DataError

__all__ = ["Drive", "Kind", "Request", "Submit", "Workload", "drive", "load_workload", "parse_workload"]

ARRIVALS = {"closed": {"concurrency"}, "poisson": {"rate_per_s"}, "bursts": {"rate_per_s", "burst"}}
DISTRIBUTIONS = {"uniform": {"least", "most"}, "lognormal": {"median", "sigma", "least", "most"}}
KEYS = {"seed", "requests", "warmup", "arrival", "mix"}
KIND_KEYS = {"task", "weight", "input", "tokens", "images", "rows", "deadline_s", "priority"}
MOST = 1e6
LONGEST = 1 << 20  # bytes of a workload file


@dataclass(frozen=True)
class Kind:
    """One entry of the mix: `tokens` a distribution, `input` and `images` files, or none of the three."""

    task: str
    weight: float
    rows: int
    tokens: Mapping[str, float | str] | None
    input: Path | None
    images: tuple[Path, ...]
    deadline_s: float | None
    priority: int


@dataclass(frozen=True)
class Request:
    """Which entry of the mix it is of; when it is meant to come, in seconds from the start (None: when there is room); what its inputs are
    drawn with, and their lengths where they are random."""

    kind: int
    at_s: float | None
    seed: int
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Workload:
    """What a file says; `source` is its content, which `parse_workload` reads again in another process."""

    mix: tuple[Kind, ...]
    arrival: Mapping[str, Any]
    seed: int
    requests: int | None
    warmup: int | None
    source: str
    name: str

    @property
    def concurrency(self) -> int | None:
        """Requests that are out at once; None where they come by the clock."""
        return self.arrival["concurrency"] if self.arrival["kind"] == "closed" else None

    def as_json(self) -> dict[str, Any]:
        """As a record has it."""
        digest = hashlib.sha256(self.source.encode()).hexdigest()
        tasks = [kind.task for kind in self.mix]
        return {"kind": "mix", "file": self.name, "sha256": digest, "arrival": dict(self.arrival), "seed": self.seed, "tasks": tasks}

    def part(self, number: int, count: int) -> list[Request]:
        """`count` requests, the same whenever they are asked for; another `number` gives others. Its time begins at 0."""
        rng = np.random.default_rng([self.seed, number])
        weights = np.array([kind.weight for kind in self.mix])
        kinds = rng.choice(len(self.mix), count, p=weights / weights.sum())
        times = self._times(rng, count)
        seeds = rng.integers(0, 1 << 32, count)
        return [
            Request(int(kind), at, int(seed), tuple(_length(rng, self.mix[kind].tokens) for _ in range(self.mix[kind].rows)))
            for kind, at, seed in zip(kinds, times, seeds, strict=True)
        ]

    def _times(self, rng: np.random.Generator, count: int) -> list[float | None]:
        if self.arrival["kind"] == "closed":
            return [None] * count
        burst = self.arrival.get("burst", 1)
        gaps = rng.exponential(burst / self.arrival["rate_per_s"], -(-count // burst))
        return [float(at) for at in np.repeat(np.cumsum(gaps) - gaps[:1].sum(), burst)[:count]]


@dataclass
class Drive:
    """What became of driven requests, in their order: seconds from when each was meant to come until it was answered, None where it was
    not; the seconds of all of it; and by how much the submitting itself was late at worst."""

    latency_s: list[float | None] = field(default_factory=list)
    seconds: float = 0.0
    late_s: float = 0.0


#: Queues request number i, which was meant to come at a time of `time.perf_counter`, and has the function called once, from any thread:
#: with whether it was answered.
Submit = Callable[[int, float, Callable[[bool], None]], None]


def drive(requests: Sequence[Request], submit: Submit, most: int | None) -> Drive:
    """Submit each request at its time or, of those without one, when fewer than `most` are out; wait for all of them.

    What `submit` raises itself ends the drive.
    """
    done = Drive([None] * len(requests))
    room, ends = threading.Semaphore(most or 1), threading.Semaphore(0)
    started = time.perf_counter()
    for number, request in enumerate(requests):
        if request.at_s is None:
            room.acquire()
            meant = time.perf_counter()
        else:
            meant = started + request.at_s
            time.sleep(max(0.0, meant - time.perf_counter()))
            done.late_s = max(done.late_s, time.perf_counter() - meant)

        def ended(answered: bool, number: int = number, meant: float = meant) -> None:
            done.latency_s[number] = time.perf_counter() - meant if answered else None
            room.release()
            ends.release()

        submit(number, meant, ended)
    for _ in requests:
        ends.acquire()
    done.seconds = time.perf_counter() - started
    return done


def load_workload(path: Path) -> Workload:
    """The workload of a file. Raises `DataError` with what is wrong in it, and where."""
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a workload as TOML") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    if len(content) > LONGEST:
        raise DataError(f"{path}: longer than any workload is")
    return parse_workload(text, path)


def parse_workload(text: str, path: Path) -> Workload:
    """The workload that a text says; files that it names lie beside `path`. Raises `DataError`."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not TOML ({error})") from None
    top = _Table(document, str(path), KEYS)
    mix = document.get("mix")
    if not isinstance(mix, list) or not mix or not all(isinstance(entry, dict) for entry in mix):
        raise DataError(f"{path}: it has no [[mix]]: say there which task's requests come")
    kinds = tuple(_kind(_Table(entry, f"{path}: [[mix]] number {number}", KIND_KEYS), path) for number, entry in enumerate(mix, 1))
    if not sum(kind.weight for kind in kinds):
        raise DataError(f"{path}: all weights are 0; one must be more")
    return Workload(
        kinds,
        _arrival(document.get("arrival", {"kind": "closed"}), f"{path}: [arrival]"),
        int(top.number("seed", 0, 0, 2**31 - 1, whole=True)),
        None if "requests" not in document else int(top.number("requests", 0, 1, MOST, whole=True)),
        None if "warmup" not in document else int(top.number("warmup", 0, 0, MOST, whole=True)),
        text,
        path.name,
    )


def _kind(entry: _Table, path: Path) -> Kind:
    tokens, images = entry.given.get("tokens"), entry.given.get("images", [])
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise DataError(f"{entry.where}: images is a list of files, not {images!r:.40}")
    if sum((tokens is not None, "input" in entry.given, bool(images))) > 1:
        raise DataError(f"{entry.where}: give one of input, tokens and images")
    if isinstance(tokens, dict):
        tokens = _chosen(tokens, f"{entry.where}: tokens", "distribution", DISTRIBUTIONS, whole=("least", "most"))
        if tokens["least"] > tokens["most"]:
            raise DataError(f"{entry.where}: tokens: least is more than most")
    elif tokens is not None:
        count = int(entry.number("tokens", 0, 1, MOST, whole=True))
        tokens = {"distribution": "uniform", "least": count, "most": count}
    return Kind(
        entry.text("task"),
        entry.number("weight", 1, 0, MOST),
        int(entry.number("rows", 1, 1, 4096, whole=True)),
        tokens,
        path.parent / entry.text("input") if "input" in entry.given else None,
        tuple(path.parent / name for name in images),
        entry.number("deadline_s", 0, 1e-6, MOST) if "deadline_s" in entry.given else None,
        int(entry.number("priority", 0, -100, 100, whole=True)),
    )


def _arrival(given: Any, where: str) -> dict[str, Any]:
    if isinstance(given, dict) and given.get("kind") == "closed":
        given = {"concurrency": 1} | given
    return _chosen(given, where, "kind", ARRIVALS, whole=("concurrency", "burst"))


def _chosen(given: Any, where: str, by: str, choices: Mapping[str, set[str]], whole: Sequence[str]) -> dict[str, Any]:
    """A table whose key `by` says which numbers belong to it: all of them, and nothing else."""
    if not isinstance(given, dict) or given.get(by) not in list(choices):
        raise DataError(f"{where}: write a table with {by} = one of {', '.join(choices)}")
    keys = choices[given[by]]
    table = _Table(given, where, {by, *keys})
    found = {key: table.number(key, None, 1 if key in whole else 1e-6, MOST, whole=key in whole) for key in sorted(keys)}
    return {by: given[by], **{key: int(value) if key in whole else value for key, value in found.items()}}


@dataclass(frozen=True)
class _Table:
    """A table of the file; says where it is when something in it is wrong."""

    given: Mapping[str, Any]
    where: str
    keys: set[str]

    def __post_init__(self) -> None:
        for key in self.given:
            if key not in self.keys:
                raise DataError(f"{self.where}: unknown key {key!r:.40}; there are {', '.join(sorted(self.keys))}")

    def number(self, key: str, default: float | None, least: float, most: float, whole: bool = False) -> float:
        if key not in self.given and default is not None:
            return float(default)
        value = self.given.get(key)
        right = isinstance(value, int) or (isinstance(value, float) and not whole and math.isfinite(value))
        if value is None or isinstance(value, bool) or not right or not least <= value <= most:
            kind = "a whole number" if whole else "a number"
            raise DataError(f"{self.where}: {key} is {kind} from {least:g} to {most:g}, not {value!r:.40}")
        return float(value)

    def text(self, key: str) -> str:
        value = self.given.get(key)
        if not isinstance(value, str) or not value:
            raise DataError(f"{self.where}: {key} is missing, or no text")
        return value


def _length(rng: np.random.Generator, tokens: Mapping[str, Any] | None) -> int:
    """A length in tokens from its distribution, within its bounds; 0 where inputs are not random ids."""
    if tokens is None:
        return 0
    if tokens["distribution"] == "uniform":
        return int(rng.integers(tokens["least"], tokens["most"] + 1))
    drawn = rng.lognormal(math.log(tokens["median"]), tokens["sigma"])  # infinite, where sigma is very large
    return int(min(max(drawn, tokens["least"]), tokens["most"]) + 0.5)
