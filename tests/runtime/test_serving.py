"""Submitted requests: answers equal to `run`'s whatever shares their batch, and one sentence for each that goes wrong."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.errors import BudgetError, DataError, EdgemlError, NotAnswered, PageError, UsageError
from edgeml.made import make_cnn
from edgeml.result import Result
from edgeml.router import ResidentSet
from edgeml.scheduler_events import Limits, State, Step, WorkingSet
from edgeml.serving import Serving, Ticket
from edgeml.session import Session

WAIT = 60


class Job:
    """A request of some steps; `fault` is raised when it is computed."""

    def __init__(self, steps: int = 1, fault: Exception | None = None, lost: Exception | None = None) -> None:
        self.left, self.fault, self.lost = steps, fault, lost

    def step(self) -> Step | None:
        return Step() if self.left else None

    def result(self) -> Result:
        return Result("job")


class Workshop:
    """An engine that computes nothing, one batch whenever the test opens the gate."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.batches: list[int] = []
        self.begun = threading.Semaphore(0)

    def route(self, work: Job) -> tuple[WorkingSet, ...]:
        if work.lost is not None:
            raise work.lost
        return (WorkingSet("job", frozenset({1}), leased=True),)

    def compute(self, works: Sequence[Job], used: WorkingSet, paged: Callable[[], None]) -> None:
        assert used.leased
        paged()
        self.begun.release()
        assert self.gate.acquire(timeout=WAIT)
        self.batches.append(len(works))
        for work in works:
            if work.fault is not None:
                raise work.fault
        for work in works:
            work.left -= 1

    def advise(self, pages: Sequence[int], priority: int, load: bool) -> None:
        pass


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture
def serving(workshop: Workshop) -> Iterator[Serving]:
    serving = Serving(workshop, Limits(slots=1, queue=3))
    yield serving
    workshop.gate.release(1000)
    serving.close()


def test_tickets_tell_where_they_are(serving: Serving, workshop: Workshop) -> None:
    first = serving.submit(Job(), "job")
    assert workshop.begun.acquire(timeout=WAIT)
    second = serving.submit(Job(), "job")
    assert (first.state, second.state) == (State.RUNNING, State.ROUTED)
    with pytest.raises(TimeoutError, match="request 1 is still routed"):
        second.result(0.01)
    workshop.gate.release(2)
    assert first.result(WAIT).task == second.result(WAIT).task == "job"
    assert (first.state, second.state) == (State.DONE, State.DONE)
    assert second.result(WAIT).latency_s > 0
    assert serving.stats()["done"] == 2
    assert serving.stats()["busy_s"] > 0


def test_the_queue_is_bounded(serving: Serving, workshop: Workshop) -> None:
    tickets = [serving.submit(Job(), "job")]
    assert workshop.begun.acquire(timeout=WAIT)
    tickets += [serving.submit(Job(), "job") for _ in range(4)]
    assert tickets[-1].state == State.REFUSED
    with pytest.raises(NotAnswered, match=r"^the queue is full \(3 requests wait\); try again later$"):
        tickets[-1].result(WAIT)
    workshop.gate.release(2)
    for ticket in tickets[:-1]:
        ticket.result(WAIT)
    assert workshop.batches == [1, 3]


