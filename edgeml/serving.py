"""Answers requests of many callers with one session: the shell around the table in `scheduler`, and the only place with its threads.

Ownership.
    The table, the tickets that have not ended and the batches not yet begun belong to `_lock`. While it is held nothing waits: nothing
    is read, computed or called back. Advice to the pager is passed on under it, so that it arrives in the table's order.
    A `Work` belongs to its submitter until `submit` returns, then to whoever runs its batch: one worker at a time, since the table never
    has a request in two batches. A ticket that has ended is nobody's; its work is let go.
    Workers, one a lane, only run batches; a watcher, begun with the first deadline, only tells the table that one has come. The thread
    that told the table an event carries out what follows from it: it finds routes, and calls back the callers of tickets that ended,
    after the lock is released. So a callback may submit, but should be short.

What is computed, and how, is the `Engine`'s business.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from edgeml.errors import EdgemlError, NotAnswered, UsageError
from edgeml.result import Result
from edgeml.scheduler import Scheduler
from edgeml.scheduler_events import (
    Advise,
    Broken,
    Cancelled,
    Dropped,
    End,
    Event,
    Instruction,
    Limits,
    Page,
    Paged,
    Route,
    Routed,
    Run,
    State,
    Step,
    Stepped,
    Submitted,
    Ticked,
    WorkingSet,
)

__all__ = ["Engine", "Serving", "Ticket", "Work"]

#: A deadline farther away than this, in seconds, is a mistake.
LONGEST = 1e9


class Work(Protocol):
    """The inputs of a request, and the answers it has so far. `until`: its deadline on `time.monotonic`, set when it is submitted."""

    until: float | None

    def step(self) -> Step | None:
        """What it computes next; None when it has all its answers."""

    def result(self) -> Result:
        """All answers."""


class Engine(Protocol):
    """What serving needs of a session. Its methods may be called from several threads."""

    def route(self, work: Any) -> tuple[WorkingSet, ...]:
        """The pages a request needs, then sets that may stand in for them, the best first. Raises what `Ticket.result` will raise."""

    def compute(self, works: Sequence[Any], used: WorkingSet, paged: Callable[[], None]) -> None:
        """A step of each with this working set; calls `paged` once its pages are there, and does not go on if that raises."""

    def advise(self, pages: Sequence[int], priority: int, load: bool) -> None:
        """A hint to the pager; never waits."""


class Ticket:
    """A submitted request. `number` counts the session's tickets from 0."""

    def __init__(self, serving: Serving, number: int, task: str, on_end: Callable[[Ticket], None] | None) -> None:
        self.number, self.task = number, task
        self._serving, self._on_end = serving, on_end
        self._ended = threading.Event()
        self.ending: State | None = None  # set by `Serving` as soon as the table has ended it
        self._result: Result | None = None
        self._error: EdgemlError | None = None

    @property
    def state(self) -> State:
        """queued, routed, paging, running, done, failed or refused."""
        return self._serving.state(self)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the answers, at most `timeout` seconds: then `TimeoutError`, and the request goes on.

        Raises `NotAnswered` for a request that was refused, cancelled or too late, otherwise what `Session.run` would have raised.
        The counters of a request that shared a batch are those of the batch; its tokens are its own.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"request {self.number} is still {self.state}")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Give the request up; nothing happens if it has ended. What runs already is not interrupted, but its answer is thrown away."""
        self._serving.cancel(self.number)

    def end(self, result: Result | None, error: EdgemlError | None) -> None:
        """For `Serving` only: the ticket has ended so."""
        self._result, self._error = result, error
        self._ended.set()
        if self._on_end is None:
            return
        try:
            self._on_end(self)
        except BaseException as fault:  # it must not end the thread, which others wait for
            with suppress(Warning):  # nor must a warning, where warnings are errors
                warnings.warn(f"on_end of request {self.number} raised {type(fault).__name__}: {fault}", stacklevel=2)


class _GivenUpError(Exception):
    """Nobody is left who wants the batch's answers."""


