"""The transfer matrix: measured as a loop would, kept in the sidecar, and used where a deadline leaves no time for the own set."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.data import Row
from edgeml.errors import DataError, InputError, UsageError
from edgeml.resident import Meter, Transfer
from edgeml.router import ResidentSet, mask_of
from edgeml.session import Session
from edgeml.sidecar import load
from edgeml.transfer import measure_transfer

WORDS = ("rain", "a warm and sunny day", "fog", "no, that was a bad film", "snow", "the sea is good", "hate", "tomorrow at home")
TEXTS = [f"{WORDS[number % 8]} {number}" for number in range(32)]
WAIT = 60


def two_domains(manifest: dict[str, Any]) -> None:
    for task in manifest["tasks"]:
        task["domain"] = {"weather": "sky", "mood": "film"}.get(task["name"], "other")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def path(rebuild: Any) -> Path:
    built: Path = rebuild(change=two_domains)
    return built


@pytest.fixture
def opened(path: Path, state: Path) -> Iterator[Callable[..., Session]]:
    sessions: list[Session] = []

    def build(residency: str, memory: str = "50%") -> Session:
        sessions.append(edgeml.open(path, memory=memory, residency=residency, state=str(state), threads=1))
        return sessions[-1]

    yield build
    for session in sessions:
        session.close()


def rows(labelled: bool) -> dict[str, list[Row]]:
    return {task: [Row(text, None, number % 2 if labelled else None) for number, text in enumerate(TEXTS)] for task in ("weather", "mood")}


# ---- measuring ----


@pytest.mark.parametrize("labelled", [True, False])
def test_a_matrix_is_what_a_loop_finds(opened: Callable[..., Session], labelled: bool) -> None:
    session, ticks = opened("exact"), list[int]()
    own = session.resident_set("weather").pages
    found = measure_transfer(session, rows(labelled), ticks.append)
    assert (found.domains, found.examples, found.by) == (("film", "sky"), (32, 32), "labels" if labelled else "agreement")
    assert sum(ticks) == 64 * 4
    tasks = {"film": "mood", "sky": "weather"}
    none = ResidentSet((), mask_of(session.manifest, ()))
    for j, domain in enumerate(found.domains):
        task = session.task(tasks[domain])

        def score(resident: ResidentSet | None, name: str = task.name, labels: tuple[str, ...] = task.labels) -> float:
            right = 0
            for number, text in enumerate(TEXTS):
                wanted = labels[number % 2] if labelled else session.run(name, text).labels[0]
                right += session.run(name, text, resident=resident).labels[0] == wanted
            return right / len(TEXTS)

        assert found.reference[j] == score(None)
        assert found.baseline is not None
        assert found.baseline[j] == score(none)
        for i, other in enumerate(found.domains):
            assert found.scores[i][j] == score(ResidentSet(found.sets[i], mask_of(session.manifest, found.sets[i]))), (other, domain)
            possible = found.scores[j][j] - found.baseline[j]
            ratio = (found.scores[i][j] - found.baseline[j]) / possible if possible >= 0.01 else None
            assert found.ratios[i][j] == pytest.approx(ratio)
    assert found.sets[1] == own
    if not labelled:
        assert found.reference == (1, 1)


def test_what_was_measured_is_kept_beside_what_was_learned(opened: Callable[..., Session], path: Path, state: Path) -> None:
    session = opened("hybrid")
    session.load("weather")
    session.run("weather", texts=TEXTS)
    found = measure_transfer(session, rows(False))
    place = session.residents.keep(found)
    session.close()
    assert place.parent == state
    learned, problem = load(place, session.bundle.id, session.manifest)
    assert problem is None
    assert learned is not None
    assert learned.transfer == found
    assert learned.tasks["weather"].watched.tokens > 0
    assert opened("masked").residents.transfer == found


def test_a_second_measurement_takes_the_place_of_the_first(opened: Callable[..., Session]) -> None:
    session = opened("exact")
    found = matrix(session)
    session.residents.keep(found)
    other = dataclasses.replace(found, by="agreement")
    session.residents.keep(other)
    assert opened("masked").residents.transfer == other


def test_without_shared_experts_there_is_no_baseline_and_nothing_stands_in(rebuild: Any, state: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        two_domains(manifest)
        for site in manifest["sites"]:
            site["shared"] = []

    with edgeml.open(rebuild(change=change), memory="50%", state=str(state)) as session:
        found = measure_transfer(session, rows(False))
    assert found.baseline is None
    assert found.cdtr is None
    assert found.ratios == ((None, None), (None, None))
    assert found.stand_ins("sky") == []


@pytest.mark.parametrize(
    ("residency", "memory", "change", "kind", "sentence"),
    [
        ("masked", "50%", {}, UsageError, "measure with residency exact or hybrid"),
        ("exact", "100%", {}, UsageError, "everything fits this budget"),
        ("exact", "50%", {"mood": None}, UsageError, "transfer is between the bundle's domains, and there is data of sky only"),
        ("exact", "50%", {"mood": [Row("fog", None, 0)] * 29}, DataError, "domain 'film' has 29 rows, and 30 are the fewest"),
        ("exact", "50%", {"vector": [Row("fog")] * 30}, UsageError, "task 'vector' has no labels on texts"),
        ("exact", "50%", {"tide": [Row("fog")] * 30}, UsageError, "has no task 'tide'"),
        ("exact", "50%", {"mood": [Row("", None, 0)] * 30}, DataError, "the text is empty"),
    ],
)
def test_what_cannot_be_measured(
    opened: Callable[..., Session], residency: str, memory: str, change: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    data = {name: found for name, found in (rows(True) | change).items() if found is not None}
    session = opened(residency, memory)
    with pytest.raises(kind, match=sentence) as caught:
        measure_transfer(session, data)
    assert "\n" not in str(caught.value)
    assert session.run("weather", "fog").labels


def test_a_sidecar_of_another_bundle_is_not_written_over(opened: Callable[..., Session], state: Path) -> None:
    session = opened("exact")
    place = session.residents.keep(matrix(session))
    content = place.read_bytes()
    place.write_bytes(content.replace(b"edgeml usage 1", b"edgeml usage 9"))
    with pytest.raises(InputError, match="install a newer edgeml-runtime"):
        session.residents.keep(matrix(session))
    assert place.read_bytes().startswith(b"edgeml usage 9")


# ---- whose set stands in ----


def matrix(session: Session, helps: float = 0.7) -> Transfer:
    """film's set keeps `helps` of what sky's own makes of sky's data, from a baseline of 0.5."""
    sets = tuple(session.residents.domain_set(domain).pages for domain in ("film", "sky"))
    scores = ((0.9, 0.5 + 0.4 * helps), (0.5, 0.9))
    return Transfer(("film", "sky"), sets, scores, (0.99, 0.99), (0.5, 0.5), (30, 30), "labels")