@pytest.mark.parametrize(
    ("deadline", "sentence"),
    [
        (-1, "the deadline is not in the future; give seconds from now, or none"),
        (0, "the deadline is not in the future; give seconds from now, or none"),
        (math.nan, "the deadline is not a number; give seconds from now, or none"),
        (math.inf, "a deadline is a number of seconds from now, not inf"),
        (10**400, f"a deadline is a number of seconds from now, not {str(10**400)[:40]}"),
        ("1", "a deadline is a number of seconds from now, not 1"),
        (True, "a deadline is a number of seconds from now, not True"),
    ],
)
def test_deadlines_that_cannot_be(serving: Serving, workshop: Workshop, deadline: Any, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        serving.submit(Job(), "job", deadline)
    assert str(caught.value) == sentence
    workshop.gate.release()
    assert serving.submit(Job(), "job", 60).result(WAIT)


@pytest.mark.parametrize("priority", [101, -101, 1.5, "1", True, None])
def test_priorities_that_cannot_be(serving: Serving, priority: Any) -> None:
    with pytest.raises(UsageError, match=r"^a priority is a whole number"):
        serving.submit(Job(), "job", priority=priority)


def test_a_deadline_that_passes(serving: Serving, workshop: Workshop) -> None:
    first = serving.submit(Job(), "job")
    assert workshop.begun.acquire(timeout=WAIT)
    late = serving.submit(Job(), "job", deadline=0.01)
    time.sleep(0.02)
    workshop.gate.release()
    first.result(WAIT)
    with pytest.raises(NotAnswered, match=r"^its deadline passed before it could run$"):
        late.result(WAIT)
    assert late.state == State.FAILED


def test_cancelling(serving: Serving, workshop: Workshop) -> None:
    """What waits ends at once; what runs ends at once as well, and its answer is thrown away."""
    running = serving.submit(Job(), "job")
    assert workshop.begun.acquire(timeout=WAIT)
    waiting = serving.submit(Job(), "job")
    for ticket in (waiting, running, running):
        ticket.cancel()
    for ticket in (waiting, running):
        with pytest.raises(NotAnswered, match=r"^the request was cancelled$"):
            ticket.result(0)
    workshop.gate.release()
    serving.drain()
    assert workshop.batches == [1]


def test_a_faulty_request_fails_alone(serving: Serving, workshop: Workshop) -> None:
    first = serving.submit(Job(), "job")
    assert workshop.begun.acquire(timeout=WAIT)
    tickets = [serving.submit(Job(fault=fault), "job") for fault in (None, PageError("page 3 is broken"), None)]
    workshop.gate.release(100)
    first.result(WAIT)
    assert [tickets[number].result(WAIT).task for number in (0, 2)] == ["job", "job"]
    with pytest.raises(PageError, match=r"^page 3 is broken$"):
        tickets[1].result(WAIT)
    assert workshop.batches == [1, 3, 1, 1, 1]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [(MemoryError(), "this machine has not enough free memory"), (ValueError("what"), "a fault in edgeml itself: ValueError: what")],
)
def test_any_fault_is_a_sentence_and_the_worker_goes_on(serving: Serving, workshop: Workshop, fault: Exception, sentence: str) -> None:
    workshop.gate.release(2)
    with pytest.raises(NotAnswered, match=f"^{sentence}"):
        serving.submit(Job(fault=fault), "job").result(WAIT)
    assert serving.submit(Job(), "job").result(WAIT)


def test_a_route_that_is_not_found(serving: Serving, workshop: Workshop) -> None:
    with pytest.raises(UsageError, match=r"^no usage$"):
        serving.submit(Job(lost=UsageError("no usage")), "job").result(WAIT)
    workshop.gate.release()
    assert serving.submit(Job(), "job").result(WAIT)


def test_a_request_of_several_steps(serving: Serving, workshop: Workshop) -> None:
    workshop.gate.release(3)
    assert serving.submit(Job(3), "job").result(WAIT)
    assert workshop.batches == [1, 1, 1]


def test_callbacks_may_submit_and_may_fail(serving: Serving, workshop: Workshop) -> None:
    following: list[Ticket] = []
    workshop.gate.release(3)
    first = serving.submit(Job(), "job", on_end=lambda ticket: following.append(serving.submit(Job(), "job")))
    first.result(WAIT)
    serving.drain()
    assert following[0].result(WAIT)


def test_closing_cancels_what_waits_and_answers_what_runs(workshop: Workshop) -> None:
    serving = Serving(workshop, Limits(slots=1))
    running = serving.submit(Job(), "job")
    assert workshop.begun.acquire(timeout=WAIT)
    waiting = serving.submit(Job(), "job")
    threading.Timer(0.05, workshop.gate.release).start()
    serving.close()
    serving.close()
    assert running.result(0)
    with pytest.raises(NotAnswered, match=r"^the request was cancelled$"):
        waiting.result(0)
    with pytest.raises(UsageError, match=r"^the session is closed$"):
        serving.submit(Job(), "job")


def test_many_threads_submit_and_cancel(workshop: Workshop) -> None:
    """Every ticket ends, and ends once."""
    workshop.gate.release(10_000)
    serving = Serving(workshop, Limits(slots=1, lanes=2, queue=50))
    ends: list[int] = []

    def caller(number: int) -> None:
        for turn in range(40):
            ticket = serving.submit(Job(1 + turn % 3), "job", on_end=lambda ticket: ends.append(ticket.number))
            if (turn + number) % 3 == 0:
                ticket.cancel()

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(WAIT)
    serving.drain()
    serving.close()
    assert sorted(ends) == list(range(160))


# ---- with a real session ----

TEXTS = ("Will it rain tomorrow?", "a warm and sunny day by the sea", "fog", "no, that was a very bad film: zzz 42")


@pytest.fixture(params=["exact", "masked"])
def session(toy: Path, request: pytest.FixtureRequest) -> Iterator[Session]:
    with edgeml.open(toy, memory="50%", residency=request.param, threads=1) as session:
        yield session


