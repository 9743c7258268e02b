"""Random stories of the scheduler's table, in which nothing may be lost, doubled, starved, held beyond the budget, or kept waiting after
its deadline."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_table import Table

from edgeml.scheduler import Scheduler
from edgeml.scheduler_events import (
    Advise,
    Broken,
    Cancelled,
    End,
    Event,
    Limits,
    Page,
    Paged,
    Route,
    Routed,
    Run,
    Step,
    Stepped,
    Submitted,
    Ticked,
    WorkingSet,
)

SETS = [
    WorkingSet(task, frozenset(pages), leased)
    for task, pages, leased in [
        ("a", (0, 1, 2), True), ("b", (2, 3), True), ("c", (4, 5, 6), True), ("d", (0, 6), True), ("e", (1, 3, 5), False), ("f", (), False),
        ("g", tuple(range(9)), True),
    ]
]  # fmt: skip

STAND_INS = [WorkingSet("z", frozenset(pages), True, 0, name) for name, pages in (("one", (0, 1)), ("two", (2, 6)), ("all", range(9)))]


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
    deadlines: dict[int, float] = field(default_factory=dict)
    allowed: dict[int, set[WorkingSet]] = field(default_factory=dict)  # its own set, and what may stand in for it

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
        waiting = {*self.waiting, *self.routing} & self.deadlines.keys()
        assert all(self.deadlines[number] > event.now for number in waiting), "a request waits for what is of no use any more"

    def begin(self, page: Page) -> None:
        assert all(page.set in self.allowed[number] for number in page.requests), "a set that is not the request's"
        assert not page.set.stand_in or all(number in self.deadlines for number in page.requests), "a stand-in without a deadline"
        assert not page.set.stand_in or self.table.scheduler.limits.order == "overlap"
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
            if deadline is not None:
                world.deadlines[t.numbers] = deadline
            before = len(world.waiting) + len(world.routing)
            world.tell(Submitted(t.now, t.numbers, Step(draw(31) + 1, draw(63) + 1), draw(4) - 2, deadline))
            assert t.numbers in world.routing or before >= limits.queue, "refused though there was room"
            t.numbers += 1
        elif action <= 5 and world.routing:
            others = tuple(STAND_INS[draw(len(STAND_INS) - 1)] for _ in range(draw(2)))
            route(world, world.routing.pop(draw(len(world.routing) - 1)), SETS[draw(len(SETS) - 1)], others)
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


def stream(order: str, requests: int = 600) -> tuple[list[float], int]:
    """Latencies and pages read, in simulated time: 8 kinds of request come at random, at four fifths of what order of arrival can bear."""
    rng = random.Random(3)
    kinds = [WorkingSet(str(kind), frozenset(rng.sample(range(64), 32)), leased=True) for kind in range(8)]
    scheduler, now, came, latencies, read = Scheduler(Limits(slots=32, rows=4, order=order)), 0.0, dict[int, float](), list[float](), 0
    here: dict[int, int] = {}
    coming, running = 0.0, None
    while len(latencies) < requests:
        if len(came) < requests and (running is None or coming < running[0]):
            now, number = coming, len(came)
            came[number], coming = now, now + rng.expovariate(17)
            scheduler.handle(Submitted(now, number, Step(4, 32)))
            said = scheduler.handle(Routed(now, number, kinds[rng.randrange(8)]))
        else:
            assert running is not None
            (now, page), running = running, None
            scheduler.handle(Paged(now, page.batch))
            said = scheduler.handle(Stepped(now, page.batch))
            latencies.append(now - came[page.requests[0]])
        for page in (each for each in said if isinstance(each, Page)):
            absent = page.set.pages - here.keys()
            here |= dict.fromkeys(page.set.pages, page.batch)
            for old in sorted(here.keys() - page.set.pages, key=here.__getitem__)[: max(len(here) - 32, 0)]:
                del here[old]
            read += len(absent)
            running = now + 0.021 + 0.0018 * len(absent), page
    return sorted(latencies), read


def test_on_a_stream_it_reads_less_and_nobody_waits_longer_than_in_order_of_arrival() -> None:
    (ours, ours_read), (theirs, theirs_read) = stream("overlap"), stream("arrival")
    assert ours_read < 0.95 * theirs_read
    for share in (0.5, 0.9, 0.99):
        assert ours[int(share * len(ours))] < theirs[int(share * len(theirs))]


def route(world: World, number: int, kind: WorkingSet, stand_ins: tuple[WorkingSet, ...] = ()) -> None:
    t = world.table
    world.allowed[number] = {kind, *stand_ins}
    if not (kind.leased and len(kind.pages) > t.scheduler.limits.slots):
        world.wait(number)
    world.tell(Routed(t.now, number, kind, stand_ins))


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
