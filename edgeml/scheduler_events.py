"""What the scheduler is told, and what it tells to do: `scheduler` is the table between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from edgeml.errors import UsageError

__all__ = [
    "PRIORITIES", "Advise", "Broken", "Cancelled", "Dropped", "End", "Event", "Instruction", "Limits", "Page", "Paged", "Route", "Routed",
    "Run", "State", "Step", "Stepped", "Submitted", "Ticked", "WorkingSet",
]  # fmt: skip

#: Priorities of requests lie between minus this and this.
PRIORITIES = 100


class State(StrEnum):
    """Where a request is."""

    QUEUED = "queued"  # waits for its route
    ROUTED = "routed"  # its working set is known: waits for a lane
    PAGING = "paging"  # its pages are read and pinned
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(frozen=True)
class Step:
    """What a request computes at once: `rows`, each of up to `tokens`."""

    rows: int = 1
    tokens: int = 1


@dataclass(frozen=True)
class WorkingSet:
    """Pages that requests of a task need. `leased`: they are pinned while it runs, and no others are used; else a guess.

    `mask` tells sets of the same pages apart that forbid different experts: such requests share no batch. `stand_in`: the domain
    whose set it is, where that is not the task's own.
    """

    task: str
    pages: frozenset[int] = frozenset()
    leased: bool = False
    mask: int = 0
    stand_in: str = ""


@dataclass(frozen=True)
class Limits:
    """`slots` of the pager; `queue`: most requests that wait; a batch holds at most `rows` and `tokens`, padding included, unless one
    step is larger; `lanes`: batches at once; `patience`: see Fairness; `order`: "overlap" or "arrival".
    """

    slots: int
    queue: int = 256
    rows: int = 32
    tokens: int = 1024
    lanes: int = 1
    patience: int = 2
    order: str = "overlap"

    def __post_init__(self) -> None:
        if self.order not in ("overlap", "arrival"):
            raise UsageError(f"the order must be overlap or arrival, not {self.order!r:.40}")
        if min(self.queue, self.rows, self.tokens, self.lanes) < 1 or min(self.patience, self.slots) < 0:
            raise UsageError("limits of queue, rows, tokens and lanes are at least 1, patience and slots at least 0")


# ---- events; `now` is in seconds of any clock that does not run backwards ----


@dataclass(frozen=True)
class Submitted:
    """A request has come. `deadline`: when its answer is of no use any more, on the clock of `now`; None: never."""

    now: float
    request: int
    step: Step = Step()
    priority: int = 0
    deadline: float | None = None

    def check(self) -> None:
        """Raise `UsageError` for what cannot be."""
        if self.step.rows < 1 or self.step.tokens < 1:
            raise UsageError("a step has at least one row and one token")
        if not -PRIORITIES <= self.priority <= PRIORITIES:
            raise UsageError(f"a priority is a whole number from -{PRIORITIES} to {PRIORITIES}, not {self.priority}")
        if self.deadline is not None and math.isnan(self.deadline):
            raise UsageError("the deadline is not a number; give seconds from now, or none")
        if self.deadline is not None and self.deadline <= self.now:
            raise UsageError("the deadline is not in the future; give seconds from now, or none")


@dataclass(frozen=True)
class Routed:
    """The answer to `Route`. `stand_ins`: sets that may be used where there is no time to read `set`, the best first."""

    now: float
    request: int
    set: WorkingSet
    stand_ins: tuple[WorkingSet, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """A request cannot go on for a reason of its own."""

    now: float
    request: int
    reason: str


@dataclass(frozen=True)
class Cancelled:
    """Nobody wants the answer any more. Unknown and ended requests are passed over in silence: the message may come late."""

    now: float
    request: int


@dataclass(frozen=True)
class Paged:
    """The pages of a batch are there."""

    now: float
    batch: int


@dataclass(frozen=True)
class Stepped:
    """A batch has ended well; `more` are those of its requests that need a further step."""

    now: float
    batch: int
    more: Mapping[int, Step] = field(default_factory=dict)


@dataclass(frozen=True)
class Broken:
    """A batch could not be paged in or computed."""

    now: float
    batch: int
    reason: str


@dataclass(frozen=True)
class Ticked:
    """Time has passed and nothing else has happened: told when a deadline has come, see `Scheduler.due`."""

    now: float


# ---- instructions ----


@dataclass(frozen=True)
class Route:
    """Find the request's working set, then tell `Routed` or `Dropped`."""

    request: int


@dataclass(frozen=True)
class Page:
    """Begin a batch: pin the set's pages if it is leased, then tell `Paged`, or `Broken`."""

    batch: int
    requests: tuple[int, ...]
    set: WorkingSet


@dataclass(frozen=True)
class Run:
    """Compute a step of each request, then tell `Stepped` or `Broken`. Without it after `Paged`, give the batch up: tell `Stepped`."""

    batch: int


@dataclass(frozen=True)
class Advise:
    """Tell the pager: these pages have this priority; with `load`, read the absent ones where there is room."""

    pages: tuple[int, ...]
    priority: int
    load: bool = False


@dataclass(frozen=True)
class End:
    """A request is done, failed or refused; `reason` is a sentence unless it is done."""

    request: int
    state: State
    reason: str = ""


Event = Submitted | Routed | Dropped | Cancelled | Paged | Stepped | Broken | Ticked
Instruction = Route | Page | Run | Advise | End
