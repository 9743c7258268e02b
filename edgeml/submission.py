"""Submitted requests as the scheduler takes them: cut into steps, each a batch as `Session.run` would cut it; steps of several requests of
one task are computed together where they fit.
"""

from __future__ import annotations

import math
import time
import zlib
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from edgeml.batching import BATCH_ROWS, BATCH_TOKENS, batches, joined
from edgeml.manifest import ImageStages, Manifest, Task
from edgeml.preprocess import TextBatch
from edgeml.residency import Residents
from edgeml.result import Counters, Result
from edgeml.router import ResidentSet, checked_bias, resident_set
from edgeml.scheduler_events import Step, WorkingSet
from edgeml.store import Budget

__all__ = ["ImageWork", "SessionEngine", "TextWork", "text_work", "working_set"]

BIASED = 1 << 32  # in `WorkingSet.mask`, above the checksum of a mask

Floats = NDArray[np.float32]
Batches = Iterable[tuple[NDArray[np.intp], TextBatch]]


class TextWork:
    """Texts of one task: `batches` with the rows each came from, of `truncated` rows in all. `resident`: a set other than the task's.

    `leases`: the sets it may be run with, by the domain they stand in from, "" for its own.
    """

    def __init__(self, task: Task, batches: Batches, truncated: Sequence[bool], resident: ResidentSet | None) -> None:
        self.task = task
        self.leases: dict[str, ResidentSet] = {} if resident is None else {"": resident}
        self.until: float | None = None
        self.passed = False  # others that could not wait were run before it
        self._left = deque(batches)
        self._parts: list[tuple[NDArray[np.intp], Floats]] = []
        self._result = Result(task.name, truncated=list(truncated), row_s=[0.0] * len(truncated))

    @property
    def batch(self) -> TextBatch | None:
        """The step that comes next."""
        return self._left[0][1] if self._left else None

    @property
    def biased(self) -> bool:
        """Whether a router was asked before."""
        return self.batch is not None and self.batch.bias is not None

    def step(self) -> Step | None:
        return Step(*self._left[0][1].ids.shape) if self._left else None

    def take(self, answers: Floats, counters: Counters, row_s: float) -> int:
        """Take the answers to the step that came next, the first of these, and what its batch cost; returns how many."""
        rows, batch = self._left.popleft()
        self._parts.append((rows, answers[: len(rows)]))
        own = self._result.counters
        own.hits, own.misses = own.hits + counters.hits, own.misses + counters.misses
        own.page_in_bytes, own.page_wait_s = own.page_in_bytes + counters.page_in_bytes, own.page_wait_s + counters.page_wait_s
        own.tokens += int(batch.mask.sum())
        own.masked_tokens += int(batch.mask.sum()) if counters.masked_tokens else 0
        own.stand_in = counters.stand_in or own.stand_in
        for row in rows:
            self._result.row_s[row] = row_s
        return len(rows)

    def result(self) -> Result:
        values = np.zeros((0, len(self.task.labels)), np.float32)
        if self._parts:
            values = np.empty((len(self._result.row_s), *self._parts[0][1].shape[1:]), np.float32)
        for rows, answers in self._parts:
            values[rows] = answers
        self._result.fill(self.task, values)
        return self._result


class ImageWork:
    """Images of one task: one step, which nothing fits beside; `run` cuts it itself."""

    def __init__(self, task: Task, run: Callable[[], Result]) -> None:
        self.task, self._run = task, run
        self.until: float | None = None
        self._result: Result | None = None

    def step(self) -> Step | None:
        return Step(BATCH_ROWS, BATCH_TOKENS) if self._result is None else None

    def run(self) -> None:
        """Compute it."""
        self._result = self._run()

    def result(self) -> Result:
        assert self._result is not None
        return self._result


def text_work(
    task: Task, windows: Iterable[TextBatch], resident: ResidentSet | None, manifest: Manifest, bias: Floats | None = None
) -> TextWork:
    """The texts of these windows, one after the other, cut into batches. Raises `BundleError` for a `bias` that is no router's."""
    cut: list[tuple[NDArray[np.intp], TextBatch]] = []
    truncated: list[bool] = []
    for window in windows:
        cut += [(rows + len(truncated), batch) for rows, batch in batches(window)]
        truncated += window.truncated
    if bias is not None:
        given = checked_bias(manifest, bias, len(truncated), f"the router before task '{task.name}'")
        cut = [(rows, replace(batch, bias=given[rows])) for rows, batch in cut]
    return TextWork(task, cut, truncated, resident)


