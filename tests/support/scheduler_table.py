"""A scheduler's table that tests drive by hand: it validates itself after every event."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeml.scheduler import Scheduler
from edgeml.scheduler_events import (
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
    WorkingSet,
)

__all__ = ["FULL", "A", "B", "C", "Table", "ends", "table"]

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

    def submit(
        self,
        kind: WorkingSet,
        step: Step = FULL,
        priority: int = 0,
        deadline: float | None = None,
        stand_ins: tuple[WorkingSet, ...] = (),
    ) -> int:
        number, self.numbers = self.numbers, self.numbers + 1
        assert self.tell(Submitted(self.now, number, step, priority, deadline)) == [Route(number)]
        self.tell(Routed(self.now, number, kind, stand_ins))
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
