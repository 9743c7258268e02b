"""`run`, `eval`, `bench` and `inspect` on networks for images; everything wrong with a question is one sentence."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.cli import main
from edgeml.made import make_cnn
from edgeml.made_cnn import DIGITS, GARMENTS, STREET
from edgeml.metrics import edge_f1, miou

pil = pytest.importorskip("PIL.Image", reason="the extra `image` is not installed")

Capture = pytest.CaptureFixture[str]
SHARED = Path(os.environ.get("EDGEML_SHARED", Path(__file__).parents[3] / "shared")) / "data" / "images"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks, a photograph, broken files, and data for both. Nobody writes to it."""
    place = tmp_path_factory.mktemp("images")
    make_cnn(place / "digits.edgeml", filters=4)
    make_cnn(place / "street.edgeml", "dense", filters=4)
    rng = np.random.default_rng(0)
    pil.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)).save(place / "photo.png")
    (place / "cut.png").write_bytes((place / "photo.png").read_bytes()[:900])
    pil.fromarray(np.zeros((1, 1), np.uint8)).save(place / "dot.png")
    (place / "words.png").write_text("no picture")
    digits = {"x": rng.integers(0, 256, (40, 36, 36), np.uint8), "y_digit": rng.integers(0, 10, 40), "y_garment": rng.integers(0, 10, 40)}
    street = {"x": rng.integers(0, 256, (31, 24, 32, 3), np.uint8), "edge": rng.integers(0, 2, (31, 24, 32), np.uint8)}
    street["segmentation"] = rng.integers(0, 5, (31, 24, 32), np.uint8)
    for name, labels, arrays in (("digits", {"y_digit": DIGITS, "y_garment": GARMENTS}, digits), ("street", STREET, street)):
        (place / "data" / name).mkdir(parents=True)
        (place / "data" / name / "image.json").write_text(json.dumps({"name": name, "labels": labels}))
        for split in ("train", "test"):
            np.savez(place / "data" / name / f"{split}.npz", **arrays)
    return place


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("EDGEML_THREADS", "1")


