"""Recipes of vision models: which variants go into the bundle and how they are made, as TOML.

name = "multi-fashion"
pareto = true               # leave out what another variant makes pointless; false: keep all

[[variant]]                 # one step of compression, stored as one or two variants
bound = 1.10                # prune while no task's loss ratio passes this; or remove_macs = 0.6, remove_parameters = 0.6
store = ["f32", "int8"]
tune = true                 # whether [tune] follows; false: what pruning leaves
max_drop = 2.0              # refuse where the mean score falls by more points, on validation

[prune]                     # see edgeml_export.prune
[tune]                      # fine-tuning of what was pruned, by distillation from the reference
[int8]                      # see int8.py
[limits]
max_bytes = "2MB"

An ONNX file says nothing about its tasks: its recipe has a table [image] and a [[task]] for each, see `onnx_source`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from edgeml.errors import InputError, UsageError
from edgeml.sizes import parse_bytes
from edgeml_export.recipe import read_document
from edgeml_export.vision.int8 import METHODS, REDUCE, WHEN, Int8

__all__ = ["Limits", "Prune", "Tune", "VariantStep", "VisionRecipe", "default_recipe", "parse_recipe", "parse_table", "read_recipe"]

STORED = ("f32", "int8")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
T = TypeVar("T")


@dataclass(frozen=True)
class VariantStep:
    """One degree of pruning; 0 is none. `max_drop` in points of the mean score on validation; 0 is no limit.

    `tune`: whether it is fine-tuned after pruning, as [tune] says.
    """

    name: str = ""
    bound: float = 0.0
    remove_macs: float = 0.0
    remove_parameters: float = 0.0
    store: tuple[str, ...] = STORED
    max_drop: float = 0.0
    tune: bool = True

    @property
    def title(self) -> str:
        """Its name in the bundle, before the kind of numbers."""
        shares = {"macs": self.remove_macs, "parameters": self.remove_parameters}
        parts = [f"{what}-{100 * share:g}" for what, share in shares.items() if share]
        return self.name or (f"bound-{self.bound:g}" if self.bound else parts[0] if parts else "dense")

    @property
    def pruned(self) -> bool:
        """Whether it is cut at all."""
        return bool(self.bound or self.remove_macs or self.remove_parameters)


@dataclass(frozen=True)
class Prune:
    """Parameters of `edgeml_export.prune.prune`; `images` of the training split are its calibration data."""

    images: int = 1024
    align: int = 8
    rounds: int = 1
    protect: tuple[str, ...] = ()
    cost: str = "macs"


@dataclass(frozen=True)
class Tune:
    """Fine-tuning on the training split: `soft` and `labels` weigh the reference's answers and the tasks' own losses."""

    epochs: int = 3
    rate: float = 0.03
    batch: int = 128
    temperature: float = 4.0
    soft: float = 1.0
    labels: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Limits:
    """What refuses the bundle. `max_bytes` of the file before its manifest, such as "2MB"; empty: none."""

    max_bytes: str = ""


@dataclass(frozen=True)
class VisionRecipe:
    """All that decides an export, apart from the model and its data. `image` and `tasks` are for ONNX files, undecoded."""

    name: str = "default"
    variants: tuple[VariantStep, ...] = ()
    prune: Prune = field(default_factory=Prune)
    tune: Tune = field(default_factory=Tune)
    int8: Int8 = field(default_factory=Int8)
    limits: Limits = field(default_factory=Limits)
    image: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[Mapping[str, Any], ...] = ()
    pareto: bool = True
    where: str = "the default recipe"

    def check(self, with_data: bool) -> None:
        """Raise `UsageError` where data is needed and not given."""
        for step in self.variants:
            if not with_data and (step.pruned or "int8" in step.store):
                what = "pruned" if step.pruned else "int8"
                raise UsageError(f"{self.where}: the {what} variant '{step.title}' is made with labelled images; name them with --data")

    def as_json(self) -> dict[str, Any]:
        """For the bundle's provenance."""
        document = {key: value for key, value in asdict(self).items() if key not in ("image", "tasks", "where")}
        return document


def default_recipe(with_data: bool) -> VisionRecipe:
    """Without a recipe: the model as it is, and in int8 where there is data and it helps."""
    return VisionRecipe(variants=(VariantStep(store=STORED if with_data else ("f32",)),))


def read_recipe(path: Path) -> VisionRecipe:
    """Read a recipe file. Raises `InputError` naming the file and the place in it."""
    return parse_recipe(read_document(path), str(path))


