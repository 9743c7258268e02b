"""Whole exports of a small CNN: variants in one bundle, evidence from the written bundle, refusals that leave nothing behind."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import edgeml_export
import numpy as np
import pytest
import torch
from edgeml_export.vision import MultiTaskCNN, VisionModel
from edgeml_export.vision.graphs import Stages
from edgeml_export.vision.recipe import parse_recipe
from edgeml_export.vision.variants import Candidate, dominated

import edgeml
from edgeml import native
from edgeml.bundle import Bundle
from edgeml.errors import DataError, QualityRefused, UsageError
from edgeml.manifest import load_manifest

pytestmark = pytest.mark.skipif(not hasattr(native, "Context"), reason="the extension is not built")


MAIN = "from edgeml import cli; cli.COMMANDS['export'] = ('edgeml_export.command', ''); raise SystemExit(cli.main())"
#: The validation set is small, so one image more or less is nearly a point.
INT8 = {"when": "always", "images": 32, "max_drop": 5.0, "max_map_drop": 5.0}
TABLES: dict[str, Any] = {
    "name": "toy",
    "variant": [{"max_drop": 8.0}, {"remove_macs": 0.4, "store": ["int8"]}],
    "prune": {"images": 128},
    "tune": {"epochs": 3, "rate": 0.02, "batch": 32},
    "int8": INT8,
}


def recipe(**changes: Any) -> Any:
    return parse_recipe(TABLES | changes, "r.toml")


@pytest.fixture(scope="module")
def exported(vision: VisionModel, vision_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "toy.edgeml"
    return out, edgeml_export.export(vision, out, recipe(), vision_data, work=out.parent / "work")


def test_evidence_is_what_the_written_bundle_scored(exported: tuple[Path, dict[str, Any]], vision: VisionModel) -> None:
    out, evidence = exported
    with Bundle.open(out) as bundle:
        assert list(bundle.verify())
        manifest = load_manifest(bundle)
        assert manifest.evidence == evidence
        assert evidence["bytes"]["bundle"] == bundle.header.manifest_offset
    assert [variant.name for variant in manifest.variants] == list(evidence["variants"])
    for task in vision.tasks:
        found = evidence["tasks"][task.name]
        assert (found["metric"], found["n"]) == (task.metric, 120)
        assert found["score"] > 0.7
        assert abs(found["score"] - found["reference_score"]) < 0.1
    assert evidence["macs"]["reference"] > 0


def test_each_variant_says_what_it_costs_and_scores(exported: tuple[Path, dict[str, Any]]) -> None:
    out, evidence = exported
    with Bundle.open(out) as bundle:
        manifest = load_manifest(bundle)
    scores = [variant.score for variant in manifest.variants]
    assert scores == sorted(scores, reverse=True)
    for variant in manifest.variants:
        figures = evidence["variants"][variant.name]
        assert (figures["bytes"], figures["macs"]) == (variant.bytes, variant.macs)
        assert figures["latency_s"]["p50"] == variant.latency_s
        assert variant.latency_cpu
        assert figures["validation"] == variant.scores
        assert variant.quantized == ("int8" in figures) == variant.name.endswith("int8")
        assert 0 <= figures["mean_score"] <= 1
    left = {item["name"] for item in evidence["dropped"]}
    assert {*evidence["variants"], *left} == {"dense-f32", "dense-int8", "macs-40-int8"}
    assert all(item["reason"] for item in evidence["dropped"])


def test_the_pruned_variant_is_smaller_in_fact(exported: tuple[Path, dict[str, Any]]) -> None:
    _, evidence = exported
    pruned = evidence["variants"]["macs-40-int8"]  # the smallest, so nothing dominates it
    assert 0.35 <= pruned["macs_removed"] < 0.8
    assert pruned["parameters_removed"] > 0
    assert set(pruned["prune"]["loss_ratios"]) == {"place", "size", "pixels", "edge"}
    assert any(after < before for before, after in pruned["prune"]["channels"].values())


def test_every_variant_answers(exported: tuple[Path, dict[str, Any]], vision_data: Path) -> None:
    out, evidence = exported
    images = list(np.load(vision_data / "images" / "squares" / "test.npz")["x"][:4])
    for name in evidence["variants"]:
        with edgeml.open(out, variant=name) as session:
            found = session.run_many(["place", "edge"], images=images)
        assert len(found["place"].labels) == 4
        assert found["edge"].maps is not None
        assert found["edge"].maps.shape == (4, 16, 16)


def test_provenance_names_data_recipe_and_versions(exported: tuple[Path, dict[str, Any]]) -> None:
    with Bundle.open(exported[0]) as bundle:
        manifest = load_manifest(bundle)
    assert manifest.provenance["recipe"]["name"] == "toy"
    assert {len(manifest.provenance["data"]["squares"][split]) for split in ("train", "validation", "test")} == {64}
    assert set(manifest.provenance["versions"]) == {"numpy", "onnx", "onnxruntime", "torch"}
    chances = {task.name: task.chance for task in manifest.tasks}
    assert chances["edge"] == 0
    assert 0.2 < (chances["place"] or 0) < 0.4


def test_the_same_export_has_the_same_pages_and_resumes_its_pruning(
    exported: tuple[Path, dict[str, Any]], vision: VisionModel, vision_data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from edgeml_export.prune import Distillation

    def again(*_: Any) -> None:
        raise AssertionError("what is in --work is not trained again")

    monkeypatch.setattr(Distillation, "__call__", again)
    identities = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.edgeml"
        evidence = edgeml_export.export(vision, out, recipe(pareto=False), vision_data, work=exported[0].parent / "work")
        assert set(evidence["variants"]) == {"dense-f32", "dense-int8", "macs-40-int8"}
        assert not evidence["dropped"]
        with Bundle.open(out) as bundle:
            identities.append(bundle.id)
    assert identities[0] == identities[1]


def test_without_data_the_float_model_is_written_unmeasured(vision: VisionModel, tmp_path: Path) -> None:
    evidence = edgeml_export.export(vision, tmp_path / "m.edgeml")
    assert "tasks" not in evidence
    with Bundle.open(tmp_path / "m.edgeml") as bundle:
        manifest = load_manifest(bundle)
    assert [variant.name for variant in manifest.variants] == ["dense-f32"]
    assert manifest.variants[0].scores == {}
    assert manifest.tasks[0].chance is None


def test_a_bound_holds_on_the_calibration_images(vision: VisionModel, vision_data: Path, tmp_path: Path) -> None:
    steps = recipe(variant=[{"bound": 1.5, "store": ["f32"], "tune": False}])
    evidence = edgeml_export.export(vision, tmp_path / "m.edgeml", steps, vision_data)
    figures = evidence["variants"]["bound-1.5-f32"]
    assert figures["prune"]["holds"]
    assert max(figures["prune"]["loss_ratios"].values()) <= 1.5
    with Bundle.open(tmp_path / "m.edgeml") as bundle:
        assert load_manifest(bundle).variants[0].bound == 1.5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"variant": [{"store": ["f32"]}], "limits": {"max_bytes": "1KiB"}}, r"it has .*KiB, and the limit is 1KiB"),
        (
            {"variant": [{"remove_macs": 0.7, "store": ["f32"], "max_drop": 0.001}], "tune": {"epochs": 0}},
            r"the mean score of variant 'macs-70-f32' falls by \d+\.\d\d points on validation \(limit 0\.001\)",
        ),
    ],
)
def test_a_broken_limit_leaves_the_old_file(
    vision: VisionModel, vision_data: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    out = tmp_path / "m.edgeml"
    out.write_bytes(b"earlier")
    with pytest.raises(QualityRefused, match=sentence):
        edgeml_export.export(vision, out, recipe(**changes), vision_data)
    assert out.read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["m.edgeml"]


def edited(data: Path, root: Path, change: Any) -> Path:
    """A copy of the data with other training arrays."""
    place = root / "images" / "squares"
    place.mkdir(parents=True)
    for file in (data / "images" / "squares").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    arrays = dict(np.load(place / "train.npz"))
    change(arrays)
    np.savez(place / "train.npz", **arrays)
    return root


def no_large(arrays: dict[str, np.ndarray]) -> None:
    arrays["y_size"][:] = 0


def no_size(arrays: dict[str, np.ndarray]) -> None:
    del arrays["y_size"]


def beyond(arrays: dict[str, np.ndarray]) -> None:
    arrays["y_size"][3] = 2


def floats(arrays: dict[str, np.ndarray]) -> None:
    arrays["x"] = arrays["x"].astype(np.float32)


def flat(arrays: dict[str, np.ndarray]) -> None:
    arrays["x"] = arrays["x"].reshape(len(arrays["x"]), -1)


def unlabelled(arrays: dict[str, np.ndarray]) -> None:
    arrays["y_size"] = arrays["y_size"][:5]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (no_large, "no training image is labelled 'large', a class of task 'size'"),
        (no_size, r"'y_size' is missing|task 'size' is missing"),
        (beyond, "'y_size' has a label outside 0 to 1"),
        (floats, "'x' must be|'x'.*uint8"),
        (flat, "'x' must be|'x'.*axes"),
        (unlabelled, "'y_size' must be whole numbers with 1 axes for 320 images"),
    ],
)
def test_data_that_cannot_serve_is_named(vision: VisionModel, vision_data: Path, tmp_path: Path, change: Any, sentence: str) -> None:
    root = edited(vision_data, tmp_path / "data", change)
    with pytest.raises(DataError, match=sentence):
        edgeml_export.export(vision, tmp_path / "m.edgeml", recipe(), root)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_missing_split_is_found_before_the_work(
    vision: VisionModel, vision_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = edited(vision_data, tmp_path / "data", lambda _arrays: None)
    (root / "images" / "squares" / "test.npz").unlink()
    monkeypatch.setattr("edgeml_export.vision.export.float_stages", lambda _source: pytest.fail("the work had begun"))
    with pytest.raises(DataError, match="test"):
        edgeml_export.export(vision, tmp_path / "m.edgeml", recipe(), root)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_data_of_other_images_is_refused(vision: VisionModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tasks are on the image set 'squares', and there is no image\.json"):
        edgeml_export.export(vision, tmp_path / "m.edgeml", data=tmp_path)


def test_a_task_with_a_loss_that_is_no_number_is_named(vision: VisionModel, vision_data: Path, tmp_path: Path) -> None:
    bad = VisionModel(vision.module, vision.tasks, vision.image, {"size": lambda output, _label: output.mean() * float("nan")})
    with pytest.raises(DataError, match="the loss of task 'size' is nan"):
        edgeml_export.export(bad, tmp_path / "m.edgeml", recipe(variant=[{"bound": 1.1}]), vision_data)


def test_maps_of_another_size_than_the_labels_are_refused(vision: VisionModel, vision_data: Path, tmp_path: Path) -> None:
    class Half(torch.nn.Module):
        def __init__(self, whole: torch.nn.Module) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, features: Any) -> Any:
            return self.whole(features)[:, :, ::2, ::2]

    parts = copy.deepcopy(vision.parts)
    heads = {name: Half(head) if name == "edge" else head for name, head in parts.heads.items()}
    small = VisionModel(MultiTaskCNN(parts.backbone, heads), vision.tasks, vision.image)
    with pytest.raises(DataError, match=r"task 'edge' answers \(8, 8\) an image, and its labels are \(16, 16\)"):
        edgeml_export.export(small, tmp_path / "m.edgeml", recipe(), vision_data)


def test_options_of_the_other_kind_of_model_are_refused(vision: VisionModel, model: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--experts and --dense are for mixtures"):
        edgeml_export.export(vision, tmp_path / "m.edgeml", experts="int4")
    with pytest.raises(UsageError, match="--split-at is for ONNX files"):
        edgeml_export.export(vision, tmp_path / "m.edgeml", split_at=["x"])
    with pytest.raises(UsageError, match=r"\[image\] and \[\[task\]\] are for ONNX files"):
        edgeml_export.export(vision, tmp_path / "m.edgeml", recipe(image={"height": 16}, variant=[{"store": ["f32"]}]))
    with pytest.raises(UsageError, match="this recipe is for vision models"):
        edgeml_export.export(model, tmp_path / "m.edgeml", recipe())


def made(name: str, score: float, latency: float, size: int) -> Candidate:
    return Candidate(name, Stages(bytes(size), {}), 1, 1, scores={"t": score}, latency=latency)


def test_only_variants_that_are_best_at_something_stay() -> None:
    found = [made("slow", 0.9, 3.0, 50), made("small", 0.8, 2.0, 10), made("worse", 0.8, 2.5, 10), made("best", 0.95, 3.0, 60)]
    kept, dropped = dominated(found)
    assert [one.name for one in kept] == ["best", "slow", "small"]
    assert [(one["name"], one["reason"]) for one in dropped] == [("worse", "'small' is at least as good in every way")]


def test_a_latency_within_the_noise_dominates_nothing() -> None:
    kept, _ = dominated([made("best", 0.9, 1.0, 50), made("as quick", 0.9, 1.02, 50)])
    assert len(kept) == 2
    kept, _ = dominated([made("best", 0.9, 1.02, 50), made("no quicker", 0.8, 1.0, 50)])
    assert [one.name for one in kept] == ["best"]
    kept, _ = dominated([made("best", 0.9, 1.0, 50), made("slower", 0.9, 1.1, 50)])
    assert [one.name for one in kept] == ["best"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", MAIN, *arguments], capture_output=True, text=True, check=False)


def test_the_command_exports_an_onnx_file(vision_data: Path, tmp_path: Path, vision_stages: Stages) -> None:
    """The backbone with one head, joined to one graph, as it comes from elsewhere."""
    import onnx

    backbone, place = (onnx.load_from_string(graph) for graph in (vision_stages.backbone, vision_stages.heads["place"]))
    joined = onnx.compose.merge_models(backbone, place, [("features_1", "features_1")], prefix1="b_", prefix2="h_", outputs=["h_scores"])
    (tmp_path / "cnn.onnx").write_bytes(joined.SerializeToString())
    (tmp_path / "r.toml").write_text(
        'name = "from-onnx"\n[int8]\nwhen = "always"\nimages = 32\nmax_drop = 5\n[image]\nmean = [0.3]\nstd = [0.25]\n'
        '[[task]]\nname = "place"\ndomain = "squares"\noutput = "h_scores"\nlogits = false\n'
        'labels = ["left top", "right top", "left bottom", "right bottom"]\n'
    )
    out = tmp_path / "m.edgeml"
    arguments = ["export", str(tmp_path / "cnn.onnx"), "-o", str(out), "--recipe", str(tmp_path / "r.toml"), "--data", str(vision_data)]
    done = run(*arguments, "--split-at", "b_features_1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    evidence = json.loads(done.stdout)["evidence"]
    assert evidence["tasks"]["place"]["score"] > 0.8
    assert any(name.startswith("dense") for name in evidence["variants"])


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["none.onnx", "--recipe", "r.toml"], 2, r"none.onnx: cannot be read"),
        (["bad.onnx", "--recipe", "r.toml"], 3, "bad.onnx: this is no ONNX model"),
        (["bad.onnx"], 2, "needs a recipe with a [[task]]"),
        (["vision_source.py:model", "--recipe", "text.toml"], 3, "unknown key 'pass'"),
        (["vision_source.py:fails"], 2, "RuntimeError: no such weights"),
        (["vision_source.py:network"], 2, "returned MultiTaskCNN, not an edgeml_export.Model"),
    ],
)
def test_each_error_is_one_sentence(arguments: list[str], code: int, sentence: str, vision_source: str, tmp_path: Path) -> None:
    (tmp_path / "vision_source.py").write_text(Path(vision_source.rpartition(":")[0]).read_text())
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 40)
    task = '[[variant]]\nstore = ["f32"]\n[[task]]\nname = "t"\ndomain = "d"\nlabels = ["a", "b"]\n'
    (tmp_path / "r.toml").write_text(task)
    (tmp_path / "text.toml").write_text('[[pass]]\nkind = "quantize"\n')
    done = run("export", *(str(tmp_path / part) if "." in part else part for part in arguments), "-o", str(tmp_path / "m.edgeml"))
    assert done.returncode == code
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.edgeml*"))
    assert not list(tmp_path.glob(".*"))
