"""The scheduler as a table: short stories whose instructions are known, then random ones in which nothing may be lost, doubled, starved
or held beyond the budget."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeml.errors import UsageError
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

A = WorkingSet("a", frozenset({1, 2}), leased=True)
B = WorkingSet("b", frozenset({3, 4}), leased=True)
C = WorkingSet("c", frozenset({4, 5}), leased=True)
FULL = Step(32, 32)  # nothing fits beside it


@dataclass
class Table:
    """A scheduler that validates itself after every event, and what it said last."""

    scheduler: Scheduler
    now: float = 0.0
    numbers: int = 0
    said: list[Instruction] = field(default_factory=list)

    def tell(self, event: Event) -> list[Instruction]:
        self.said = self.scheduler.handle(event)
        self.scheduler.validate()
        return self.said

    def submit(self, kind: WorkingSet, step: Step = FULL, priority: int = 0, deadline: float | None = None) -> int:
        number, self.numbers = self.numbers, self.numbers + 1
        assert self.tell(Submitted(self.now, number, step, priority, deadline)) == [Route(number)]
        self.tell(Routed(self.now, number, kind))
        return number

    def pages(self) -> list[Page]:
        return [each for each in self.said if isinstance(each, Page)]

    def finish(self, batch: int, seconds: float = 1.0) -> list[Page]:
        """Page a batch in and compute it; returns what begins after it."""
        self.tell(Paged(self.now, batch))
        assert Run(batch) in self.said
        self.now += seconds
        self.tell(Stepped(self.now, batch))
        return self.pages()

    def order(self, batch: int) -> list[tuple[int, ...]]:
        """The requests of all batches from this one on, until nothing is left."""
        requests = []
        begun = self.pages()
        while begun:
            requests.append(begun[0].requests)
            begun = self.finish(begun[0].batch)
        assert self.scheduler.idle()
        return requests


def table(slots: int = 4, **limits: int | str) -> Table:
    return Table(Scheduler(Limits(slots=slots, **limits)))  # type: ignore[arg-type]


def ends(said: list[Instruction]) -> list[tuple[int, State, str]]:
    return [(each.request, each.state, each.reason) for each in said if isinstance(each, End)]


def test_a_request_from_queue_to_answer() -> None:
    """One request, every state in turn."""
    scheduler = Scheduler(Limits(slots=4))
    assert scheduler.handle(Submitted(0, 0)) == [Route(0)]
    assert scheduler.state(0) == State.QUEUED
    assert Page(0, (0,), A) in scheduler.handle(Routed(0, 0, A))
    assert scheduler.state(0) == State.PAGING
    assert scheduler.handle(Paged(1, 0)) == [Run(0)]
    assert scheduler.state(0) == State.RUNNING
    assert scheduler.handle(Stepped(2, 0))[0] == End(0, State.DONE)
    assert scheduler.state(0) is None
    assert scheduler.idle()


def test_requests_of_one_set_follow_each_other_and_the_nearest_set_comes_next() -> None:
    """a is in use when b, c, a arrive: the a goes first; then b, the earlier; then c, which shares a page with b."""
    t = table()
    first = t.submit(A)
    begun = t.pages()
    others = [t.submit(kind) for kind in (B, C, A, B)]
    t.said = list(begun)
    assert t.order(0) == [(first,), (others[2],), (others[0],), (others[3],), (others[1],)]


def test_arrival_order_is_for_comparison() -> None:
    t = table(order="arrival")
    first = t.submit(A)
    begun = t.pages()
    others = [t.submit(kind) for kind in (B, C, A, B)]
    t.said = list(begun)
    assert t.order(0) == [(number,) for number in (first, *others)]


def test_small_steps_of_one_set_share_a_batch() -> None:
    t = table()
    t.submit(A)
    begun = t.pages()
    small = [t.submit(A, Step(10, 20)) for _ in range(4)]
    t.submit(B, Step(1, 1))
    (page,) = t.finish(begun[0].batch)
    assert page.requests == tuple(small[:3])  # a fourth would be the fortieth row


def test_padding_counts_against_the_tokens_of_a_batch() -> None:
    t = table()
    t.submit(A)
    begun = t.pages()
    short, long = t.submit(A, Step(8, 16)), t.submit(A, Step(8, 128))
    (page,) = t.finish(begun[0].batch)
    assert page.requests == (short,)
    assert t.finish(page.batch)[0].requests == (long,)


def test_the_next_set_is_read_while_a_batch_computes() -> None:
    """With room for two sets the other one is prefetched once the first is paged in; what is leased stays."""
    t = table(slots=4)
    t.submit(A)
    t.submit(B)
    assert not [each for each in t.said if isinstance(each, Advise) and each.load]
    t.tell(Paged(0, 0))
    assert [each.pages for each in t.said if isinstance(each, Advise) and each.load] == [(3, 4)]


def test_prefetch_takes_no_more_than_what_the_leases_leave() -> None:
    t = table(slots=3)
    t.submit(A)
    t.submit(B)
    t.tell(Paged(0, 0))
    assert [each.pages for each in t.said if isinstance(each, Advise) and each.load] == [(3,)]


def test_priority_then_deadline_then_patience() -> None:
    t = table(patience=100)
    t.submit(A)
    begun = t.pages()
    t.finish(begun[0].batch)  # the pace is now a second
    t.submit(A)
    begun = t.pages()
    plain, high, pressed = t.submit(A), t.submit(B, priority=5), t.submit(C, deadline=t.now + 3)
    t.said = list(begun)
    assert t.order(0)[1:] == [(pressed,), (high,), (plain,)]


def test_a_far_deadline_does_not_disturb_the_order() -> None:
    t = table()
    t.submit(A)
    begun = t.pages()
    far, plain = t.submit(B, deadline=1e6), t.submit(A)
    t.said = list(begun)
    assert t.order(0)[1:] == [(plain,), (far,)]


def test_a_request_of_low_priority_is_passed_over_a_bounded_number_of_times() -> None:
    """A flood of better ones: the low one runs after `patience` of them."""
    t = table(patience=3)
    t.submit(A)
    low = t.submit(B, priority=-100)
    batch, passed = 0, 0
    while True:
        t.submit(A, priority=100)
        (page,) = t.finish(batch)
        batch = page.batch
        if low in page.requests:
            break
        passed += 1
    assert passed == 3


def test_a_long_request_lets_others_in_between_its_steps() -> None:
    """Three steps of a; b came after its first and is not passed over for ever."""
    t = table(patience=0)
    long, other = t.submit(A), t.submit(B)
    t.tell(Paged(0, 0))
    t.tell(Stepped(1, 0, {long: FULL}))
    assert t.pages()[0].requests == (other,)
    assert t.finish(1)[0].requests == (long,)
    t.tell(Paged(2, 2))
    t.tell(Stepped(3, 2, {long: FULL}))
    assert t.pages()[0].requests == (long,)
    t.finish(3)
    assert t.scheduler.stats["done"] == 2


def test_the_queue_is_bounded() -> None:
    t = table(queue=2)
    for _ in range(3):  # one of them runs
        t.submit(A)
    assert ends(t.tell(Submitted(0, 3))) == [(3, State.REFUSED, "the queue is full (2 requests wait); try again later")]
    t.numbers = 4
    t.tell(Cancelled(0, 2))
    t.submit(A)


def test_a_set_that_can_never_fit_is_refused() -> None:
    t = table(slots=1)
    t.tell(Submitted(0, 0))
    ((number, state, reason),) = ends(t.tell(Routed(0, 0, A)))
    assert (number, state) == (0, State.REFUSED)
    assert reason == "its working set of 2 pages is larger than the 1 slots; give more memory"


def test_a_guessed_set_may_be_of_any_size() -> None:
    t = table(slots=1)
    t.submit(WorkingSet("a", frozenset({1, 2, 3})))
    assert t.pages()


def test_a_deadline_that_passes_while_waiting_fails_the_request() -> None:
    t = table()
    t.submit(A)
    late = t.submit(B, deadline=5)
    t.tell(Paged(1, 0))
    t.tell(Stepped(6, 0))
    assert (late, State.FAILED, "its deadline passed before it could run") in ends(t.said)
    assert t.scheduler.idle()


def test_a_batch_that_breaks_is_taken_apart() -> None:
    """Three share a batch and one of them is faulty: the others are answered."""
    t = table()
    t.submit(A)
    small = [t.submit(A, Step()) for _ in range(3)]
    (page,) = t.finish(0)
    assert page.requests == tuple(small)
    t.tell(Paged(t.now, page.batch))
    t.tell(Broken(t.now, page.batch, "it broke"))
    assert ends(t.said) == []
    alone = []
    while t.pages():
        (page,) = t.pages()
        alone.append(page.requests)
        t.tell(Paged(t.now, page.batch))
        t.tell(Broken(t.now, page.batch, "it broke") if page.requests == (2,) else Stepped(t.now, page.batch))
    assert alone == [(number,) for number in small]
    assert {key: t.scheduler.stats[key] for key in ("done", "failed")} == {"done": 3, "failed": 1}


@pytest.mark.parametrize("state", ["queued", "routed", "paging", "running"])
def test_cancelling_in_every_state(state: str) -> None:
    t = table()
    if state == "queued":
        t.tell(Submitted(0, 0))
    else:
        t.submit(A)
        if state == "routed":
            t.submit(B)
        if state == "running":
            t.tell(Paged(0, 0))
    number = 1 if state == "routed" else 0
    assert t.scheduler.state(number) == state
    assert ends(t.tell(Cancelled(0, number))) == [(number, State.FAILED, "the request was cancelled")]
    assert ends(t.tell(Cancelled(0, number))) == []
    if state == "queued":
        assert t.tell(Routed(0, 0, A)) == []  # the route comes late
    elif state == "paging":
        assert Run(0) not in t.tell(Paged(0, 0))  # nobody is left to run
    if state != "queued":
        if state == "routed":
            t.tell(Paged(0, 0))
        t.tell(Stepped(1, 0))
    assert t.scheduler.idle()


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (Submitted(1, 5, deadline=0.5), "the deadline is not in the future; give seconds from now, or none"),
        (Submitted(1, 5, deadline=1), "the deadline is not in the future; give seconds from now, or none"),
        (Submitted(1, 5, deadline=-math.inf), "the deadline is not in the future; give seconds from now, or none"),
        (Submitted(1, 5, deadline=math.nan), "the deadline is not a number; give seconds from now, or none"),
        (Submitted(1, 5, priority=101), "a priority is a whole number from -100 to 100, not 101"),
        (Submitted(1, 5, Step(0, 1)), "a step has at least one row and one token"),
        (Submitted(1, 0), "numbers of requests ascend"),
        (Submitted(math.nan, 5), "an event needs a time"),
        (Routed(1, 9, A), "there never was a request 9"),
        (Cancelled(1, 9), "there never was a request 9"),
        (Dropped(1, 9, ""), "there never was a request 9"),
        (Routed(1, 0, A), "Routed cannot follow: request 0 was queued, routed, paging"),
        (Stepped(1, 0), "Stepped cannot follow: request 0 was queued, routed, paging"),
        (Paged(1, 7), "there is no batch 7 under way"),
    ],
)
def test_what_cannot_be_changes_nothing(event: Event, sentence: str) -> None:
    t = table()
    t.submit(A)
    before = repr(vars(t.scheduler))
    with pytest.raises(UsageError) as caught:
        t.scheduler.handle(event)
    assert str(caught.value) == sentence
    assert repr(vars(t.scheduler)) == before


@pytest.mark.parametrize("limits", [{"order": "random"}, {"queue": 0}, {"rows": 0}, {"lanes": 0}, {"patience": -1}])
def test_limits_that_cannot_be(limits: dict[str, int | str]) -> None:
    with pytest.raises(UsageError):
        table(**limits)


def test_a_deadline_that_has_come_ends_a_request_without_another_event() -> None:
    scheduler = Scheduler(Limits(slots=4, queue=9))
    assert scheduler.due() is None
    for number, deadline in enumerate((7.0, 3.0, None, math.inf)):
        scheduler.handle(Submitted(0, number, deadline=deadline))
    assert scheduler.due() == 3
    assert scheduler.handle(Ticked(2)) == []
    assert ends(scheduler.handle(Ticked(3))) == [(1, State.FAILED, "its deadline passed before it could run")]
    assert scheduler.due() == 7
    scheduler.handle(Cancelled(4, 0))
    assert scheduler.due() is None


def test_the_dead_do_not_fill_the_queue() -> None:
    scheduler = Scheduler(Limits(slots=4, queue=1))
    scheduler.handle(Submitted(0, 0, deadline=1))
    out = scheduler.handle(Submitted(2, 1))
    assert ends(out) == [(0, State.FAILED, "its deadline passed before it could run")]
    assert Route(1) in out


def test_deadlines_of_ended_requests_are_let_go() -> None:
    scheduler = Scheduler(Limits(slots=4, queue=9))
    for number in range(10_000):
        scheduler.handle(Submitted(number, number, deadline=1e6 + number))
        scheduler.handle(Cancelled(number, number))
    assert len(scheduler._deadlines) < 3000


# ---- random stories ----

SETS = [
    WorkingSet(task, frozenset(pages), leased)
    for task, pages, leased in [
        ("a", (0, 1, 2), True), ("b", (2, 3), True), ("c", (4, 5, 6), True), ("d", (0, 6), True), ("e", (1, 3, 5), False), ("f", (), False),
        ("g", tuple(range(9)), True),
    ]
]  # fmt: skip


@dataclass
class World:
    """Plays the driver for a table, at random, and keeps books of its own on what the table promises."""

    table: Table
    ended: Counter[int] = field(default_factory=Counter)
    routing: list[int] = field(default_factory=list)
    paging: list[Page] = field(default_factory=list)
    running: list[Page] = field(default_factory=list)
    waiting: dict[int, tuple[int, int]] = field(default_factory=dict)  # routed: (its turn, the batches that may begin before it)
    turns: int = 0

    def tell(self, event: Event) -> None:
        limits, leased = self.table.scheduler.limits, {page for each in self.paging + self.running for page in pages_of(each)}
        for said in self.table.tell(event):
            match said:
                case Route():
                    self.routing.append(said.request)
                case End():
                    self.ended[said.request] += 1
                    self.waiting.pop(said.request, None)
                    self.routing = [number for number in self.routing if number != said.request]
                case Page():
                    self.begin(said)
                    leased = {page for each in self.paging + self.running for page in pages_of(each)}
                    assert len(leased) <= limits.slots
                case Run():
                    (page,) = [each for each in self.paging if each.batch == said.batch]
                    self.paging.remove(page)
                    self.running.append(page)
                case Advise(load=True):
                    leased = {page for each in self.paging + self.running for page in pages_of(each)}
                    assert len(leased | set(said.pages)) <= limits.slots

    def begin(self, page: Page) -> None:
        assert all(number in self.waiting for number in page.requests), "a request runs that does not wait"
        for number in page.requests:
            del self.waiting[number]
        for number, (turn, left) in self.waiting.items():
            assert left > 0, f"request {number} waits beyond the bound"
            self.waiting[number] = turn, left - 1
        self.paging.append(page)

    def wait(self, number: int) -> None:
        """A bound the table does not compute: all that were ahead, as many later ones again, and the patience."""
        ahead = len(self.waiting)
        self.waiting[number] = self.turns, 2 * ahead + self.table.scheduler.limits.patience
        self.turns += 1


def pages_of(page: Page) -> frozenset[int]:
    return page.set.pages if page.set.leased else frozenset()


def play(rng: random.Random, limits: Limits) -> None:
    world = World(Table(Scheduler(limits)))
    t = world.table

    def draw(most: int) -> int:
        return rng.randint(0, most)

    for _ in range(draw(40)):
        action = draw(9)
        t.now += draw(3)
        if action <= 3:
            deadline = t.now + draw(20) + 1 if draw(3) == 0 else None
            world.tell(Submitted(t.now, t.numbers, Step(draw(31) + 1, draw(63) + 1), draw(4) - 2, deadline))
            t.numbers += 1
        elif action <= 5 and world.routing:
            route(world, world.routing.pop(draw(len(world.routing) - 1)), SETS[draw(len(SETS) - 1)])
        elif action == 9:
            world.tell(Ticked(t.now))
        elif action == 6 and t.numbers:
            world.tell(Cancelled(t.now, draw(t.numbers - 1)))
        else:
            advance(world, draw)
    while world.routing or world.paging or world.running:  # to the end
        if world.routing:
            route(world, world.routing.pop(), SETS[0])
        else:
            advance(world, lambda _: 0)
    assert t.scheduler.idle()
    assert not world.waiting
    assert world.ended == Counter(range(t.numbers)), "a request was lost or ended twice"
    stats = t.scheduler.stats
    assert stats["submitted"] == t.numbers == stats["done"] + stats["failed"] + stats["refused"]


def route(world: World, number: int, kind: WorkingSet) -> None:
    t = world.table
    if not (kind.leased and len(kind.pages) > t.scheduler.limits.slots):
        world.wait(number)
    world.tell(Routed(t.now, number, kind))


def advance(world: World, draw: object) -> None:
    """One batch goes a step further, or breaks."""
    assert callable(draw)
    t, fate = world.table, draw(5)
    if world.paging:
        page = world.paging[draw(len(world.paging) - 1)]
        if fate == 5:
            leave(world, page, world.paging)
            world.tell(Broken(t.now, page.batch, "no"))
            return
        world.tell(Paged(t.now, page.batch))
        if page in world.paging:  # nobody was left to run
            world.paging.remove(page)
            world.tell(Stepped(t.now, page.batch))
    elif world.running:
        page = world.running[draw(len(world.running) - 1)]
        if fate == 5:
            leave(world, page, world.running)
            world.tell(Broken(t.now, page.batch, "no"))
            return
        world.running.remove(page)
        more = {number: Step(draw(31) + 1) for number in page.requests if fate == 4}
        for number in more:
            if world.table.scheduler.state(number) is not None:
                world.wait(number)
        world.tell(Stepped(t.now, page.batch, more))


def leave(world: World, page: Page, place: list[Page]) -> None:
    """A batch breaks; each of several requests keeps its place, and those behind it may see it begin once more."""
    place.remove(page)
    if len(page.requests) > 1:
        world.waiting = {number: (turn, left + len(page.requests)) for number, (turn, left) in world.waiting.items()}
        for number in page.requests:
            if world.table.scheduler.state(number) is not None:
                world.waiting[number] = 0, 10**9


@pytest.mark.parametrize("order", ["overlap", "arrival"])
@pytest.mark.parametrize("lanes", [1, 2])
@settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**64))
def test_nothing_is_lost_doubled_starved_or_over_the_budget(order: str, lanes: int, seed: int) -> None:
    """2,500 random stories each for both orders and for one lane and two."""
    rng = random.Random(seed)
    slots, patience, queue = rng.randint(3, 9), rng.randint(0, 5), rng.randint(1, 12)
    play(rng, Limits(slots=slots, queue=queue, lanes=lanes, patience=patience, order=order))
