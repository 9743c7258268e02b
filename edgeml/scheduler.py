"""Which request runs next, and what is read meanwhile, as a table: events in, instructions out; no clock, no thread, no file.

    queued -> routed -> paging -> running -> done          running -> routed where a further step follows
    refused from queued                                    failed from any, a cancelled one with that reason

Theory. Reading a working set costs more than computing with it, so requests that use the same pages should follow each other. A
request comes with its first step (rows, tokens); once it is routed, its working set is known. Free lanes take batches: a leader,
and the waiting requests of the same set that fit beside its step. The leader is

    1. the earliest request that was passed over as often as it may be;
    2. else the one with the earliest deadline among those that could miss it: less than URGENT batches away;
    3. else, of the highest priority, one whose set lacks the fewest pages for each request that waits for it; among equals one
       of the set in use, then the earliest.

Fairness. A request is passed over when a batch begins whose leader came later. It is never passed over more than `patience` +
(requests ahead of it when it was routed) times, whatever priorities and deadlines the others have: a bound of about twice its turn.
Who came earlier was passed over at least as often by the same batches, so rule 1 never has to choose between two bounds.

Memory. `resident` is what the pager should hold now, as far as the instructions determine it. Pages are advised a priority: those of
the next set most, others by how many waiting sets they are in. While a batch computes, the next set is read as far as
slots are left beside the leases. Leases of batches in flight, taken together with it, never exceed the slots.

A batch that breaks is taken apart: its requests run again one by one, so that only the faulty one fails.
Order "arrival" is for comparison: first come, first served, and pages given up by least recent use.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from edgeml.errors import UsageError
from edgeml.scheduler_events import (
    PRIORITIES,
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

__all__ = ["Scheduler"]

#: Batches, at their recent pace, before a deadline from which on it decides the order.
URGENT = 4
#: Sets that are kept for comparing, and deadlines of ended requests; beyond that those that are not in use are let go.
SETS = 1024
#: The priority that pages of the next set are advised.
NEXT = 1 << 20
WAITING = (State.QUEUED, State.ROUTED)
MOVES = {
    State.QUEUED: {State.ROUTED, State.REFUSED, State.FAILED},
    State.ROUTED: {State.PAGING, State.FAILED},
    State.PAGING: {State.RUNNING, State.ROUTED, State.FAILED},
    State.RUNNING: {State.DONE, State.ROUTED, State.FAILED},
}


@dataclass(eq=False)
class _Group:
    """Requests of one set; `lacking`: how many of its pages are not expected to be resident, None where that has to be counted."""

    set: WorkingSet
    waiting: dict[int, _Request] = field(default_factory=dict)
    lacking: int | None = None
    first: _Request | None = None  # of the highest priority, the earliest; None where that has to be looked for


@dataclass(eq=False)
class _Request:
    number: int
    step: Step
    priority: int
    deadline: float | None
    state: State = State.QUEUED
    group: _Group | None = None
    turn: int = 0  # order of arrival among the routed
    passed: int = 0  # batches begun by later ones
    allowed: int = 0  # how many of them it has to bear
    alone: bool = False  # it was in a batch that broke
    story: deque[State] = field(default_factory=lambda: deque(maxlen=16))


@dataclass(eq=False)
class _Batch:
    requests: list[_Request]
    group: _Group
    begun: float


class Scheduler:
    """The table. `handle` is the only way to change it; an event that cannot be raises `UsageError` and changes nothing.

    `stats`: how many requests were submitted and how many ended in each way; batches begun, and those led by an overdue request.
    """

    def __init__(self, limits: Limits) -> None:
        if limits.order not in ("overlap", "arrival"):
            raise UsageError(f"the order must be overlap or arrival, not {limits.order!r:.40}")
        if min(limits.queue, limits.rows, limits.tokens, limits.lanes) < 1 or min(limits.patience, limits.slots) < 0:
            raise UsageError("limits of queue, rows, tokens and lanes are at least 1, patience and slots at least 0")
        self.limits = limits
        self.stats = dict.fromkeys(("submitted", "done", "failed", "refused", "batches", "overdue"), 0)
        self._now = -math.inf
        self._live: dict[int, _Request] = {}
        self._groups: dict[WorkingSet, _Group] = {}  # by their sets, those in use and others
        self._waiting: dict[_Group, None] = {}  # groups in which a request waits, in the order in which that began
        self._batches: dict[int, _Batch] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap; ended requests stay in it for a while
        self._here: set[int] = set()  # the pages that the pager should hold
        self._used: dict[int, int] = {}  # by page, the batch at whose time it was last expected
        self._levels: dict[int, int] = {}  # priorities as advised; 0 is left out
        self._newest, self._turns, self._pace, self._latest = -1, 0, 0.0, _Group(WorkingSet(""))
        self._wanted: dict[int, int] = {}  # by how many waiting leased sets
        self._coming: frozenset[int] = frozenset()  # pages advised as next
        self._changed: set[int] = set()  # pages whose priority may differ from what was advised
        self._overdue: dict[int, _Request] = {}  # that may not be passed over again
        self._hinted: list[_Group] = []  # the groups in use when priorities were advised last
        self._stale = self._read = False  # sets or expected pages have changed since; the coming pages are yet to be advised
        self._out: list[Instruction] = []

    def handle(self, event: Event) -> list[Instruction]:
        """Apply one event; returns what is to be done, in this order."""
        self._check(event)
        self._now, self._out = max(self._now, event.now), []
        self._expire()  # first, so that nobody is refused for the sake of the dead
        match event:
            case Submitted():
                self._submit(event)
            case Routed():
                self._route(event)
            case Dropped():
                self._end(event.request, State.FAILED, event.reason)
            case Cancelled():
                self._end(event.request, State.FAILED, "the request was cancelled")
            case Paged():
                self._paged(event)
            case Stepped():
                self._stepped(event)
            case Broken():
                self._broken(event)
        self._expire()
        self._begin()
        self._hint()
        if self._read:
            self._prefetch()
        return self._out

    def state(self, request: int) -> State | None:
        """The state of a request that has not ended."""
        found = self._live.get(request)
        return None if found is None else found.state

    def due(self) -> float | None:
        """When `Ticked` is to be told next, unless another event comes before: the earliest deadline of a request that has not ended."""
        while self._deadlines and self._deadlines[0][1] not in self._live:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._live and not self._batches

    def validate(self) -> None:
        """Raise `AssertionError` where an invariant does not hold."""
        placed = [number for group in self._waiting for number in group.waiting]
        placed += [request.number for batch in self._batches.values() for request in batch.requests if request.number in self._live]
        placed += [number for number, request in self._live.items() if request.state == State.QUEUED]
        assert sorted(placed) == sorted(self._live), "a request is in no place, or in two"
        assert len(self._leased()) <= self.limits.slots, "leases of batches in flight exceed the slots"
        assert len(self._batches) <= self.limits.lanes, "more batches than lanes"
        assert len(self._here) <= self.limits.slots, "more pages expected than slots"
        overdue = {number for group in self._waiting for number, request in group.waiting.items() if request.passed >= request.allowed}
        assert overdue == self._overdue.keys(), "an overdue request is not noted, or one that is not"
        assert all(bool(group.waiting) == (group in self._waiting) for group in self._groups.values()), "an empty group waits"
        assert all(self._groups[group.set] is group for group in self._waiting), "a set has two groups"
        for request in self._live.values():
            assert request.passed <= request.allowed or request.state != State.ROUTED, f"passed over too often: {_story(request)}"

    # ---- events ----

    def _check(self, event: Event) -> None:
        """Refuse what cannot be, before anything has changed."""
        if not math.isfinite(event.now):
            raise UsageError("an event needs a time")
        if isinstance(event, Submitted):
            self._check_new(event)
        elif isinstance(event, Paged | Stepped | Broken):
            if event.batch not in self._batches:
                raise UsageError(f"there is no batch {event.batch} under way")
            states = {request.state for request in self._batches[event.batch].requests if request.number in self._live}
            wanted = {Paged: (State.PAGING,), Stepped: (State.RUNNING,), Broken: (State.PAGING, State.RUNNING)}[type(event)]
            if any(state not in wanted for state in states):
                told = "; ".join(_story(request) for request in self._batches[event.batch].requests)
                raise UsageError(f"{type(event).__name__} cannot follow: {told}")
        elif not isinstance(event, Ticked) and event.request > self._newest:
            raise UsageError(f"there never was a request {event.request}")
        elif isinstance(event, Routed) and self.state(event.request) not in (None, State.QUEUED):
            raise UsageError(f"Routed cannot follow: {_story(self._live[event.request])}")

    def _check_new(self, event: Submitted) -> None:
        if event.request <= self._newest:
            raise UsageError("numbers of requests ascend")
        if event.step.rows < 1 or event.step.tokens < 1:
            raise UsageError("a step has at least one row and one token")
        if not -PRIORITIES <= event.priority <= PRIORITIES:
            raise UsageError(f"a priority is a whole number from -{PRIORITIES} to {PRIORITIES}, not {event.priority}")
        if event.deadline is None:
            return
        if math.isnan(event.deadline):
            raise UsageError("the deadline is not a number; give seconds from now, or none")
        if event.deadline <= event.now:
            raise UsageError("the deadline is not in the future; give seconds from now, or none")

    def _submit(self, event: Submitted) -> None:
        deadline = None if event.deadline == math.inf else event.deadline
        request = _Request(event.request, event.step, event.priority, deadline)
        self._newest, self._live[request.number] = request.number, request
        self.stats["submitted"] += 1
        if len(self._live) - sum(len(self._living(batch)) for batch in self._batches) > self.limits.queue:
            self._end(request.number, State.REFUSED, f"the queue is full ({self.limits.queue} requests wait); try again later")
            return
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, request.number))
            if len(self._deadlines) > 2 * len(self._live) + SETS:
                self._deadlines = [each for each in self._deadlines if each[1] in self._live]
                heapq.heapify(self._deadlines)
        self._out.append(Route(request.number))

    def _route(self, event: Routed) -> None:
        request = self._live.get(event.request)
        if request is None:
            return  # it ended while its route was sought
        if event.set.leased and len(event.set.pages) > self.limits.slots:
            pages, slots = len(event.set.pages), self.limits.slots
            self._end(request.number, State.REFUSED, f"its working set of {pages} pages is larger than the {slots} slots; give more memory")
            return
        if len(self._groups) >= SETS:
            self._groups = {group.set: group for group in (*self._waiting, *self._in_use())}
        request.group = self._groups.setdefault(event.set, _Group(event.set))
        self._wait(request, behind=True)

    def _paged(self, event: Paged) -> None:
        live = self._living(event.batch)
        for request in live:
            _move(request, State.RUNNING)
        if live:
            self._out.append(Run(event.batch))

    def _stepped(self, event: Stepped) -> None:
        live, batch = self._living(event.batch), self._batches.pop(event.batch)
        taken = self._now - batch.begun
        self._pace = taken if not self._pace else 0.75 * self._pace + 0.25 * taken
        for request in live:
            if request.number in event.more:
                request.step = event.more[request.number]
                self._wait(request, behind=True)
            else:
                self._end(request.number, State.DONE)

    def _broken(self, event: Broken) -> None:
        live, batch = self._living(event.batch), self._batches.pop(event.batch)
        for request in live:
            if len(batch.requests) == 1:
                self._end(request.number, State.FAILED, event.reason)
            else:
                request.alone = True
                self._wait(request, behind=False)

    def _expire(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._now:
            _, number = heapq.heappop(self._deadlines)
            if self.state(number) in WAITING:
                self._end(number, State.FAILED, "its deadline passed before it could run")

    # ---- moving requests ----

    def _living(self, batch: int) -> list[_Request]:
        return [request for request in self._batches[batch].requests if request.number in self._live]

    def _wait(self, request: _Request, behind: bool) -> None:
        """Put a request among the routed, `behind` all others or where it was."""
        assert request.group is not None
        _move(request, State.ROUTED)
        if behind:
            ahead = sum(len(group.waiting) for group in self._waiting)
            request.turn, request.passed, request.allowed = self._turns, 0, self.limits.patience + ahead
            self._turns += 1
        group = request.group
        if not group.waiting:
            self._groups[group.set] = group
            self._waiting[group] = None
            self._wish(group.set, 1)
        group.waiting[request.number] = request
        group.first = None
        if request.passed >= request.allowed:
            self._overdue[request.number] = request

    def _leave(self, request: _Request) -> None:
        """Take a routed request out of those that wait."""
        group = request.group
        assert group is not None
        del group.waiting[request.number]
        self._overdue.pop(request.number, None)
        group.first = None
        if not group.waiting:
            del self._waiting[group]
            self._wish(group.set, -1)

    def _end(self, number: int, state: State, reason: str = "") -> None:
        request = self._live.get(number)
        if request is None:
            return  # the message came late
        if request.state == State.ROUTED:
            self._leave(request)
        _move(request, state)
        del self._live[number]
        self.stats[state.value] += 1
        self._out.append(End(number, state, reason))

    # ---- choosing ----

    def _begin(self) -> None:
        while len(self._batches) < self.limits.lanes:
            leader = min(self._overdue.values(), key=_by_turn, default=None) or self._pressed() or self._best(self._waiting)
            if leader is None or leader.group is None:
                return
            used = leader.group.set
            if used.leased and len(self._leased() | used.pages) > self.limits.slots:
                return  # it goes first, and cannot yet
            number = self.stats["batches"]
            self.stats["batches"] += 1
            self.stats["overdue"] += leader.passed >= leader.allowed
            batch = self._batches[number] = _Batch(self._mates(leader), leader.group, self._now)
            for request in batch.requests:
                self._leave(request)
                _move(request, State.PAGING)
            self._pass_over(leader.turn)
            if leader.group is not self._latest or not self._here.issuperset(used.pages):
                self._expect(used.pages)
            self._latest = leader.group
            if self.limits.order == "arrival":
                self._out.append(Advise(tuple(sorted(used.pages)), number + 1))
            self._hint()
            self._out.append(Page(number, tuple(request.number for request in batch.requests), used))

    def _pass_over(self, turn: int) -> None:
        """A batch has begun that is led by a request of this turn."""
        for group in self._waiting:
            for request in group.waiting.values():
                if request.turn < turn:
                    request.passed += 1
                    if request.passed == request.allowed:
                        self._overdue[request.number] = request

    def _pressed(self) -> _Request | None:
        """The request with the earliest deadline, where it could be missed."""
        soon = self._now + URGENT * self._pace
        if not self._deadlines or self._deadlines[0][0] > soon or self.limits.order == "arrival":
            return None
        near = sorted(each for each in self._deadlines if each[0] <= soon)
        return next((self._live[number] for _, number in near if self.state(number) == State.ROUTED), None)

    def _best(self, groups: Iterable[_Group]) -> _Request | None:
        """The request that goes first among those that wait in these groups, if no bound and no deadline is near."""
        if self.limits.order == "arrival":
            return min((request for group in groups for request in group.waiting.values()), key=_by_turn, default=None)
        for group in groups:
            if group.first is None:
                group.first = min(group.waiting.values(), key=_by_priority)
        return min((group.first for group in groups if group.first is not None), key=self._rank, default=None)

    def _rank(self, first: _Request) -> tuple[float, ...]:
        """The order of sets, each by the request of it that goes first."""
        group = first.group
        assert group is not None
        if group.lacking is None:
            group.lacking = len(group.set.pages - self._here)
        return -first.priority, group.lacking / len(group.waiting), group is not self._latest, first.turn

    def _mates(self, leader: _Request) -> list[_Request]:
        """The leader and those of its set that are computed with it: their rows are padded to the longest."""
        assert leader.group is not None
        batch, rows, longest = [leader], leader.step.rows, leader.step.tokens
        if leader.alone or rows >= self.limits.rows:
            return batch
        for request in sorted(leader.group.waiting.values(), key=_by_priority):
            more, long = rows + request.step.rows, max(longest, request.step.tokens)
            if request is not leader and not request.alone and more <= self.limits.rows and more * long <= self.limits.tokens:
                batch.append(request)
                rows, longest = more, long
        return batch

    # ---- memory ----

    def _in_use(self) -> list[_Group]:
        return [batch.group for batch in self._batches.values()]

    def _leased(self) -> set[int]:
        return {page for group in self._in_use() if group.set.leased for page in group.set.pages}

    def _expect(self, used: Collection[int]) -> None:
        """The pager will hold these pages, and gives up others by priority, then by least recent use."""
        if self._here.issuperset(used):
            self._used.update(dict.fromkeys(used, self.stats["batches"]))
            return
        self._stale = True
        self._here.update(used)
        self._used.update(dict.fromkeys(used, self.stats["batches"]))
        over = len(self._here) - self.limits.slots
        if over > 0:
            kept = self._leased().union(used)
            order = sorted(self._here, key=lambda page: (page in kept, self._levels.get(page, 0), self._used[page]))
            self._here.difference_update(order[:over])
        for group in self._groups.values():
            group.lacking = None

    def _wish(self, wanted: WorkingSet, change: int) -> None:
        """A set has begun (1) or ceased (-1) to be waited for."""
        self._stale = True
        if wanted.leased:
            self._changed.update(wanted.pages)
            for page in wanted.pages:
                self._wanted[page] = self._wanted.get(page, 0) + change

    def _hint(self) -> None:
        """Advise priorities, where something has changed that they depend on."""
        in_use = self._in_use()
        if (not self._stale and in_use == self._hinted) or self.limits.order == "arrival":
            return
        self._stale, self._hinted, self._read = False, in_use, True
        coming = self._coming_pages()
        changed: dict[int, list[int]] = {}
        for page in self._changed | (coming ^ self._coming):
            level = NEXT if page in coming else self._wanted.get(page, 0)
            if level != self._levels.get(page, 0):
                changed.setdefault(level, []).append(page)
                self._levels[page] = level
        self._coming, self._changed = coming, set()
        self._out += [Advise(tuple(sorted(pages)), level) for level, pages in sorted(changed.items())]

    def _prefetch(self) -> None:
        """Read the next set while batches compute; once, and not while one of them is being read."""
        if any(request.state == State.PAGING for batch in self._batches.values() for request in batch.requests):
            return
        self._read = False
        absent = tuple(sorted(self._coming - self._here))
        if absent:
            self._out.append(Advise(absent, NEXT, load=True))
            self._expect(absent)

    def _coming_pages(self) -> frozenset[int]:
        """Of the set that is next after those in use, the pages that have slots beside the leases, residents first."""
        in_use = self._in_use()
        if not in_use or not all(group.set.leased for group in in_use):
            return frozenset()
        following = self._best([group for group in self._waiting if group.set.leased and group not in in_use])
        if following is None or following.group is None:
            return frozenset()
        leased = self._leased()
        wanted, room = following.group.set.pages - leased, self.limits.slots - len(leased)
        if len(wanted) <= room:
            return wanted
        return frozenset(sorted(wanted, key=lambda page: (page not in self._here, page))[:room])


def _by_turn(request: _Request) -> int:
    return request.turn


def _by_priority(request: _Request) -> tuple[int, int]:
    return -request.priority, request.turn


def _move(request: _Request, state: State) -> None:
    if state not in MOVES[request.state]:
        raise UsageError(f"{state} cannot follow: {_story(request)}")
    request.story.append(request.state)
    request.state = state


def _story(request: _Request) -> str:
    return f"request {request.number} was {', '.join([*request.story, request.state])}"
