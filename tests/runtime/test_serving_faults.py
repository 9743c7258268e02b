"""What must not end the thread that answers, nor mix up two requests: each found by trying to break it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.bundle import Bundle
from edgeml.errors import EdgemlError, NotAnswered, UsageError
from edgeml.graph_bytes import Node, graph
from edgeml.made import make_cnn
from edgeml.manifest import load_manifest
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

    def route(self, work: Job) -> tuple[WorkingSet, ...]:
        return (WorkingSet("job", frozenset({1}), leased=True),)

    def compute(self, works: Sequence[Job], used: WorkingSet, paged: Callable[[], None]) -> None:
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
        def compute(self, works: Sequence[Job], used: WorkingSet, paged: Callable[[], None]) -> None:
            super().compute(works, used, paged)
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


class Caller(threading.Thread):
    """Submits until the session is closed."""

    def __init__(self, session: edgeml.Session, ready: threading.Barrier) -> None:
        super().__init__()
        self.session, self.ready = session, ready
        self.tickets, self.said = list[Ticket](), ""

    def run(self) -> None:
        self.ready.wait(WAIT)
        try:
            for _ in range(3):
                self.tickets.append(self.session.submit("weather", "fog", deadline=WAIT))
        except UsageError as error:
            self.said = str(error)


def close_after_calls(session: edgeml.Session) -> str:
    """Close it, however often that is refused because calls run; returns the last refusal."""
    refused = ""
    for _ in range(1000):
        try:
            session.close()
            break
        except UsageError as error:
            refused = str(error)
            time.sleep(1e-3)
    return refused


def test_closing_while_other_threads_submit_ends_every_ticket(toy: Path) -> None:
    """Whoever comes first: a ticket that ends, or a sentence; and nothing is left running."""
    before = threading.active_count()
    for turn in range(12):
        session, ready = edgeml.open(toy, threads=1), threading.Barrier(4)
        callers = [Caller(session, ready) for _ in range(3)]
        for each in callers:
            each.start()
        ready.wait(WAIT)
        time.sleep(turn * 2e-3)
        refused = close_after_calls(session)
        assert not refused or "calls still run; close the session after them" in refused
        for each in callers:
            each.join(WAIT)
            assert not each.is_alive()
            assert not each.said or "the session is closed" in each.said
            for ticket in each.tickets:
                assert ticket._ended.wait(WAIT)
                assert (ticket._result is None) == (str(ticket._error) == "the request was cancelled")
    assert threading.active_count() == before


SITES, EXPERTS, HIDDEN = 2, 8, 64
INPUTS: dict[str, Any] = {"hidden0": ("float32", ("B", "T", HIDDEN)), "mask": ("float32", ("B", "T"))}


def router_of_experts(expert: int, weight: float) -> bytes:
    """A router that sends each token to one expert of site 0 and answers what becomes of its first numbers, as a bias."""
    row = np.array([1, 1, 1], np.int64)
    constants: dict[str, Any] = {
        "expert": np.full(1, expert), "weight": np.full(1, weight, np.float32), "row": row, "zero": np.array([0]), "axis": np.array([1]),
        "end": np.array([SITES * EXPERTS]), "last": np.array([-1]), "shape": np.array([-1, SITES, EXPERTS]),
    }  # fmt: skip
    nodes = [
        Node("Shape", ["mask"], ["size"]),
        Node("Concat", ["size", "axis"], ["each"], {"axis": 0}),
        Node("Expand", ["expert", "each"], ["ids"]),
        Node("Expand", ["weight", "each"], ["weights"]),
        Node("PagedExperts", ["hidden0", "ids", "weights"], ["y"], {"site": 0}, "edgeml"),
        Node("ReduceMean", ["y"], ["mean"], {"axes": [1], "keepdims": 0}),
        Node("Slice", ["mean", "zero", "end", "last"], ["some"]),
        Node("Reshape", ["some", "shape"], ["bias"]),
    ]
    return graph(nodes, INPUTS, {"bias": ("float32", ("B", SITES, EXPERTS))}, constants, {"": 17, "edgeml": 1})


def constant_router(value: float) -> bytes:
    bias = np.full((1, SITES, EXPERTS), value, np.float32)
    node = Node("Constant", [], ["bias"], {"value": bias})
    return graph([node], INPUTS, {"bias": ("float32", (1, SITES, EXPERTS))}, {}, {"": 17, "edgeml": 1})


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        (router_of_experts(0, 1), None),
        (router_of_experts(77, 1), "stage 'router_mood' failed: Non-zero status code returned"),
        (router_of_experts(-2, 1), "edgeml.PagedExperts: -2 is outside its range"),
        (router_of_experts(0, np.nan), "the router of task 'mood' answers a bias that is not a number or infinite"),
        (constant_router(np.nan), "the router of task 'mood' answers a bias that is not a number or infinite"),
        (constant_router(-np.inf), "the router of task 'mood' leaves no expert of site 'layer.0' to choose, and it has no shared one"),
        (constant_router(0)[:-9], "stage 'router_mood'"),
    ],
    ids=["good", "id too large", "id too small", "weights", "bias", "bare", "damaged"],
)
def test_a_faulty_router_spoils_its_own_requests_only(toy: Path, rebuild: Any, page: bytes, sentence: str | None) -> None:
    with Bundle.open(toy) as bundle:
        place = next(stage.page for stage in load_manifest(bundle).stages if stage.name == "router_mood")

    def declare(manifest: dict[str, Any]) -> None:
        next(stage for stage in manifest["stages"] if stage["name"] == "router_mood").update(inputs=["hidden0", "mask"])
        for site in manifest["sites"]:
            site["shared"] = []

    with edgeml.open(rebuild({place: page}, declare), threads=1) as session:
        wanted = session.run("weather", "fog").labels
        tickets = [session.submit(task, "fog") for task in ("mood", "weather", "mood", "weather")]
        assert [ticket.result(WAIT).labels for ticket in tickets[1::2]] == [wanted, wanted]
        for ticket in tickets[::2]:
            if sentence is None:
                assert ticket.result(WAIT).labels
                continue
            with pytest.raises(EdgemlError) as caught:
                ticket.result(WAIT)
            assert sentence in str(caught.value)
            assert "\n" not in str(caught.value)
            assert ticket.state == State.FAILED


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
