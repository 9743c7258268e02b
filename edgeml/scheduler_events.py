"""What the scheduler is told, and what it tells to do: `scheduler` is the table between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

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

    `mask` tells sets of the same pages apart that forbid different experts: such requests share no batch.
    """

    task: str
    pages: frozenset[int] = frozenset()
    leased: bool = False
    mask: int = 0


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


# ---- events; `now` is in seconds of any clock that does not run backwards ----


@dataclass(frozen=True)
class Submitted:
    """A request has come. `deadline`: when its answer is of no use any more, on the clock of `now`; None: never."""

    now: float
    request: int
    step: Step = Step()
    priority: int = 0
    deadline: float | None = None


@dataclass(frozen=True)
class Routed:
    """The answer to `Route`."""

    now: float
    request: int
    set: WorkingSet


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
