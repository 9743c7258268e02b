"""Stand-ins from the measurement to the answer: learned by `edgeml eval --learn`, met by a deadline, told by `bench` and `serve-stdin`; and
requests that share a batch, of which only some cannot wait."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgeml
from edgeml.batching import checked_arrays
from edgeml.bundle import Bundle, PageSource, write_bundle
from edgeml.cli import main
from edgeml.commands._records import COLUMNS, MIX
from edgeml.errors import PageError
from edgeml.made import make_mixture
from edgeml.manifest import Manifest, load_manifest
from edgeml.records import read
from edgeml.resident import Meter
from edgeml.result import Counters
from edgeml.router import ResidentSet, mask_of
from edgeml.scheduler_events import WorkingSet
from edgeml.session import Session
from edgeml.sidecar import Learned, place_of, save
from edgeml.submission import SessionEngine, TextWork, text_work

WORDS = ["sun", "rain", "snow", "fog", "car", "train", "good", "bad", "day", "night", "river", "sea", "the", "a", "is", "was"]
TEXTS = [" ".join(np.random.default_rng(number).choice(WORDS, 2 + number % 4)) for number in range(40)]
WAIT = 300


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m.edgeml: a task uses always the same four experts, and weather (domain sky) and mood (film) have none in common; film's help with
    weather, sky's not with mood. And rows of both whose labels are what it answers."""
    place = tmp_path_factory.mktemp("stand-ins")
    make_mixture(place / "made.edgeml", skew=30.0, seed=24)
    with Bundle.open(place / "made.edgeml") as bundle:
        pages = [PageSource(p.kind, bundle.read(p.id), p.matrices, p.activation, max(p.count, 1)) for p in bundle.pages]
        manifest = dict(bundle.manifest)
    for task in manifest["tasks"]:
        task["domain"] = {"weather": "sky", "mood": "film"}.get(task["name"], "other")
    write_bundle(place / "m.edgeml", pages, manifest)
    with edgeml.open(place / "m.edgeml") as session:
        for domain, name in (("sky", "weather"), ("film", "mood")):
            folder = place / "data" / domain / name
            folder.mkdir(parents=True)
            task, answers = session.task(name), session.run(name, texts=TEXTS).labels
            described = {"name": name, "domain": domain, "labels": list(task.labels), "metric": "accuracy"}
            (folder / "task.json").write_text(json.dumps(described))
            rows = "".join(
                json.dumps({"text": text, "label": task.labels.index(label)}) + "\n" for text, label in zip(TEXTS, answers, strict=True)
            )
            for split in ("train", "test"):
                (folder / f"{split}.jsonl").write_text(rows)
    return place