def parse_recipe(document: Mapping[str, Any], where: str) -> VisionRecipe:
    """Check a decoded recipe: known tables and keys, right types and ranges."""
    known = {"name", "pareto", "variant", "prune", "tune", "int8", "limits", "image", "task"}
    unknown = sorted(set(document) - known)
    if unknown:
        raise InputError(f"{where}: unknown key '{unknown[0]}'; a vision recipe has {', '.join(sorted(known))}")
    lists = {key: document.get(key, []) for key in ("variant", "task")}
    for key, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise InputError(f"{where}: '{key}' must be a list of tables, written [[{key}]]")
    steps = [parse_table(VariantStep, item, f"{where}: variant {number + 1}") for number, item in enumerate(lists["variant"])]
    name, image, pareto = document.get("name", "unnamed"), document.get("image", {}), document.get("pareto", True)
    if not isinstance(name, str) or not isinstance(image, dict) or not isinstance(pareto, bool):
        raise InputError(f"{where}: 'name' must be a string, 'image' a table and 'pareto' true or false")
    recipe = VisionRecipe(
        name=name,
        variants=tuple(steps) or (VariantStep(),),
        prune=parse_table(Prune, document.get("prune", {}), f"{where}: [prune]"),
        tune=parse_table(Tune, document.get("tune", {}), f"{where}: [tune]"),
        int8=parse_table(Int8, document.get("int8", {}), f"{where}: [int8]"),
        limits=parse_table(Limits, document.get("limits", {}), f"{where}: [limits]"),
        image=image,
        tasks=tuple(lists["task"]),
        pareto=pareto,
        where=where,
    )
    _check_ranges(recipe, where)
    return recipe


def _check_ranges(recipe: VisionRecipe, where: str) -> None:
    _check_variants(recipe, where)
    _among((recipe.int8.when,), WHEN, f"{where}: [int8]: when")
    _among((recipe.int8.reduce_range,), REDUCE, f"{where}: [int8]: reduce_range")
    _among(recipe.int8.methods, tuple(METHODS), f"{where}: [int8]: methods")
    _among((recipe.prune.cost,), ("macs", "latency"), f"{where}: [prune]: cost")
    if recipe.limits.max_bytes:
        try:
            parse_bytes(recipe.limits.max_bytes)
        except UsageError as error:
            raise InputError(f"{where}: [limits]: max_bytes: {error}") from error
    for value, key in ((recipe.int8.images, "images"), (recipe.prune.images, "images"), (recipe.tune.batch, "batch")):
        if value < 1:
            raise InputError(f"{where}: '{key}' must be at least 1")


def _check_variants(recipe: VisionRecipe, where: str) -> None:
    titles = [step.title for step in recipe.variants]
    for step in recipe.variants:
        place = f"{where}: variant '{step.title}'"
        if titles.count(step.title) > 1:
            raise InputError(f"{place} occurs twice; give one of them a name")
        if not _NAME.fullmatch(step.title):
            raise InputError(f"{where}: a variant is named by 1 to 40 letters, digits, dots, dashes or underscores, not {step.title!r:.60}")
        shares = step.remove_macs, step.remove_parameters
        if step.bound and any(shares):
            raise InputError(f"{place}: give bound, or remove_macs and remove_parameters, not both")
        if (step.bound and step.bound < 1) or max(shares) >= 1:
            raise InputError(f"{place}: a bound is at least 1, and what is removed a share below 1")
        _among(step.store, STORED, f"{place}: store")
        if recipe.int8.when == "never" and "f32" not in step.store:
            raise InputError(f"{place} is stored in int8 alone, and [int8] says never; store 'f32' too")


def _among(values: tuple[str, ...], choices: tuple[str, ...], where: str) -> None:
    odd = [value for value in values if value not in choices]
    if odd or not values:
        raise InputError(f"{where} is one or more of {', '.join(choices)}, not {odd[0] if odd else 'nothing'!r:.40}")


def parse_table(made: type[T], table: Any, where: str) -> T:
    """A table as a dataclass: keys are its fields, types those of their defaults. Raises `InputError` naming the place."""
    if not isinstance(table, dict):
        raise InputError(f"{where} must be a table")
    known = {item.name: item for item in fields(made)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise InputError(f"{where}: there is no '{key}'; there is {', '.join(known)}")
        given[key] = _typed(value, known[key].type, f"{where}: '{key}'")
    missing = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING and name not in given]
    if missing:
        raise InputError(f"{where}: '{missing[0]}' is missing")
    return made(**given)


_TYPES: Mapping[str, tuple[str, type]] = {
    "str": ("a string", str),
    "bool": ("true or false", bool),
    "int": ("a whole number from 0", int),
    "int | None": ("a whole number from 0", int),
    "float": ("a number from 0", float),
    "tuple[str, ...]": ("a list of strings", str),
    "tuple[float, ...]": ("a list of numbers", float),
}


def _typed(value: Any, annotation: Any, where: str) -> Any:
    what, kind = _TYPES[str(annotation)]
    many = what.startswith("a list")
    items = value if many and isinstance(value, list) else [value]
    items = [float(item) if kind is float and type(item) is int else item for item in items]
    bad = any(type(item) is not kind for item in items) or (many and not isinstance(value, list))
    if bad or (kind in (int, float) and not many and not 0 <= items[0] < 1e9):
        raise InputError(f"{where} must be {what}, not {value!r:.40}")
    return tuple(items) if many else items[0]