def test_the_best_helper_comes_first_and_none_that_does_not_help() -> None:
    scores = ((0.8, 0.8, 0.8, 0.8), (0.7, 0.7, 0.7, 0.7), (0.4, 0.3, 0.9, 0.9), (0.5, 0.5, 0.5, 0.5))
    found = Transfer(tuple("abcd"), ((1,), (2,), (3,), (4,)), scores, (0.9,) * 4, (0.4,) * 4, (30,) * 4, "labels")
    assert [(name, pages) for name, _, pages in found.stand_ins("d")] == [("c", (3,)), ("a", (1,)), ("b", (2,))]
    assert [name for name, _, _ in found.stand_ins("a")] == ["b", "d"], "c is no better than no set at all"
    assert [name for name, _, _ in found.stand_ins("b")] == ["a", "d"], "c interferes"
    assert found.stand_ins("e") == []
    assert found.cdtr is not None


def slow_disk(session: Session) -> None:
    """Nothing can be read within a deadline, and computing takes no time."""
    known = session.residents._known
    known.computing, known.reading = Meter(1e12, 1), Meter(1, 1e6)


def hold(session: Session, pages: tuple[int, ...]) -> None:
    session._context.settle()
    session.evict_all()
    with session._context.request() as request:
        request.lease(pages)


