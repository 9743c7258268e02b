"""`edgeml export --device` of a small CNN: what is picked of the ladder, and that nothing is pruned before it must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import edgeml_export
import pytest
from edgeml_export.fit import Estimate, Target
from edgeml_export.fit_tried import Fitting, NothingFits
from edgeml_export.vision import VisionModel
from edgeml_export.vision import fit_variant as fit_module
from edgeml_export.vision.fit_variant import BOUNDS, fit_variants, ladder
from edgeml_export.vision.graphs import Stages
from edgeml_export.vision.recipe import VariantStep, VisionRecipe, default_recipe, parse_recipe
from edgeml_export.vision.variants import Candidate
from hypothesis import given
from hypothesis import strategies as st

from edgeml import native
from edgeml.bundle import Bundle
from edgeml.device import Figure, Profile
from edgeml.errors import UsageError
from edgeml.manifest import load_manifest
from edgeml.predict import Interval
from edgeml.store import Budget

pytestmark = pytest.mark.skipif(not hasattr(native, "Context"), reason="the extension is not built")

#: Nothing but multiply-adds costs time: a million of them 1 ms in f32, half as much in int8.
FIGURES = {
    "cpu.cores": 1, "memory.usable_bytes": 1 << 30, "graphs.conv_macs_per_s": 1e9, "graphs.conv_int8_macs_per_s": 2e9,
    "graphs.node_s": 1e-8, "process.request_s": 1e-6, "process.bytes": 1 << 20, "process.bytes_per_graph_byte": 2,
}  # fmt: skip
MADE = Profile("made", "A made device", "aarch64", {key: Figure(float(value), "made for a test") for key, value in FIGURES.items()})
TABLES: dict[str, Any] = {
    "name": "toy",
    "prune": {"images": 64},
    "tune": {"epochs": 1, "rate": 0.02, "batch": 32},
    "int8": {"when": "always", "images": 16, "methods": ["minmax"], "max_drop": 20.0, "max_map_drop": 20.0},
}


def recipe(*variants: dict[str, Any], **changes: Any) -> VisionRecipe:
    return parse_recipe(TABLES | {"variant": list(variants)} | changes, "r.toml")


def export(vision: VisionModel, out: Path, steps: VisionRecipe | None, data: Path | None, **limits: Any) -> dict[str, Any]:
    return edgeml_export.export(vision, out, steps, data, target=Target(MADE, **limits))


@pytest.fixture(scope="module")
def dense(vision: VisionModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the float model is predicted to take, by an export that nothing constrains."""
    fit: dict[str, Any] = export(vision, tmp_path_factory.mktemp("dense") / "m.edgeml", None, None)["fit"]
    (one,) = fit["tried"]
    assert (one["name"], one["chosen"], one["memory"], one["lost_points"]) == ("dense-f32", True, None, None)
    assert "everything is held, predicted" in fit["said"]
    return dict(one)


def never(*_: Any) -> Any:
    pytest.fail("nothing had to be pruned")


