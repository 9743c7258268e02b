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

Stand-ins. Where reading the leader's set, at the recent pace, would miss its deadline, the first of its stand-ins that is in time takes
the set's place; and for others of its set likewise.

A batch that breaks is taken apart: its requests run again one by one, so that only the faulty one fails.
Order "arrival" is for comparison: first come, first served, and pages given up by least recent use.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable

from edgeml.errors import UsageError
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
    Stepped,
    Submitted,
    Ticked,
    WorkingSet,
)
from edgeml.scheduler_requests import Batch, Group, Request, by_priority, by_turn, move, recent, story

__all__ = ["Scheduler"]

#: Batches, at their recent pace, before a deadline from which on it decides the order.
URGENT = 4
#: Sets that are kept for comparing, and deadlines of ended requests; beyond that those that are not in use are let go.
SETS = 1024
#: The priority that pages of the next set are advised.
NEXT = 1 << 20
WAITING = (State.QUEUED, State.ROUTED)


class Scheduler:
    """The table. `handle` is the only way to change it; an event that cannot be raises `UsageError` and changes nothing.

    `stats`: how many requests were submitted and how many ended in each way; batches begun, those led by an overdue request, and those
    under a stand-in.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.stats = dict.fromkeys(("submitted", "done", "failed", "refused", "batches", "overdue", "stand_ins"), 0)
        self._now = -math.inf
        self._live: dict[int, Request] = {}
        self._groups: dict[WorkingSet, Group] = {}  # by their sets, those in use and others
        self._waiting: dict[Group, None] = {}  # groups in which a request waits, in the order in which that began
        self._batches: dict[int, Batch] = {}
        self._deadlines: list[tuple[float, int]] = []  # a heap; ended requests stay in it for a while
        self._here: set[int] = set()  # the pages that the pager should hold
        self._used: dict[int, int] = {}  # by page, the batch at whose time it was last expected
        self._levels: dict[int, int] = {}  # priorities as advised; 0 is left out
        self._newest, self._turns, self._latest = -1, 0, Group(WorkingSet(""))
        self._pace = self._page_s = self._compute_s = 0.0  # recent seconds of a batch, of reading a page, of computing a batch
        self._wanted: dict[int, int] = {}  # by how many waiting leased sets
        self._wishes: dict[Group, int] = {}  # what has changed in that since
        self._coming: frozenset[int] = frozenset()  # pages advised as next
        self._overdue: dict[int, Request] = {}  # that may not be passed over again
        self._hinted: list[Group] = []  # the groups in use when priorities were advised last
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
            assert request.passed <= request.allowed or request.state != State.ROUTED, f"passed over too often: {story(request)}"

    # ---- events ----

    def _check(self, event: Event) -> None:
        """Refuse what cannot be, before anything has changed."""
        if not math.isfinite(event.now):
            raise UsageError("an event needs a time")
        if isinstance(event, Submitted):
            if event.request <= self._newest:
                raise UsageError("numbers of requests ascend")
            event.check()
        elif isinstance(event, Paged | Stepped | Broken):
            if event.batch not in self._batches:
                raise UsageError(f"there is no batch {event.batch} under way")
            states = {request.state for request in self._batches[event.batch].requests if request.number in self._live}
            wanted = {Paged: (State.PAGING,), Stepped: (State.RUNNING,), Broken: (State.PAGING, State.RUNNING)}[type(event)]
            if any(state not in wanted for state in states):
                told = "; ".join(story(request) for request in self._batches[event.batch].requests)
                raise UsageError(f"{type(event).__name__} cannot follow: {told}")
        elif not isinstance(event, Ticked) and event.request > self._newest:
            raise UsageError(f"there never was a request {event.request}")
        elif isinstance(event, Routed) and self.state(event.request) not in (None, State.QUEUED):
            raise UsageError(f"Routed cannot follow: {story(self._live[event.request])}")

    def _submit(self, event: Submitted) -> None:
        deadline = None if event.deadline == math.inf else event.deadline
        request = Request(event.request, event.step, event.priority, deadline)
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
        request.own = event.set
        if self.limits.order != "arrival":
            request.stand_ins = tuple(each for each in event.stand_ins if len(each.pages) <= self.limits.slots)
        self._wait(request, behind=True)

    def _paged(self, event: Paged) -> None:
        live, batch = self._living(event.batch), self._batches[event.batch]
        batch.paged = self._now
        if batch.lacking:
            self._page_s = recent(self._page_s, (self._now - batch.begun) / batch.lacking)
        for request in live:
            move(request, State.RUNNING)
        if live:
            self._out.append(Run(event.batch))

    def _stepped(self, event: Stepped) -> None:
        live, batch = self._living(event.batch), self._batches.pop(event.batch)
        self._pace = recent(self._pace, self._now - batch.begun)
        if live and batch.paged is not None:
            self._compute_s = recent(self._compute_s, self._now - batch.paged)
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

    def _living(self, batch: int) -> list[Request]:
        return [request for request in self._batches[batch].requests if request.number in self._live]

    def _wait(self, request: Request, behind: bool) -> None:
        """Put a request among the routed, `behind` all others or where it was."""
        move(request, State.ROUTED)
        if request.deadline is not None and request.deadline <= self._now:  # it came while an earlier step ran
            heapq.heappush(self._deadlines, (request.deadline, request.number))
        if behind:
            ahead = sum(len(group.waiting) for group in self._waiting)
            request.turn, request.passed, request.allowed = self._turns, 0, self.limits.patience + ahead
            self._turns += 1
        self._enter(request, request.own)

    def _enter(self, request: Request, wanted: WorkingSet) -> None:
        """Put a routed request among those that wait for this set."""
        request.group = group = self._groups.setdefault(wanted, Group(wanted))
        if not group.waiting:
            self._groups[group.set] = group
            self._waiting[group] = None
            self._wish(group, 1)
        group.waiting[request.number] = request
        group.first = None
        if request.passed >= request.allowed:
            self._overdue[request.number] = request

    def _leave(self, request: Request) -> None:
        """Take a routed request out of those that wait."""
        group = request.group
        assert group is not None
        del group.waiting[request.number]
        self._overdue.pop(request.number, None)
        group.first = None
        if not group.waiting:
            del self._waiting[group]
            self._wish(group, -1)

    def _end(self, number: int, state: State, reason: str = "") -> None:
        request = self._live.get(number)
        if request is None:
            return  # the message came late
        if request.state == State.ROUTED:
            self._leave(request)
        move(request, state)
        del self._live[number]
        self.stats[state.value] += 1
        self._out.append(End(number, state, reason))

    # ---- choosing ----

    def _begin(self) -> None:
        while len(self._batches) < self.limits.lanes:
            leader = min(self._overdue.values(), key=by_turn, default=None) or self._pressed() or self._best(self._waiting)
            if leader is None:
                return
            self._stand_in(leader)
            assert leader.group is not None
            used = leader.group.set
            if used.leased and len(self._leased() | used.pages) > self.limits.slots:
                return  # it goes first, and cannot yet
            number = self.stats["batches"]
            self.stats["batches"] += 1
            self.stats["overdue"] += leader.passed >= leader.allowed
            self.stats["stand_ins"] += bool(used.stand_in)
            lacking = len(used.pages - self._here)
            batch = self._batches[number] = Batch(self._mates(leader), leader.group, self._now, lacking)
            for request in batch.requests:
                self._leave(request)
                move(request, State.PAGING)
            self._pass_over(leader.turn)
            if leader.group is not self._latest or lacking:
                self._expect(used.pages)
            self._latest = leader.group
            if self.limits.order == "arrival":
                self._out.append(Advise(tuple(sorted(used.pages)), number + 1))
            self._hint()
            self._out.append(Page(number, tuple(request.number for request in batch.requests), used))

    def _stand_in(self, leader: Request) -> None:
        """Give the leader a stand-in where its own set would be late, and those of its set that would be late without the same one."""
        found, group = self._in_time(leader), leader.group
        if found is None or group is None:
            return
        for request in list(group.waiting.values()):
            if request is leader or self._in_time(request) == found:
                self._leave(request)
                self._enter(request, found)

    def _in_time(self, request: Request) -> WorkingSet | None:
        """The first of its stand-ins that is in time; None where none is, or its own set is, or it has one."""
        if request.deadline is None or request.group is None or request.group.set != request.own:
            return None
        left = request.deadline - self._now - self._compute_s
        if self._reading_s(request.own) <= left:
            return None
        return next((each for each in request.stand_ins if self._reading_s(each) <= left), None)

    def _reading_s(self, wanted: WorkingSet) -> float:
        return len(wanted.pages - self._here) * self._page_s

    def _pass_over(self, turn: int) -> None:
        """A batch has begun that is led by a request of this turn."""
        for group in self._waiting:
            for request in group.waiting.values():
                if request.turn < turn:
                    request.passed += 1
                    if request.passed == request.allowed:
                        self._overdue[request.number] = request

    def _pressed(self) -> Request | None:
        """The request with the earliest deadline, where it could be missed."""
        soon = self._now + URGENT * self._pace
        if not self._deadlines or self._deadlines[0][0] > soon or self.limits.order == "arrival":
            return None
        near = sorted(each for each in self._deadlines if each[0] <= soon)
        return next((self._live[number] for _, number in near if self.state(number) == State.ROUTED), None)

    def _best(self, groups: Iterable[Group]) -> Request | None:
        """The request that goes first among those that wait in these groups, if no bound and no deadline is near."""
        if self.limits.order == "arrival":
            return min((request for group in groups for request in group.waiting.values()), key=by_turn, default=None)
        for group in groups:
            if group.first is None:
                group.first = min(group.waiting.values(), key=by_priority)
        return min((group.first for group in groups if group.first is not None), key=self._rank, default=None)

    def _rank(self, first: Request) -> tuple[float, ...]:
        """The order of sets, each by the request of it that goes first."""
        group = first.group
        assert group is not None
        if group.lacking is None:
            group.lacking = len(group.set.pages - self._here)
        return -first.priority, group.lacking / len(group.waiting), group is not self._latest, first.turn

    def _mates(self, leader: Request) -> list[Request]:
        """The leader and those of its set that are computed with it: their rows are padded to the longest."""
        assert leader.group is not None
        batch, rows, longest = [leader], leader.step.rows, leader.step.tokens
        if leader.alone or rows >= self.limits.rows:
            return batch
        for request in sorted(leader.group.waiting.values(), key=by_priority):
            more, long = rows + request.step.rows, max(longest, request.step.tokens)
            if request is not leader and not request.alone and more <= self.limits.rows and more * long <= self.limits.tokens:
                batch.append(request)
                rows, longest = more, long
        return batch

    # ---- memory ----

    def _in_use(self) -> list[Group]:
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

    def _wish(self, group: Group, change: int) -> None:
        """A set has begun (1) or ceased (-1) to be waited for; of one that is run at once, both cancel out before any page is looked at."""
        self._stale = True
        if group.set.leased and self.limits.order != "arrival":
            self._wishes[group] = self._wishes.get(group, 0) + change

    def _hint(self) -> None:
        """Advise priorities, where something has changed that they depend on."""
        in_use = self._in_use()
        if (not self._stale and in_use == self._hinted) or self.limits.order == "arrival":
            return
        self._stale, self._hinted, self._read = False, in_use, True
        coming = self._coming_pages()
        may_differ = set(coming ^ self._coming)
        for group, change in self._wishes.items():
            if change:
                may_differ |= group.set.pages
                for page in group.set.pages:
                    self._wanted[page] = self._wanted.get(page, 0) + change
        self._wishes.clear()
        changed: dict[int, list[int]] = {}
        for page in may_differ:
            level = NEXT if page in coming else self._wanted.get(page, 0)
            if level != self._levels.get(page, 0):
                changed.setdefault(level, []).append(page)
                self._levels[page] = level
        self._coming = coming
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
