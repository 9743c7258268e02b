"""Candidates for a bundle: what a recipe's variants come to, what they cost, and which of them are worth their bytes.

A candidate is dominated when another is at least as good in mean validation score, latency and bytes, and better in one; a recipe
may keep it all the same. What remains is ordered by score, the best first: that is what a request without a wish gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import QualityRefused, UsageError
from edgeml_export.passes import Bar
from edgeml_export.vision.cost import count_stages
from edgeml_export.vision.data import VisionData, scores
from edgeml_export.vision.graphs import Stages, stage_graphs
from edgeml_export.vision.int8 import quantize
from edgeml_export.vision.model import VisionModel
from edgeml_export.vision.onnx_source import OnnxModel
from edgeml_export.vision.recipe import VariantStep, VisionRecipe
from edgeml_export.vision.runner import Runner, in_batches, interleaved, speedup

__all__ = ["Candidate", "Source", "candidates", "check_drop", "dominated", "float_stages", "ranked", "scored", "timed", "versions"]

NOISE = 1.03  # latencies closer than this are the same: which variants stay must not hang on a disturbance

Source = VisionModel | OnnxModel


@dataclass(frozen=True)
class Candidate:
    """A version of the model. `scores` on validation, empty without data; `latency` in seconds, of one image with every task."""

    name: str
    stages: Stages
    macs: int
    parameters: int
    bound: float | None = None
    quantized: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)
    latency: float = 0.0
    speedup: float = 1.0
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The mean over tasks."""
        return sum(self.scores.values()) / max(len(self.scores), 1)

    @property
    def size(self) -> int:
        """Bytes of its different graphs."""
        return sum(map(len, {self.stages.backbone, *self.stages.heads.values()}))


def float_stages(source: Source) -> Stages:
    """The model as it came."""
    return source.stages if isinstance(source, OnnxModel) else stage_graphs(source)


def candidates(
    source: Source, dense: Stages, recipe: VisionRecipe, data: VisionData | None, work: Path | None, bar: Bar
) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """All versions that the recipe names, and those it names that are left out, with the reason.

    Raises `QualityRefused` where a version falls by more than the recipe allows it.
    """
    made, dropped = list[Candidate](), list[dict[str, Any]]()
    reference = {} if data is None else scored(source, dense, data)
    for step in recipe.variants:
        these, left = versions(source, dense, step, recipe, data, work, bar)
        for one in these:
            check_drop(one, reference, step.max_drop)
        made, dropped = made + these, dropped + left
    if not made:
        raise UsageError(f"{recipe.where}: no variant is left, since int8 was not kept ({dropped[0]['reason']}); store 'f32' too")
    return made, dropped


def versions(
    source: Source, dense: Stages, step: VariantStep, recipe: VisionRecipe, data: VisionData | None, work: Path | None, bar: Bar
) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """What one step of a recipe comes to, as it is stored, and what int8 could not keep, with the reason."""
    stages, about = dense, dict[str, Any]()
    if step.pruned:
        stages, about = _pruned(source, step, recipe, data, work, bar)
    macs, parameters = count_stages(stages)
    found = {} if data is None else scored(source, stages, data)
    plain = Candidate(f"{step.title}-f32", stages, macs, parameters, step.bound or None, False, found, evidence=about)
    made, dropped = [plain] if "f32" in step.store else [], list[dict[str, Any]]()
    if "int8" in step.store and recipe.int8.when != "never":
        assert data is not None
        smaller, how = _int8(source, stages, recipe, data, bar, step.title)
        name = f"{step.title}-int8"
        if smaller is None:
            dropped.append({"name": name, "reason": how["reason"], "int8": how})
        else:
            after, whole = scored(source, smaller, data), {**about, "int8": how}
            made.append(replace(plain, name=name, stages=smaller, quantized=True, scores=after, evidence=whole))
    return made, dropped


def scored(source: Source, stages: Stages, data: VisionData) -> dict[str, float]:
    """Each task's score on validation."""
    return scores(source.tasks, data.validation, in_batches(Runner(stages), data.validation.images))


def _pruned(
    source: Source, step: VariantStep, recipe: VisionRecipe, data: VisionData | None, work: Path | None, bar: Bar
) -> tuple[Stages, dict[str, Any]]:
    if isinstance(source, OnnxModel):
        raise UsageError(
            f"{recipe.where}: variant '{step.title}' is pruned, which needs the torch model; an ONNX file can be quantised only"
        )
    assert data is not None
    from edgeml_export.vision.shrink import shrink

    module, about = shrink(source, step, recipe, data, work, bar)
    return stage_graphs(source, module), {"prune": about}


def _int8(
    source: Source, stages: Stages, recipe: VisionRecipe, data: VisionData, bar: Bar, title: str
) -> tuple[Stages | None, dict[str, Any]]:
    images = data.train.images[: recipe.int8.images]
    with bar(f"{title}: int8", len(recipe.int8.methods)) as tick:
        return quantize(stages, source.tasks, recipe.int8, images, lambda made: scored(source, made, data), tick)


def check_drop(candidate: Candidate, reference: Mapping[str, float], limit: float) -> None:
    """Raise `QualityRefused` where the mean score on validation falls by more points than `limit`; 0 is none."""
    if not limit or not reference:
        return
    mean = sum(reference.values()) / len(reference)
    drop = 100 * (mean - candidate.score)
    if drop > limit:
        raise QualityRefused(
            f"the bundle is refused and nothing was written: the mean score of variant '{candidate.name}' falls by {drop:.2f} points "
            f"on validation (limit {limit:g})"
        )


def timed(found: Sequence[Candidate], dense: Stages, image: NDArray[np.float32]) -> list[Candidate]:
    """The same with latency, and speed relative to the float model that was given, all measured in turns on one thread."""
    runners = [Runner(dense), *(Runner(candidate.stages) for candidate in found)]
    seconds = interleaved([_call(runner, image) for runner in runners])
    return [
        replace(candidate, latency=float(np.median(seconds[:, place])), speedup=speedup(seconds[:, 0], seconds[:, place]))
        for place, candidate in enumerate(found, 1)
    ]


def _call(runner: Runner, image: NDArray[np.float32]) -> Callable[[], object]:
    return lambda: runner(image)


def ranked(found: Sequence[Candidate]) -> list[Candidate]:
    """The best score first; among equals the quicker, then the smaller."""
    return sorted(found, key=lambda one: (-one.score, one.latency, one.size))


def dominated(found: Sequence[Candidate]) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """Those worth keeping, the best score first, and those that another one makes pointless."""
    kept, dropped = list[Candidate](), list[dict[str, Any]]()
    for candidate in ranked(found):
        better = next((one for one in found if one is not candidate and _dominates(one, candidate)), None)
        if better is None:
            kept.append(candidate)
        else:
            figures = {"mean_score": candidate.score, "latency_s": candidate.latency, "bytes": candidate.size}
            dropped.append({"name": candidate.name, "reason": f"'{better.name}' is at least as good in every way", **figures})
    return kept, dropped


def _dominates(one: Candidate, other: Candidate) -> bool:
    quicker, slower = one.latency * NOISE < other.latency, one.latency > other.latency * NOISE
    if slower or one.score < other.score or one.size > other.size:
        return False
    return quicker or one.score > other.score or one.size < other.size
