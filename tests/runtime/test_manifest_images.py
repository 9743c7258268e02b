"""The parts of a manifest that speak of images and variants: good ones become records, and each abuse is refused by its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeml.bundle import Bundle, Page
from edgeml.errors import BundleError
from edgeml.made import make_cnn
from edgeml.manifest import ImagePreprocess, ImageStages, parse_manifest

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], tuple[Page, ...]]:
    path = tmp_path_factory.mktemp("street") / "street.edgeml"
    make_cnn(path, "dense")
    with Bundle.open(path) as bundle:
        return dict(bundle.manifest), tuple(bundle.pages)


def test_good_image_tasks_become_records(street: Any) -> None:
    manifest = parse_manifest(*street)
    segmentation, edge = manifest.tasks
    assert segmentation.stages == ImageStages("backbone_full", "head_full_segmentation")
    assert segmentation.preprocess == ImagePreprocess("image", 24, 32, 3, (0.5,) * 3, (0.25,) * 3, "stretch")
    assert (segmentation.void, edge.void, segmentation.dense, segmentation.pair) == (4, 2, True, False)
    full, small = manifest.variants
    assert full.stages["edge"] == edge.stages
    assert (full.score, small.score, small.bound, full.bound) == (0.9, 0.8, 1.1, None)
    assert small.latency_s == 0.002
    assert small.bytes < full.bytes


def test_figures_of_a_variant_may_be_unmeasured(street: Any) -> None:
    document = copy.deepcopy(street[0])
    document["variants"][0].update(latency_s=None, scores={})
    full = parse_manifest(document, street[1]).variants[0]
    assert (full.latency_s, full.latency_cpu, full.score) == (None, None, None)


def task(number: int, **changes: Any) -> Edit:
    return lambda manifest: manifest["tasks"][number].update(changes)


def stages(number: int, **changes: Any) -> Edit:
    return lambda manifest: manifest["tasks"][number]["stages"].update(changes)


def image(**changes: Any) -> Edit:
    return lambda manifest: manifest["tasks"][0]["preprocess"].update(changes)


def variant(number: int, **changes: Any) -> Edit:
    return lambda manifest: manifest["variants"][number].update(changes)


def stage(number: int, **changes: Any) -> Edit:
    return lambda manifest: manifest["stages"][number].update(changes)


ABUSES: dict[str, tuple[Edit, str]] = {
    "both shapes of stages": (stages(0, embed="backbone_full"), "unknown key 'embed'"),
    "a text task with a backbone": (image(kind="text", tokenizer=0, max_tokens=8), "no tokenizer page"),
    "no backbone": (lambda m: m["tasks"][0]["stages"].pop("backbone"), "'backbone' is missing"),
    "backbone that is not there": (stages(0, backbone="other"), "does not exist"),
    "head of a classification": (task(0, kind="classification", metric="accuracy", void=None), "no output 'scores'"),
    "head that reads what nobody makes": (stage(1, inputs=["features_5"]), "reads 'features_5', which no stage before it makes"),
    "head that reads tokens": (stage(1, inputs=["ids"]), "reads 'ids'"),
    "backbone that reads features": (stage(0, inputs=["features"]), "reads 'features'"),
    "nine features": (stage(0, outputs=["features_8"]), "unknown output"),
    "unknown kind of input": (image(kind="sound"), "'kind'"),
    "no height": (image(height=0), "'height'"),
    "width beyond reason": (image(width=8193), "'width'"),
    "height is a float": (image(height=24.0), "'height'"),
    "two channels": (image(channels=2), "1 .grey. or 3"),
    "four channels": (image(channels=4), "'channels'"),
    "mean of another length": (image(mean=[0.5]), "'mean' must be a list of 3 numbers"),
    "mean beyond reason": (image(mean=[1e30, 0, 0]), "'std' must lie"),
    "mean is text": (image(mean=["a", "b", "c"]), "'mean'"),
    "std of zero": (image(std=[0.25, 0, 0.25]), "'std' must lie"),
    "std below zero": (image(std=[-1, 1, 1]), "'std' must lie"),
    "unknown resize": (image(resize="crop"), "'resize'"),
    "segmentation scored by accuracy": (task(0, metric="accuracy"), "'metric'"),
    "classification scored by mIoU": (task(0, kind="classification", metric="miou"), "'metric'"),
    "void in the middle": (task(0, void=1), "'void' must be null or 4"),
    "void out of range": (task(0, void=5), "'void' must be null or 4"),
    "void of an edge task among its labels": (task(1, void=1), "'void' must be null or 2"),
    "void is a boolean": (task(0, void=True), "'void'"),
    "one class": (task(0, labels=["sky"], void=None), "2 to 256 labels"),
    "more classes than a byte": (task(0, labels=[f"c{i}" for i in range(257)], void=None), "2 to 256 labels"),
    "other labels of an edge task": (task(1, labels=["edge", "no edge"]), "labels of an edge task"),
    "pair of images": (task(0, pair=True), "'pair'"),
    "variant without a name": (lambda m: m["variants"][0].pop("name"), "'name' is missing"),
    "two variants of one name": (variant(1, name="full"), "occurs twice"),
    "variant is text": (lambda m: m.update(variants=["full"]), r"variants\[0\]: expected an object"),
    "variant without a task": (lambda m: m["variants"][1]["stages"].pop("edge"), "'edge' is in only one"),
    "variant of an unknown task": (lambda m: m["variants"][1]["stages"].update(depth={"backbone": "a", "head": "b"}), "'depth'"),
    "scores of half the tasks": (lambda m: m["variants"][1]["scores"].pop("edge"), "scores are not for"),
    "score above one": (lambda m: m["variants"][1]["scores"].update(edge=1.5), "'edge' must be a number from 0 to 1"),
    "variant with a stage that is not there": (lambda m: m["variants"][1]["stages"]["edge"].update(head="no"), "does not exist"),
    "variant with text stages": (lambda m: m["variants"][1]["stages"]["edge"].update(trunk="no"), "unknown key 'trunk'"),
    "first variant is not the tasks'": (lambda m: m["variants"].reverse(), "first variant"),
    "bytes that are not those of its graphs": (variant(1, bytes=7), "'bytes' is 7, but its graphs have"),
    "bytes below zero": (variant(1, bytes=-1), "'bytes'"),
    "bound below one": (variant(1, bound=0.9), "'bound'"),
    "quantized is a number": (variant(1, quantized=1), "true or false"),
    "latency below zero": (variant(1, latency_s={"p50": -1, "cpu": "x"}), "'p50'"),
    "latency without a processor": (variant(1, latency_s={"p50": 1}), "'cpu' is missing"),
    "latency is a number": (variant(1, latency_s=0.002), "expected an object"),
    "variants of nothing": (lambda m: m.update(tasks=[]), "no task on images"),
}


@pytest.mark.parametrize("name", ABUSES)
def test_abuse_is_refused(name: str, street: Any) -> None:
    edit, match = ABUSES[name]
    document = copy.deepcopy(street[0])
    edit(document)
    with pytest.raises(BundleError, match=match) as caught:
        parse_manifest(document, street[1])
    assert str(caught.value).startswith("manifest")
    assert "\n" not in str(caught.value)


def test_maps_of_texts_are_refused(toy: Path) -> None:
    with Bundle.open(toy) as bundle:
        document = copy.deepcopy(dict(bundle.manifest))
        document["tasks"][1].update(kind="segmentation", metric="miou")
        with pytest.raises(BundleError, match="needs images"):
            parse_manifest(document, bundle.pages)
        document["tasks"][1].update(kind="classification", metric="accuracy", void=1)
        with pytest.raises(BundleError, match="cannot have 'void'"):
            parse_manifest(document, bundle.pages)
