"""Where the time of requests goes: stages, sites and experts, page-ins and waits, threads, and what nobody explains.

A `Recorder` is attached to an open session and changes nothing of what it does. It hears from three sides, on one clock
(CLOCK_MONOTONIC): the graphs say when each stage ran, the native side notes what its threads did, and each round is timed here.

onnxruntime's own profiler tells one operator from another, but takes up to half of the time of small graphs itself. So it has rounds
of its own, in a session of its own, from which only shares are taken. It writes microseconds since it began, on a clock that its
versions do not agree about: the offset is measured. Every run of a graph lies inside the stage that we timed, which bounds the offset
from both sides; the middle of the narrowest bounds is taken, and half their width is the uncertainty.
"""

from __future__ import annotations

import json
import resource
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import DeviceError
from edgeml.measure import Counted, spread
from edgeml.native import Context
from edgeml.perfetto import Span
from edgeml.session import Session

__all__ = ["Recorder", "Round", "operators", "phase_figures", "site_figures"]

NOWHERE = 2**32 - 1
#: edgeml_event of native/include/edgeml.h, whose `kind` is a place in EVENT_KINDS.
EVENT_FIELDS = "begin_ns end_ns value thread kind site page sub unused"
EVENT = np.dtype([(name, "u4" if place > 2 else "u8") for place, name in enumerate(EVENT_FIELDS.split())])
EVENT_KINDS = ("", "site", "job", "wait", "lease", "read", "checksum", "hit", "miss", "linear", "rows", "part")
USAGE = {"minor_faults": "ru_minflt", "major_faults": "ru_majflt", "waiting_switches": "ru_nvcsw", "forced_switches": "ru_nivcsw"}


@dataclass
class Round:
    """One request: when, what it cost, and what the system did to the process meanwhile."""

    begin_ns: int
    end_ns: int
    counters: Counted
    usage: dict[str, int]


@dataclass
class Recorder:
    """What was heard of a session between `start` and `stop`. `phases` holds the rounds by phase; `lost` events found no room."""

    session: Session
    phases: dict[str, list[Round]] = field(default_factory=lambda: defaultdict(list))
    stages: list[Span] = field(default_factory=list)
    extra: list[Span] = field(default_factory=list)
    lost: int = 0
    _events: list[NDArray[Any]] = field(default_factory=list)

    # The profiler is the one module that looks inside a session: an interface for it would be there for nobody else.
    def start(self) -> None:
        """Begin to listen. Raises `DeviceError` where the C extension, which notes what threads do, is not in use."""
        if not isinstance(self.session._context, Context):
            raise DeviceError(
                "a profile needs edgeml's C extension, which this installation lacks; install the wheel for this kind of machine"
            )
        self.session._context.note_events()
        self.session._graphs.observe = self._stage

    def stop(self) -> None:
        """Listen no more."""
        self.session._graphs.observe = None
        self.session._context.note_events(0)
        self.drain()

    def drain(self) -> None:
        """Take what the native side has noted, so that there is room for more."""
        events, self.lost = self.session._context.events()
        while events:
            self._events.append(np.frombuffer(events, EVENT))
            events, self.lost = self.session._context.events()

    def rounds(self, phase: str, call: Callable[[int], Counted], count: int, before: Callable[[], None] = lambda: None) -> None:
        """Time `call(i)` `count` times, each after `before()`."""
        for index in range(count):
            before()
            was, begin = _usage(), time.monotonic_ns()
            counters = call(index)
            end, now = time.monotonic_ns(), _usage()
            self.phases[phase].append(Round(begin, end, counters, {name: now[name] - was[name] for name in USAGE}))
            self.drain()

    def submitted(self, submit: Callable[[int, Callable[[Any], None]], Any], count: int) -> None:
        """Submit `count` requests at once and wait: lanes for what the scheduler decided, and for each request from end to end."""
        serving = self.session.serve()
        decide = serving._handle
        ended: dict[int, int] = {}

        def timed(event: Any) -> Any:
            begin = time.monotonic_ns()
            told = decide(event)
            self.extra.append(Span("scheduler", type(event).__name__.lower(), "decide", begin, time.monotonic_ns()))
            return told

        serving._handle = timed  # type: ignore[method-assign]
        try:
            begun = [
                (time.monotonic_ns(), submit(index, lambda ticket: ended.update({ticket.number: time.monotonic_ns()})))
                for index in range(count)
            ]
            for _, ticket in begun:
                ticket.result()
            serving.drain()
        finally:
            serving._handle = decide  # type: ignore[method-assign]
        for begin, ticket in begun:
            self.extra.append(Span("submitted", ticket.task, "request", begin, ended[ticket.number], number=ticket.number))
        self.drain()

    def events(self) -> NDArray[Any]:
        """All native events, in the order in which they ended."""
        return np.concatenate(self._events) if self._events else np.empty(0, EVENT)

    def spans(self) -> list[Span]:
        """Everything as lanes: requests, compute threads, readers, scheduler."""
        events, me = self.events(), threading.get_native_id()
        readers = sorted({int(thread) for thread in events["thread"][events["kind"] == EVENT_KINDS.index("read")]})
        callers = [me, *sorted({span.about["thread"] for span in self.stages} - {me})]
        others = sorted({int(thread) for thread in events["thread"]} - {*readers, *callers})
        lanes = {thread: f"compute {number}" for number, thread in enumerate([*callers, *others])}
        lanes |= {thread: f"reader {number}" for number, thread in enumerate(readers)}
        found = [
            Span("requests", phase, "request", one.begin_ns, one.end_ns, {"round": number})
            for phase, rounds in self.phases.items()
            for number, one in enumerate(rounds)
        ]
        found += [Span(lanes[span.about["thread"]], span.name, "stage", span.begin_ns, span.end_ns) for span in self.stages]
        names = [site.name for site in self.session.manifest.sites]
        for event in events[~np.isin(events["kind"], [EVENT_KINDS.index("hit"), EVENT_KINDS.index("miss")])]:
            kind, site, page = EVENT_KINDS[event["kind"]], int(event["site"]), int(event["page"])
            where = names[site] if site < len(names) else f"page {page}" if page != NOWHERE else ""
            about = {"page": page} if page != NOWHERE else {}
            about |= {"bytes" if kind in ("read", "checksum") else "tokens": int(event["value"])} if event["value"] else {}
            found.append(
                Span(lanes[int(event["thread"])], f"{kind} {where}".strip(), kind, int(event["begin_ns"]), int(event["end_ns"]), about)
            )
        return [*found, *self.extra]

    def _stage(self, name: str, begin_ns: int) -> None:
        about = {"thread": threading.get_native_id()}
        self.stages.append(Span("", name, "stage", begin_ns, time.monotonic_ns(), about))


