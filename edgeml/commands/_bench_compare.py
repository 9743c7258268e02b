"""The part of `edgeml bench` that compares: with another bundle or other settings in turns, or with records of an earlier day."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeml.commands._bench_child import Worker
from edgeml.compare import FEWEST_PAIRS, PROCESS, THREADS, Comparison, Turn, busy, compare_records, in_turns
from edgeml.errors import DataError, UsageError
from edgeml.records import Record, read

__all__ = ["Other", "against_records", "names_of", "parse_other", "sentence", "take_turns"]

KEYS = ("memory", "residency", "threads", "variant")
#: A turn lasts about so long, so that the clock and the pipe are no part of it; rounds that take longer need no round to warm up.
TURN_S, MOST_ROUNDS, LONG_S = 0.02, 50, 0.05
#: What must be the same for two records to be compared, and of the machine.
SAME = ("task", "workload", "memory", "residency", "threads", "variant")
MACHINE = ("cpu", "board", "architecture", "processors")
NOTED = ("kernel", "governor", "onnxruntime", "numpy", "python")


@dataclass(frozen=True)
class Other:
    """What to compare with: a bundle under settings that differ from ours, or earlier records."""

    path: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Record] = ()


def parse_other(text: str) -> Other:
    """`BUNDLE[,KEY=VALUE]...`, or a file of records. Raises `UsageError` for other keys, `DataError` for a file that cannot be read."""
    path, *changes = [text] if os.path.exists(text) else text.split(",")
    settings = {key.strip(): value.strip() for key, _, value in (change.partition("=") for change in changes)}
    if len(settings) < len(changes) or any(key not in KEYS or not value for key, value in settings.items()):
        raise UsageError(f"--compare {text!r:.80}: write BUNDLE[,KEY=VALUE]... with the keys {', '.join(KEYS)}, or a file of records")
    try:
        with open(path, "rb") as file:
            begin = file.read(64).lstrip()
    except (OSError, ValueError) as error:
        raise DataError(f"{path:.200}: cannot be read ({getattr(error, 'strerror', None) or error}); see --compare") from None
    if begin and not begin.startswith(b"{"):
        return Other(path, settings)
    found = [record for record in read(path) if record["kind"] == "bench"]
    if not found or settings:
        raise UsageError(f"{path}: " + ("settings go with a bundle, not with records" if found else "it has no record of edgeml bench"))
    return Other(path, records=found)


def take_turns(
    jobs: Sequence[Mapping[str, Any]], allowed: float, seconds: float, least: int, tick: Callable[[], None]
) -> tuple[Comparison, list[Record]]:
    """Measure two jobs in turns: at least `least` rounds of each, then until it is sure or so many seconds are over."""
    with ExitStack() as stack:
        (ours, first_s), (theirs, second_s) = ((worker := stack.enter_context(Worker(job)), worker.ready()) for job in jobs)
        round_s = max(first_s, second_s)  # each had opened and warmed up before the other began
        overlap = jobs[0]["workload"]["kind"] == "mix"
        if overlap:
            rounds, pairs, lead = max(math.ceil(least / FEWEST_PAIRS), 4), FEWEST_PAIRS, False
        else:
            rounds = min(max(math.ceil(TURN_S / max(round_s, 1e-9)), 1), MOST_ROUNDS)
            pairs, lead = math.ceil(least / rounds), round_s < LONG_S
        until = time.monotonic() + seconds
        alone = not overlap and jobs[0]["threads"] == jobs[1]["threads"] == 1
        places = fast_processors() if alone else [None]

        def turns_of(worker: Worker) -> Turn:
            return lambda turn: worker.turn(turn, rounds, lead, places[turn % len(places)])

        process = PROCESS if alone else THREADS
        found = in_turns(turns_of(ours), turns_of(theirs), allowed, pairs, lambda: time.monotonic() < until, tick=tick, process=process)
        return found, [ours.record(), theirs.record()]


def fast_processors() -> list[int | None]:
    """The processors that this process may use, of a machine with big and little ones the big ones.

    Both turns of a pair run on the same one, since the kernel likes to leave a process where it is: one side would otherwise have the
    little processor, or the one that other programs use, to itself.
    """
    files = {number: Path(f"/sys/devices/system/cpu/cpu{number}/cpu_capacity") for number in sorted(os.sched_getaffinity(0))}
    capacity = {number: int(file.read_text()) if file.exists() else 0 for number, file in files.items()}
    return [number for number, value in capacity.items() if value == max(capacity.values())]


def against_records(new: Record, other: Other, allowed: float) -> tuple[Comparison, list[str]]:
    """A new record and those of the file that were made under its settings; and in which ways the machine has changed since.

    Raises `UsageError` where there is none, or where one has too few rounds; `DataError` for one that bench did not write.
    """
    try:
        return _against(new, other, allowed)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(f"{other.path}: a record of it has not the figures that edgeml bench writes; take its line out") from None


def _against(new: Record, other: Other, allowed: float) -> tuple[Comparison, list[str]]:
    alike = [record for record in other.records if all(record.get(key) == new[key] for key in SAME)]
    here = [record for record in alike if all(record["device"].get(key) == new["device"].get(key) for key in MACHINE)]
    if not here:
        asked = ", ".join(f"{key} {new[key]}" for key in ("task", "memory", "residency", "threads", "variant") if new[key] is not None)
        why = "on this machine" if alike else f"of {asked} and this workload"
        raise UsageError(f"{other.path}: no record {why}; make one with --records and the same options")
    named = [record for record in here if record["bundle"] == new["bundle"]] or here
    if len({record["bundle"] for record in named}) > 1:
        raise UsageError(f"{other.path}: its records are of several bundles, and none is called {new['bundle']}; choose one's records")
    last = named[-1]["device"]
    changed = [f"{key} {last.get(key)}, now {new['device'][key]}" for key in NOTED if last.get(key) != new["device"][key]]
    notes = [f"the earlier record is of another state of this machine: {'; '.join(changed)}"] if changed else []
    if busy(named[-1]) or busy(new):
        loads = " then, ".join(f"{record.get('load_average') or 0:.1f}" for record in (named[-1], new))
        notes.append(f"other programs ran (load average {loads} now), so little can be told; compare in turns")
    return compare_records(new, named, allowed), notes


def sentence(found: Comparison, ours: str, theirs: str, what: str) -> str:
    """The comparison, for people; `what` it rests on, such as "pairs of turns"."""
    times = f"{ours} takes {found.ratio:.3f} times as long as {theirs} (98 %: {found.low:.3f} to {found.high:.3f}, {found.n} {what})"
    if found.difference is not None:
        passed = "" if found.difference == "faster" or found.refused else f", within the {100 * found.allowed:g} % that are allowed"
        return f"{times}: {found.difference}{passed}"
    sight = f"a slow-down by {100 * found.smallest:.1f} % would be found 95 times in 100"
    return f"{times}: no difference found; {sight}" + (", so this was too noisy" if found.noisy else "")


def names_of(ours: Mapping[str, Any], theirs: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, str]:
    """Names that tell both sides apart: the files', and of the other side the settings that differ."""
    first, second = Path(ours["bundle"]).name, Path(theirs["bundle"]).name
    second = "itself" if ours["bundle"] == theirs["bundle"] else second if first != second else f"the other {second}"
    return first, " with ".join([second, *([", ".join(f"{key} {value}" for key, value in settings.items())] if settings else [])])
