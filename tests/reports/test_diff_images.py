"""`edgeml diff` on networks for images: stages and layers are exchanged where they fit, and what was damaged is named first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("edgeml_report.diff", reason="edgeml-report is not installed")

from damage import Run, parts_of, rewrite, spoiled, stage_page
from edgeml_report.diff_graph import Graph, exchanged, layers, logits

import edgeml
from edgeml.cli import main
from edgeml.errors import BundleError
from edgeml.graph_bytes import Node, graph
from edgeml.made import make_cnn

COUNT = 24


def images(place: Path, name: str, bundle: Path, shape: tuple[int, ...]) -> Path:
    """A set that is labelled as the bundle answers."""
    folder = place / name
    folder.mkdir()
    x = np.random.default_rng(3).integers(0, 256, (COUNT, *shape), np.uint8)
    with edgeml.open(bundle) as session:
        results = session.run_many([task.name for task in session.manifest.tasks], list(x))
        named = {task.name: list(task.labels) for task in session.manifest.tasks if task.kind != "edge"}
    labels: dict[str, Any] = {}
    for task, result in results.items():
        if result.maps is None:
            labels[f"y_{task}"] = np.array([named[task].index(label) for label in result.labels], np.uint8)
        else:
            labels[task] = (result.maps >= 0.5 if task == "edge" else result.maps).astype(np.uint8)
    (folder / "image.json").write_text(json.dumps({"labels": {array: named.get(array.removeprefix("y_"), []) for array in labels}}))
    for split in ("train", "validation"):
        np.savez(folder / f"{split}.npz", x=x, **labels)
    return folder


@pytest.fixture(scope="module", params=["classification", "dense"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, the same a little off everywhere, and images labelled as the first answers them."""
    place = tmp_path_factory.mktemp("diff-images")
    make_cnn(place / "full.edgeml", request.param)
    names = [f"head_full_{task}" for task in tasks_of(place)]
    pages = dict(stage_page(place / "full.edgeml", name) for name in ("backbone_full", *names))
    rewrite(place / "full.edgeml", place / "small.edgeml", {page: spoiled(model, 0.01) for page, model in pages.items()})
    images(place, "images", place / "full.edgeml", (36, 36) if request.param == "classification" else (24, 32, 3))
    return place


def tasks_of(place: Path) -> list[str]:
    with edgeml.open(place / "full.edgeml") as session:
        return [task.name for task in session.manifest.tasks]


def test_parts_come_in_the_order_of_a_request(place: Path, run: Run) -> None:
    found = run(place / "full.edgeml", place / "small.edgeml", "--data", place / "images")
    first, second = tasks_of(place)
    stages = [part["name"] for part in found["parts"] if part["within"] is None]
    assert stages == ["backbone", f"head of {first}", f"head of {second}"]
    inner = [part["name"] for part in found["parts"] if part["within"] == "backbone"]
    assert inner == ["backbone, layer 1", "backbone, layer 2"]
    assert [part["name"] for part in found["parts"]][:3] == ["backbone", *inner]
    for part in found["parts"]:
        for key in ("alone_error", "error", "restored_error", "gain"):
            assert part[key] is not None, (part["name"], key)
    assert found["why"] is None
    assert {task["metric"] for task in found["by_task"]} <= {"accuracy", "miou", "edge_f1"}
    assert found["reference_score"] == pytest.approx(1)  # labelled as it answers


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_head_is_named_first_and_so_is_its_layer(place: Path, tmp_path: Path, run: Run, which: int) -> None:
    task = tasks_of(place)[which]
    page, model = stage_page(place / "small.edgeml", f"head_full_{task}")
    kernel = next(name for name in Graph.parse(model, "head").weights if name.startswith("kernel"))
    hurt = rewrite(place / "small.edgeml", tmp_path / "hurt.edgeml", {page: spoiled(model, 0.8, kernel)})
    found = run(place / "full.edgeml", hurt, "--data", place / "images")
    assert found["worst"] == f"head of {task}"
    within = [part for part in found["parts"] if part["within"] == f"head of {task}"]
    assert min(within, key=lambda part: part["restored_error"])["name"] == f"head of {task}, layer 1"
    errors = {one["task"]: one["error"] for one in found["by_task"]}
    assert max(errors, key=lambda name: errors[name]) == task


@pytest.mark.parametrize("layer", [1, 2])
def test_a_damaged_layer_of_the_backbone_is_named_first(
    place: Path, tmp_path: Path, run: Run, layer: int, capsys: pytest.CaptureFixture[str]
) -> None:
    page, model = stage_page(place / "small.edgeml", "backbone_full")
    kernels = [name for name in Graph.parse(model, "backbone").weights if name.startswith("kernel")]
    hurt = rewrite(place / "small.edgeml", tmp_path / "hurt.edgeml", {page: spoiled(model, 0.8, kernels[layer - 1])})
    found = run(place / "full.edgeml", hurt, "--data", place / "images")
    parts, name = parts_of(found), f"backbone, layer {layer}"
    assert found["worst"] == "backbone"
    assert parts[name]["alone_error"] == max(part["alone_error"] for part in found["parts"] if part["within"])
    assert parts[name]["restored_error"] == min(part["restored_error"] for part in found["parts"] if part["within"])
    assert main(["diff", str(place / "full.edgeml"), str(hurt), "--data", str(place / "images")]) == 0
    printed = capsys.readouterr().out
    assert printed.index("backbone lost most of it") < printed.index(f"in it, layer {layer}: restored alone")