def said(capsys: Capture, *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def one_sentence(captured: Any, *words: str) -> None:
    assert captured.out == ""
    assert captured.err.startswith("edgeml: ")
    assert captured.err.count("\n") == 1
    assert "fault in edgeml itself" not in captured.err
    for word in words:
        assert word in captured.err


# ---- run ----


def test_all_tasks_answer_an_image(capsys: Capture) -> None:
    assert main(["run", "digits.edgeml", "--image", "photo.png"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["digit", "garment"]
    for _, label, score, spent in lines:
        assert label in DIGITS + GARMENTS
        assert 0.1 <= float(score) <= 1
        assert spent.endswith(" ms")


def test_run_as_a_document(capsys: Capture) -> None:
    document = said(
        capsys, "run", "digits.edgeml", "--image", "photo.png", "--image", "photo.png", "--task", "garment", "--variant", "small"
    )
    with edgeml.open("digits.edgeml", variant="small") as session:
        expected = session.run("garment", images=["photo.png"]).labels * 2
    assert [answer["label"] for answer in document["results"]] == expected
    for answer in document["results"]:
        assert set(answer) == {"task", "label", "score", "scores", "latency_s", "image"}
    assert (document["record"]["variant"], document["record"]["rounds"]) == ("small", 2)


def test_a_map_is_written_at_the_photographs_size(tmp_path: Path, capsys: Capture) -> None:
    assert main(["run", "street.edgeml", "--task", "segmentation", "--image", "photo.png", "-o", str(tmp_path / "map.png")]) == 0
    out = capsys.readouterr().out
    with pil.open(tmp_path / "map.png") as image:
        assert (image.mode, image.size) == ("P", (90, 60))
        colours = {"#" + bytes(colour).hex() for colour in np.array(image.convert("RGB")).reshape(-1, 3)}
    assert colours <= {line.split()[0] for line in out.splitlines()[1:]}, "the legend names every colour that is there"
    document = said(capsys, "run", "street.edgeml", "--image", "photo.png", "-o", str(tmp_path / "out.png"))
    assert [Path(answer["file"]).name for answer in document["results"]] == ["out-segmentation.png", "out-edge.png"]
    assert all(Path(answer["file"]).is_file() for answer in document["results"])
    for answer in document["results"]:
        assert sum(answer["classes"].values()) == pytest.approx(1)
        assert "void" not in answer["classes"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["digits.edgeml", "--image", "cut.png"], 3, ["cut.png", "cut short"]),
        (["digits.edgeml", "--image", "dot.png"], 3, ["dot.png", "1 x 1"]),
        (["digits.edgeml", "--image", "words.png"], 3, ["words.png", "neither a PNG nor a JPEG"]),
        (["digits.edgeml", "--image", "absent.png"], 3, ["absent.png", "No such file"]),
        (["digits.edgeml", "--image", "."], 3, ["cannot be read"]),
        (["digits.edgeml", "--image", "photo.png", "--task", "other"], 2, ["no task 'other'", "digit, garment"]),
        (["digits.edgeml", "--image", "photo.png", "--text", "a"], 2, ["takes images"]),
        (["digits.edgeml", "--task", "digit"], 2, ["--image FILE"]),
        (["digits.edgeml", "--task", "digit", "--text", "a"], 2, ["--image FILE"]),
        (["digits.edgeml", "--image", "photo.png", "-o", "map.png"], 2, ["no map to write"]),
        (["street.edgeml", "--image", "photo.png", "-o", "map.jpg"], 2, [".png"]),
        (["street.edgeml", "--image", "photo.png", "--image", "photo.png", "-o", "map.png"], 2, ["one image"]),
        (["street.edgeml", "--task", "edge", "--image", "photo.png", "-o", "./photo.png"], 2, ["overwrite"]),
        (["street.edgeml", "--task", "edge", "--image", "photo.png", "-o", "absent/map.png"], 2, ["folder that exists"]),
        (["digits.edgeml", "--image", "photo.png", "--variant", "tiny"], 2, ["no variant 'tiny'", "full", "small"]),
        (["digits.edgeml", "--image", "photo.png", "--max-latency", "soon"], 2, ["not a duration"]),
        (["digits.edgeml", "--image", "photo.png", "--max-bytes", "1"], 2, ["keeps to these limits", "full", "small"]),
        (["digits.edgeml", "--image", "photo.png", "--min-score", "2"], 2, ["from 0 to 1"]),
    ],
)
def test_wrong_questions(arguments: list[str], code: int, words: list[str], capsys: Capture) -> None:
    assert main(["run", *arguments]) == code
    one_sentence(capsys.readouterr(), *words)


def test_images_are_not_for_texts_and_the_other_way_round(toy: Path, capsys: Capture) -> None:
    assert main(["run", str(toy), "--task", "mood", "--image", "photo.png"]) == 2
    one_sentence(capsys.readouterr(), "'mood' takes texts, not images")
    assert main(["run", str(toy), "--task", "mood,weather", "--text", "rain"]) == 2
    one_sentence(capsys.readouterr(), "name one task")
    assert main(["run", str(toy), "--task", "mood", "--text", "rain", "-o", "map.png"]) == 2
    one_sentence(capsys.readouterr(), "-o writes the map")
    assert main(["run", str(toy), "--task", "mood", "--text", "rain", "--max-bytes", "1MB"]) == 2
    one_sentence(capsys.readouterr(), "no variants")


def test_without_pillow_the_install_line_is_the_answer(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["run", "digits.edgeml", "--image", "photo.png"]) == 2
    one_sentence(capsys.readouterr(), "pip install 'edgeml-runtime[image]'")


# ---- eval ----


def test_labels_are_scored(capsys: Capture, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    document = said(capsys, "eval", "digits.edgeml", "--data", "data/digits", "--predictions", str(lines))
    with np.load("data/digits/test.npz") as data:
        truth, pixels = data["y_digit"], list(data["x"])
    with edgeml.open("digits.edgeml") as session:
        answers = session.run("digit", images=pixels).scores.argmax(-1)  # type: ignore[union-attr]
    digit = document["tasks"]["digit"]
    assert digit["score"] == pytest.approx(float((truth == answers).mean()))
    assert (digit["metric"], digit["n"], digit["domain"]) == ("accuracy", 40, "digits")
    commonest = np.bincount(truth[:36]).argmax()  # without a validation file the last tenth of training is not training
    assert digit["chance"] == pytest.approx(float((truth == commonest).mean()))
    written = [row for row in map(json.loads, lines.read_text().splitlines()) if "predictions" not in row]
    assert len(written) == 80
    assert written[0] == {"variant": "digits", "task": "digit", "row": 0, "label": int(truth[0]), "predicted": int(answers[0])}
    assert document["record"]["rounds"] == 40


def test_maps_are_scored(capsys: Capture) -> None:
    document = said(capsys, "eval", "street.edgeml", "--data", "data", "--reference", "street.edgeml", "--variant", "small")
    with np.load("data/street/test.npz") as data:
        classes, edges, pixels = data["segmentation"], data["edge"], list(data["x"])
    with edgeml.open("street.edgeml", variant="small") as session:
        found = session.run_many(["segmentation", "edge"], images=pixels)
    tasks = document["tasks"]
    assert tasks["segmentation"]["score"] == pytest.approx(miou(classes, found["segmentation"].maps, 5, 4))  # type: ignore[arg-type]
    edges = np.where(classes == 4, 2, edges)
    assert tasks["edge"]["score"] == pytest.approx(edge_f1(edges, found["edge"].maps >= 0.5, 2))  # type: ignore[operator]
    assert (tasks["edge"]["chance"], tasks["edge"]["metric"], tasks["segmentation"]["n"]) == (0, "edge_f1", 31)
    assert 0 < tasks["segmentation"]["chance"] < 0.1
    assert document["record"]["variant"] == "small"
    assert sorted(document["skipped"]) == ["digit", "garment"]
    assert document["retention"] is None or document["retention"]["n"] in (31, 62)


def test_coarser_labels_and_a_table(capsys: Capture) -> None:
    assert main(["eval", "street.edgeml", "--data", "data", "--tasks", "street/edge", "--limit", "4", "--split", "validation"]) == 0
    table = capsys.readouterr().out
    assert "edge_f1" in table
    assert "segmentation" not in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits.edgeml", "--data", "data/street"], ["answers none of the tasks", "on images it has digit, garment"]),
        (["digits.edgeml", "--data", "data", "--tasks", "depth"], ["0 tasks", "'depth'"]),
        (["digits.edgeml", "--data", "data/absent"], ["no such directory"]),
    ],
)
def test_data_that_does_not_fit(arguments: list[str], words: list[str], capsys: Capture) -> None:
    assert main(["eval", *arguments]) == 3
    one_sentence(capsys.readouterr(), *words)


