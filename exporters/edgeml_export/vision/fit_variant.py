"""The variant of a CNN for a device: the gentlest compression that fits, and of that the version with the best score.

Steps are tried from the cheapest to make and the least lost: the model as it is, in f32 and in int8, then pruned further and further,
which takes minutes each and is kept in the folder of --work. A recipe that prunes to bounds gets gentler bounds before its own; without
a recipe there is a ladder of them. A step is made only when no version of the gentler ones fits. Whether int8 is quicker is predicted
for the device, not timed here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeml.bundle import write_bundle
from edgeml.errors import QualityRefused, UsageError
from edgeml.sizes import format_bytes, parse_bytes
from edgeml_export.fit import IMAGES, Sketch, Target, estimate
from edgeml_export.fit_tried import Fitting, Tried
from edgeml_export.passes import Bar
from edgeml_export.vision.assemble import assemble
from edgeml_export.vision.data import VisionData
from edgeml_export.vision.graphs import Stages
from edgeml_export.vision.onnx_source import OnnxModel
from edgeml_export.vision.recipe import VariantStep, VisionRecipe
from edgeml_export.vision.variants import Candidate, Source, check_drop, scored, versions

__all__ = ["BOUNDS", "fit_variants", "ladder"]

#: Loss ratios that pruning may reach, gentle ones first.
BOUNDS = (1.05, 1.1, 1.2)


def ladder(recipe: VisionRecipe, given: bool, with_data: bool, prunable: bool) -> list[VariantStep]:
    """The steps to try, the gentlest first. `given`: the recipe is the user's; `prunable`: the model is not an ONNX file."""
    whole = next((step for step in recipe.variants if not step.pruned), VariantStep())
    kinds = ["f32", "int8"] if with_data and recipe.int8.when != "never" else ["f32"]
    steps = [replace(whole, store=(kind,)) for kind in kinds]
    cut = [step for step in recipe.variants if step.pruned]
    bounded = [step for step in cut if step.bound]
    if prunable and with_data:
        like = min(bounded, key=lambda step: step.bound) if bounded else VariantStep(store=tuple(kinds))
        highest = max((step.bound for step in bounded), default=0.0 if given else BOUNDS[-1] + 1)
        known = {step.bound for step in bounded}
        cut += [replace(like, name="", bound=bound) for bound in BOUNDS if bound < highest and bound not in known]
    cut.sort(key=lambda step: (not step.bound, step.bound, step.remove_macs, step.remove_parameters))
    return [*steps, *cut]


def fit_variants(
    source: Source,
    dense: Stages,
    recipe: VisionRecipe,
    given: bool,
    data: VisionData | None,
    work: Path | None,
    bar: Bar,
    place: Path,
    target: Target,
) -> tuple[list[Candidate], list[dict[str, Any]], Fitting]:
    """The candidate that is chosen, what int8 could not keep, and all that was tried; `place` is written to. Raises `NothingFits`."""
    target.check(IMAGES)
    if target.tokens is not None:
        raise UsageError("--tokens is about texts, and this model reads images")
    here = replace(recipe, int8=replace(recipe.int8, when="always" if recipe.int8.when == "faster" else recipe.int8.when))
    reference = {} if data is None else scored(source, dense, data)
    search, dropped = Fitting(target), list[dict[str, Any]]()
    for step in ladder(recipe, given, data is not None, not isinstance(source, OnnxModel)):
        made, left = versions(source, dense, step, here, data, work, bar)
        dropped += left
        tried = [(one, _try(search, one, source, place)) for one in made]
        for one, about in tried:
            _check(about, one, step, reference, recipe)
        fitting = [(one, about) for one, about in tried if about.fits and about.refused is None]
        if fitting:
            one, about = max(fitting, key=lambda each: (each[0].score, -target.figure(each[1].found.latency), -each[0].size))
            about.chosen = True
            return [one], dropped, search
    raise search.nothing(hint=_hint(recipe, given, data, source))


def _try(search: Fitting, one: Candidate, source: Source, place: Path) -> Tried:
    pages, manifest = assemble(source.tasks, source.image, [one], {}, None, {})
    write_bundle(place, pages, manifest)
    sketch = Sketch.read(place)
    return search.add(one.name, "", sketch, estimate(sketch, search.target))


def _check(about: Tried, one: Candidate, step: VariantStep, reference: dict[str, float], recipe: VisionRecipe) -> None:
    """Note what a candidate loses, and the first limit of the recipe that it breaks."""
    if reference:
        about.lost = 100 * (sum(reference.values()) / len(reference) - one.score)
    try:
        check_drop(one, reference, step.max_drop)
    except QualityRefused as refused:
        about.refused = str(refused).partition("nothing was written: ")[2]
    if recipe.limits.max_bytes and about.sketch.bytes > parse_bytes(recipe.limits.max_bytes):
        about.refused = f"it has {format_bytes(about.sketch.bytes)}, and the limit is {recipe.limits.max_bytes}"


def _hint(recipe: VisionRecipe, given: bool, data: VisionData | None, source: Source) -> str:
    """What could be tried that was not."""
    if data is None:
        return "int8 and pruned variants could be tried with labelled images: name them with --data"
    if isinstance(source, OnnxModel):
        return "pruning needs the torch model"
    if given and not any(step.pruned for step in recipe.variants):
        return "the recipe prunes nothing: a [[variant]] with bound = 1.2 would be smaller"
    return "a recipe with a [[variant]] that is pruned further, say remove_macs = 0.6, would make a smaller one"
