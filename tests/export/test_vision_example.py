"""The vision example: its networks can be exported, its augmentations move labels with pixels, an absent checkpoint is named."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from edgeml_export.model import load_source
from edgeml_export.vision.cost import count_stages
from edgeml_export.vision.graphs import stage_graphs
from edgeml_export.vision.recipe import read_recipe

from edgeml.bundle import Bundle
from edgeml.errors import InputError, UsageError
from edgeml.manifest import load_manifest

EXAMPLE = Path(__file__).parents[2] / "examples" / "multitask_vision"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The file `model.py`, whose neighbour is `networks.py`."""
    before = {name: sys.modules.pop(name, None) for name in ("model", "networks")}
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield importlib.import_module("model")
    finally:
        sys.path.remove(str(EXAMPLE))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.mark.parametrize(("name", "macs", "parameters"), [("multi_fashion_mnist", 92e6, 1.53e6), ("camvid", 190e6, 1e6)])
def test_the_networks_can_be_exported(example: ModuleType, name: str, macs: float, parameters: float) -> None:
    reference = example.REFERENCES[name]
    counted = count_stages(stage_graphs(reference.model(reference.network(), {}, {})))
    assert 0.3 * macs < counted[0] <= macs
    assert 0.3 * parameters < counted[1] <= parameters


def test_labels_move_with_pixels(example: ModuleType) -> None:
    random = torch.Generator().manual_seed(3)
    images = torch.randint(0, 2, (4, 3, 24, 32), generator=random).float()
    for _ in range(6):
        moved, labels = example.mirrored(images, {"segmentation": images[:, 0].long()}, random)
        assert moved.shape == images.shape
        assert torch.equal((moved[:, 0] > 0).long(), labels["segmentation"])
    moved, labels = example.shifted(images, {"digit": torch.arange(4)}, random)
    assert moved.shape == images.shape
    assert torch.equal(labels["digit"], torch.arange(4))


def test_losses_leave_void_out(example: ModuleType) -> None:
    losses = example.REFERENCES["camvid"].losses
    outputs = torch.randn(1, 11, 2, 3, generator=torch.Generator().manual_seed(0))
    label = torch.full((1, 2, 3), 11)
    label[0, 0, 0] = 4
    changed = outputs.clone()
    changed[0, :, 1] = 9
    assert losses["segmentation"](outputs, label) == losses["segmentation"](changed, label)
    assert float(losses["edge"](outputs[:, :1], torch.full((1, 2, 3), 2))) == 0


@pytest.mark.parametrize(
    ("content", "kind", "sentence"), [(None, UsageError, "is not trained yet"), (b"no", InputError, "not a checkpoint")]
)
def test_a_checkpoint_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, kind: type[Exception], sentence: str
) -> None:
    monkeypatch.setenv("EDGEML_VISION_RUNS", str(tmp_path))
    if content is not None:
        (tmp_path / "camvid.safetensors").write_bytes(content)
    with pytest.raises(kind, match=sentence):
        load_source(f"{EXAMPLE / 'model.py'}:camvid")


BUNDLE = Path(__file__).parents[2] / "models" / "multi-fashion.edgeml"


@pytest.mark.skipif(not BUNDLE.exists(), reason="the committed bundle is not there: make vision-models")
def test_the_committed_bundle_is_small_and_says_under_which_terms() -> None:
    assert BUNDLE.stat().st_size < 2_000_000
    with Bundle.open(BUNDLE) as bundle:
        manifest = load_manifest(bundle)
    assert {task.name: len(task.labels) for task in manifest.tasks} == {"digit": 10, "fashion": 10}
    assert len(manifest.variants) >= 3
    assert any(variant.quantized for variant in manifest.variants)
    stored = {name for step in manifest.provenance["recipe"]["variants"] for name in step["store"]}
    assert stored == {"f32", "int8"}  # what is not among the variants was made, and was pointless
    assert "CC BY-SA" in manifest.provenance["licence"]
    assert "CC BY-SA" in BUNDLE.with_suffix(".md").read_text("utf-8")
    recipe = read_recipe(EXAMPLE / "multi_fashion.toml").as_json()
    assert manifest.provenance["recipe"]["name"] == recipe["name"]
    assert [step["bound"] for step in manifest.provenance["recipe"]["variants"]] == [step["bound"] for step in recipe["variants"]]


@pytest.mark.skipif(not BUNDLE.exists(), reason="the committed bundle is not there: make vision-models")
def test_the_committed_bundle_keeps_what_its_evidence_promises() -> None:
    with Bundle.open(BUNDLE) as bundle:
        manifest = load_manifest(bundle)
    for name, variant in manifest.evidence["variants"].items():
        assert variant["prune"]["holds"], name
        for drop in variant.get("int8", {}).get("drop_points", {}).values():
            assert drop <= 0.5