def working_set(manifest: Manifest, task: Task, budget: Budget, leased: ResidentSet | None) -> WorkingSet:
    """The pages that a request of this task needs: the set it leases; or, where nothing is masked, those it will use most."""
    if leased is not None:
        return WorkingSet(task.name, frozenset(leased.pages), leased=True)
    if isinstance(task.stages, ImageStages) or budget.complete or task.name not in manifest.usage:
        return WorkingSet(task.name)
    return WorkingSet(task.name, frozenset(resident_set(manifest, manifest.usage[task.name], budget.pages).pages))


class SessionEngine:
    """What `serving.Serving` needs, out of a session's methods.

    `working_set` gives a task's; `residents` the sets that are leased, those that may stand in for them, and that of a batch which has
    so many seconds left, or none (`residency`); `run_batch` answers a batch of a task.
    """

    def __init__(
        self,
        working_set: Callable[[Task], WorkingSet],
        residents: Residents,
        run_batch: Callable[[Task, TextBatch, ResidentSet | None, Counters, Callable[[], None]], Floats],
        advise: Callable[[Sequence[int], int, bool], None],
    ) -> None:
        self._working_set, self._residents = working_set, residents
        self._run_batch, self._advise = run_batch, advise

    def route(self, work: TextWork | ImageWork) -> tuple[WorkingSet, ...]:
        """The working set of the task, or the one the request came with, and for a request with a deadline what may stand in for it.

        Requests with a bias share no batch with those without.
        """
        if isinstance(work, ImageWork):
            return (self._working_set(work.task),)
        mask, name = BIASED if work.biased else 0, work.task.name
        if not work.leases:
            found = self._working_set(work.task)
            if not found.leased:
                return (replace(found, mask=mask) if mask else found,)
            work.leases[""] = self._residents.resident_set(name)  # kept: the task's own may have changed when it runs
            if work.until is not None:
                work.leases |= {each.stand_in: each for each in self._residents.stand_ins(name)}
        return tuple(
            WorkingSet(name, frozenset(each.pages), True, mask + zlib.crc32(np.ascontiguousarray(each.mask).tobytes()), each.stand_in)
            for each in work.leases.values()
        )

    def compute(self, works: Sequence[TextWork | ImageWork], used: WorkingSet, paged: Callable[[], None]) -> None:
        """A step of each; answers are kept once all of them are there.

        Under hybrid residency only those that cannot wait take one, so that they are not late and the others not masked for their sake;
        the others keep theirs for a later batch, once. Passed over before, they are run in this batch too.
        """
        first = works[0]
        if isinstance(first, ImageWork):
            paged()
            first.run()
            return
        texts = [work for work in works if isinstance(work, TextWork) and work.batch is not None]
        if not texts:  # no texts at all: no answers
            paged()
            return
        parts = [(texts[0].leases[used.stand_in], texts)] if used.leased else self._in_time(first.task, texts)
        if len(parts) > 1 and not any(work.passed for work in parts[1][1]):
            for work in parts[1][1]:
                work.passed = True
            parts = parts[:1]
        found: list[tuple[list[TextWork], Floats, Counters, float]] = []
        for resident, part in parts:
            counters, started = Counters(), time.perf_counter()
            answers = self._run_batch(first.task, _together(part), resident, counters, (lambda: None) if found else paged)
            found.append((part, answers, counters, (time.perf_counter() - started) / len(answers)))
        for part, answers, counters, row_s in found:
            start = 0
            for work in part:
                start += work.take(answers[start:], counters, row_s)

    def _in_time(self, task: Task, works: list[TextWork]) -> list[tuple[ResidentSet | None, list[TextWork]]]:
        """Under hybrid residency: the requests that would be late unmasked, with the set that is in time for the most pressed of them;
        and those that can wait.
        """
        batch, now = _together(works), time.monotonic()

        @cache
        def masks(until: float | None) -> ResidentSet | None:
            return None if until is None else self._residents.pick(task.name, None, max(until - now, 1e-6))(batch)

        order = sorted(works, key=lambda work: math.inf if work.until is None else work.until)
        resident = masks(order[0].until)
        pressed = 0 if resident is None else bisect_left(order, True, key=lambda work: masks(work.until) is None)
        return [part for part in ((resident, order[:pressed]), (None, order[pressed:])) if part[1]]

    def advise(self, pages: Sequence[int], priority: int, load: bool) -> None:
        """A hint to the pager."""
        self._advise(pages, priority, load)


def _together(works: Sequence[TextWork]) -> TextBatch:
    """The steps of these that come next, as one batch."""
    return joined([work.batch for work in works if work.batch is not None])
