"""A timeline as lanes of spans: what each lane did with its time, and the file that Perfetto and Chrome's tracing page open.

A lane is a thread, or a row of requests. Its spans lie one after the other or one inside the other. The file has the Trace Event
Format: an object with `traceEvents`, each span an event of phase "X" with `ts` and `dur` in microseconds from the first, names of
lanes as metadata, and "b"/"e" for requests that overlap.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeml.errors import DeviceError

__all__ = ["Span", "lane_times", "own_times", "write_trace"]

WAITS = ("wait", "lease")


@dataclass(frozen=True)
class Span:
    """Something that took time on a lane, in nanoseconds of CLOCK_MONOTONIC. `number`: of a request that may overlap others."""

    lane: str
    name: str
    kind: str
    begin_ns: int
    end_ns: int
    about: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None


def own_times(spans: Iterable[Span]) -> Iterator[tuple[Span, int, bool]]:
    """Of the spans of one lane: each with its time less that of the spans directly inside it, and whether it is inside none."""
    open_spans: list[tuple[Span, int, bool]] = []
    for span in sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)):
        while open_spans and open_spans[-1][0].end_ns <= span.begin_ns:
            yield open_spans.pop()
        if open_spans:
            outer, own, top = open_spans[-1]
            open_spans[-1] = (outer, own - (span.end_ns - span.begin_ns), top)
        open_spans.append((span, span.end_ns - span.begin_ns, not open_spans))
    yield from reversed(open_spans)


def lane_times(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """What each lane did between the first and the last moment of all: seconds busy, waiting and idle, which add up to the wall's.

    Idle is measured, as the gaps between a lane's spans, so that spans which overlap would show as a sum that is too large.
    """
    drawn = [span for span in spans if span.number is None]
    if not drawn:
        return []
    first, last = min(span.begin_ns for span in drawn), max(span.end_ns for span in drawn)
    told = []
    for lane in sorted({span.lane for span in drawn}):
        busy = waited = gaps = 0
        reached = first
        for span, own, _ in own_times(span for span in drawn if span.lane == lane):
            busy, waited = (busy, waited + own) if span.kind in WAITS else (busy + own, waited)
        for span in sorted((span for span in drawn if span.lane == lane), key=lambda span: span.begin_ns):
            gaps += max(span.begin_ns - reached, 0)
            reached = max(reached, span.end_ns)
        gaps += last - reached
        parts = {"busy_s": busy / 1e9, "wait_s": waited / 1e9, "idle_s": gaps / 1e9, "wall_s": (last - first) / 1e9}
        told.append({"name": lane, **parts})
    return told


def write_trace(path: str | os.PathLike[str], spans: Sequence[Span], about: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all. Raises `DeviceError` when that cannot be done."""
    first = min((span.begin_ns for span in spans), default=0)
    lanes = {lane: number for number, lane in enumerate(sorted({span.lane for span in spans}), 1)}
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "edgeml"}}]
    for lane, number in lanes.items():
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane}})
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": number, "args": {"sort_index": number}})
    for span in sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)):
        event = {"name": span.name, "cat": span.kind, "pid": 1, "tid": lanes[span.lane], "ts": (span.begin_ns - first) / 1e3}
        if span.number is None:
            events.append({**event, "ph": "X", "dur": (span.end_ns - span.begin_ns) / 1e3, "args": dict(span.about)})
        else:
            events.append({**event, "ph": "b", "id": span.number, "args": dict(span.about)})
            events.append({**event, "ph": "e", "id": span.number, "ts": (span.end_ns - first) / 1e3})
    partial = f"{os.fspath(path)}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(about)}, file, allow_nan=False)
        os.replace(partial, path)
    except OSError as error:
        if os.path.exists(partial):
            os.unlink(partial)
        raise DeviceError(f"{path}: the trace cannot be written ({error.strerror}); name another --trace file") from None
