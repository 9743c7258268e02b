"""Evaluation: figures from known answers, which experts are kept, and the command from data directory to document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.bundle import Bundle
from edgeml.cli import main
from edgeml.data import Row, TaskData
from edgeml.domains import Sheet
from edgeml.errors import DataError, UsageError
from edgeml.evaluate import Labels, answer_rows, kept_set, match_tasks, read_labelled, report
from edgeml.made import TOY, make_mixture
from edgeml.manifest import Manifest, load_manifest

WORDS = ["sun", "rain", "snow", "fog", "car", "train", "good", "bad", "day", "night", "river", "sea", "the", "a", "is", "was"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.edgeml"
    make_mixture(path)
    return path


@pytest.fixture(scope="module")
def manifest(toy: Path) -> Manifest:
    with Bundle.open(toy) as bundle:
        return load_manifest(bundle)


def write_task(root: Path, name: str, labels: list[str], rows: list[dict[str, Any]], **changes: Any) -> None:
    place = root / "made" / name
    place.mkdir(parents=True)
    task = {"name": name, "domain": "made", "labels": labels, "metric": "accuracy"} | changes
    (place / "task.json").write_text(json.dumps(task))
    for split in ("train", "test"):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def random_rows(classes: int, count: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"text": " ".join(rng.choice(WORDS, rng.integers(1, 12))), "label": int(rng.integers(classes))} for _ in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write_task(root, "mood", list(TOY.tasks["mood"]), random_rows(2, 40, 1), metric="macro_f1")
    write_task(root, "weather", list(TOY.tasks["weather"]), random_rows(4, 50, 2))
    write_task(root, "other", ["x", "y"], random_rows(2, 3, 3))
    return root


def document(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def sentence(capsys: pytest.CaptureFixture[str], code: int, *arguments: str | Path) -> str:
    assert main(["eval", *map(str, arguments)]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("edgeml: ")
    assert said.err.count("\n") == 1
    return said.err


def answered(name: str, labels: list[int], predicted: list[int], reference: list[int] | None = None, commonest: int = 0) -> Sheet:
    answers = [np.array(one) for one in (reference, predicted) if one is not None]
    return Sheet.of_labels(name, "d", "accuracy", np.array(labels), commonest, answers)


def test_figures_without_a_reference() -> None:
    found = report([answered("a", [0, 1, 1, 0], [0, 1, 0, 0], commonest=1), answered("b", [0, 0], [0, 1])])
    assert found["tasks"]["a"] == {"domain": "d", "metric": "accuracy", "n": 4, "chance": 0.5, "score": 0.75, "reference_score": None}
    assert found["mean"] == 0.625
    assert found["retention"] is None
    assert found["reference_mean"] is None


def test_retention_is_a_ratio_of_sums_over_the_tasks_that_have_something_to_lose() -> None:
    labels = [0, 1, 0, 1, 0, 1, 0, 1] * 2
    half = [0, 1, 0, 1, 0, 1, 0, 0] * 2  # score 7/8
    nothing = answered("c", labels, labels, [0] * 16)  # its reference is at chance
    found = report([answered("a", labels, half, labels), answered("b", labels, labels, half), nothing])
    assert found["retention"] == {"value": (3 / 8 + 4 / 8) / (4 / 8 + 3 / 8), "low": None, "high": None, "n": 32}
    assert found["excluded"] == ["c"]
    assert report([nothing])["retention"] is None
    assert report([answered("a", labels, half, labels), nothing])["retention"] is None, "16 rows say nothing"


def test_the_interval_is_paired() -> None:
    """The same rows are drawn for both: a variant equal to its reference has no spread at all."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200).tolist()
    guesses = [label if rng.random() < 0.9 else 1 - label for label in labels]
    assert report([answered("a", labels, guesses, guesses)])["retention"] == {"value": 1, "low": 1, "high": 1, "n": 200}
    worse = [1 - guess if rng.random() < 0.1 else guess for guess in guesses]
    found = report([answered("a", labels, worse, guesses)])["retention"]
    assert found["low"] < found["value"] < found["high"] < 1


