"""What the scheduler's table keeps of each request, and the states it goes through: data only, and no decision."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from edgeml.errors import UsageError
from edgeml.scheduler_events import State, Step, WorkingSet

__all__ = ["Batch", "Group", "Request", "by_priority", "by_turn", "move", "recent", "story"]

NO_SET = WorkingSet("")
MOVES = {
    State.QUEUED: {State.ROUTED, State.REFUSED, State.FAILED},
    State.ROUTED: {State.PAGING, State.FAILED},
    State.PAGING: {State.RUNNING, State.ROUTED, State.FAILED},
    State.RUNNING: {State.DONE, State.ROUTED, State.FAILED},
}


@dataclass(eq=False)
class Group:
    """Requests of one set; `lacking`: how many of its pages are not expected to be resident, None where that has to be counted."""

    set: WorkingSet
    waiting: dict[int, Request] = field(default_factory=dict)
    lacking: int | None = None
    first: Request | None = None  # of the highest priority, the earliest; None where that has to be looked for


@dataclass(eq=False)
class Request:
    """A request that has not ended."""

    number: int
    step: Step
    priority: int
    deadline: float | None
    state: State = State.QUEUED
    own: WorkingSet = NO_SET
    stand_ins: tuple[WorkingSet, ...] = ()
    group: Group | None = None  # of its own set or of a stand-in
    turn: int = 0  # order of arrival among the routed
    passed: int = 0  # batches begun by later ones
    allowed: int = 0  # how many of them it has to bear
    alone: bool = False  # it was in a batch that broke
    story: deque[State] = field(default_factory=lambda: deque(maxlen=16))


@dataclass(eq=False)
class Batch:
    """Requests that run together, all of one group; `begun` and `paged` on the clock of the events."""

    requests: list[Request]
    group: Group
    begun: float
    lacking: int  # pages that had to be read
    paged: float | None = None


def recent(mean: float, value: float) -> float:
    """A mean in which the past fades."""
    return value if not mean else 0.75 * mean + 0.25 * value


def by_turn(request: Request) -> int:
    """The earliest first."""
    return request.turn


def by_priority(request: Request) -> tuple[int, int]:
    """The most urgent first, then the earliest."""
    return -request.priority, request.turn


def move(request: Request, state: State) -> None:
    """Change a request's state. Raises `UsageError` for a step that the table does not have."""
    if state not in MOVES[request.state]:
        raise UsageError(f"{state} cannot follow: {story(request)}")
    request.story.append(request.state)
    request.state = state


def story(request: Request) -> str:
    """The states it was in, for a sentence."""
    return f"request {request.number} was {', '.join([*request.story, request.state])}"
