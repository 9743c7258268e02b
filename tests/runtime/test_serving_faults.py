"""What must not end the thread that answers, nor mix up two requests: each found by trying to break it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.errors import NotAnswered, UsageError
from edgeml.made import make_cnn
from edgeml.result import Result
from edgeml.router import ResidentSet
from edgeml.scheduler_events import Limits, State, Step, WorkingSet
from edgeml.serving import Serving, Ticket

WAIT = 60


class Job:
    def __init__(self, fault: BaseException | None = None) -> None:
        self.fault, self.left = fault, 1

    def step(self) -> Step | None:
        return Step() if self.left else None

    def result(self) -> Result:
        if self.fault is not None:
            raise self.fault
        return Result("job")


class Workshop:
    """An engine whose hints are refused."""

    def route(self, work: Job) -> WorkingSet:
        return WorkingSet("job", frozenset({1}), leased=True)

    def compute(self, works: Sequence[Job], leased: bool, paged: Callable[[], None]) -> None:
        paged()
        for work in works:
            work.left = 0

    def advise(self, pages: Sequence[int], priority: int, load: bool) -> None:
        raise UsageError("there is no such page")


@pytest.mark.parametrize("fault", [MemoryError(), ValueError("widths differ"), SystemExit(1)])
def test_an_answer_that_cannot_be_put_together_fails_alone(fault: BaseException) -> None:
    serving = Serving(Workshop(), Limits(slots=1, queue=9))
    bad = serving.submit(Job(fault), "job")
    with pytest.raises(NotAnswered):
        bad.result(WAIT)
    assert serving.submit(Job(), "job").result(WAIT).task == "job"
    serving.close()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fault", [RuntimeError("callback"), SystemExit(1)])
def test_a_callback_that_raises_anything_ends_nobody(fault: BaseException) -> None:
    def refuse(ticket: Ticket) -> None:
        raise fault

    serving = Serving(Workshop(), Limits(slots=1, queue=9))
    assert serving.submit(Job(), "job", on_end=refuse).result(WAIT)
    assert serving.submit(Job(), "job").result(WAIT)
    serving.close()


def test_a_callback_may_close_but_not_wait() -> None:
    serving = Serving(Workshop(), Limits(slots=1, queue=9))
    said: list[str] = []

    def stop(ticket: Ticket) -> None:
        try:
            serving.drain()
        except UsageError as error:
            said.append(str(error))
        serving.close()

    serving.submit(Job(), "job", on_end=stop).result(WAIT)
    serving.close()
    assert said == ["on_end cannot wait for other requests: the thread that calls it answers them"]
    with pytest.raises(UsageError, match="the session is closed"):
        serving.submit(Job(), "job")


def test_a_deadline_passes_while_everybody_is_busy() -> None:
    """The one worker computes; nobody else tells the table anything."""
    go = threading.Event()

    class Slow(Workshop):
        def compute(self, works: Sequence[Job], leased: bool, paged: Callable[[], None]) -> None:
            super().compute(works, leased, paged)
            assert go.wait(WAIT)

    serving = Serving(Slow(), Limits(slots=1, queue=9))
    first = serving.submit(Job(), "job")
    late = [serving.submit(Job(), "job", deadline=seconds) for seconds in (0.2, 0.1, 0.15)]
    said: list[str] = []
    last = serving.submit(Job(), "job", deadline=0.05, on_end=lambda ticket: said.append(threading.current_thread().name))
    for ticket in (*late, last):
        with pytest.raises(NotAnswered, match="its deadline passed before it could run"):
            ticket.result(WAIT)
    assert first.state == State.RUNNING
    assert said == ["edgeml-deadlines"]
    go.set()
    assert first.result(WAIT)
    serving.close()
    assert not [thread for thread in threading.enumerate() if thread is serving._watcher]


def test_a_session_that_is_being_closed_begins_to_serve_no_more(toy: Path) -> None:
    session = edgeml.open(toy, threads=1)
    with session._call():  # a first submit that has not come to serving yet
        with pytest.raises(UsageError, match="1 calls still run"):
            session.close()
        with pytest.raises(UsageError, match="the session is closed"):
            session.serve()
    session.close()


def test_pages_of_no_expert_are_refused_at_once(toy: Path) -> None:
    with edgeml.open(toy, threads=1) as session:
        own = session.resident_set("weather")
        for resident in (dataclasses.replace(own, pages=(999_999,)), dataclasses.replace(own, mask=own.mask[:1])):
            with pytest.raises(UsageError, match="a resident set has pages of this bundle's routed experts"):
                session.submit("weather", "fog", resident=resident)
        assert session.submit("weather", "fog").result(WAIT)


def test_equal_pages_under_different_masks_are_not_one_batch(toy: Path) -> None:
    with edgeml.open(toy, threads=1) as session:
        whole = session.resident_set("weather")
        mask = whole.mask.copy()
        mask[:, ::2] = -np.inf
        narrow = ResidentSet(whole.pages, mask)
        session.submit("weather", texts=["sun and rain"] * 100)
        tickets = [session.submit("weather", "sun and rain", resident=resident) for resident in (whole, narrow, whole, narrow)]
        expected = [session.run("weather", "sun and rain", resident=resident).scores for resident in (whole, narrow, whole, narrow)]
        for ticket, scores in zip(tickets, expected, strict=True):
            np.testing.assert_allclose(ticket.result(WAIT).scores, scores, atol=1e-5)
            assert ticket.state == State.DONE


@pytest.mark.parametrize("images", ["a.png", np.zeros((8, 8), np.uint8), 5, None])
def test_one_image_is_not_a_list_of_images(tmp_path: Path, images: Any) -> None:
    make_cnn(tmp_path / "cnn.edgeml")
    with edgeml.open(tmp_path / "cnn.edgeml", threads=1) as session:
        task = session.manifest.tasks[0].name
        for ask in (session.submit, session.run):
            with pytest.raises(UsageError):
                ask(task, images=images)