def phase_figures(recorder: Recorder, phase: str) -> dict[str, Any] | None:
    """What the rounds of a phase took and where; None without rounds. Seconds of the calling thread, except `compute_s` and `read_s`."""
    rounds = recorder.phases.get(phase, [])
    if not rounds:
        return None
    stages = [span for one in rounds for span in recorder.stages if one.begin_ns <= span.begin_ns and span.end_ns <= one.end_ns]
    events = recorder.events()
    of_rounds = np.zeros(len(events), bool)
    prepare = 0
    for one in rounds:
        of_rounds |= (events["begin_ns"] >= one.begin_ns) & (events["end_ns"] <= one.end_ns)
        starts = [span.begin_ns for span in stages if one.begin_ns <= span.begin_ns <= one.end_ns]
        prepare += min(starts, default=one.end_ns) - one.begin_ns
    events = events[of_rounds]
    mine, wall = threading.get_native_id(), sum(one.end_ns - one.begin_ns for one in rounds)
    native = {kind: events[(events["kind"] == EVENT_KINDS.index(kind)) & (events["thread"] == mine)] for kind in EVENT_KINDS[1:]}
    told = []
    for name in dict.fromkeys(span.name for span in stages):
        own = [span for span in stages if span.name == name]
        inside = {kind: sum(_within(native[kind], span) for span in own) / 1e9 for kind in ("site", "linear", "rows", "wait")}
        took = sum(span.end_ns - span.begin_ns for span in own) / 1e9
        operators_s = inside["site"] + inside["linear"] + inside["rows"]
        entry = {"name": name, "calls": len(own), "time_s": took, "experts_s": inside["site"] - inside["wait"], "wait_s": inside["wait"]}
        told.append(entry | {"dense_s": inside["linear"], "rows_s": inside["rows"], "graph_s": took - operators_s})
    in_stages = sum(span.end_ns - span.begin_ns for span in stages)
    counted = ("hits", "misses", "page_in_bytes", "page_wait_s", "tokens")
    return {
        "rounds": len(rounds),
        "latency_s": spread([(one.end_ns - one.begin_ns) / 1e9 for one in rounds]),
        "wall_s": wall / 1e9,
        **{name: sum(getattr(one.counters, name) for one in rounds) for name in counted},
        "prepare_s": prepare / 1e9,
        "between_s": (wall - prepare - in_stages) / 1e9,
        "lease_s": _seconds(native["lease"]),
        **{name: sum(one.usage[name] for one in rounds) for name in USAGE},
        "stages": told,
        "sites": site_figures(events, recorder.session, mine),
    }