@pytest.mark.parametrize("residency", ["masked", "hybrid"])
def test_a_call_that_cannot_wait_takes_the_set_that_is_there(opened: Callable[..., Session], residency: str) -> None:
    session = opened(residency)
    found = matrix(session)
    session.residents.keep(found)
    assert set(found.sets[0]) != set(session.resident_set("weather").pages)
    session.load("weather")
    slow_disk(session)
    hold(session, found.sets[0])
    film = ResidentSet(found.sets[0], mask_of(session.manifest, found.sets[0]))
    result = session.run("weather", texts=TEXTS, deadline_s=100)
    slow_disk(session)
    if residency == "masked":
        assert result.counters.stand_in == "film"
    if result.counters.stand_in:  # what hybrid residency has of the own set may be worth more
        np.testing.assert_allclose(result.scores, session.run("weather", texts=TEXTS, resident=film).scores, atol=1e-6)
        assert result.counters.page_in_bytes == 0
    assert session.run("weather", texts=TEXTS).counters.stand_in == "", "without a deadline nothing stands in"


def test_what_is_left_of_the_own_set_competes_by_what_it_covers(opened: Callable[..., Session]) -> None:
    """film's set holds a page or none of weather's: a large T wins, a small one loses against all of the own set."""
    for helps, own, wanted in ((0.99, 0, "film"), (0.01, None, ""), (1.2, None, "")):
        session = opened("hybrid")
        found = matrix(session, helps)
        session.residents.keep(found)
        session.load("weather")
        slow_disk(session)
        both = set(found.sets[0]) | set(session.resident_set("weather").pages[:own])
        hold(session, tuple(sorted(both)[: session.budget.slots]) if own == 0 else session.resident_set("weather").pages)
        result = session.run("weather", texts=TEXTS, deadline_s=100)
        assert result.counters.stand_in == wanted
        session.close()


@pytest.mark.parametrize("helps", [0, -0.5])
def test_a_set_that_does_not_help_is_refused(opened: Callable[..., Session], helps: float) -> None:
    session = opened("masked")
    found = matrix(session, helps)
    session.residents.keep(found)
    assert session.residents.stand_ins("weather") == []
    slow_disk(session)
    hold(session, found.sets[0])
    assert session.run("weather", texts=TEXTS, deadline_s=100).counters.stand_in == ""


def test_sets_that_do_not_fit_this_budget_do_not_stand_in(opened: Callable[..., Session]) -> None:
    session = opened("exact")
    session.residents.keep(matrix(session))
    assert [each.stand_in for each in opened("masked", "50%").residents.stand_ins("weather")] == ["film"]
    assert opened("masked", "20%").residents.stand_ins("weather") == []
    assert opened("masked", "100%").residents.stand_ins("weather") == [], "nothing has to be read"


def test_a_submitted_request_says_whose_set_stood_in(opened: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has seen that reading takes long; film's set is in memory when a request for weather comes that cannot wait."""
    session = opened("masked")
    found = matrix(session)
    session.residents.keep(found)
    film = ResidentSet(found.sets[0], mask_of(session.manifest, found.sets[0]))
    session.submit("mood", "fog", resident=film).result(WAIT)
    table = session.serve()._table
    table._page_s, table._compute_s = 1e3, 1e-3
    session._context.settle()
    late = session.submit("weather", texts=TEXTS, deadline=600)
    patient = session.submit("weather", texts=TEXTS)
    result = late.result(WAIT)
    assert result.counters.stand_in == "film"
    np.testing.assert_allclose(result.scores, session.run("weather", texts=TEXTS, resident=film).scores, atol=1e-5)
    told = patient.result(WAIT)
    assert told.counters.stand_in == ""
    np.testing.assert_allclose(told.scores, session.run("weather", texts=TEXTS).scores, atol=1e-5)
    assert session.serve().stats()["stand_ins"] >= 1


def test_a_parent_process_is_told_whether_a_set_stood_in(path: Path) -> None:
    command = [sys.executable, "-P", "-m", "edgeml.cli", "serve-stdin", str(path), "--threads", "1", "--quiet"]
    line = json.dumps({"id": 1, "task": "weather", "text": "fog"})
    done = subprocess.run(command, input=line, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["stand_in"] is None
