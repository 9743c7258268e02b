"""Recipes: the passes of an export and their parameters, in order, as TOML.

name = "multitask-text"

[[pass]]
kind = "quantize"
experts = "int4"

[[pass]]
kind = "verify"
max_mean_drop = 0.5
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgeml.errors import InputError, UsageError
from edgeml_export.passes import PASSES, Pass, Quantize, Usage

__all__ = ["Recipe", "default_recipe", "parse_recipe", "read_document", "read_recipe"]


@dataclass(frozen=True)
class Recipe:
    """Passes in the order they run."""

    name: str
    passes: tuple[Pass, ...]

    def check(self, with_data: bool) -> None:
        """Raise `UsageError` where a pass needs what no earlier one provides, or data that is not given."""
        facts = {"bundle"}  # it is written as soon as a pass requires it
        for step in self.passes:
            missing = sorted(step.requires - facts)
            if missing:
                raise UsageError(f"recipe '{self.name}': pass '{step.kind}' needs '{missing[0]}', which no pass before it provides")
            if step.split is not None and not with_data:
                raise UsageError(f"recipe '{self.name}': pass '{step.kind}' reads the {step.split} split; name the data with --data")
            facts |= step.ensures

    def as_json(self) -> dict[str, Any]:
        """For the bundle's provenance."""
        return {"name": self.name, "passes": [{"kind": step.kind, **asdict(step)} for step in self.passes]}  # type: ignore[call-overload]


def default_recipe(with_data: bool) -> Recipe:
    """Without a recipe: quantize, and record usage where there is data. No limits."""
    return Recipe("default", (Quantize(), Usage()) if with_data else (Quantize(),))


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises `InputError` naming the file and the pass."""
    return parse_recipe(read_document(path), str(path))


def read_document(path: Path) -> Mapping[str, Any]:
    """A recipe file, decoded and no more. Raises `InputError` naming the file."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: the recipe cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: the recipe is not TOML in UTF-8 ({error})") from error


def parse_recipe(document: Mapping[str, Any], where: str) -> Recipe:
    """Check a decoded recipe: known passes, known parameters, right types."""
    unknown = sorted(set(document) - {"name", "pass"})
    if unknown:
        raise InputError(f"{where}: unknown key '{unknown[0]}'; a recipe has a name and a list of [[pass]]")
    name, steps = document.get("name", "unnamed"), document.get("pass", [])
    if not isinstance(name, str) or not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise InputError(f"{where}: 'name' must be a string and 'pass' a list of tables, written [[pass]]")
    return Recipe(name, tuple(_parse_pass(step, f"{where}: pass {number + 1}") for number, step in enumerate(steps)))


def _parse_pass(step: Mapping[str, Any], where: str) -> Pass:
    kind = step.get("kind")
    if not isinstance(kind, str) or kind not in PASSES:
        raise InputError(f"{where}: 'kind' must be one of {', '.join(PASSES)}, not {kind!r:.40}")
    made = PASSES[kind]
    known: dict[str, Any] = {item.name: item.default for item in fields(made)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in step.items():
        if key == "kind":
            continue
        if key not in known:
            raise InputError(f"{where}: '{kind}' has no parameter '{key}'; it has {', '.join(known)}")
        wanted = type(known[key])
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted or (wanted in (int, float) and not 0 <= value < 1e9):
            what = {str: "a string", int: "a whole number from 0", float: "a number from 0"}[wanted]
            raise InputError(f"{where}: '{key}' of '{kind}' must be {what}, not {value!r:.40}")
        given[key] = value
    return made(**given)
