"""Sessions and their resident sets: what is learned and kept, unknown tasks, and masks that only a deadline brings."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.cli import main
from edgeml.errors import UsageError
from edgeml.measure import Phase, Timing, record
from edgeml.resident import GENERAL, SEGMENT_TOKENS, Meter
from edgeml.session import Session

TEXTS = ["Will it rain tomorrow?", "a warm and sunny day by the sea"] * 20


def usage_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.usage"))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    return folder


def hybrid(path: Path, state: Path, memory: str = "50%") -> Session:
    return edgeml.open(path, memory=memory, residency="hybrid", state=str(state))


# ---- learning ----


def test_exact_without_a_state_folder_leaves_no_trace(rebuild: Any) -> None:
    path = rebuild()
    with edgeml.open(path, memory="50%") as session:
        session.run("weather", texts=TEXTS)
        assert session._residents.stages(session.task("weather"), session.task("weather").stages).trunk == "trunk"  # type: ignore[arg-type]
    assert usage_files(path.parent) == []


def test_hybrid_without_a_deadline_is_exact_and_learns_beside_the_bundle(rebuild: Any) -> None:
    path = rebuild()
    with edgeml.open(path) as session:
        wanted = session.run("weather", texts=TEXTS).scores
    with edgeml.open(path, memory="50%", residency="hybrid") as session:
        session.load("weather")
        result = session.run("weather", texts=TEXTS)
        assert np.array_equal(result.scores, wanted)  # type: ignore[arg-type]
        assert result.counters.masked_tokens == 0
    assert len(usage_files(path.parent)) == 1


def test_masked_reads_what_was_learned_and_writes_nothing(toy: Path, state: Path) -> None:
    with edgeml.open(toy, memory="50%", residency="masked") as session:
        before = session._residents.usage("weather")
    with hybrid(toy, state) as session:
        for _ in range(20):
            session.run("weather", texts=TEXTS)
    (file,) = usage_files(state)
    saved = file.read_bytes()
    with edgeml.open(toy, memory="50%", residency="masked", state=str(state)) as session:
        assert not np.allclose(session._residents.usage("weather"), before)
        session.run("weather", texts=TEXTS)
    assert file.read_bytes() == saved


def test_what_this_device_uses_moves_the_set(toy: Path, state: Path) -> None:
    """A task whose recorded usage is wrong: after enough requests its set covers what they choose."""
    with hybrid(toy, state) as session:
        for _ in range(60):
            session.run("weather", texts=TEXTS)
        residents = session._residents
        seen = residents._known.tasks["weather"].watched
        chosen = set(session.resident_set("weather").pages)
        for site, row in zip(session.manifest.sites, seen.usage, strict=True):
            best = sorted(range(len(row)), key=lambda e: (-row[e], e))[: site.top_k]
            assert {site.experts[e].page for e in best} <= chosen


def test_a_trunk_that_tells_no_choices_is_noted_and_answers(rebuild: Any, state: Path) -> None:
    def hide(manifest: dict[str, Any]) -> None:
        for stage in manifest["stages"]:
            stage["outputs"] = [name for name in stage["outputs"] if not name.startswith("ids_")]

    with hybrid(rebuild(change=hide), state) as session:
        assert sum("nothing is learned from requests" in note for note in session.notes) == 1
        assert session.run("weather", texts=TEXTS, deadline_s=60).labels
    assert usage_files(state) == []


def test_a_task_without_usage_begins_with_the_general_pattern(rebuild: Any, state: Path) -> None:
    path = rebuild(change=lambda manifest: manifest["usage"].pop("weather"))
    with edgeml.open(path, memory="50%", residency="masked") as session:
        assert session.run("weather", texts=TEXTS).counters.masked_tokens > 0
        assert session._residents._follow("weather").current == GENERAL
    with hybrid(path, state) as session:
        for _ in range(20):
            session.run("weather", texts=TEXTS)
    with edgeml.open(path, memory="50%", residency="masked", state=str(state)) as session:
        assert session._residents._tokens("weather") > SEGMENT_TOKENS
        assert session.run("weather", texts=TEXTS).labels


def test_a_task_that_is_used_like_another_follows_its_pattern(toy: Path, state: Path, rebuild: Any) -> None:
    def swap(manifest: dict[str, Any]) -> None:
        manifest["usage"]["weather"], manifest["usage"]["mood"] = manifest["usage"]["mood"], manifest["usage"]["weather"]

    with hybrid(rebuild(change=swap), state) as session:
        first = session.resident_set("weather").pages
        for _ in range(10):
            session.run("weather", texts=TEXTS)
        assert session._residents._follow("weather").current != "weather"
        assert session.resident_set("weather").pages != first


# ---- deadlines ----


def test_a_mask_comes_only_when_a_deadline_would_be_missed(toy: Path, state: Path) -> None:
    with hybrid(toy, state) as session:
        session.load("weather")
        for _ in range(3):
            session.run("weather", texts=TEXTS)
        assert session.run("weather", texts=TEXTS, deadline_s=60).counters.masked_tokens == 0
        known = session._residents._known
        known.computing, known.reading = Meter(1e12, 1), Meter(1, 1e6)
        session._context.settle()
        session.evict_all()
        late = session.run("weather", texts=TEXTS, deadline_s=10)
        assert late.counters.masked_tokens == late.counters.tokens > 0
        assert late.counters.misses == 0, "there was no time to read anything; what was under way may still have come in"
        assert len(late.labels) == len(TEXTS)


def test_submitted_requests_are_masked_for_their_deadlines_too(toy: Path, state: Path) -> None:
    with hybrid(toy, state) as session:
        session.load("weather")
        for _ in range(3):
            session.run("weather", texts=TEXTS)
        assert session.submit("weather", texts=TEXTS, deadline=600).result(60).counters.masked_tokens == 0
        known = session._residents._known
        known.computing, known.reading = Meter(1e12, 1), Meter(1, 1e6)
        session._context.settle()
        session.evict_all()
        assert session.submit("weather", texts=TEXTS).result(60).counters.masked_tokens == 0, "without a deadline nothing is masked"
        known.computing, known.reading = Meter(1e12, 1), Meter(1, 1e6)
        session._context.settle()
        session.evict_all()
        late = session.submit("weather", texts=TEXTS, deadline=30).result(60)
        assert late.counters.masked_tokens == late.counters.tokens > 0


def test_where_computing_alone_is_too_late_a_mask_leaves_the_whole_set(toy: Path, state: Path) -> None:
    with hybrid(toy, state) as session:
        session.run("weather", texts=TEXTS)
        pages = session.resident_set("weather").pages
        session._context.settle()
        session.evict_all()
        session.run("weather", texts=TEXTS, deadline_s=1e-9)
        assert set(session.stats()["resident"]) == set(pages)


def test_no_deadline_masks_what_is_in_memory(toy: Path, state: Path) -> None:
    with hybrid(toy, state, memory="100%") as session:
        session.run("weather", texts=TEXTS)
        session._context.prefetch(sorted(session._residents._page_bytes))
        session._context.settle()
        assert session.run("weather", texts=TEXTS, deadline_s=1e-6).counters.masked_tokens == 0


def test_a_site_without_shared_experts_is_never_left_bare(rebuild: Any, state: Path) -> None:
    path = rebuild(change=lambda manifest: [site.update(shared=[]) for site in manifest["sites"]])
    with hybrid(path, state) as session:
        session._context.settle()
        session.evict_all()
        assert len(session.run("weather", texts=TEXTS, deadline_s=1e-6).labels) == len(TEXTS)


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), "soon"])
def test_a_deadline_that_cannot_be_is_refused(toy: Path, state: Path, deadline: Any) -> None:
    with hybrid(toy, state) as session:
        with pytest.raises(UsageError, match="positive number of seconds"):
            session.run("weather", text="fog", deadline_s=deadline)
        assert session.run("weather", text="fog").labels


# ---- records ----


def test_records_say_what_was_masked_and_what_that_is_expected_to_cost(rebuild: Any) -> None:
    kept = {"share": 0.5, "retention": {"value": 0.9}, "split": "validation"}
    path = rebuild(change=lambda manifest: manifest.update(evidence={"kept": kept}))
    with edgeml.open(path, memory="100%", residency="masked") as session:
        figures = record(Timing(warm=phase(session)), session.settings())
        assert (figures["masked_share"], figures["expected_retention"]) == (0, 1)
    with edgeml.open(path, memory="75%", residency="masked") as session:
        figures = record(Timing(warm=phase(session)), session.settings())
        assert (figures["masked_share"], figures["expected_retention"]) == (1, 0.9)
    with edgeml.open(path, memory="10%", residency="masked") as session:
        figures = record(Timing(warm=phase(session)), session.settings())
        assert (figures["masked_share"], figures["expected_retention"]) == (1, None), "nothing was measured of so small a set"


def phase(session: Session) -> Phase:
    counted = Phase()
    result = session.run("weather", texts=TEXTS)
    counted.add(result.latency_s, result.counters)
    return counted


@pytest.mark.parametrize("kept", [None, 3, {}, {"share": "half", "retention": 1}, {"share": 0.5, "retention": {"value": None}}])
def test_evidence_that_says_nothing_is_null(rebuild: Any, kept: Any) -> None:
    with edgeml.open(
        rebuild(change=lambda manifest: manifest.update(evidence={"kept": kept})), memory="50%", residency="masked"
    ) as session:
        assert session.settings()["masked_retention"] is None


def test_the_command_line_takes_a_deadline_and_a_state_folder(toy: Path, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["run", str(toy), "--task", "weather", "--text", "fog", "--memory", "50%", "--json"]
    assert main([*common, "--residency", "hybrid", "--deadline", "50s", "--state", str(state)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["record"]["residency"] == "hybrid"
    assert document["record"]["masked_share"] == 0
    assert len(usage_files(state)) == 1
    for wrong in (["--deadline", "50ms"], ["--residency", "hybrid", "--deadline", "soon"], ["--state", str(state / "no")]):
        assert main([*common, *wrong]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("edgeml: ")
        assert captured.err.count("\n") == 1


def test_masked_and_exact_requests_of_several_threads_share_the_slots(toy: Path, state: Path) -> None:
    with edgeml.open(toy) as session:
        wanted = {task: session.run(task, texts=TEXTS).scores for task in ("weather", "mood")}
    failures: list[BaseException] = []
    with hybrid(toy, state, memory="30%") as session:
        session.run("weather", texts=TEXTS)

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(12):
                    task = ("weather", "mood")[int(rng.integers(2))]
                    result = session.run(task, texts=TEXTS, deadline_s=float(rng.choice([1e-6, 5e-3, 60])))
                    if not result.counters.masked_tokens:
                        assert np.array_equal(result.scores, wanted[task])  # type: ignore[arg-type]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert failures == []
