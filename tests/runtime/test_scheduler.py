"""The scheduler as a table: short stories whose instructions are known. Random ones stand in `test_scheduler_random`."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scheduler_table import FULL, A, B, C, ends, table

from edgeml.errors import UsageError
from edgeml.scheduler import Scheduler
from edgeml.scheduler_events import (
    Advise,
    Broken,
    Cancelled,
    Dropped,
    End,
    Event,
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


@pytest.mark.parametrize("broken", [False, True])
def test_a_deadline_that_comes_while_a_step_runs_ends_what_follows_it(broken: bool) -> None:
    """Also where a tick has told of it meanwhile."""
    t = table()
    first = t.submit(A, Step(), deadline=5)
    t.submit(A)
    t.tell(Paged(0, 0))
    t.tell(Ticked(6))
    assert ends(t.said) == []
    t.tell(Broken(7, 0, "no") if broken else Stepped(7, 0, {first: Step()}))
    assert ends(t.said) == [(first, State.FAILED, "no" if broken else "its deadline passed before it could run")]
    assert len(t.pages()) == 1


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


# ---- stand-ins ----

OTHER = WorkingSet("b", frozenset({1, 2}), leased=True, mask=7, stand_in="other")
FAR = WorkingSet("b", frozenset({5, 6}), leased=True, mask=8, stand_in="far")


def read_and_computed(*, page_s: float = 1, compute_s: float = 1) -> Any:
    """A table that has read the two pages of a and computed with them."""
    t = table(slots=2)
    t.submit(A)
    t.now += 2 * page_s
    t.tell(Paged(t.now, 0))
    t.now += compute_s
    t.tell(Stepped(t.now, 0))
    assert t.scheduler.idle()
    return t


def test_another_set_stands_in_where_reading_the_own_one_would_be_late() -> None:
    t = read_and_computed()
    late = t.submit(B, deadline=t.now + 2.5, stand_ins=(FAR, OTHER))  # reading b takes 2 and computing 1
    assert t.pages() == [Page(1, (late,), OTHER)], "far helps more, but has to be read as well"
    t.finish(1)
    assert t.scheduler.stats["stand_ins"] == 1


@pytest.mark.parametrize(
    ("kind", "left", "stand_ins"),
    [(B, 3.5, (OTHER,)), (B, None, (OTHER,)), (B, 2.5, ()), (B, 2.5, (FAR,)), (B, 0.5, (OTHER,)), (A, 0.5, (OTHER,))],
    ids=["in time", "no deadline", "none", "none in time", "computing alone is late", "own set is there"],
)
def test_no_set_stands_in(kind: WorkingSet, left: float | None, stand_ins: tuple[WorkingSet, ...]) -> None:
    t = read_and_computed()
    t.submit(kind, deadline=None if left is None else t.now + left, stand_ins=stand_ins)
    assert [page.set for page in t.pages()] == [kind]
    assert t.scheduler.stats["stand_ins"] == 0


def test_nothing_stands_in_before_a_page_was_read_or_in_order_of_arrival() -> None:
    t = table(slots=2)
    t.submit(B, deadline=t.now + 1e-6, stand_ins=(OTHER,))
    assert [page.set for page in t.pages()] == [B]
    arrival = table(slots=2, order="arrival")
    arrival.submit(A)
    arrival.now += 2
    assert not arrival.finish(0)
    arrival.submit(B, deadline=arrival.now + 1, stand_ins=(OTHER,))
    assert [page.set for page in arrival.pages()] == [B]


def test_a_stand_in_that_does_not_fit_is_passed_over() -> None:
    t = read_and_computed()
    large = WorkingSet("b", frozenset({1, 2, 3}), leased=True, stand_in="large")
    t.submit(B, deadline=t.now + 2.5, stand_ins=(large, OTHER))
    assert [page.set for page in t.pages()] == [OTHER]


def test_those_that_would_be_late_too_share_the_stand_in_and_others_do_not() -> None:
    t = read_and_computed()
    t.submit(A)
    (first,) = t.pages()
    small = Step(1, 1)
    patient = t.submit(B, small)
    late = [t.submit(B, small, deadline=t.now + left, stand_ins=(OTHER,)) for left in (3.5, 3.4)]
    far = t.submit(B, small, deadline=t.now + 100, stand_ins=(OTHER,))
    (page,) = t.finish(first.batch)
    assert (page.set, sorted(page.requests)) == (OTHER, late)
    (page,) = t.finish(page.batch)
    assert (page.set, sorted(page.requests)) == (B, [patient, far])


def test_each_step_asks_anew() -> None:
    """A request of two steps: the first under a stand-in, the second, when its own pages have come, under its own set."""
    t = read_and_computed()
    long = t.submit(B, deadline=t.now + 2.5, stand_ins=(OTHER,))
    t.tell(Paged(t.now, 1))
    t.tell(Stepped(t.now + 0.1, 1, {long: FULL}))
    assert [page.set for page in t.pages()] == [OTHER]
    t.tell(Broken(t.now, 2, "it broke"))
    assert ends(t.said) == [(long, State.FAILED, "it broke")]
