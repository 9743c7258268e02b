"""From a model to a bundle with evidence, or to nothing at all (see `output` for how)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import onnx
import torch

from edgeml import metrics
from edgeml.bundle import write_bundle
from edgeml.data import SPLITS, TaskData, majority_label
from edgeml.errors import UsageError
from edgeml_export.assemble import assemble
from edgeml_export.evidence import evaluate, measured_sizes
from edgeml_export.model import Model, load_source
from edgeml_export.output import FILES, folder, publish
from edgeml_export.passes import Bar, Job, View
from edgeml_export.recipe import Recipe, default_recipe, read_recipe

if TYPE_CHECKING:
    from edgeml_export.fit import Target
    from edgeml_export.vision.model import VisionModel
    from edgeml_export.vision.recipe import VisionRecipe

__all__ = ["export"]


def export(
    source: str | Model | VisionModel,
    out: str | os.PathLike[str],
    recipe: str | os.PathLike[str] | Recipe | VisionRecipe | None = None,
    data: str | os.PathLike[str] | None = None,
    experts: str | None = None,
    dense: str | None = None,
    bar: Bar | None = None,
    show: bool = False,
    split_at: Sequence[str] = (),
    work: str | os.PathLike[str] | None = None,
    target: Target | None = None,
) -> dict[str, Any]:
    """Export a model (`file.py:function`, an `.onnx` file or a description) and return the evidence that stands in the bundle.

    Without `data` nothing is measured and no usage recorded. `experts` and `dense` (int4, int8, f32) go before the recipe's; they are
    for mixtures. `split_at` names the tensors where the backbone of an ONNX file ends, and `work` a folder where pruning keeps what
    it has decided, to go on from after an interruption; they are for vision models. `bar` shows progress, and `show` lets the
    measuring process show its own on standard error. With a `target` (`fit.read_target`) bits, residency or variant are those that fit
    the device, and the evidence has them below `fit`.
    Raises `QualityRefused` when a limit is broken; then, as after any error, `out` is as it was.
    """
    final, root, shown = Path(out), None if data is None else Path(data), bar or _silent
    with folder(final) as place:
        if isinstance(source, str) and not source.endswith(".onnx"):
            source = load_source(source)
        if isinstance(source, Model):
            if split_at or work is not None:
                raise UsageError("--split-at and --work are for vision models, and this is a mixture for texts")
            steps = _steps(recipe, root is not None)
            job, evidence = _mixture(Job(source, place, shown, show), steps, root, experts, dense, target)
            candidate = job.written()
        else:
            from edgeml_export.vision.export import export_vision

            if experts is not None or dense is not None:
                raise UsageError("--experts and --dense are for mixtures; the recipe of a vision model says how its weights are stored")
            if isinstance(recipe, Recipe):
                raise UsageError("this recipe is for mixtures, and the model is one for images")
            candidate = place / FILES[0]
            folder_of_work = None if work is None else Path(work)
            evidence = export_vision(source, candidate, recipe, root, tuple(split_at), folder_of_work, shown, show, target)
        publish(candidate, final, evidence)
    return evidence


def _silent(_label: str, _length: int) -> Any:
    return nullcontext(lambda _more: None)


def _steps(recipe: Any, with_data: bool) -> Recipe:
    if recipe is not None and not isinstance(recipe, str | os.PathLike | Recipe):
        raise UsageError("this recipe is for vision models, and the model is a mixture for texts")
    steps = recipe if isinstance(recipe, Recipe) else default_recipe(with_data) if recipe is None else read_recipe(Path(recipe))
    steps.check(with_data)
    return steps


def _mixture(
    job: Job, steps: Recipe, root: Path | None, experts: str | None, dense: str | None, target: Target | None
) -> tuple[Job, dict[str, Any]]:
    """The passes of a recipe, and what is known of the candidate they leave."""
    tasks = job.model.find_data(root) if root is not None else []
    views = {} if root is None else {split: View(root, tasks, split) for split in SPLITS}
    if target is not None:
        from edgeml_export.fit_mixture import fit_mixture

        fitted = fit_mixture(job, steps, views, (experts, dense), lambda: _write(job, steps, views), target)
        return job, {**_evidence(job, views.get("test")), "fit": fitted.document()}
    job.plan = job.plan.override(experts, dense)
    for step in steps.passes:
        if "bundle" in step.requires and job.bundle is None:
            _write(job, steps, views)
        step.apply(job, None if step.split is None else views[step.split])
        job.plan = job.plan.override(experts, dense)
    if job.bundle is None:
        _write(job, steps, views)
    return job, _evidence(job, views.get("test"))


def _write(job: Job, recipe: Recipe, views: Mapping[str, View]) -> None:
    test = views.get("test")
    chances = {} if test is None else {task.name: _chance(task) for task in test.tasks}
    pages, manifest = assemble(job.model, job.plan, job.usage, chances, _provenance(job, recipe, [] if test is None else test.tasks))
    path = job.folder / FILES[0]
    write_bundle(path, pages, manifest)
    job.bundle = path


def _chance(task: TaskData) -> float:
    labels = numpy.array([row.label for row in task.rows("test")])
    return metrics.chance(task.metric, labels, majority_label(task.rows("train")))


def _provenance(job: Job, recipe: Recipe, tasks: Sequence[TaskData]) -> dict[str, Any]:
    """Where the model comes from, in words that are the same for the next export of the same thing."""
    return {
        **job.model.provenance,
        "recipe": {**recipe.as_json(), "stored": vars(job.plan)},
        "versions": {"numpy": numpy.__version__, "onnx": onnx.__version__, "torch": torch.__version__},
        "data": {task.name: {"licence": task.licence, **{split: _hash(task, split) for split in SPLITS}} for task in tasks},
    }


def _hash(task: TaskData, split: str) -> str:
    """SHA-256 of a split's file."""
    for suffix in (".jsonl.gz", ".jsonl"):
        file = task.path / f"{split}{suffix}"
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
    raise UsageError(f"{task.path}: no {split}.jsonl.gz or {split}.jsonl there")


def _evidence(job: Job, test: View | None) -> dict[str, Any]:
    """Scores on the test split, and sizes. What passes measured is already there."""
    evidence = {**job.evidence, **measured_sizes(job.model, job.written())}
    if test is None:
        return evidence
    found = evaluate(job.written(), test, None, job.show)
    known = dict(job.model.reference_scores)
    if not set(found) <= set(known):
        known = job.reference_scores(test)
    keys = ("score", "metric", "n")
    tasks = {name: {**{key: task[key] for key in keys}, "reference_score": known[name]} for name, task in found.items()}
    for name, score in job.model.dense_scores.items():
        if name in tasks:
            tasks[name]["dense_score"] = score
    means = {f"mean_{key}": sum(task[key] for task in tasks.values()) / len(tasks) for key in ("score", "reference_score")}
    return {**evidence, "tasks": tasks, "split": test.split, **means}