@pytest.mark.parametrize(
    ("labels", "words"),
    [(DIGITS[:9], ["9 labels", "differing: 9"]), (DIGITS[::-1], ["another order"]), ((*DIGITS, "ten"), ["11 labels", "differing: ten"])],
)
def test_a_missing_class_is_named(labels: Any, words: list[str], place: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "image.json").write_text(json.dumps({"name": "digits", "labels": {"y_digit": labels, "y_garment": GARMENTS}}))
    for split in ("train", "test"):
        (tmp_path / f"{split}.npz").write_bytes((place / "data" / "digits" / f"{split}.npz").read_bytes())
    assert main(["eval", "digits.edgeml", "--data", str(tmp_path)]) == 3
    one_sentence(capsys.readouterr(), "'digit'", *words)


def test_experts_are_not_kept_where_there_are_none(capsys: Capture) -> None:
    assert main(["eval", "digits.edgeml", "--data", "data", "--experts-kept", "none"]) == 2
    one_sentence(capsys.readouterr(), "mixtures of experts")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here: set EDGEML_SHARED")
def test_the_shared_images_are_scored(capsys: Capture, tmp_path: Path) -> None:
    make_cnn(tmp_path / "digits.edgeml", filters=2)
    arguments = ["--data", str(SHARED), "--limit", "40", "--tasks", "multi_fashion_mnist/digit"]
    document = said(capsys, "eval", str(tmp_path / "digits.edgeml"), *arguments)
    assert document["tasks"]["digit"]["n"] == 40


# ---- bench, inspect, verify ----


def test_a_row_for_each_variant(capsys: Capture) -> None:
    rounds = ["--iterations", "2", "--warmup", "1"]
    records = said(capsys, "bench", "digits.edgeml", "--task", "digit,garment", "--variant", "full,small", *rounds)["records"]
    assert [record["variant"] for record in records] == ["full", "small"]
    for record in records:
        assert (record["task"], record["rounds"], record["cold"]) == ("digit,garment", 2, None)
        assert record["workload"] == {"kind": "random image", "height": 36, "width": 36, "channels": 1}
    assert main(["bench", "street.edgeml", "--task", "edge", "--image", "photo.png", *rounds]) == 0
    table = capsys.readouterr().out
    assert "variant" in table
    assert "misses" not in table


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--image", "cut.png"], 3, ["cut.png", "cut short"]),
        (["--variant", "full,tiny"], 2, ["no variant 'tiny'"]),
        (["--max-latency", "1us"], 2, ["keeps to these limits"]),
        (["--tokens", "5"], 2, ["takes images"]),
        (["--text", "a"], 2, ["takes images"]),
    ],
)
def test_wrong_measurements(arguments: list[str], code: int, words: list[str], capsys: Capture) -> None:
    assert main(["bench", "digits.edgeml", "--task", "digit", *arguments]) == code
    one_sentence(capsys.readouterr(), *words)


def test_inspect_shows_images_and_variants(capsys: Capture) -> None:
    assert main(["inspect", "street.edgeml"]) == 0
    out = capsys.readouterr().out
    assert "segmentation of images of 32 x 24 x 3, 5 labels" in out
    assert "variant small: float, pruned to a bound of 1.1" in out
    document = said(capsys, "inspect", "street.edgeml")
    assert [variant["name"] for variant in document["variants"]] == ["full", "small"]
    assert document["variants"][1]["latency_s"] == {"p50": 0.002, "cpu": "a made processor"}
    assert document["tasks"][0]["input"] == {"kind": "image", "height": 24, "width": 32, "channels": 3}


def test_verify_loads_every_variant(capsys: Capture) -> None:
    assert said(capsys, "verify", "street.edgeml")["stages"] == 6
