"""The same work on one machine or several at once, and one table of what came of it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import click

from edgeml.commands import _records
from edgeml.commands._options import printable
from edgeml.errors import EdgemlError
from edgeml.sizes import format_bytes
from edgeml_devices.remote import Copied, Remote

__all__ = ["Outcome", "Speaker", "on_all", "pushed", "table"]


@dataclass
class Outcome:
    """What came of one machine. `error` is a sentence; `document` what the command printed with --json."""

    to: str
    exit_code: int = 0
    error: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    copied: Copied | None = None
    start_s: float | None = None
    seconds: float | None = None
    document: dict[str, Any] | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Its entry in the document of --json; what was not reached is null."""
        copied = self.copied
        return {
            "to": self.to,
            "exit_code": self.exit_code,
            "error": self.error,
            **{key: self.facts.get(key) for key in ("edgeml", "python", "platform", "free_bytes", "root")},
            "copied_bytes": None if copied is None else copied.bytes,
            "resumed_bytes": None if copied is None else copied.resumed_bytes,
            "copy_s": None if copied is None else copied.seconds,
            "start_s": self.start_s,
            "seconds": self.seconds,
            "document": self.document,
            "predicted": [record["device_run"]["predicted"] for record in self.records if "device_run" in record],
        }


class Speaker:
    """What devices say, on this terminal: a single one's text as it is, several ones' in whole lines that begin with their name."""

    def __init__(self, several: bool) -> None:
        self.several, self._lock = several, threading.Lock()
        self._held: dict[str, str] = {}

    def err(self, name: str) -> Callable[[str], None]:
        """A function for text of that machine's standard error."""

        def say(text: str) -> None:
            with self._lock:
                if not self.several:
                    sys.stderr.write(text)
                    sys.stderr.flush()
                    return
                *lines, self._held[name] = (self._held.get(name, "") + text).split("\n")
                for line in lines:
                    click.echo(f"{name}: {printable(line)}", err=True)

        return say


def on_all(far: Sequence[Remote], work: Callable[[Remote, Outcome], int]) -> list[Outcome]:
    """Do the work on every machine at once; a fault of one is its own. Ctrl-C ends all. Raises nothing but that."""

    def one(remote: Remote) -> Outcome:
        outcome, started = Outcome(remote.name), time.monotonic()
        try:
            with remote:
                outcome.facts = remote.open()
                outcome.start_s = time.monotonic() - started
                outcome.exit_code = work(remote, outcome)
        except EdgemlError as error:
            outcome.error, outcome.exit_code = str(error), error.exit_code
        outcome.facts = remote.facts or outcome.facts
        outcome.seconds = time.monotonic() - started
        return outcome

    with ThreadPoolExecutor(max(len(far), 1)) as pool:
        futures = [pool.submit(one, remote) for remote in far]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for remote in far:
                remote.abort()
            raise


