"""`edgeml profile`: where the time of requests goes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from edgeml.commands._bench_job import DEFAULT_ROUNDS, DEFAULT_TOKENS, job_of, job_options
from edgeml.commands._options import (
    Number,
    bundle_argument,
    json_option,
    notes,
    printable,
    progress,
    quiet_option,
    records_option,
    variant_options,
)
from edgeml.commands.bench_worker import calls
from edgeml.energy import Monitor
from edgeml.errors import DataError
from edgeml.measure import Counted
from edgeml.perfetto import Span, lane_times, write_trace
from edgeml.profile import Recorder, operators, phase_figures
from edgeml.records import append, complete
from edgeml.session import RESIDENCIES
from edgeml.session import open as open_session

WARMUP, OPERATOR_ROUNDS, BURST = 3, 10, 12
MOST_PAGE_INS = 2000


@click.command("profile")
@bundle_argument
@job_options
@variant_options
@click.option("--iterations", type=click.IntRange(1), default=DEFAULT_ROUNDS, show_default=True, help="Warm rounds, one input each.")
@click.option("--cold", type=click.IntRange(0), default=3, show_default=True, help="Rounds that begin without any expert in memory.")
@click.option(
    "--operators/--no-operators", default=True, show_default=True, help="Also rounds under onnxruntime's own profiler, which is slow."
)
@click.option("--idle", type=Number(0), default=2, show_default=True, help="Seconds at rest before, as the baseline of energy.")
@click.option("--threads", type=int, help="Threads to compute with (default: EDGEML_THREADS, or all processors).")
@click.option("--memory", help="Memory for weights: 64MiB, 50%, auto.")
@click.option("--residency", default="exact", show_default=True, type=click.Choice(RESIDENCIES))
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE.json", help="Write a timeline that ui.perfetto.dev opens.")
@records_option
@quiet_option
@json_option
def command(
    bundle: str,
    trace: Path | None,
    records_file: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Where the time of a request goes: stages, sites and experts, page-ins and waits, cold and warm; and what nobody explains.

    Energy, frequency and throttling are told where this machine tells them. A run in which the processor slowed itself down is
    marked as not valid.

    Example: edgeml profile model.edgeml --task mood --memory 50% --trace timeline.json
    """
    if trace is not None and not trace.absolute().parent.is_dir():
        raise DataError(f"{trace}: there is no folder {trace.parent} to write the trace into; make it first")
    one = {key: options[key] for key in ("memory", "threads", "residency", "variant")}
    job = job_of(bundle, {**options, "workload": None, "warmup": WARMUP}, [one])
    limits = one | job["limits"]
    rounds = job["cold"] + WARMUP + job["iterations"] + (OPERATOR_ROUNDS + WARMUP if options["operators"] else 0)
    with progress(rounds, "profiling", quiet) as tick, open_session(bundle, **limits) as session:
        notes(session.notes, quiet)
        recorder, settings = Recorder(session), session.settings()
        monitor = Monitor(options["idle"])
        with monitor:
            _record(recorder, job, trace is not None, tick)
        warm = phase_figures(recorder, "warm")
        assert warm is not None
        document: dict[str, Any] = {
            "task": job["task"],
            "input_files": job["input_files"],
            "workload": {key: value for key, value in job["workload"].items() if key not in ("texts", "paths")},
            "cold": phase_figures(recorder, "cold"),
            "warm": warm,
        }
        told, more = _operators(bundle, limits, job, warm, tick) if options["operators"] else (None, [])
        spans = recorder.spans() + more
    document["operators"] = told
    document |= {"lanes": lane_times(spans), "lost_events": recorder.lost, **_machine(monitor), **_for_reports(document, spans)}
    click.echo(json.dumps(document, allow_nan=False) if as_json else "\n".join(_table(document)))
    if records_file is not None:
        append(records_file, complete("profile", settings, profile=document))
    if trace is not None:
        write_trace(trace, spans, {key: settings[key] for key in ("bundle", "bundle_id", "tool_version")})


