"""Recipes are read strictly, and a pass sees one split."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from edgeml_export.passes import PASSES, Quantize, Verify
from edgeml_export.recipe import default_recipe, parse_recipe, read_recipe

from edgeml.errors import InputError, UsageError

GOOD = """
name = "small"
[[pass]]
kind = "quantize"
dense = "f32"
[[pass]]
kind = "usage"
rows = 10
[[pass]]
kind = "sets"
[[pass]]
kind = "verify"
max_mean_drop = 1
"""


def test_passes_keep_their_order_and_parameters(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(GOOD)
    recipe = read_recipe(file)
    recipe.check(with_data=True)
    assert [step.kind for step in recipe.passes] == ["quantize", "usage", "sets", "verify"]
    assert recipe.passes[0] == Quantize(dense="f32")
    assert recipe.passes[3] == Verify(max_mean_drop=1.0)
    assert recipe.as_json()["passes"][1] == {"kind": "usage", "rows": 10}


def test_each_pass_may_see_its_own_split_only() -> None:
    assert {kind: made.split for kind, made in PASSES.items()} == {
        "quantize": None,
        "usage": "train",
        "agree": "train",
        "sets": "validation",
        "verify": "validation",
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("passes = []", "unknown key 'passes'"),
        ("pass = 3", "a list of tables"),
        ("name = 3", "'name' must be a string"),
        ("[[pass]]\nkind = 'distil'", "'kind' must be one of quantize"),
        ("[[pass]]\nkind = ['usage']", "'kind' must be one of"),
        ("[[pass]]\nkind = 'usage'\nrow = 3", "no parameter 'row'"),
        ("[[pass]]\nkind = 'usage'\nrows = '3'", "must be a whole number"),
        ("[[pass]]\nkind = 'usage'\nrows = -1", "must be a whole number"),
        ("[[pass]]\nkind = 'verify'\nmax_mean_drop = nan", "must be a number"),
        ("[[pass]]\nkind = 'quantize'\nexperts = true", "must be a string"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_recipe(tomllib.loads(text), "r.toml")


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    with pytest.raises(InputError, match=r"r\.toml: the recipe cannot be read"):
        read_recipe(file)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"r\.toml: the recipe is not TOML"):
        read_recipe(file)


def test_a_pass_needs_what_earlier_ones_provide() -> None:
    alone = parse_recipe({"pass": [{"kind": "sets"}]}, "r")
    with pytest.raises(UsageError, match="pass 'sets' needs 'usage'"):
        alone.check(with_data=True)
    with pytest.raises(UsageError, match="pass 'verify' reads the validation split; name the data with --data"):
        parse_recipe({"pass": [{"kind": "verify"}]}, "r").check(with_data=False)
    default_recipe(with_data=False).check(with_data=False)