class Serving:
    """Takes requests from any thread, runs them in the scheduler's order. `close` it."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._table = engine, Scheduler(limits)
        self._lock = threading.Lock()
        self._changed, self._due = threading.Condition(self._lock), threading.Condition(self._lock)
        self._tickets: dict[int, tuple[Ticket, Any, float]] = {}  # with its work and when it came
        self._begun: deque[tuple[Page, list[Any]]] = deque()
        self._faults: dict[int, EdgemlError] = {}  # what requests met that are about to fail
        self._count, self._closed = 0, False
        self._table_s = self._busy_s = 0.0
        self._workers = [threading.Thread(target=self._serve, name=f"edgeml-{lane}", daemon=True) for lane in range(limits.lanes)]
        self._watcher: threading.Thread | None = None
        for worker in self._workers:
            worker.start()

    def submit(
        self,
        work: Work,
        task: str,
        deadline: float | None = None,
        priority: int = 0,
        on_end: Callable[[Ticket], None] | None = None,
    ) -> Ticket:
        """Queue a request; `deadline` in seconds from now. Raises `UsageError` for a deadline or priority that cannot be.

        `on_end` is called once with the ticket, by the thread that ended it.
        """
        step = work.step()
        until = _checked(deadline, priority)
        with self._lock:
            if self._closed:
                raise UsageError("the session is closed")
            now = time.monotonic()
            ticket = Ticket(self, self._count, task, on_end)
            work.until = None if until is None else now + until
            instructions = self._handle(Submitted(now, ticket.number, step or Step(), priority, work.until))
            if until is not None:
                self._watch_deadlines()
            self._count += 1
            self._tickets[ticket.number] = ticket, work, now
            ended = self._carry_out(instructions)
        self._tell_callers(ended)
        if Route(ticket.number) in instructions:
            self._find_route(ticket.number, work)
        return ticket

    def cancel(self, number: int) -> None:
        """Give a request up."""
        self._tell(Cancelled(time.monotonic(), number))

    def state(self, ticket: Ticket) -> State:
        """Where a request is."""
        with self._lock:
            found = ticket.ending or self._table.state(ticket.number)
            assert found is not None
            return found

    def stats(self) -> dict[str, float]:
        """The table's counts; `table_s`, seconds spent on it and on routes; `busy_s`, seconds in which batches were under way."""
        with self._lock:
            return {**self._table.stats, "table_s": self._table_s, "busy_s": self._busy_s}

    def drain(self) -> None:
        """Wait until nothing waits and nothing runs. Raises `UsageError` in a callback, which what is waited for would wait for."""
        if self._is_ours(threading.current_thread()):
            raise UsageError("on_end cannot wait for other requests: the thread that calls it answers them")
        with self._lock:
            while not self._table.idle():
                self._changed.wait()

    def close(self) -> None:
        """Cancel what waits, let what runs end, and stop the workers; in a callback, without waiting for it. A second call does nothing."""
        with self._lock:
            self._closed = True
            waiting = [number for number in self._tickets if self._table.state(number) in (State.QUEUED, State.ROUTED)]
        for number in waiting:
            self.cancel(number)
        with self._lock:
            self._changed.notify_all()
            self._due.notify_all()
        if self._is_ours(threading.current_thread()):
            return
        self.drain()
        with self._lock:
            self._changed.notify_all()
            self._due.notify_all()
            ours = [*self._workers, *([self._watcher] if self._watcher is not None else [])]
        for thread in ours:
            thread.join()

    def _is_ours(self, thread: threading.Thread) -> bool:
        return thread in self._workers or thread is self._watcher

    # ---- events and instructions ----

    def _tell(self, event: Event) -> list[Instruction]:
        with self._lock:
            instructions = self._handle(event)
            ended = self._carry_out(instructions)
        self._tell_callers(ended)
        return instructions

    def _handle(self, event: Event) -> list[Instruction]:
        started = time.perf_counter()
        instructions = self._table.handle(event)
        self._table_s += time.perf_counter() - started
        return instructions

    def _carry_out(self, instructions: Sequence[Instruction]) -> list[tuple[Ticket, Any, float, End]]:
        """What can be done under the lock; returns the tickets that ended."""
        ended = []
        for each in instructions:
            match each:
                case Advise():
                    with suppress(EdgemlError):  # a hint: nothing depends on it
                        self._engine.advise(each.pages, each.priority, each.load)
                case Page():
                    self._begun.append((each, [self._tickets[number][1] for number in each.requests]))
                    self._changed.notify_all()
                case End():
                    found = self._tickets.pop(each.request)
                    found[0].ending = each.state
                    ended.append((*found, each))
        if self._table.idle():
            self._changed.notify_all()
        return ended

    def _tell_callers(self, ended: Sequence[tuple[Ticket, Any, float, End]]) -> None:
        for ticket, work, came, end in ended:
            if end.state == State.DONE:
                ticket.end(*self._finished(work, came))
            else:
                ticket.end(None, self._faults.pop(ticket.number, None) or NotAnswered(end.reason))

    def _finished(self, work: Work, came: float) -> tuple[Result | None, EdgemlError | None]:
        try:
            result = work.result()
            result.latency_s = time.monotonic() - came
            return result, None
        except BaseException as error:  # as in `_run`
            return None, _fault(error)

    def _find_route(self, number: int, work: Work) -> None:
        started = time.perf_counter()
        try:
            found, *stand_ins = self._engine.route(work)
        except Exception as error:
            self._faults[number] = fault = _fault(error)
            self._tell(Dropped(time.monotonic(), number, str(fault)))
            self._faults.pop(number, None)  # where it had been cancelled meanwhile
            return
        self._table_s += time.perf_counter() - started
        self._tell(Routed(time.monotonic(), number, found, tuple(stand_ins)))

    # ---- workers, and the watcher ----

    def _watch_deadlines(self) -> None:
        """Under the lock: a deadline has been added, perhaps the earliest."""
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="edgeml-deadlines", daemon=True)
            self._watcher.start()
        self._due.notify_all()

    def _watch(self) -> None:
        while True:
            with self._lock:
                due = self._table.due()
                if due is None and self._closed and self._table.idle():
                    return
                left = None if due is None else due - time.monotonic()
                if left is None or left > 0:
                    self._due.wait(left)
                    continue
            self._tell(Ticked(max(time.monotonic(), due or 0.0)))

    def _serve(self) -> None:
        while True:
            with self._lock:
                while not self._begun:
                    if self._closed and self._table.idle():
                        return
                    self._changed.wait()
                page, works = self._begun.popleft()
            started = time.monotonic()
            event = self._run(page, works)
            with self._lock:
                self._busy_s += time.monotonic() - started
            self._tell(event)
            self._faults.pop(page.requests[0], None)

    def _run(self, page: Page, works: list[Any]) -> Event:
        """Run a batch; returns what became of it."""

        def paged() -> None:
            if Run(page.batch) not in self._tell(Paged(time.monotonic(), page.batch)):
                raise _GivenUpError

        try:
            self._engine.compute(works, page.set, paged)
            following = [(number, work.step()) for number, work in zip(page.requests, works, strict=True)]
        except _GivenUpError:
            return Stepped(time.monotonic(), page.batch)
        except BaseException as error:  # a worker must not end: it would leave all others waiting
            fault = _fault(error)
            if len(page.requests) == 1:
                self._faults[page.requests[0]] = fault
            return Broken(time.monotonic(), page.batch, str(fault))
        return Stepped(time.monotonic(), page.batch, {number: step for number, step in following if step is not None})


def _fault(error: BaseException) -> EdgemlError:
    if isinstance(error, EdgemlError):
        return error
    if isinstance(error, MemoryError):
        return NotAnswered("this machine has not enough free memory for that; try fewer or shorter inputs")
    return NotAnswered(f"a fault in edgeml itself: {type(error).__name__}: {error}")


def _checked(deadline: Any, priority: Any) -> float | None:
    """The deadline as a number. Whether it and the priority can be, the table checks."""
    number = isinstance(deadline, int | float) and not isinstance(deadline, bool)
    if deadline is not None and not (number and (abs(deadline) <= LONGEST or deadline != deadline)):
        raise UsageError(f"a deadline is a number of seconds from now, not {str(deadline)[:40]}")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise UsageError(f"a priority is a whole number, not {str(priority)[:40]}")
    return None if deadline is None else float(deadline)
