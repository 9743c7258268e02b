"""What goes wrong in a session stays with its request, and is a sentence of the right kind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml import session as sessions
from edgeml.bundle import Bundle
from edgeml.errors import BudgetError, BundleError, DataError, PageError, UsageError
from edgeml.manifest import load_manifest

TEXTS = ["rain", "a warm and sunny day by the sea", "fog and snow on the trees in the city", "money"] * 6


# ---- wrong questions ----


def test_an_unknown_task_lists_those_there_are_the_closest_first(toy: Path) -> None:
    with edgeml.open(toy) as session:
        with pytest.raises(UsageError, match="has no task 'moood'; it has mood, vector, weather"):
            session.run("moood", text="rain")
        with pytest.raises(UsageError, match="has no task"):
            session.load("")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"text": "a", "texts": ["b"]},
        {"pairs": [("a", "b")]},
        {"arrays": {}},
        {"arrays": {"ids": np.ones((1, 2), np.int64), "other": np.ones(1)}},
    ],
)
def test_wrong_combinations_of_inputs(toy: Path, given: dict[str, Any]) -> None:
    with edgeml.open(toy) as session, pytest.raises(UsageError):
        session.run("mood", **given)


@pytest.mark.parametrize(
    "arrays",
    [
        {"ids": np.ones(3, np.int64)},
        {"ids": np.ones((1, 3), np.float32)},
        {"ids": np.ones((0, 3), np.int64)},
        {"ids": np.ones((2, 3), np.int64), "mask": np.ones((2, 4), np.float32)},
        {"ids": np.ones((2, 3), np.int64), "types": np.ones((3, 2), np.int64)},
    ],
)
def test_arrays_of_the_wrong_shape(toy: Path, arrays: dict[str, Any]) -> None:
    with edgeml.open(toy) as session, pytest.raises(DataError):
        session.run("mood", arrays=arrays)


@pytest.mark.parametrize("value", [-1, 256, 1 << 40])
def test_a_token_id_that_does_not_exist(toy: Path, value: int) -> None:
    with edgeml.open(toy) as session:
        with pytest.raises(UsageError, match=str(value)):
            session.run("mood", arrays={"ids": np.array([[1, value]])})
        assert session.run("mood", text="rain").labels


@pytest.mark.parametrize("text", ["", " \n\t", "x" * 200_001, "half \ud800 of a character", 7, None])
def test_texts_that_are_none(toy: Path, text: Any) -> None:
    with edgeml.open(toy) as session:
        with pytest.raises(DataError, match="input 1: "):
            session.run("mood", texts=["rain", text])
        assert session.run("mood", text="rain").labels


def test_a_long_text_is_cut_and_says_so(toy: Path) -> None:
    with edgeml.open(toy) as session:
        assert session.run("mood", texts=["rain " * 500, "rain"]).truncated == [True, False]


def test_text_of_any_script_is_welcome(toy: Path) -> None:
    with edgeml.open(toy) as session:
        given = [
            "\N{SNOWMAN}\N{VARIATION SELECTOR-16} \U0001f327",
            "\u0928\u092e\u0938\u094d\u0924\u0947",
            "a\x00b",
            "\u202eevil",
            "e" * 5000,
        ]
        assert len(session.run("mood", texts=given).labels) == len(given)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"memory": "1000"}, BudgetError),
        ({"memory": 1}, BudgetError),
        ({"memory": "a lot"}, UsageError),
        ({"memory": -1}, UsageError),
        ({"memory": "101%"}, UsageError),
        ({"threads": 0}, UsageError),
        ({"threads": 1000}, UsageError),
        ({"residency": "half"}, UsageError),
        ({"isa": "mmx"}, UsageError),
    ],
)
def test_settings_that_cannot_be(toy: Path, settings: dict[str, Any], kind: type[Exception]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kind):
        edgeml.open(toy, **settings)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- a bad file ----


@pytest.mark.parametrize("memory", ["0%", "50%", "100%"])
def test_a_flipped_bit_in_an_expert_fails_only_who_needs_it(toy: Path, flipped: Callable[[int], Path], memory: str) -> None:
    with edgeml.open(toy) as session:
        needs = {text: _used(session, text) for text in dict.fromkeys(TEXTS)}
        expected = {text: session.run("weather", text=text).labels for text in needs}
    bad = next(page for page in sorted(set().union(*needs.values())) if any(page not in used for used in needs.values()))
    with edgeml.open(flipped(bad), memory=memory) as session:
        for _ in range(2):
            for text, used in needs.items():
                if bad in used:
                    with pytest.raises(PageError, match=rf"flipped.edgeml: page {bad} at offset \d+: .*checksum"):
                        session.run("weather", text=text)
                else:
                    assert session.run("weather", text=text).labels == expected[text]


def _used(session: sessions.Session, text: str) -> set[int]:
    session.evict_all()
    session.run("weather", text=text)
    return set(session.stats()["resident"])


def test_a_flipped_bit_in_a_leased_page_fails_the_masked_request(toy: Path, flipped: Callable[[int], Path]) -> None:
    with edgeml.open(toy, memory="50%", residency="masked") as session:
        ours, theirs = (set(session.resident_set(task).pages) for task in ("weather", "mood"))
    bad = min(ours - theirs)
    with edgeml.open(flipped(bad), memory="50%", residency="masked") as session:
        with pytest.raises(PageError, match=f"page {bad} at"):
            session.run("weather", text="rain")
        assert session.run("mood", text="rain").labels


def test_a_set_larger_than_the_budget_is_refused(toy: Path) -> None:
    with edgeml.open(toy, residency="masked") as session:
        everything = session.resident_set("mood")
    with edgeml.open(toy, memory="50%") as session:
        with pytest.raises(BudgetError, match=r"toy.edgeml: .*larger than the slots"):
            session.run("mood", text="rain", resident=everything)
        assert session.run("mood", text="rain").labels


def test_a_flipped_bit_in_a_tokenizer_fails_who_uses_it(toy: Path, flipped: Callable[[int], Path]) -> None:
    with Bundle.open(toy) as bundle:
        bad = load_manifest(bundle).tasks[0].preprocess.tokenizer
    with edgeml.open(flipped(bad)) as session:
        with pytest.raises(PageError, match=f"flipped.edgeml: page {bad} "):
            session.run("mood", text="rain")
        assert session.run("mood", arrays={"ids": np.array([[1, 2]])}).labels


def test_a_flipped_bit_in_a_pinned_page_fails_at_open(toy: Path, flipped: Callable[[int], Path]) -> None:
    with Bundle.open(toy) as bundle:
        bad = load_manifest(bundle).sites[0].shared[0].page
    with pytest.raises(PageError, match=rf"flipped.edgeml: page {bad} at offset"):
        edgeml.open(flipped(bad))


def test_a_flipped_bit_in_a_graph_fails_when_it_is_loaded(toy: Path, flipped: Callable[[int], Path]) -> None:
    with Bundle.open(toy) as bundle:
        bad = next(stage.page for stage in load_manifest(bundle).stages if stage.name == "head_mood")
    with edgeml.open(flipped(bad)) as session:
        with pytest.raises(PageError, match=f"page {bad} "):
            session.run("mood", text="rain")
        assert session.run("weather", text="rain").labels


def test_a_file_cut_after_it_was_opened(toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.edgeml"
    path.write_bytes(toy.read_bytes())
    with edgeml.open(path, memory="0%") as session:
        session.load("weather")
        os.truncate(path, 4096)
        with pytest.raises(PageError, match=r"cut.edgeml: page \d+ .*"):
            session.run("weather", text="rain")


@pytest.mark.parametrize("content", [b"", b"EDGEML\r\n", b"\x7fELF" + bytes(9000), b"PK\x03\x04" + bytes(5000)])
def test_what_is_no_bundle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(BundleError, match="foreign"):
        edgeml.open(tmp_path / "foreign")
    with pytest.raises(BundleError, match="no such file"):
        edgeml.open(tmp_path / "absent")


# ---- several threads, several sessions ----


def test_four_threads_on_one_session(toy: Path, flipped: Callable[[int], Path]) -> None:
    with edgeml.open(toy) as session:
        used = _used(session, "rain")
        expected = session.run("mood", texts=TEXTS).scores
    bad = min(used)
    answers, faults = 0, 0
    with edgeml.open(flipped(bad), memory="25%") as session, edgeml.open(toy, memory="0%") as healthy, ThreadPoolExecutor(6) as pool:

        def work(number: int) -> bool:
            if number % 3 == 0:
                assert np.array_equal(healthy.run("mood", texts=TEXTS).scores, expected)  # type: ignore[arg-type]
                return True
            if number % 3 == 1:
                with pytest.raises(PageError, match=f"page {bad} "):
                    session.run("weather", text="rain")
                return False
            with pytest.raises(DataError):
                session.run("mood", text="")
            return False

        for answered in pool.map(work, range(60)):
            answers, faults = answers + answered, faults + (not answered)
    assert (answers, faults) == (20, 40)


def test_masked_requests_of_two_tasks_take_turns(toy: Path) -> None:
    with edgeml.open(toy, memory="50%", residency="masked") as session, ThreadPoolExecutor(4) as pool:
        expected = {task: session.run(task, texts=TEXTS).scores for task in ("weather", "mood")}
        jobs = [(task, pool.submit(session.run, task, texts=TEXTS)) for task in ("weather", "mood") * 10]
        for task, job in jobs:
            assert np.array_equal(job.result(timeout=60).scores, expected[task])  # type: ignore[arg-type]


# ---- the end ----


def test_a_closed_session_says_so(toy: Path) -> None:
    session = edgeml.open(toy)
    session.run("mood", text="rain")
    session.close()
    session.close()
    for call in (lambda: session.run("mood", text="rain"), session.stats, session.evict_all, lambda: session.load("mood")):
        with pytest.raises(UsageError, match="the session is closed"):
            call()


def test_closing_waits_for_nobody_and_breaks_nobody(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, inside, go_on = edgeml.open(toy), threading.Event(), threading.Event()
    original = session._graphs.run

    def slow(*arguments: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        return original(*arguments)

    monkeypatch.setattr(session._graphs, "run", slow)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(session.run, "mood", text="rain")
        assert inside.wait(60)
        with pytest.raises(UsageError, match="1 calls still run"):
            session.close()
        go_on.set()
        assert running.result(timeout=60).labels
    session.close()


def test_an_error_does_not_keep_the_session_open(toy: Path, flipped: Callable[[int], Path]) -> None:
    with edgeml.open(toy) as session:
        bad = min(_used(session, "rain"))
    with pytest.raises(PageError), edgeml.open(flipped(bad)) as session:
        session.run("weather", text="rain")
    with pytest.raises(UsageError, match="the session is closed"):
        session.stats()


def test_many_sessions_leave_nothing_behind(toy: Path) -> None:
    with edgeml.open(toy) as session:
        session.run("mood", text="rain")
    before = (len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task")))
    for _ in range(10):
        with edgeml.open(toy, memory="25%") as session:
            session.run("mood", text="rain")
    after = (len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task")))
    assert after == before


def test_importing_edgeml_is_light() -> None:
    code = "import sys, edgeml; print([name for name in ('numpy', 'onnxruntime', 'tokenizers', 'torch', 'click') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert edgeml.Session.__name__ == "Session"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = edgeml.nonsense