def test_submitted_answers_are_those_of_run(session: Session) -> None:
    """Requests of two tasks and of several sizes, at once: bit for bit what each would get alone, whoever shared its batch."""
    asked = [("weather" if number % 3 else "mood", [TEXTS[number % 4], TEXTS[(number + 1) % 4]][: 1 + number % 2]) for number in range(40)]
    tickets = [session.submit(task, texts=texts) for task, texts in asked]
    for ticket, (task, texts) in zip(tickets, asked, strict=True):
        found, wanted = ticket.result(WAIT), session.run(task, texts=texts)
        assert (found.task, found.labels, found.truncated) == (task, wanted.labels, wanted.truncated)
        assert found.scores is not None
        assert wanted.scores is not None
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-6)
        assert found.counters.tokens == wanted.counters.tokens
        assert len(found.row_s) == len(texts)
        assert min(found.row_s) > 0
    assert session.serve().stats()["done"] == 40


def test_a_long_request_is_answered_in_input_order(session: Session) -> None:
    texts = [" ".join([TEXTS[number % 4]] * (1 + number % 7)) for number in range(600)]
    found, wanted = session.submit("weather", texts=texts).result(WAIT), session.run("weather", texts=texts)
    assert found.labels == wanted.labels
    assert found.truncated == wanted.truncated


def test_vectors_arrays_and_no_texts_at_all(toy: Path) -> None:
    with edgeml.open(toy, threads=1) as session:
        ids = np.array([[2, 40, 41, 3]])
        vector = session.submit("vector", TEXTS[0]).result(WAIT).vectors
        np.testing.assert_allclose(vector, session.run("vector", TEXTS[0]).vectors, atol=1e-6)
        assert session.submit("weather", arrays={"ids": ids}).result(WAIT).labels == session.run("weather", arrays={"ids": ids}).labels
        assert session.submit("weather", texts=[]).result(WAIT).labels == []


def test_images_are_requests_too(tmp_path: Path) -> None:
    make_cnn(tmp_path / "m.edgeml")
    images = [np.full((40, 40), number * 60, np.uint8) for number in range(3)]
    with edgeml.open(tmp_path / "m.edgeml", threads=1) as session:
        task = next(task.name for task in session.manifest.tasks if task.kind == "classification")
        assert session.submit(task, images=images).result(WAIT).labels == session.run(task, images=images).labels
        with pytest.raises(UsageError, match="takes images"):
            session.submit(task, "a text")
        with pytest.raises(DataError):
            session.submit(task, images=[tmp_path / "nothing.png"]).result(WAIT)


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [({"text": ""}, DataError), ({"texts": ["a", 5]}, DataError), ({}, UsageError), ({"pairs": [("a", "b")]}, UsageError)],
)
def test_wrong_inputs_are_refused_at_once(session: Session, inputs: dict[str, Any], kind: type[EdgemlError]) -> None:
    with pytest.raises(kind):
        session.submit("weather", **inputs)
    with pytest.raises(UsageError, match="has no task"):
        session.submit("whether", "fog")
    assert session.submit("weather", "fog").result(WAIT)


def test_a_faulty_request_does_not_spoil_those_in_its_batch(toy: Path) -> None:
    """Token ids that the table does not have, among good ones, submitted while another batch runs."""
    with edgeml.open(toy, threads=1) as session:
        session.submit("weather", texts=list(TEXTS) * 100)
        good = [session.submit("weather", arrays={"ids": np.array([[2, 40 + number, 3]])}) for number in range(3)]
        bad = session.submit("weather", arrays={"ids": np.array([[2, 10**6, 3]])})
        assert all(len(ticket.result(WAIT).labels) == 1 for ticket in good)
        with pytest.raises(EdgemlError, match="1000000"):
            bad.result(WAIT)


def test_a_task_whose_set_cannot_be_chosen_fails_alone(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with edgeml.open(toy, memory="50%", residency="masked", threads=1) as session:
        choose = session.residents.resident_set

        def chosen(task: str) -> ResidentSet:
            if task == "mood":
                raise BudgetError("a site is left bare")
            return choose(task)

        monkeypatch.setattr(session.residents, "resident_set", chosen)
        with pytest.raises(BudgetError, match=r"^a site is left bare$"):
            session.submit("mood", "fog").result(WAIT)
        assert session.submit("weather", "fog").result(WAIT)


def test_closing_a_session_ends_its_requests(toy: Path) -> None:
    session = edgeml.open(toy, threads=1)
    tickets = [session.submit("weather", texts=list(TEXTS) * 8) for _ in range(20)]
    session.close()
    assert {ticket.state for ticket in tickets} <= {State.DONE, State.FAILED}
    with pytest.raises(UsageError, match="the session is closed"):
        session.submit("weather", "fog")