def test_errors_and_scores_are_those_of_plain_code(place: Path, tmp_path: Path, run: Run) -> None:
    found = run(place / "full.edgeml", place / "small.edgeml", "--data", place / "images")
    page, model = stage_page(place / "full.edgeml", "backbone_full")
    back = rewrite(place / "small.edgeml", tmp_path / "back.edgeml", {page: model})
    x = list(np.load(place / "images" / "validation.npz")["x"])
    answers = {}
    for name, path in (("whole", place / "full.edgeml"), ("lossy", place / "small.edgeml"), ("back", back)):
        with edgeml.open(path) as session:
            answers[name] = session.run_many(tasks_of(place), x)
    scores = {}
    for name, results in answers.items():
        per = []
        for task, result in results.items():
            truth = answers["whole"][task]
            if result.maps is None:
                per.append(np.mean([one == two for one, two in zip(result.labels, truth.labels, strict=True)]))
            elif task == "edge":
                said, is_edge = result.maps >= 0.5, truth.maps >= 0.5
                both = np.count_nonzero(said & is_edge)
                per.append(2 * both / (np.count_nonzero(said) + np.count_nonzero(is_edge)))
            else:
                ratios = []
                for label in np.unique(truth.maps):
                    said, there = result.maps == label, truth.maps == label
                    ratios.append(np.count_nonzero(said & there) / np.count_nonzero(said | there))
                per.append(np.mean(ratios))
        scores[name] = float(np.mean(per))
    assert found["score"] == pytest.approx(scores["lossy"])
    assert parts_of(found)["backbone"]["gain"]["value"] == pytest.approx(scores["back"] - scores["lossy"])


def test_variants_of_one_bundle_that_were_pruned_otherwise_are_compared_by_answers(
    place: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    question = (place / "full.edgeml", "--reference-variant", "full", "--variant", "small", "--data", place / "images")
    found = run(*question)
    assert "cannot be exchanged" in found["why"]
    assert [part["within"] for part in found["parts"]] == [None] * 3
    assert all((part["restored_error"] is None and part["alone_error"] in (None,)) or part["kind"] == "backbone" for part in found["parts"])
    assert [part["error"] is None for part in found["parts"]] == [True, False, False]
    assert found["worst"] is None
    assert all(task["error"] > 0 for task in found["by_task"])
    assert main(["diff", *map(str, question)]) == 0
    assert capsys.readouterr().out.count("cannot be exchanged") == 1


def test_an_image_of_ones_own_has_no_scores(place: Path, tmp_path: Path, run: Run) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="the extra `image` is not installed")
    photo = tmp_path / "photo.png"
    pillow.fromarray(np.random.default_rng(4).integers(0, 256, (40, 50, 3), np.uint8)).save(photo)
    found = run(place / "full.edgeml", place / "small.edgeml", "--image", photo)
    assert found["score"] is None
    assert [answer["task"] for answer in found["answers"]] == tasks_of(place)
    for answer in found["answers"]:
        assert sum(answer["reference"].values()) <= 1 + 1e-6
        assert 0 <= answer["changed"] <= 1
    first = tasks_of(place)[0]
    assert run(place / "full.edgeml", place / "small.edgeml", "--image", photo, "--task", first)["tasks"] == [first]


def test_a_rounded_layer_is_followed_to_where_it_is_read_back() -> None:
    def rounded(name: str, out: str) -> list[Node]:
        return [Node("QuantizeLinear", [name, "s", "z"], [f"{name}_q"]), Node("DequantizeLinear", [f"{name}_q", "s", "z"], [out])]

    weights = {"s": np.float32(0.1), "z": np.int8(0), "w": np.ones((4, 4), np.float32), "v": np.ones((4, 4), np.float32)}
    nodes = [Node("MatMul", ["x", "w"], ["a"]), *rounded("a", "b"), Node("DequantizeLinear", ["a_q", "s", "z"], ["c"])]
    nodes += [
        Node("MatMul", ["b", "v"], ["d"]),
        Node("Relu", ["d"], ["e"]),
        Node("Add", ["e", "c"], ["f"]),
        Node("Softmax", ["f"], ["scores"]),
    ]
    constants = {name: np.asarray(value) for name, value in weights.items()}
    kind = ("float32", ("B", 4))
    parsed = Graph.parse(graph(nodes, {"x": kind}, {"scores": kind}, constants, {"": 17}), "it")
    assert layers(parsed) == [("b", "c"), ("e",)]
    assert logits(parsed, "scores") == "f"
    assert Graph.parse(parsed.encode(["f"]), "again").outputs.keys() == {"scores", "f"}
    joined = exchanged(parsed, parsed, layers(parsed), layers(parsed), 0)
    assert {name for node in joined.nodes for name in node.outputs} >= {"b", "other/a", "e", "scores"}
    assert not any("c" in node.inputs for node in joined.nodes)  # both readers of the rounded layer have the other's
    other = Graph.parse(graph(nodes, {"x": kind}, {"scores": kind}, constants, {"": 13}), "it")
    with pytest.raises(BundleError, match="cannot be joined"):
        exchanged(parsed, other, layers(parsed), layers(other), 0)


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(BundleError, match=r"^m\.edgeml: this is no ONNX graph"):
        Graph.parse(b"\x3a\xff\xff", "m.edgeml")