def site_figures(events: NDArray[Any], session: Session, mine: int) -> list[dict[str, Any]]:
    """Each site with its experts: calls, seconds, pages found and missed, bytes read and how long that took the readers.

    `expert_calls` counts each expert's tokens. A wait belongs to a site and not to an expert: it ends with whichever page comes first.
    """
    kinds = {kind: events[events["kind"] == number] for number, kind in enumerate(EVENT_KINDS)}
    told = []
    for number, site in enumerate(session.manifest.sites):
        own = {kind: found[found["site"] == number] for kind, found in kinds.items()}
        at = {(int(page), int(sub)): _Spent() for page, sub in [(one.page, one.sub) for one in (*site.experts, *site.shared)]}
        for job in own["job"]:
            spent = at[int(job["page"]), int(job["sub"])]
            spent.pieces, spent.tokens, spent.ns = (
                spent.pieces + 1,
                spent.tokens + int(job["value"]),
                spent.ns + int(job["end_ns"] - job["begin_ns"]),
            )
        count = {kind: Counter(map(int, own[kind]["page"])) for kind in ("hit", "miss")}
        read, read_ns = Counter[int](), Counter[int]()
        for event in own["read"]:
            read[int(event["page"])] += int(event["value"])
            read_ns[int(event["page"])] += int(event["end_ns"] - event["begin_ns"])
        experts = [
            {
                "expert": place if place < len(site.experts) else None,
                "shared": place >= len(site.experts),
                "pieces": at[one.page, one.sub].pieces,
                "tokens": at[one.page, one.sub].tokens,
                "time_s": at[one.page, one.sub].ns / 1e9,
                "hits": count["hit"][one.page],
                "misses": count["miss"][one.page],
                "page_in_bytes": read[one.page],
                "read_s": read_ns[one.page] / 1e9,
            }
            for place, one in enumerate((*site.experts, *site.shared))
        ]
        told.append(
            {
                "name": site.name,
                "calls": len(own["site"]),
                "time_s": _seconds(own["site"]),
                "compute_s": _seconds(own["job"]),
                "wait_s": _seconds(own["wait"][own["wait"]["thread"] == mine]),
                "hits": len(own["hit"]),
                "misses": len(own["miss"]),
                "page_in_bytes": sum(read.values()),
                "read_s": sum(read_ns.values()) / 1e9,
                "expert_calls": [at[one.page, one.sub].tokens for one in site.experts],
                "experts": experts,
            }
        )
    return told


def operators(recorder: Recorder, files: Mapping[str, str], warm_p50_s: float | None) -> dict[str, Any] | None:
    """What onnxruntime's profiler told of the rounds "operators": time by operator, and the share of the rounds outside any.

    `files`: stage -> its profile. Adds the operators to the recorder's spans, on our clock. None where nothing was told.
    """
    rounds = recorder.phases.get("operators", [])
    took: dict[str, list[int]] = defaultdict(list)
    uncertainty = 0.0
    for stage, path in files.items():
        with open(path, encoding="utf-8") as file:
            events = [event for event in json.load(file) if event.get("ph") == "X"]
        ours = [span for span in recorder.stages if span.name == stage]
        runs = [event for event in events if event["name"] == "model_run"][-len(ours) :]
        if not ours or len(runs) < len(ours):
            continue
        pairs = list(zip(ours, runs, strict=True))
        low = max(span.begin_ns - 1000 * (run["ts"] + 1) for span, run in pairs)  # it writes whole microseconds, rounded down
        high = min(span.end_ns - 1000 * (run["ts"] + run["dur"]) for span, run in pairs)
        offset, uncertainty = (low + high) // 2, max(uncertainty, abs(high - low) / 2e9)
        nodes = [event for event in events if event["cat"] == "Node"]
        for span, run in pairs:
            for node in (node for node in nodes if run["ts"] <= node["ts"] <= run["ts"] + run["dur"]):
                name, begin = node["args"]["op_name"], max(1000 * node["ts"] + offset, span.begin_ns)
                end = max(min(begin + 1000 * node["dur"], span.end_ns), begin)
                took[name].append(end - begin)
                recorder.extra.append(Span("onnxruntime", name, "operator", begin, end, {"node": node["name"]}))
    wall = sum(one.end_ns - one.begin_ns for one in rounds)
    if not took or not wall:
        return None
    middle = spread([(one.end_ns - one.begin_ns) / 1e9 for one in rounds])["p50"]
    prepared = (phase_figures(recorder, "operators") or {})["prepare_s"]
    known = sum(map(sum, took.values()))
    by_type = [{"operator": name, "calls": len(each), "time_s": sum(each) / 1e9, "share": sum(each) / wall} for name, each in took.items()]
    return {
        "rounds": len(rounds),
        "slowdown": None if not warm_p50_s else middle / warm_p50_s,
        "clock_uncertainty_s": uncertainty,
        "by_type": sorted(by_type, key=lambda entry: -float(str(entry["time_s"]))),
        "prepare_share": prepared * 1e9 / wall,
        "unexplained_share": 1 - known / wall - prepared * 1e9 / wall,
    }


@dataclass
class _Spent:
    pieces: int = 0
    tokens: int = 0
    ns: int = 0


def _within(events: NDArray[Any], span: Span) -> int:
    inside = events[(events["begin_ns"] >= span.begin_ns) & (events["end_ns"] <= span.end_ns)]
    return int((inside["end_ns"] - inside["begin_ns"]).sum())


def _seconds(events: Sequence[Any] | NDArray[Any]) -> float:
    found = np.asarray(events)
    return float((found["end_ns"] - found["begin_ns"]).sum()) / 1e9


def _usage() -> dict[str, int]:
    now = resource.getrusage(resource.RUSAGE_SELF)
    return {name: int(getattr(now, key)) for name, key in USAGE.items()}