def table(verb: str, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The lines of the one table of several machines."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    measured = [(outcome.to, record) for outcome in done for record in outcome.records]
    if verb == "bench" and measured:
        yield from _bench(measured)
    elif verb == "run":
        yield from _aligned(["on", "task", "answer", "score", "ms"], [row for one in done for row in _answers(one)])
    elif verb == "eval":
        yield from _aligned(["on", "variant", "tasks", "mean", "retention", "GG"], [row for one in done for row in _scores(one)])
    elif verb == "profile":
        heads = [
            "on",
            "when",
            "rounds",
            "ms each",
            "graphs",
            "experts",
            "dense layers",
            "waiting",
            "rest",
            "misses",
            "read MiB",
            "energy J",
        ]
        yield from _aligned(heads, [row for one in done for row in _phases(one)])
    else:
        yield from _aligned(["on", "ended with", "seconds"], [[one.to, str(one.exit_code), _seconds(one.seconds)] for one in done])


def pushed(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The table of `edgeml device push`."""
    rows = []
    for one in outcomes:
        if one.error is None:
            rows.append([one.to, one.facts["platform"], one.facts["python"], one.facts["edgeml"] or "-", *_copied(one.copied)])
    yield from _aligned(["to", "machine", "Python", "edgeml", "bundle", "seconds"], rows)


def _copied(copied: Copied | None) -> list[str]:
    if copied is None:
        return ["-", "-"]
    if not copied.bytes and not copied.resumed_bytes:
        return ["was there", _seconds(copied.seconds)]
    after = f", {format_bytes(copied.resumed_bytes)} were there" if copied.resumed_bytes else ""
    return [f"copied {format_bytes(copied.bytes)}{after}", _seconds(copied.seconds)]


def _bench(measured: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """The table of `edgeml bench`, with a column in front that says where; what the machines are, and how a comparison ended."""
    width = max(2, *(len(name) for name, _ in measured))
    first = measured[0][1]
    what, _, head, rules = (_records.head("md", first) or "").splitlines()
    yield what.replace(f" on {first['device']['cpu'] or 'this machine'}", "", 1)
    yield ""
    yield f"| {'on':{width}} {head}"
    yield f"| {'-' * width} {rules}"
    for name, record in measured:
        yield f"| {name:{width}} {_records.row('md', record)}"
    yield ""
    for name, record in dict(measured).items():
        about = record["device"]
        yield f"{name}: {printable(about['board'] or about['cpu'] or 'processor unknown')}, {about['architecture']}"
    for name, record in measured:
        if compared := record.get("compare"):
            sure, ratio, other = (
                100 * compared["confidence"],
                compared["ratio"],
                compared["with"].get("bundle") or compared["with"].get("records"),
            )
            found = compared["difference"] or "no difference found"
            yield (
                f"{name}: {ratio['value']:.3f} times as long as {printable(str(other))} "
                f"({sure:.0f} %: {ratio['low']:.3f} to {ratio['high']:.3f}): {found}"
                + (", more than is allowed" if compared["refused"] else "")
            )


def _answers(one: Outcome) -> Iterator[list[str]]:
    for answer in (one.document or {}).get("results", []):
        found = answer.get("label", answer.get("file", "a vector" if "vector" in answer else "-"))
        latency = answer.get("latency_s")
        score = answer.get("score")
        shown = ["-" if score is None else f"{score:.3f}", "-" if latency is None else f"{1e3 * latency:.1f}"]
        yield [one.to, str(answer.get("task", "-")), printable(str(found)), *shown]


def _scores(one: Outcome) -> Iterator[list[str]]:
    for variant in (one.document or {}).get("variants", []):
        figures = [_figure(variant.get(key)) for key in ("mean", "retention", "gg")]
        yield [one.to, variant["name"], str(len(variant.get("tasks", ()))), *figures]


def _phases(one: Outcome) -> Iterator[list[str]]:
    """Where a profile's time went, cold and warm, in milliseconds of a round; energy is that of the whole run."""
    document = one.document or {}
    energy = (document.get("energy") or {}).get("energy_j")
    for phase in ("cold", "warm"):
        told = document.get(phase)
        if told is None:
            continue
        rounds = told["rounds"]
        parts = [sum(stage[key] for stage in told["stages"]) for key in ("graph_s", "experts_s", "dense_s", "wait_s")]
        shown = [f"{1e3 * seconds / rounds:.2f}" for seconds in (told["wall_s"], *parts, told["wall_s"] - sum(parts))]
        read = f"{told['page_in_bytes'] / (1 << 20):.1f}"
        yield [one.to, phase, str(rounds), *shown, str(told["misses"]), read, "-" if energy is None else f"{energy:.3g}"]


def _figure(value: Any) -> str:
    """A number, or an interval's, to four places."""
    number = value["value"] if isinstance(value, Mapping) else value
    return "-" if number is None else f"{number:.4f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if rows:
        widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
        for row in (head, ["-" * width for width in widths], *rows):
            yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
