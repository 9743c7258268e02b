"""The part of `edgeml bench` that plays a workload, in the worker's process: requests that overlap, through `Session.submit`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgeml.errors import EdgemlError, NotAnswered, UsageError
from edgeml.manifest import ImagePreprocess
from edgeml.measure import Timing, spread
from edgeml.scheduler_events import State
from edgeml.serving import Ticket
from edgeml.session import Session
from edgeml.workload import Kind, Request, Workload, drive

__all__ = ["Mix"]


class Mix:
    """A workload on an open session, whose tasks it loads. `rows`: the texts, or texts and second texts, of entries that have a file."""

    def __init__(self, session: Session, workload: Workload, rows: Mapping[str, Sequence[Any]]) -> None:
        self._session, self._workload, self._rows = session, workload, rows
        self._counts = dict.fromkeys(("requests", "answered", "refused", "late"), 0)
        self._seconds = self._planned_s = self._late_s = 0.0
        self._by_task: dict[str, list[float]] = {kind.task: [] for kind in workload.mix}
        #: Answers of another domain's set, of tasks for which one could stand in.
        self._stood_in: dict[str, int] = {}
        for kind in workload.mix:
            session.load(kind.task)
            if kind.deadline_s is not None and session.residency != "exact" and session.residents.stand_ins(kind.task):
                self._stood_in[kind.task] = 0

    def play(self, number: int, count: int, timing: Timing) -> list[float]:
        """Part `number` of the workload, `count` requests, counted as warm; returns the latencies of those that were answered.

        Raises what a request met, unless it was refused or too late, and `UsageError` where none was answered.
        """
        requests = self._workload.part(number, count)
        kinds = [self._workload.mix[request.kind] for request in requests]
        inputs = [self._inputs(kind, request) for kind, request in zip(kinds, requests, strict=True)]
        before, faults, ended_as = self._session.stats(), list[EdgemlError](), list[str]()

        def submit(index: int, meant: float, ended: Callable[[bool], None]) -> None:
            kind, left = kinds[index], None
            if kind.deadline_s is not None and (left := kind.deadline_s - (time.perf_counter() - meant)) <= 0:
                ended_as.append("late")
                ended(False)
                return

            def on_end(ticket: Ticket) -> None:
                ended(_outcome(ticket, timing, ended_as, faults, self._stood_in) == "answered")

            self._session.submit(kind.task, **inputs[index], deadline=left, priority=kind.priority, on_end=on_end)

        done = drive(requests, submit, self._workload.concurrency)
        if faults:
            raise faults[0]
        answered = [seconds for seconds in done.latency_s if seconds is not None]
        if count and not answered:
            raise UsageError(f"{self._workload.name}: none of {count} requests was answered; give them a later deadline, or a lower rate")
        for kind, seconds in zip(kinds, done.latency_s, strict=True):
            self._by_task[kind.task] += [] if seconds is None else [seconds]
        self._seconds, self._late_s = self._seconds + done.seconds, max(self._late_s, done.late_s)
        self._planned_s += requests[-1].at_s or 0.0 if requests else 0.0
        for outcome in ("requests", *ended_as):
            self._counts[outcome] += count if outcome == "requests" else 1
        after, warm = self._session.stats(), timing.warm
        warm.latency_s += answered
        warm.hits += after["hits"] - before["hits"]
        warm.misses += after["misses"] - before["misses"]
        warm.page_in_bytes += after["page_in_bytes"] - before["page_in_bytes"]
        warm.page_wait_s += (after["page_wait_ns"] - before["page_wait_ns"]) / 1e9
        return answered

    def figures(self, tokens: int) -> dict[str, Any]:
        """What a record says of everything played, in which so many tokens were answered."""
        requests, by_clock = self._counts["requests"], self._workload.concurrency is None
        mix = {
            **self._counts,
            "seconds": self._seconds,
            "answered_per_s": self._counts["answered"] / self._seconds if self._seconds else None,
            "offered_per_s": requests / self._planned_s if by_clock and self._planned_s else None,
            "submitted_late_s": self._late_s if by_clock else None,
            "by_task": {
                task: {
                    "answered": len(found),
                    "latency_s": spread(found) if found else None,
                    "stand_in_share": self._stood_in[task] / len(found) if found and task in self._stood_in else None,
                }
                for task, found in self._by_task.items()
            },
        }
        share = sum(self._stood_in.values()) / self._counts["answered"] if self._stood_in and self._counts["answered"] else None
        told = {"mix": mix, "stand_in_share": share, "tokens_per_s": tokens / self._seconds if tokens and self._seconds else None}
        return told | ({"expected_retention": None} if share else {})  # the evidence is of tasks' own sets

    def notes(self) -> list[str]:
        """What a user should know of the figures."""
        lost = self._counts["refused"] + self._counts["late"]
        found = [f"{lost} of {self._counts['requests']} requests were refused or too late; the latencies are of the others"] if lost else []
        if self._planned_s and self._seconds > 1.25 * self._planned_s + 0.5:
            found.append("requests came faster than they were answered: latencies grow with the length of the run; take a lower rate")
        return found

    def _inputs(self, kind: Kind, request: Request) -> dict[str, Any]:
        task = self._session.task(kind.task)
        rng = np.random.default_rng(request.seed)
        if isinstance(task.preprocess, ImagePreprocess):
            size = task.preprocess
            if kind.images:
                return {"images": [str(kind.images[place]) for place in rng.integers(0, len(kind.images), kind.rows)]}
            return {"images": list(rng.integers(0, 256, (kind.rows, size.height, size.width, size.channels), np.uint8))}
        if kind.input is not None:
            rows = self._rows[str(kind.input)]
            drawn = [rows[place] for place in rng.integers(0, len(rows), kind.rows)]
            return {"pairs": [tuple(row) for row in drawn]} if task.pair else {"texts": [row[0] for row in drawn]}
        lengths = np.array(request.tokens)
        ids = rng.integers(0, self._session.preprocessor(task).vocabulary, (len(lengths), lengths.max()))
        return {"arrays": {"ids": ids, "mask": (np.arange(lengths.max()) < lengths[:, None]).astype(np.float32)}}


def _outcome(ticket: Ticket, timing: Timing, ended_as: list[str], faults: list[EdgemlError], stood_in: dict[str, int]) -> str:
    """Count how a request ended; called by the thread that ended it."""
    try:
        counters = ticket.result(0).counters
    except NotAnswered:
        outcome = "refused" if ticket.state == State.REFUSED else "late"
    except EdgemlError as error:
        faults.append(error)
        return "failed"
    else:
        timing.warm.tokens += counters.tokens
        timing.warm.masked_tokens += counters.masked_tokens
        if counters.stand_in:
            stood_in[ticket.task] = stood_in.get(ticket.task, 0) + 1
        outcome = "answered"
    ended_as.append(outcome)
    return outcome
