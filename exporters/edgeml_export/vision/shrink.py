"""A pruned copy of a model, fine-tuned from its reference: the pruner's entry, fed from the model's own data and losses."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeml.errors import UsageError
from edgeml_export.passes import Bar
from edgeml_export.prune import Distillation, PruneResult, prune
from edgeml_export.vision.data import Split, VisionData
from edgeml_export.vision.graphs import stage_graphs
from edgeml_export.vision.model import Labels, MultiTaskCNN, VisionModel
from edgeml_export.vision.recipe import Tune, VariantStep, VisionRecipe
from edgeml_export.vision.runner import Runner, interleaved

__all__ = ["shrink"]

CALIBRATION_BATCH = 64
Batch = tuple[Tensor, Labels]


def shrink(
    model: VisionModel, step: VariantStep, recipe: VisionRecipe, data: VisionData, work: Path | None, bar: Bar
) -> tuple[nn.Module, dict[str, Any]]:
    """Prune to the step's bound or share of MACs, fine-tune as the recipe says; the module and its evidence.

    With `work`, decisions and weights are kept there, and a run that was broken off goes on from them.
    """
    parts = model.parts
    module = MultiTaskCNN(*copy.deepcopy((parts.backbone, dict(parts.heads.items()))))  # together: they may share weights
    wanted = {name: _objective(model, name) for name in model.losses}
    how = recipe.prune
    epochs = recipe.tune.epochs if step.tune else 0
    with bar(f"{step.title}: pruning", epochs * how.rounds + 1) as tick:
        tune = _tuning(model, module, wanted, recipe.tune, data.train, tick) if epochs else None
        result = prune(
            module,
            model.example(),
            wanted,
            _batches(data.train.first(how.images), CALIBRATION_BATCH),
            bound=step.bound or 1.10,
            target_macs=step.remove_macs or None,
            target_parameters=step.remove_parameters or None,
            align=how.align,
            rounds=how.rounds,
            protect=how.protect,
            cost="macs" if how.cost == "macs" else _seconds(model),
            fine_tune=tune,
            checkpoint=_checkpoint(work, model, step, recipe, data.train),
            seed=recipe.tune.seed,
        )
        tick(1)
    return result.module, _about(result)


def _objective(model: VisionModel, name: str) -> Callable[[Any, Any], Tensor]:
    return lambda outputs, batch: model.losses[name](outputs[name], batch[1][name])


def _batches(split: Split, size: int) -> list[Batch]:
    images = torch.from_numpy(split.images)
    labels = {name: torch.from_numpy(values.astype(np.int64)) for name, values in split.labels.items()}
    starts = range(0, len(images), size)
    return [(images[at : at + size], {name: values[at : at + size] for name, values in labels.items()}) for at in starts]


def _tuning(
    model: VisionModel, module: nn.Module, wanted: dict[str, Any], how: Tune, train: Split, tick: Callable[[int], None]
) -> Callable[[nn.Module, int], None]:
    images = torch.from_numpy(train.images)
    labels = {name: torch.from_numpy(values.astype(np.int64)) for name, values in train.labels.items()}

    def epoch(number: int) -> Sequence[Batch]:
        """Shuffled and augmented, the same for the same epoch."""
        random = torch.Generator().manual_seed(how.seed * 1000 + number)
        order = torch.randperm(len(images), generator=random)
        size = min(how.batch, len(images))
        made = []
        for start in range(0, len(images) - size + 1, size):
            rows = order[start : start + size]
            x, y = images[rows], {name: values[rows] for name, values in labels.items()}
            made.append((x, y) if model.augment is None else model.augment(x, y, random))
        return made

    distil = Distillation(
        module,
        epoch,
        epochs=how.epochs,
        rate=how.rate,
        temperature=how.temperature,
        soft=how.soft,
        labels=how.labels,
        objectives=wanted,
        progress=lambda _epoch, _loss: tick(1),
    )

    def tune(pruned: nn.Module, round_: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed * 1_000_003 + round_)  # what a module draws itself, such as dropout
            distil(pruned, round_)

    return tune


def _seconds(model: VisionModel) -> Callable[[nn.Module], float]:
    """The cost that a device feels: the median time of one image through every stage, as onnxruntime runs it."""
    image = model.example().numpy()

    def cost(module: nn.Module) -> float:
        runner = Runner(stage_graphs(model, module))
        return float(np.median(interleaved([lambda: runner(image)], rounds=5)))

    return cost


def _checkpoint(work: Path | None, model: VisionModel, step: VariantStep, recipe: VisionRecipe, train: Split) -> Path | None:
    """A file for this model, these settings and these training images alone: whatever differs is not taken up but begun anew.

    Code is not covered, such as a changed loss or augmentation.
    """
    if work is None:
        return None
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{work}: this cannot be a folder to work in ({error.strerror})") from error
    settings = [step.bound, step.remove_macs, step.remove_parameters, step.tune, asdict(recipe.prune), asdict(recipe.tune)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.module.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    arrays: dict[str, NDArray[Any]] = {"x": train.images, **train.labels}
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return work / f"{step.title}-{digest.hexdigest()[:12]}.prune"


def _about(result: PruneResult) -> dict[str, Any]:
    """The pruner's report without its single decisions."""
    report = result.as_dict()
    groups = {group["name"]: [group["before"], group["after"]] for group in report["groups"]}
    kept = {key: report[key] for key in ("bound", "holds", "loss_ratios")}
    removed = {f"{key}_removed": report[key]["removed"] for key in ("macs", "parameters")}
    return {**kept, **removed, "channels": groups, "refused": {one["name"]: one["reason"] for one in report["refused"]}}