@pytest.fixture
def state(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """What the device has learned: the transfer matrix, by the command; and that its disk takes for ever, which no test could wait for."""
    (tmp_path / "state").mkdir()
    monkeypatch.setenv("EDGEML_STATE", str(tmp_path / "state"))
    bundle = place / "m.edgeml"
    assert main(["eval", str(bundle), "--data", str(place / "data"), "--memory", "25%", "--threads", "1", "--learn"]) == 0
    shown = capsys.readouterr()
    assert "edgeml-" in shown.err
    table = [line.split() for line in shown.out.splitlines()[-3:]]
    assert [row[0] for row in table] == ["set", *table[0][1:]] == ["set", "film", "sky"]
    assert table[1][1] == table[2][2] == "1.00"
    assert 0.5 < float(table[1][2]) < 1
    assert float(table[2][1]) < 0
    with Bundle.open(bundle) as opened:
        sidecar, manifest = place_of(bundle, opened.id), load_manifest(opened)
        save(sidecar, opened.id, manifest, Learned(reading=Meter(1e6, 1e12)))
    return tmp_path / "state"


# ---- the whole loop, from the command line ----


WORKLOAD = """
requests = 30
warmup = 10
[arrival]
ARRIVAL
[[mix]]
task = "mood"
tokens = 6
[[mix]]
task = "weather"
tokens = 6
DEADLINE
"""


@pytest.mark.parametrize("arrival", ['kind = "closed"\nconcurrency = 1', 'kind = "bursts"\nrate_per_s = 300\nburst = 3'])
def test_a_benchmark_says_how_many_requests_another_set_answered(
    place: Path, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arrival: str
) -> None:
    (tmp_path / "w.toml").write_text(WORKLOAD.replace("ARRIVAL", arrival).replace("DEADLINE", "deadline_s = 1000"))
    asked = ["bench", str(place / "m.edgeml"), "--workload", str(tmp_path / "w.toml"), "--memory", "25%", "--threads", "1"]
    assert main([*asked, "--residency", "hybrid,exact", "--records", str(tmp_path / "r.jsonl")]) == 0
    hybrid, exact = read(tmp_path / "r.jsonl")
    tasks = hybrid["mix"]["by_task"]
    assert tasks["weather"]["stand_in_share"] == 1, "its own set is on the slow disk, and film's in memory"
    assert tasks["mood"]["stand_in_share"] is None, "it has no deadline"
    assert hybrid["stand_in_share"] == pytest.approx(tasks["weather"]["answered"] / hybrid["mix"]["answered"])
    assert 0 < hybrid["stand_in_share"] < 1
    assert hybrid["expected_retention"] is None
    assert exact["stand_in_share"] is None, "nothing is masked"
    assert exact["mix"]["by_task"]["weather"]["stand_in_share"] is None
    lines = capsys.readouterr().out.splitlines()
    place_in_row = [name for name, _, _ in (*COLUMNS, *MIX) if name != "cold p50 ms"].index("stand-in %")
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    assert [row[place_in_row] for row in rows if ":" not in row[0]] == ["stand-in %", f"{100 * hybrid['stand_in_share']:.1f}", "-"]


@pytest.mark.parametrize("lacking", ["deadline", "matrix"])
def test_where_nothing_could_stand_in_it_is_null(
    place: Path, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lacking: str
) -> None:
    (tmp_path / "w.toml").write_text(
        WORKLOAD.replace("ARRIVAL", 'kind = "closed"').replace("DEADLINE", "deadline_s = 1000" if lacking == "matrix" else "")
    )
    if lacking == "matrix":
        for sidecar in state.iterdir():
            sidecar.unlink()
    asked = ["bench", str(place / "m.edgeml"), "--workload", str(tmp_path / "w.toml"), "--memory", "25%", "--residency", "hybrid"]
    assert main([*asked, "--threads", "1", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["records"]
    assert record["stand_in_share"] is None
    assert [task["stand_in_share"] for task in record["mix"]["by_task"].values()] == [None, None]


def test_a_parent_process_is_told_whose_set_stood_in(place: Path, state: Path) -> None:
    command = [sys.executable, "-P", "-m", "edgeml.cli", "serve-stdin", str(place / "m.edgeml"), "--memory", "25%", "--residency", "hybrid"]
    with subprocess.Popen([*command, "--threads", "1", "--quiet"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def ask(task: str, **more: Any) -> dict[str, Any]:
            child.stdin.write(json.dumps({"id": task, "task": task, "text": TEXTS[0], **more}) + "\n")  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]
            found: dict[str, Any] = json.loads(child.stdout.readline())  # type: ignore[union-attr]
            return found

        assert ask("mood")["stand_in"] is None
        late = ask("weather", deadline_s=1000)
        patient = ask("weather")
        child.stdin.close()
        assert child.wait(WAIT) == 0
    assert (late["state"], late["stand_in"]) == ("done", "film")
    assert (patient["state"], patient["stand_in"]) == ("done", None)
    with edgeml.open(place / "m.edgeml", memory="25%") as session:
        scores = session.run("weather", TEXTS[0]).scores
        assert scores is not None
        assert list(patient["results"][0]["scores"].values()) == [float(score) for score in scores[0]], "it could wait, so it is exact"
        assert list(late["results"][0]["scores"].values()) != [float(score) for score in scores[0]]


def test_an_evaluation_has_no_deadlines(place: Path, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["eval", str(place / "m.edgeml"), "--data", str(place / "data"), "--memory", "25%", "--residency", "hybrid"]
    assert main([*asked, "--threads", "1", "--records", str(tmp_path / "r.jsonl")]) == 0
    (record,) = read(tmp_path / "r.jsonl")
    assert record["stand_in_share"] is None


def test_the_matrix_is_told_and_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEML_STATE", str(tmp_path))
    asked = ["eval", str(place / "m.edgeml"), "--data", str(place / "data"), "--memory", "25%", "--threads", "1", "--learn"]
    assert main([*asked, "--json", "--records", str(tmp_path / "r.jsonl")]) == 0
    learned = json.loads(capsys.readouterr().out)["learned"]
    assert (learned["domains"], learned["by"]) == (["film", "sky"], "labels")
    assert [row[number] for number, row in enumerate(learned["ratios"])] == [1, 1]
    assert learned["cdtr"] is not None
    assert read(tmp_path / "r.jsonl")[0]["eval"]["learned"] == learned
    assert len(list(tmp_path.glob("*.usage"))) == 1


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--memory", "25%", "--limit", "20"], 3, "domain 'film' has 20 rows, and 30 are the fewest"),
        (["--memory", "100%"], 2, "everything fits this budget"),
        (["--memory", "25%", "--tasks", "mood"], 2, "there is data of film only; give two"),
    ],
)
def test_what_cannot_be_learned_is_told_before_anything_is_evaluated(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.setenv("EDGEML_STATE", str(tmp_path))
    monkeypatch.setattr("edgeml.commands.eval.run_variant", lambda *_: pytest.fail("it was evaluated first"))
    assert main(["eval", str(place / "m.edgeml"), "--data", str(place / "data"), "--threads", "1", "--learn", *more]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err.splitlines()[-1]


# ---- submitted to a session ----


class Calls:
    """What a session computed, in order: task, rows, and the set ("all", "own", or the domain that it stood in from). While it is `held`
    it computes nothing, so that what is submitted meanwhile can share a batch."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int, str]] = []
        self.held = threading.Event()
        self.held.set()
        run = session._run_batch

        def counted(task: Any, batch: Any, resident: ResidentSet | None, *rest: Any) -> Any:
            assert self.held.wait(WAIT)
            self.seen.append((task.name, len(batch.ids), "all" if resident is None else resident.stand_in or "own"))
            return run(task, batch, resident, *rest)

        monkeypatch.setattr(session, "_run_batch", counted)


@pytest.fixture
def session(place: Path, state: Path) -> Iterator[Session]:
    """Hybrid, with a slow disk, and film's set in memory."""
    with edgeml.open(place / "m.edgeml", memory="25%", residency="hybrid", threads=1) as session:
        session.load("weather")
        session.run("mood", texts=TEXTS)
        session._residents._known.computing = Meter(1e12, 1)  # as good as no time
        yield session
        session._context.settle()
        session.evict_all()
        assert session.stats()["resident"] == [], "a page is pinned still"


def film(session: Session) -> ResidentSet:
    (found,) = session.residents.stand_ins("weather")
    assert found.stand_in == "film"
    return found


def same(result: Any, wanted: Any) -> bool:
    return bool(np.array_equal(result.scores, wanted.scores)) and result.labels == wanted.labels


def test_of_two_requests_only_the_one_that_cannot_wait_gets_the_stand_in(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(session, monkeypatch)
    calls.held.clear()
    first = session.submit("mood", TEXTS[0])  # it is begun, and held
    patient = session.submit("weather", texts=TEXTS[:2])
    late = session.submit("weather", texts=TEXTS[2:4], deadline=3000)
    far = session.submit("weather", TEXTS[4], deadline=1e8)  # so long that even this disk is quick enough
    session._residents._known.reading = Meter(1, 1)  # a byte a second: some hours for a set
    calls.held.set()
    results = [ticket.result(WAIT) for ticket in (first, patient, late, far)]
    assert calls.seen == [("mood", 1, "all"), ("weather", 2, "film"), ("weather", 3, "all")]
    assert [result.counters.stand_in for result in results] == ["", "", "film", ""]
    assert [result.counters.masked_tokens > 0 for result in results] == [False, False, True, False]
    assert results[2].counters.tokens == results[2].counters.masked_tokens
    assert results[2].counters.page_in_bytes == 0, "all of it was there"
    assert same(results[2], session.run("weather", texts=TEXTS[2:4], resident=film(session)))
    assert same(results[1], session.run("weather", texts=TEXTS[:2]))
    assert same(results[3], session.run("weather", TEXTS[4]))


def test_a_long_request_in_a_hurry_is_answered_batch_by_batch(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(session, monkeypatch)
    late = session.submit("weather", texts=TEXTS, deadline=3000).result(WAIT)
    assert [set_ for _, _, set_ in calls.seen] == ["film", "film"]
    assert sum(rows for _, rows, _ in calls.seen) == len(TEXTS)
    assert late.counters.stand_in == "film"
    assert same(late, session.run("weather", texts=TEXTS, resident=film(session)))


def test_a_request_that_brings_its_own_set_is_given_no_other(session: Session) -> None:
    own = session.resident_set("weather")
    found = session.submit("weather", texts=TEXTS[:3], resident=own, deadline=3000).result(WAIT)
    assert found.counters.stand_in == ""
    assert same(found, session.run("weather", texts=TEXTS[:3], resident=own))


def test_after_cancelled_and_failed_requests_nothing_is_held(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that could not wait is computed, the other one breaks: each is run again alone, and only that one fails."""
    calls = Calls(session, monkeypatch)
    run, broken = session._run_batch, PageError("the disk fails")

    def faulty(task: Any, batch: Any, resident: ResidentSet | None, *rest: Any) -> Any:
        if task.name == "weather" and resident is None:
            raise broken
        return run(task, batch, resident, *rest)

    monkeypatch.setattr(session, "_run_batch", faulty)
    calls.held.clear()
    session.submit("mood", TEXTS[0])
    patient, late = session.submit("weather", TEXTS[1]), session.submit("weather", TEXTS[2], deadline=3000)
    given_up = session.submit("weather", TEXTS[3], deadline=3000)
    given_up.cancel()
    calls.held.set()
    result = late.result(WAIT)
    assert result.counters.stand_in == "film"
    assert result.counters.tokens == result.counters.masked_tokens, "counted once, though it ran twice"
    assert same(result, session.run("weather", TEXTS[2], resident=film(session)))
    with pytest.raises(PageError, match="the disk fails"):
        patient.result(WAIT)


# ---- what is computed together ----


@pytest.fixture(scope="module")
def manifest(place: Path) -> Manifest:
    with Bundle.open(place / "m.edgeml") as bundle:
        return load_manifest(bundle)


LIMIT_S = 100.0


class Judge:
    """Residents for whom a batch with less than `LIMIT_S` left has to be masked; notes who was asked for."""

    def __init__(self, mask: ResidentSet) -> None:
        self.mask, self.asked = mask, list[float]()

    def pick(self, task: str, resident: None, left_s: float) -> Callable[[Any], ResidentSet | None]:
        self.asked.append(left_s)
        return lambda batch: self.mask if left_s < LIMIT_S else None


@given(st.lists(st.one_of(st.none(), st.sampled_from([-5.0, 1.0, 20.0, 400.0, 5000.0])), min_size=1, max_size=12), st.booleans())
def test_those_that_cannot_wait_come_first_and_the_others_are_not_masked(
    manifest: Manifest, lefts: Sequence[float | None], passed_before: bool
) -> None:
    """The others keep their step, once: passed over before, they are run beside those that cannot wait."""
    task = next(task for task in manifest.tasks if task.name == "weather")
    mask = ResidentSet((), mask_of(manifest, ()), "film")
    judge, calls, paged = Judge(mask), list[tuple[list[int], str]](), list[int]()

    def run(task: Any, batch: Any, resident: ResidentSet | None, counters: Counters, paged: Callable[[], None]) -> Any:
        paged()
        calls.append(([int(row) for row in batch.ids[:, 0]], "all" if resident is None else resident.stand_in))
        counters.misses += len(calls)
        counters.stand_in = "" if resident is None else resident.stand_in
        return np.stack([np.full(4, row, np.float32) for row in batch.ids[:, 0]])

    now, works = time.monotonic(), list[TextWork]()
    for number, left in enumerate(lefts):
        works.append(text_work(task, [checked_arrays({"ids": np.full((1, 2 + number % 3), number)})], None, manifest))
        works[-1].until = None if left is None else now + left
        works[-1].passed = passed_before
    engine = SessionEngine(lambda task: WorkingSet(task.name), judge, run, lambda *_: None)  # type: ignore[arg-type]
    engine.compute(works, WorkingSet("weather"), lambda: paged.append(1))
    late = [number for number, left in enumerate(lefts) if left is not None and left < LIMIT_S]
    patient = [number for number in range(len(lefts)) if number not in late]
    wanted = [part for part in ((late, "film"), (patient, "all")) if part[0]]
    together = passed_before or len(wanted) == 1
    assert [(sorted(rows), named) for rows, named in calls] == (wanted if together else wanted[:1])
    assert paged == [1]
    if not together:
        assert all(works[number].step() is not None and works[number].passed for number in patient)
        assert all(works[number].step() is None for number in late)
        engine.compute([works[number] for number in patient], WorkingSet("weather"), lambda: paged.append(1))
        assert [(sorted(rows), named) for rows, named in calls] == wanted
    for number, work in enumerate(works):
        result = work.result()
        assert result.scores is not None
        assert (result.scores == number).all(), "an answer has gone to somebody else"
        assert result.counters.stand_in == ("film" if number in late else "")
        assert result.counters.misses == (2 if late and number not in late else 1), "what its own part cost"
    assert len(judge.asked) <= 5, "each costs a look at what is in memory"
