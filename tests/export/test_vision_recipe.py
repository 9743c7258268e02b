"""Recipes of vision models: what is read, and what is refused with the place named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from edgeml_export.vision.recipe import default_recipe, parse_recipe, read_recipe

from edgeml.errors import InputError, UsageError

EXAMPLE = Path(__file__).parents[2] / "examples" / "multitask_vision"


def test_a_recipe_is_read() -> None:
    document = {
        "name": "r",
        "variant": [
            {"bound": 1.05},
            {"remove_macs": 0.6, "remove_parameters": 0.7, "store": ["int8"]},
            {"name": "whole", "max_drop": 1},
            {"remove_parameters": 0.7},
        ],
        "int8": {"methods": ["minmax"], "max_drop": 1},
        "tune": {"epochs": 2},
    }
    recipe = parse_recipe(document, "r.toml")
    assert [step.title for step in recipe.variants] == ["bound-1.05", "macs-60", "whole", "parameters-70"]
    assert [step.pruned for step in recipe.variants] == [True, True, False, True]
    assert (recipe.int8.max_drop, recipe.int8.methods, recipe.tune.epochs) == (1.0, ("minmax",), 2)
    assert recipe.as_json()["variants"][1]["store"] == ("int8",)


def test_without_data_the_default_is_float_alone() -> None:
    assert default_recipe(False).variants[0].store == ("f32",)
    assert default_recipe(True).variants[0].store == ("f32", "int8")
    with pytest.raises(UsageError, match="the int8 variant 'dense' is made with labelled images; name them with --data"):
        default_recipe(True).check(with_data=False)


@pytest.mark.parametrize("name", ["multi_fashion", "camvid"])
def test_the_examples_are_recipes(name: str) -> None:
    recipe = read_recipe(EXAMPLE / f"{name}.toml")
    recipe.check(with_data=True)
    assert len(recipe.variants) >= 2


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"pass": []}, "unknown key 'pass'; a vision recipe has"),
        ({"variant": {}}, r"'variant' must be a list of tables, written \[\[variant\]\]"),
        ({"variant": [{"bond": 1.1}]}, "variant 1: there is no 'bond'; there is name, bound"),
        ({"variant": [{"bound": "1.1"}]}, "variant 1: 'bound' must be a number from 0, not '1.1'"),
        ({"variant": [{"bound": True}]}, "variant 1: 'bound' must be a number"),
        ({"variant": [{"bound": 0.9}]}, "variant 'bound-0.9': a bound is at least 1"),
        ({"variant": [{"bound": 1.1, "remove_macs": 0.5}]}, "give bound, or remove_macs and remove_parameters, not both"),
        ({"variant": [{"remove_macs": 1.0}]}, "a share below 1"),
        ({"variant": [{}, {}]}, "variant 'dense' occurs twice"),
        ({"variant": [{"store": ["int4"]}]}, "store is one or more of f32, int8, not 'int4'"),
        ({"variant": [{"store": []}]}, "store is one or more of f32, int8, not 'nothing'"),
        ({"int8": {"methods": ["median"]}}, r"\[int8\]: methods is one or more of"),
        ({"int8": {"when": "maybe"}}, r"\[int8\]: when is one or more of faster, always, never"),
        ({"int8": {"reduce_range": "no "}}, "reduce_range"),
        ({"int8": {"images": 0}}, "'images' must be at least 1"),
        ({"tune": 3}, r"\[tune\] must be a table"),
        ({"prune": {"cost": "joules"}}, r"\[prune\]: cost is one or more of macs, latency"),
        ({"name": 1}, "'name' must be a string"),
        ({"pareto": "no"}, "'pareto' true or false"),
        ({"variant": [{"name": "../up"}]}, "a variant is named by 1 to 40 letters, .* not '../up'"),
        ({"variant": [{"store": ["int8"]}], "int8": {"when": "never"}}, r"stored in int8 alone, and \[int8\] says never"),
        ({"limits": {"max_bytes": "2 cats"}}, r"\[limits\]: max_bytes: '2 cats' is not a size"),
        ({"image": []}, "'image' a table"),
    ],
)
def test_a_faulty_recipe_is_refused(document: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as refusal:
        parse_recipe(document, "r.toml")
    assert str(refusal.value).startswith("r.toml: ")
    assert "\n" not in str(refusal.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"bad\.toml: the recipe is not TOML in UTF-8"):
        read_recipe(tmp_path / "bad.toml")
    with pytest.raises(InputError, match=r"none\.toml: the recipe cannot be read"):
        read_recipe(tmp_path / "none.toml")
