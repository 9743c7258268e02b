"""From a CNN to a candidate bundle with variants, and its evidence.

Splits by construction: training images calibrate, prune and fine-tune; validation chooses and accepts; test is read at the very
end, by the written bundle in a process where torch cannot be imported, and decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import onnx
import onnxruntime
import torch

from edgeml.bundle import Bundle, write_bundle
from edgeml.errors import QualityRefused, UsageError
from edgeml.sizes import format_bytes, parse_bytes
from edgeml_export.evidence import run_apart
from edgeml_export.passes import Bar
from edgeml_export.vision.assemble import assemble
from edgeml_export.vision.cost import count_stages
from edgeml_export.vision.data import VisionData, chances, scores
from edgeml_export.vision.graphs import Stages
from edgeml_export.vision.model import VisionModel
from edgeml_export.vision.onnx_source import OnnxModel, read_onnx
from edgeml_export.vision.recipe import VisionRecipe, default_recipe, read_recipe
from edgeml_export.vision.runner import in_batches
from edgeml_export.vision.variants import Candidate, candidates, dominated, float_stages, ranked, timed

if TYPE_CHECKING:
    from edgeml_export.fit import Target

__all__ = ["cpu_name", "export_vision"]

NAME_LIMIT = 64


def export_vision(
    source: str | VisionModel | OnnxModel,
    candidate: Path,
    recipe: str | os.PathLike[str] | VisionRecipe | None,
    root: Path | None,
    split_at: Sequence[str],
    work: Path | None,
    bar: Bar,
    show: bool,
    target: Target | None = None,
) -> dict[str, Any]:
    """Write the candidate bundle and return its evidence. `source` as text is an `.onnx` file. See `edgeml_export.export`."""
    steps = _recipe(recipe, root is not None)
    steps.check(root is not None)
    if isinstance(source, str):
        source = read_onnx(Path(source), steps, split_at)
    elif split_at:
        raise UsageError("--split-at is for ONNX files; a torch model has its backbone and heads as parts")
    elif steps.image or steps.tasks:
        raise UsageError(f"{steps.where}: [image] and [[task]] are for ONNX files; a torch model says itself what it reads and answers")
    long = next(
        (step.title for step in steps.variants if len(f"head_{step.title}-int8") + max(len(t.name) for t in source.tasks) > 63), None
    )
    if long is not None:
        raise UsageError(f"{steps.where}: the name of variant '{long}', with a task's before it, is above {NAME_LIMIT} letters; shorten it")
    data = None if root is None else VisionData.find(root, source.image, source.tasks)
    if data is not None:
        data.check()
    dense = float_stages(source)
    fitted = None
    if target is None:
        made, dropped = candidates(source, dense, steps, data, work, bar)
    else:
        from edgeml_export.vision.fit_variant import fit_variants

        made, dropped, fitted = fit_variants(source, dense, steps, recipe is not None, data, work, bar, candidate, target)
    image = data.validation.images[:1] if data is not None else numpy.zeros((1, *source.image.shape), numpy.float32)
    made = timed(made, dense, image)
    kept, pointless = dominated(made) if steps.pareto else (ranked(made), [])
    known = {} if data is None else chances(source.tasks, data.train, data.test)
    pages, manifest = assemble(source.tasks, source.image, kept, known, cpu_name(), _provenance(source, steps, data))
    write_bundle(candidate, pages, manifest)
    size = _size(candidate)
    if steps.limits.max_bytes and size > parse_bytes(steps.limits.max_bytes):
        raise QualityRefused(
            f"the bundle is refused and nothing was written: it has {format_bytes(size)}, and the limit is {steps.limits.max_bytes}"
        )
    evidence = _evidence(source, dense, kept, size) | {"dropped": dropped + pointless}
    evidence |= {} if fitted is None else {"fit": fitted.document()}
    return evidence if data is None else _with_scores(evidence, source, candidate, data, show)


def _recipe(recipe: str | os.PathLike[str] | VisionRecipe | None, with_data: bool) -> VisionRecipe:
    if recipe is None:
        return default_recipe(with_data)
    return recipe if isinstance(recipe, VisionRecipe) else read_recipe(Path(recipe))


def _size(bundle: Path) -> int:
    """Bytes before the manifest, which the evidence is a part of."""
    with Bundle.open(bundle) as opened:
        return opened.header.manifest_offset


def _evidence(source: VisionModel | OnnxModel, dense: Stages, kept: Sequence[Candidate], size: int) -> dict[str, Any]:
    """Sizes, and what is known of each variant before it is tested."""
    macs, parameters = count_stages(dense)
    first = kept[0]
    return {
        "macs": {"reference": macs, "bundle": first.macs},
        "parameters": {"reference": parameters, "bundle": first.parameters},
        "bytes": {"reference": dense.size, "bundle": size},
        "variants": {candidate.name: _figures(candidate, macs, parameters) for candidate in kept},
    }


def _figures(candidate: Candidate, macs: int, parameters: int) -> dict[str, Any]:
    return {
        "bytes": candidate.size,
        "macs": candidate.macs,
        "macs_removed": round(1 - candidate.macs / macs, 6) if macs else None,
        "parameters": candidate.parameters,
        "parameters_removed": round(1 - candidate.parameters / parameters, 6) if parameters else None,
        "latency_s": {"p50": candidate.latency, "cpu": cpu_name(), "threads": 1},
        "speedup": round(candidate.speedup, 3),
        "validation": dict(candidate.scores),
        **candidate.evidence,
    }


def _with_scores(evidence: dict[str, Any], source: VisionModel | OnnxModel, bundle: Path, data: VisionData, show: bool) -> dict[str, Any]:
    """Scores on the test split, of every variant as a device would run it, and of the model that was given."""
    reference = dict(source.reference_scores)
    if not {task.name for task in source.tasks} <= set(reference):
        reference = scores(source.tasks, data.test, in_batches(source.predict, data.test.images))
    keys = ("score", "metric", "n")
    for name, variant in evidence["variants"].items():
        found = _eval(bundle, name, source, data, show)
        variant["tasks"] = {
            task.name: {**{key: found[task.name][key] for key in keys}, "reference_score": reference[task.name]} for task in source.tasks
        }
        variant["mean_score"] = _mean(variant["tasks"], "score")
    tasks = next(iter(evidence["variants"].values()))["tasks"]
    means = {f"mean_{key}": _mean(tasks, key) for key in ("score", "reference_score")}
    return {**evidence, "tasks": tasks, "split": "test", **means}


def _mean(tasks: Mapping[str, Mapping[str, Any]], key: str) -> float:
    return float(sum(task[key] for task in tasks.values()) / len(tasks))


def _eval(bundle: Path, variant: str, source: VisionModel | OnnxModel, data: VisionData, show: bool) -> dict[str, dict[str, Any]]:
    """`edgeml eval` of a variant on the test split."""
    arguments = ["eval", str(bundle), "--data", str(data.set.path), "--split", "test", "--json", "--variant", variant]
    arguments += ["--tasks", ",".join(f"{task.domain}/{task.name}" for task in source.tasks), *([] if show else ["--quiet"])]
    found: dict[str, dict[str, Any]] = json.loads(run_apart("edgeml.cli", arguments, show))["tasks"]
    return found


def _provenance(source: VisionModel | OnnxModel, recipe: VisionRecipe, data: VisionData | None) -> dict[str, Any]:
    """Where the model comes from, in words that are the same for the next export of the same thing."""
    libraries = (numpy, onnx, onnxruntime, torch)
    sets: dict[str, Any] = {}
    if data is not None:
        files = sorted(file for file in data.set.path.glob("*.npz") if file.stem in ("train", "validation", "test"))
        hashes = {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        sets = {data.set.name: {"licence": data.set.licence, **hashes}}
    return {
        **source.provenance,
        "recipe": recipe.as_json(),
        "versions": {library.__name__: library.__version__ for library in libraries},
        "data": sets,
    }


def cpu_name() -> str | None:
    """What this CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "hardware")))
    return next((name for name in named if name), platform.processor() or platform.machine() or None)
