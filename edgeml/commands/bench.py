"""`edgeml bench`: how fast a bundle answers and what it costs, for every combination of the settings asked for; and whether that is slower
than another bundle, other settings, or an earlier record."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgeml.commands import _records
from edgeml.commands._bench_child import Worker
from edgeml.commands._bench_compare import Other, against_records, names_of, parse_other, sentence, take_turns
from edgeml.commands._bench_job import DEFAULT_ROUNDS, DEFAULT_WARMUP, combinations_of, job_of, job_options, their_job
from edgeml.commands._options import Number, bundle_argument, json_option, notes, progress, quiet_option, records_option, variant_options
from edgeml.compare import FEWEST_PAIRS, Comparison, busy
from edgeml.errors import EdgemlError, QualityRefused, UsageError
from edgeml.measure import P99_AT_LEAST
from edgeml.records import Record, append


@click.command("bench")
@bundle_argument
@job_options
@click.option("--workload", type=click.Path(), metavar="FILE.toml", help="Requests of several tasks that overlap, as a file says (above).")
@variant_options
@click.option("--iterations", type=click.IntRange(1), help=f"Rounds that are measured, one input each (default: {DEFAULT_ROUNDS}).")
@click.option("--warmup", type=click.IntRange(0), help=f"Rounds before them, left out (default: {DEFAULT_WARMUP}).")
@click.option("--cold", type=click.IntRange(0), default=3, show_default=True, help="Rounds that begin without any expert in memory.")
@click.option("--threads", help="Threads, or a list: 1,2.")
@click.option("--memory", help="Memory for weights, or a list: 25%,50%,100%.")
@click.option("--residency", default="exact", show_default=True, help="exact, masked, or both: exact,masked.")
@click.option(
    "--compare",
    metavar="BUNDLE[,KEY=VALUE]...|RECORDS",
    help="Exit with 1 if it is surely slower than this bundle, measured in turns (the same bundle under another memory, residency, "
    "threads or variant will do); or than the records that an earlier --records wrote.",
)
@click.option("--max-slowdown", default="0%", metavar="PERCENT", show_default=True, help="What --compare lets pass.")
@click.option("--seconds", type=Number(0), default=120, show_default=True, help="When --compare gives up on a noisy machine.")
@click.option("-o", "--output", type=click.Choice(_records.FORMATS), default="md", show_default=True, help="How the records are printed.")
@records_option
@quiet_option
@json_option
def command(bundle: str, output: str, records_file: Path | None, quiet: bool, as_json: bool, **options: Any) -> None:
    """Measure latency, page traffic and memory: each combination of settings in a process of its own.

    A list (--memory, --threads, --residency, --variant) makes a row for each of its values.

    \b
    Example: edgeml bench model.edgeml --task banking77 --memory 25%,50%,100% --threads 1,2
      edgeml bench new.edgeml --task banking77 --compare old.edgeml --max-slowdown 5%
      edgeml bench model.edgeml --task banking77 --compare earlier.jsonl
      edgeml bench model.edgeml --workload mixed.toml

    \b
    mixed.toml, whose latencies count from when a request was meant to come:
      seed = 7
      requests = 200
      [arrival]
      kind = "poisson"    # or "bursts", with burst = 8; or "closed", with concurrency = 4
      rate_per_s = 20
      [[mix]]
      task = "banking77"
      weight = 3
      input = "questions.jsonl"
      [[mix]]
      task = "snips"
      tokens = {distribution = "lognormal", median = 24, sigma = 0.6, least = 4, most = 128}
    """
    out = _Out("json" if as_json else output, records_file)
    allowed = _share(options["max_slowdown"])
    other = None if options["compare"] is None else parse_other(options["compare"])
    if other is None and allowed:
        raise UsageError("--max-slowdown goes with --compare, which says what it is to be no slower than")
    combinations = combinations_of(options)
    job = job_of(bundle, options, combinations)
    theirs = None if other is None or other.records else their_job(job, other, combinations)
    rounds = FEWEST_PAIRS if theirs is not None else job["iterations"] + job["warmup"] + job["cold"]
    with progress(rounds * len(combinations), "measuring", quiet) as step:
        try:
            for combination in combinations:
                ours = job | combination
                out.about = ", ".join(f"{key} {value}" for key, value in combination.items() if any(c[key] != value for c in combinations))
                if other is None:
                    out.keep(_run_worker(ours, step))
                elif theirs is None:
                    _against_records(ours, other, allowed, step, out)
                else:
                    _in_turns(ours, ours | theirs, other, allowed, options["seconds"], step, out)
        finally:
            out.document()
    out.close(quiet)


class _Out:
    """Takes records and sentences as they come, and prints and keeps them."""

    def __init__(self, kind: str, file: Path | None) -> None:
        self._kind, self._file = kind, file
        self._records: list[Record] = []
        self._said: list[str] = []
        self._refused: list[str] = []
        self.changed: list[str] = []
        self.about = ""  # which of several combinations comes now

    def keep(self, record: Record) -> None:
        """A record: the next row."""
        self._records.append(record)
        try:
            if self._file is not None:
                append(self._file, record)
        finally:
            head = _records.head(self._kind, record) if len(self._records) == 1 else None
            for part in (head, _records.row(self._kind, record, self._records[0])):
                if part is not None:
                    click.echo(part)

    def document(self) -> None:
        """What has been measured as one document, where that is asked for; also where the next measurement failed."""
        if self._kind == "json" and self._records:
            click.echo(_records.document(self._records))

    def judge(self, found: Comparison, ours: str, theirs: str, what: str) -> None:
        """What a comparison came to."""
        self._said.append((f"{self.about}: " if self.about else "") + sentence(found, ours, theirs, what))
        self._refused += self._said[-1:] if found.refused else []

    def close(self, quiet: bool) -> None:
        """What comes after the last row. Raises `QualityRefused` for what is slower than is allowed."""
        if self._kind == "md" and self._said:
            click.echo("\n" + "\n".join(self._said))
        about = [f"{record['memory']}: {note}" for record in self._records for note in record["notes"]]
        few = sorted({record["rounds"] for record in self._records if record["rounds"] < P99_AT_LEAST})
        left_out = [f"p99 is left out: it takes {P99_AT_LEAST} rounds, and there were {few[0]}; see --iterations"] if few else []
        notes(list(dict.fromkeys([*about, *self.changed, *left_out])), quiet)
        if self._refused:
            raise QualityRefused("; ".join(self._refused))


def _in_turns(
    ours: dict[str, Any], theirs: dict[str, Any], other: Other, allowed: float, seconds: float, step: Callable[[int], None], out: _Out
) -> None:
    jobs = [ours | {"turns": True}, theirs | {"turns": True}]
    found, (first, second) = take_turns(jobs, allowed, seconds, ours["iterations"], lambda: step(1))
    known = {key: second[key] for key in ("bundle", "bundle_id", "memory", "residency", "threads", "variant")}
    asked = {"iterations": ours["iterations"], "seconds": seconds}
    out.keep(first | {"arm": "A", "compare": {"how": "turns", "with": known, **asked, **found.as_json()}})
    out.keep(second | {"arm": "B", "compare": None})
    out.judge(found, *names_of(ours, theirs, other.settings), "pairs of turns")
    if busy(first):
        out.changed.append(f"other programs ran (load average {first['load_average']:.1f}); what they slow down looks like a difference")


def _against_records(ours: dict[str, Any], other: Other, allowed: float, step: Callable[[int], None], out: _Out) -> None:
    record = _run_worker(ours, step)
    try:
        found, changed = against_records(record, other, allowed)
    except EdgemlError:
        out.keep(record)  # measured is measured
        raise
    where = Path(other.path).name
    out.keep(record | {"arm": "A", "compare": {"how": "records", "with": {"records": where}, **found.as_json()}})
    out.judge(found, record["bundle"], f"in {where}", "earlier record" + "s" * (found.n > 1))
    out.changed += changed


def _share(text: str) -> float:
    if not re.fullmatch(r"\s*[0-9]{1,4}(\.[0-9]{1,6})?\s*%\s*", text):
        raise UsageError(f"--max-slowdown is a percentage such as 5%, not {text!r:.40}")
    return float(text.strip().rstrip("% ")) / 100


def _run_worker(job: dict[str, Any], step: Callable[[int], None]) -> Record:
    """Run one job in a child process and return its record. Raises the child's error."""
    with Worker(job, step) as worker:
        return worker.record()