def test_rows_are_asked_for_in_chunks_and_a_bad_one_is_named() -> None:
    rows = [Row(str(number), None, 0) for number in range(1200)]
    done: list[int] = []

    def answer(chunk: list[Row]) -> Labels:
        if any(row.text == "1100" for row in chunk) and len(done) > 2:
            raise DataError("input 76: the text is empty")
        return np.array([int(row.text) for row in chunk])

    assert answer_rows(answer, rows, "task 't'", done.append).tolist() == list(range(1200))
    assert sum(done) == 1200
    with pytest.raises(DataError, match="task 't', rows from 1024: input 76: the text is empty"):
        answer_rows(answer, rows, "task 't'", done.append)


@pytest.mark.parametrize("seed", [None, 5])
def test_a_share_of_each_site_is_kept(manifest: Manifest, seed: int | None) -> None:
    chosen = kept_set(manifest, "weather", 0.5, seed)
    assert (chosen.mask == 0).sum(-1).tolist() == [TOY.experts // 2] * TOY.layers
    assert len(chosen.pages) == TOY.layers * TOY.experts // 2
    if seed is None:
        for usage, row in zip(manifest.usage["weather"], chosen.mask, strict=True):
            kept = [value for value, open_ in zip(usage, row == 0, strict=True) if open_]
            assert min(kept) >= sorted(usage)[TOY.experts // 2]
    else:
        assert (kept_set(manifest, "weather", 0.5, seed).mask == chosen.mask).all()
        assert (kept_set(manifest, "weather", 0.5, seed + 1).mask != chosen.mask).any()
        assert (kept_set(manifest, "mood", 0.5, seed).mask != chosen.mask).any()
    assert np.isneginf(kept_set(manifest, "weather", 0.0, seed).mask).all()
    assert (kept_set(manifest, "weather", 1.0, seed).mask == 0).all()


def test_a_site_without_shared_experts_keeps_one(tmp_path: Path) -> None:
    make_mixture(tmp_path / "m.edgeml", shared=0)
    with Bundle.open(tmp_path / "m.edgeml") as bundle, pytest.raises(UsageError, match="no shared expert"):
        kept_set(load_manifest(bundle), "weather", 0.0, None)


def test_labels_must_be_the_bundles(manifest: Manifest, tmp_path: Path) -> None:
    labels = tuple(TOY.tasks["mood"])

    def task(**changes: Any) -> TaskData:
        fields: dict[str, Any] = {"name": "mood", "domain": "made", "labels": labels, "metric": "accuracy", "pair": False}
        return TaskData(**(fields | changes), licence=None, path=tmp_path)

    assert match_tasks([task(), task(name="new")], manifest, "m") == ([task()], ["new"])
    for changes, reason in (
        ({"labels": labels[::-1]}, "another order"),
        ({"labels": ("good", "ugly")}, "differing: bad, ugly"),
        ({"pair": True}, "pairs"),
        ({"name": "vector"}, "none of the 1 tasks"),
        ({"name": "new"}, "it has weather, mood"),
    ):
        with pytest.raises(DataError, match=reason):
            match_tasks([task(**changes)], manifest, "m")
    with pytest.raises(DataError, match="two tasks called 'mood'"):
        match_tasks([task(), task(domain="else")], manifest, "m")


@pytest.mark.parametrize("text", ["", " ", "\ud800", "a" * 200_001])
def test_a_text_that_cannot_be_answered_is_named_before_anything_runs(
    toy: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeml.commands.eval.run_variant", lambda *_: pytest.fail("something was run"))
    write_task(tmp_path, "mood", list(TOY.tasks["mood"]), [{"text": "fine", "label": 0}, {"text": text, "label": 1}])
    assert "test.jsonl:2: " in sentence(capsys, 3, toy, "--data", tmp_path)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path, "mood", ["good", "bad"], [])
    task = TaskData("mood", "made", ("good", "bad"), "accuracy", False, None, tmp_path / "made" / "mood")
    with pytest.raises(DataError, match="'test' has no rows"):
        read_labelled(task, "test", None)


def test_the_command_scores_what_the_session_answers(toy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "out.jsonl"
    found = document(capsys, toy, "--data", data, "--predictions", lines)
    assert set(found["tasks"]) == {"mood", "weather"}
    assert found["skipped"] == ["other"]
    assert found["retention"] is None
    rows = [row for row in map(json.loads, lines.read_text().splitlines()) if "predictions" not in row]
    assert [row["row"] for row in rows] == [*range(40), *range(50)]
    texts = [json.loads(line) for line in (data / "made" / "weather" / "test.jsonl").read_text().splitlines()]
    with edgeml.open(toy) as session:
        expected = session.run("weather", texts=[row["text"] for row in texts]).labels
    weather = [row for row in rows if row["task"] == "weather"]
    assert [TOY.tasks["weather"][row["predicted"]] for row in weather] == expected
    assert [row["label"] for row in weather] == [row["label"] for row in texts]
    assert found["tasks"]["weather"]["score"] == np.mean([row["label"] == row["predicted"] for row in weather])
    assert found["record"]["bundle_id"]
    assert found["record"]["rounds"] == 90


def test_the_command_compares_and_keeps(toy: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = document(capsys, toy, "--data", data, "--reference", toy, "--experts-kept", "1.0")
    assert all(task["score"] == task["reference_score"] for task in same["tasks"].values())
    assert set(same["tasks"]) - set(same["excluded"]) == set() or same["retention"]["value"] == 1
    limited = document(capsys, toy, "--data", data, "--tasks", "made/mood", "--limit", "7", "--experts-kept", "none")
    assert [task["n"] for task in limited["tasks"].values()] == [7]
    assert limited["record"]["misses"] == limited["record"]["hits"] == 0
    first, again, other = (document(capsys, toy, "--data", data, "--experts-kept", "0.25", "--kept-by", f"random:{n}") for n in (1, 1, 2))
    assert first["tasks"] == again["tasks"]
    assert other["record"]["kept_by"] == "random:2"


def test_the_table_is_for_people(toy: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(toy), "--data", str(data), "--reference", str(toy)]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[:4]] == ["task", "mood", "weather", "mean"]
    assert "skipped, the bundle has no such task: other" in said
    assert "reference" in said.splitlines()[0]


def test_wrong_questions_get_one_sentence(toy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none of the 1 tasks" in sentence(capsys, 3, toy, "--data", data, "--tasks", "other")
    assert "called 'absent'" in sentence(capsys, 3, toy, "--data", data, "--tasks", "absent")
    assert "no such directory" in sentence(capsys, 3, toy, "--data", tmp_path / "absent")
    assert list(document(capsys, toy, "--data", data, "--tasks", "mood, mood")["tasks"]) == ["mood"], "named twice is asked once"
    assert "not '2'" in sentence(capsys, 2, toy, "--data", data, "--experts-kept", "2")
    assert "--kept-by" in sentence(capsys, 2, toy, "--data", data, "--kept-by", "random")
    assert "leave out --memory" in sentence(capsys, 2, toy, "--data", data, "--experts-kept", "0.5", "--memory", "50%")
    smaller = tmp_path / "small.edgeml"
    make_mixture(smaller, tasks={"mood": TOY.tasks["mood"]})
    assert "has no task 'weather'" in sentence(capsys, 2, toy, "--data", data, "--reference", smaller)
    assert "no such file" in sentence(capsys, 3, toy, "--data", data, "--reference", tmp_path / "no.edgeml")
    assert "folder that exists" in sentence(capsys, 2, toy, "--data", data, "--predictions", tmp_path / "no" / "out.jsonl", "--quiet")