def test_a_model_that_fits_as_it_is_stays_so(
    vision: VisionModel, vision_data: Path, dense: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeml_export.vision.variants._int8", never)
    evidence = export(vision, tmp_path / "m.edgeml", recipe({"bound": 1.5}), vision_data, max_latency_s=dense["latency_s"]["value"] * 1.01)
    assert list(evidence["variants"]) == ["dense-f32"]
    with Bundle.open(tmp_path / "m.edgeml") as bundle:
        manifest = load_manifest(bundle)
    assert [variant.name for variant in manifest.variants] == ["dense-f32"]
    assert manifest.evidence["fit"] == json.loads(json.dumps(evidence["fit"]))


def test_int8_is_taken_where_the_float_model_is_too_slow(
    vision: VisionModel, vision_data: Path, dense: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is quicker here is not asked: the recipe says `faster`, the device decides."""
    monkeypatch.setattr("edgeml_export.vision.variants._pruned", never)
    steps = recipe({"store": ["f32"]}, int8=TABLES["int8"] | {"when": "faster"})
    evidence = export(vision, tmp_path / "m.edgeml", steps, vision_data, max_latency_s=dense["latency_s"]["value"] * 0.6)
    assert [one["name"] for one in evidence["fit"]["tried"]] == ["dense-f32", "dense-int8"]
    assert evidence["fit"]["run"]["name"] == "dense-int8"
    assert evidence["fit"]["tried"][0]["lost_points"] == 0
    assert list(evidence["variants"]) == ["dense-int8"]


def test_it_is_pruned_where_int8_is_too_slow_too_and_goes_on_from_work(
    vision: VisionModel, vision_data: Path, dense: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = recipe({"remove_macs": 0.4}, {"remove_macs": 0.9, "store": ["int8"]})
    limits = {"max_latency_s": dense["latency_s"]["value"] * 0.35}
    out = tmp_path / "m.edgeml"
    target = Target(MADE, **limits)
    evidence = edgeml_export.export(vision, out, steps, vision_data, work=tmp_path / "work", target=target)
    tried = evidence["fit"]["tried"]
    assert [one["name"] for one in tried] == ["dense-f32", "dense-int8", "macs-40-f32", "macs-40-int8"]
    assert evidence["fit"]["run"]["name"] == "macs-40-int8"
    assert list(evidence["variants"]) == ["macs-40-int8"]
    assert tried[-1]["lost_points"] == pytest.approx(tried[2]["lost_points"], abs=25)

    monkeypatch.setattr("edgeml_export.prune.Distillation.__call__", never)
    again = edgeml_export.export(vision, out, steps, vision_data, work=tmp_path / "work", target=target)
    assert again["fit"] == evidence["fit"]


def test_nothing_fits_and_the_limits_that_would_do_are_named(
    vision: VisionModel, vision_data: Path, dense: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "m.edgeml"
    with pytest.raises(NothingFits, match="dense-int8 is the nearest") as refused:
        export(vision, out, recipe({"store": ["f32"]}), vision_data, max_latency_s=dense["latency_s"]["value"] / 4)
    assert not list(tmp_path.iterdir())
    assert "the recipe prunes nothing: a [[variant]] with bound = 1.2" in str(refused.value)
    would = refused.value.document["would_fit"]["max_latency_s"]
    assert export(vision, out, recipe({"store": ["f32"]}), vision_data, max_latency_s=would)["fit"]["run"]["name"] == "dense-int8"


def test_without_images_only_the_float_model_can_be_tried(vision: VisionModel, dense: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(NothingFits, match="labelled images: name them with --data"):
        export(vision, tmp_path / "m.edgeml", None, None, max_memory_bytes=int(dense["peak_memory_bytes"]["value"]) - 1)


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (recipe({"store": ["f32"], "max_drop": 0.001}), "dense-int8 would, but the mean score of variant 'dense-int8' falls by"),
        (recipe({"store": ["f32"]}, limits={"max_bytes": "20KiB"}), "dense-int8 would, but it has .*KiB, and the limit is 20KiB"),
    ],
)
def test_a_limit_of_the_recipe_refuses_what_would_fit(
    steps: VisionRecipe, sentence: str, vision: VisionModel, vision_data: Path, dense: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real = fit_module.scored
    monkeypatch.setattr(fit_module, "scored", lambda *given: {name: score + 0.01 for name, score in real(*given).items()})
    with pytest.raises(NothingFits, match=sentence) as refused:
        export(vision, tmp_path / "m.edgeml", steps, vision_data, max_latency_s=dense["latency_s"]["value"] * 0.6)
    assert refused.value.document["tried"][-1]["missed"] == []


def test_tokens_are_for_texts(vision: VisionModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tokens is about texts"):
        export(vision, tmp_path / "m.edgeml", None, None, tokens=64)


# ---- the order ----


def names(steps: list[VariantStep]) -> list[str]:
    return [f"{step.title} {'+'.join(step.store)}" for step in steps]


def test_without_a_recipe_there_is_a_ladder_of_bounds() -> None:
    expected = ["dense f32", "dense int8", *(f"bound-{bound:g} f32+int8" for bound in BOUNDS)]
    assert names(ladder(default_recipe(True), False, True, True)) == expected
    assert names(ladder(default_recipe(True), False, True, False)) == expected[:2]
    assert names(ladder(default_recipe(False), False, False, True)) == expected[:1]


def test_the_steps_of_a_recipe_stay_and_get_gentler_bounds_before_them() -> None:
    steps = recipe(
        {"remove_macs": 0.8}, {"bound": 1.2, "store": ["int8"], "tune": False, "max_drop": 1.5}, {"remove_macs": 0.6, "store": ["int8"]}
    )
    found = ladder(steps, True, True, True)
    assert names(found) == [
        "dense f32", "dense int8", "bound-1.05 int8", "bound-1.1 int8", "bound-1.2 int8", "macs-60 int8", "macs-80 f32+int8",
    ]  # fmt: skip
    assert {(step.tune, step.max_drop) for step in found if step.bound} == {(False, 1.5)}
    assert names(ladder(recipe({"max_drop": 1.0}), True, True, True)) == ["dense f32", "dense int8"]
    assert names(ladder(recipe({"store": ["f32"]}, int8={"when": "never"}), True, True, True)) == ["dense f32"]


NO_BUDGET = Budget("auto", 0, 0, 0, 0, 0, 0, 0, 0, 0)
MADE_CANDIDATE = st.tuples(st.sampled_from([0.5, 0.6, 0.7, 0.8]), st.sampled_from([1, 2, 3, 4, 5]), st.sampled_from([1, 2, 3]))


@given(st.lists(st.lists(MADE_CANDIDATE, min_size=1, max_size=2), min_size=1, max_size=5), st.integers(1, 5), st.integers(1, 3))
def test_the_chosen_one_is_the_best_scored_of_the_gentlest_step_that_fits(
    steps: list[list[tuple[float, int, int]]], seconds: int, size: int
) -> None:
    """Steps with candidates of a score, a latency and a memory; a search that prunes nothing, against a plain loop."""
    target, made = Target(MADE, float(seconds), size << 24), []

    def versions(_source: Any, _dense: Any, step: VariantStep, *_: Any) -> tuple[list[Candidate], list[Any]]:
        place = int(step.name)
        made.append(place)
        graphs = Stages(b"", {})
        return [Candidate(f"{place}.{n}", graphs, 0, 0, scores={"task": one[0]}) for n, one in enumerate(steps[place])], []

    def tried(search: Fitting, one: Candidate, *_: Any) -> Any:
        place, number = map(int, one.name.split("."))
        _, latency, memory = steps[place][number]
        found = Estimate(Interval(latency, latency, latency), Interval(memory << 24, 0, memory << 24), "task", NO_BUDGET, "exact")
        return search.add(one.name, "", None, found)  # type: ignore[arg-type]

    expected = None
    for place, candidates in enumerate(steps):
        fitting = [(-score, latency, n) for n, (score, latency, memory) in enumerate(candidates) if latency <= seconds and memory <= size]
        if fitting:
            expected = (place, min(fitting)[2])
            break
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "versions", versions)
        patch.setattr(fit_module, "_try", tried)
        patch.setattr(fit_module, "ladder", lambda *_: [VariantStep(name=str(place)) for place in range(len(steps))])
        patch.setattr(Fitting, "nothing", lambda *_, **__: NothingFits("nothing fits", {}))
        arguments: Any = (None, None, default_recipe(False), False, None, None, None, None, target)
        if expected is None:
            with pytest.raises(NothingFits):
                fit_variants(*arguments)
            assert made == list(range(len(steps)))
            return
        (chosen,), _, search = fit_variants(*arguments)
    assert chosen.name == f"{expected[0]}.{expected[1]}"
    assert made == list(range(expected[0] + 1))
    assert [one.name for one in search.tried if one.chosen] == [chosen.name]