def _record(recorder: Recorder, job: dict[str, Any], burst: bool, tick: Callable[[int], None]) -> None:
    session = recorder.session
    call = _ticking(calls(session, job["task"], job["workload"]), tick)
    for name in job["task"].split(","):
        session.load(name)
    recorder.start()
    try:
        recorder.rounds("cold", call, job["cold"], session.evict_all)
        recorder.rounds("warm-up", call, WARMUP)
        recorder.rounds("warm", call, job["iterations"])
        if burst and "image" not in job["workload"]["kind"]:
            vocabulary = session.preprocessor(session.task(job["task"])).vocabulary
            ids = np.random.default_rng(1).integers(0, vocabulary, (BURST, 1, DEFAULT_TOKENS // 2))
            recorder.submitted(lambda index, end: session.submit(job["task"], arrays={"ids": ids[index]}, on_end=end), BURST)
    finally:
        recorder.stop()


def _ticking(call: Callable[[int], Counted], tick: Callable[[int], None]) -> Callable[[int], Counted]:
    def ticked(index: int) -> Counted:
        counters = call(index)
        tick(1)
        return counters

    return ticked


def _operators(
    bundle: str, limits: dict[str, Any], job: dict[str, Any], warm: dict[str, Any], tick: Callable[[int], None]
) -> tuple[dict[str, Any] | None, list[Span]]:
    """The same requests in another session, whose graphs onnxruntime profiles."""
    with tempfile.TemporaryDirectory(prefix="edgeml-profile-") as folder, open_session(bundle, **limits) as session:
        session._graphs.profile_folder = folder
        other = Recorder(session)
        call = _ticking(calls(session, job["task"], job["workload"]), tick)
        other.rounds("warm-up", call, WARMUP)
        other.start()
        try:
            other.rounds("operators", call, OPERATOR_ROUNDS)
        finally:
            other.stop()
        told = operators(other, session._graphs.end_profiles(), warm["latency_s"]["p50"])
        return told, other.spans()


def _machine(monitor: Monitor) -> dict[str, Any]:
    throttled = monitor.throttled()
    why = "the processor slowed itself down meanwhile (throttling or under-voltage): cool it or mind its supply, and measure again"
    told = {"energy": monitor.energy(), "frequency_hz": monitor.frequency_hz(), "throttled": throttled}
    return told | {"valid": not throttled, "invalid_reason": why if throttled else None}


def _for_reports(document: dict[str, Any], spans: list[Span]) -> dict[str, Any]:
    """Page-ins on one clock, and how many tokens each expert had in all: what `edgeml report` draws."""
    first = min((span.begin_ns for span in spans), default=0)
    reads = [
        {"start_s": (span.begin_ns - first) / 1e9, "end_s": (span.end_ns - first) / 1e9, "bytes": span.about["bytes"]}
        for span in spans
        if span.kind == "read"
    ]
    sites: dict[str, list[int]] = {}
    for phase in ("cold", "warm"):
        for site in (document[phase] or {"sites": []})["sites"]:
            before = sites.get(site["name"], [0] * len(site["expert_calls"]))
            sites[site["name"]] = [one + two for one, two in zip(before, site["expert_calls"], strict=True)]
    return {"page_ins": reads[:MOST_PAGE_INS], "sites": [{"name": name, "expert_calls": counts} for name, counts in sites.items()]}


def _table(document: dict[str, Any]) -> Iterator[str]:
    yield f"task {printable(document['task'])}"
    for name in ("cold", "warm"):
        if document[name] is not None:
            yield ""
            yield from _phase(name, document[name])
    yield ""
    yield from _system(document)


def _phase(name: str, told: dict[str, Any]) -> Iterator[str]:
    rounds, wall = told["rounds"], told["wall_s"]
    yield f"{name}: {rounds} rounds, {1e3 * wall / rounds:.2f} ms each; {told['hits']} hits, {told['misses']} misses, " + (
        f"{told['page_in_bytes'] / (1 << 20):.1f} MiB read, {1e3 * told['page_wait_s'] / rounds:.2f} ms waited a round"
    )
    rows = [("prepare (tokens, set)", told["prepare_s"])]
    rows += [("- waiting for its set", told["lease_s"])] if told["lease_s"] else []
    inner = {
        "graph": "graph_s",
        "experts": "experts_s",
        "waiting for pages": "wait_s",
        "dense layers": "dense_s",
        "embedding rows": "rows_s",
    }
    for stage in told["stages"]:
        rows.append((f"stage {printable(stage['name'])}", stage["time_s"]))
        rows += [(f"- {label}", stage[key]) for label, key in inner.items() if stage[key] > 0]
    rows.append(("between stages", told["between_s"]))
    width = max(len(label) for label, _ in rows)
    yield f"{'part':<{width}}  {'ms':>8}  {'share':>6}"
    for label, seconds in rows:
        yield f"{label:<{width}}  {1e3 * seconds / rounds:>8.3f}  {seconds / wall:>6.1%}"
    faults = f"{told['minor_faults']} page faults in memory, {told['major_faults']} from disk"
    yield f"meanwhile: {faults}; switches of threads: {told['waiting_switches']} to wait, {told['forced_switches']} forced"
    if told["sites"]:
        yield ""
        yield from _sites(told)


def _sites(told: dict[str, Any]) -> Iterator[str]:
    rounds = told["rounds"]
    width = max(4, *(len(printable(site["name"])) for site in told["sites"]))
    yield f"{'site':<{width}}  {'calls':>6}  {'ms':>8}  {'compute ms':>10}  {'wait ms':>8}  {'hits':>6}  {'misses':>6}  {'read KiB':>9}"
    for site in told["sites"]:
        times = f"{1e3 * site['time_s'] / rounds:>8.3f}  {1e3 * site['compute_s'] / rounds:>10.3f}  {1e3 * site['wait_s'] / rounds:>8.3f}"
        pages = f"{site['hits']:>6}  {site['misses']:>6}  {site['page_in_bytes'] / 1024:>9.0f}"
        yield f"{printable(site['name']):<{width}}  {site['calls']:>6}  {times}  {pages}"
    found = [(site["name"], one) for site in told["sites"] for one in site["experts"] if one["pieces"]]
    found.sort(key=lambda pair: -pair[1]["time_s"])
    yield ""
    yield f"{'expert':<{width + 7}}  {'tokens':>6}  {'ms':>8}  {'hits':>6}  {'misses':>6}  {'read KiB':>9}"
    for name, one in found[:8]:
        label = f"{printable(name)} " + ("shared" if one["shared"] else f"{one['expert']}")
        pages = f"{one['hits']:>6}  {one['misses']:>6}  {one['page_in_bytes'] / 1024:>9.0f}"
        yield f"{label:<{width + 7}}  {one['tokens']:>6}  {1e3 * one['time_s'] / rounds:>8.3f}  {pages}"


def _system(document: dict[str, Any]) -> Iterator[str]:
    told = document["operators"]
    if told is not None:
        yield f"{'operator of onnxruntime':<24}  {'calls':>6}  {'share':>6}"
        for entry in told["by_type"][:8]:
            yield f"{printable(entry['operator']):<24}  {entry['calls']:>6}  {entry['share']:>6.1%}"
        slower = "" if told["slowdown"] is None else f", at {told['slowdown']:.2f} times the time"
        yield f"nobody explains {told['unexplained_share']:.1%}: in no operator, and not preparing"
        clock = f"its clock known to {1e6 * told['clock_uncertainty_s']:.0f} us"
        yield f"({told['rounds']} rounds under onnxruntime's profiler{slower}, {clock})"
        yield ""
    width = max(4, *(len(lane["name"]) for lane in document["lanes"]))
    yield f"{'lane':<{width}}  {'busy':>6}  {'wait':>6}  {'idle':>6}"
    for lane in document["lanes"]:
        yield f"{lane['name']:<{width}}  " + "  ".join(f"{lane[key] / lane['wall_s']:>6.1%}" for key in ("busy_s", "wait_s", "idle_s"))
    energy, clock = document["energy"], document["frequency_hz"]
    yield ""
    above = "" if not energy or energy["above_idle_j"] is None else f", {energy['above_idle_j']:.3g} J of it above idle"
    yield "energy: no probe on this machine" if not energy else f"energy: {energy['energy_j']:.3g} J by {energy['probe']}{above}"
    yield "clock: not told" if clock is None else f"clock: {clock['min'] / 1e9:.2f} to {clock['max'] / 1e9:.2f} GHz"
    yield {None: "throttling: not told", False: "throttling: none"}.get(document["throttled"], f"NOT VALID: {document['invalid_reason']}")
    if document["lost_events"]:
        yield f"{document['lost_events']} events found no room and are missing above"
