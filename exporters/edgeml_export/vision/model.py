"""A multi-task CNN as it comes from torch: what the function in `file.py:function` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edgeml.errors import UsageError
from edgeml_export.vision.tasks import ImageFormat, VisionTask, check_tasks

__all__ = ["Augment", "Features", "Labels", "MultiTaskCNN", "TaskLoss", "VisionModel", "answers", "task_loss"]

#: What a backbone gives: one tensor, or several of different scales.
Features = Tensor | tuple[Tensor, ...]
#: A task's labels of a batch: (B,) or (B, h, w) int64.
Labels = dict[str, Tensor]
#: A head's logits and the task's labels -> mean loss, a scalar.
TaskLoss = Callable[[Tensor, Tensor], Tensor]
#: Images (B, C, H, W) and labels, changed alike; random choices come from the generator alone.
Augment = Callable[[Tensor, Labels, torch.Generator], tuple[Tensor, Labels]]


class Splittable(Protocol):
    """A module in two parts. A head takes what the backbone gives, as it is, and returns logits."""

    backbone: nn.Module
    heads: nn.ModuleDict


class MultiTaskCNN(nn.Module):
    """Image (B, C, H, W) -> backbone -> features -> one head for each task; returns each task's logits."""

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(dict(heads))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        return {name: head(features) for name, head in self.heads.items()}


def task_loss(task: VisionTask) -> TaskLoss:
    """The usual loss of a task's kind: cross entropy, or for edges binary cross entropy; void labels count nothing."""
    ignored = -100 if task.void is None else task.void

    def classes(output: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(output, label, ignore_index=ignored)

    def edges(output: Tensor, label: Tensor) -> Tensor:
        seen = (label != ignored).float()
        each = F.binary_cross_entropy_with_logits(output[:, 0], (label == 1).float(), reduction="none")
        return (each * seen).sum() / seen.sum().clamp(min=1)

    return edges if task.kind == "edge" else classes


@dataclass
class VisionModel:
    """A CNN ready to be exported.

    `module` has `backbone` and `heads` (see `MultiTaskCNN`), with one head for each of `tasks`, in their order. `losses` replaces
    the usual loss of the tasks it names. `augment` changes training batches when a pruned copy is fine-tuned.
    `reference_scores` are test scores of this module, in [0, 1], measured earlier; what is missing is measured at export.
    """

    module: nn.Module
    tasks: Sequence[VisionTask]
    image: ImageFormat
    losses: Mapping[str, TaskLoss] = field(default_factory=dict)
    augment: Augment | None = None
    reference_scores: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tasks = tuple(self.tasks)
        check_tasks(self.tasks)
        names = [task.name for task in self.tasks]
        backbone, heads = (getattr(self.module, part, None) for part in ("backbone", "heads"))
        if not isinstance(backbone, nn.Module) or not isinstance(heads, nn.ModuleDict):
            raise UsageError("the module needs a 'backbone' (a module) and 'heads' (a ModuleDict), as MultiTaskCNN has them")
        if list(heads) != names:
            raise UsageError(f"the module has the heads {', '.join(heads) or '(none)'}, and the tasks are {', '.join(names)}")
        unknown = sorted(set(self.losses) - set(names))
        if unknown:
            raise UsageError(f"there is a loss for '{unknown[0]}', which is no task of this model")
        self.losses = {task.name: self.losses.get(task.name, task_loss(task)) for task in self.tasks}
        self.module.eval()
        self._check_outputs()

    @property
    def parts(self) -> Splittable:
        return cast(Splittable, self.module)

    def example(self, count: int = 1) -> Tensor:
        """A batch of the right shape, of noise: zeros would hide what a wrong trace leaves out."""
        return torch.randn((count, *self.image.shape), generator=torch.Generator().manual_seed(0))

    def _check_outputs(self) -> None:
        outputs = answers(self.module, self.example(2))
        for task in self.tasks:
            shape, axes = tuple(outputs[task.name].shape), 2 if task.kind == "classification" else 4
            if len(shape) != axes or shape[0] != 2 or shape[1] not in task.channels:
                wanted = f"(2, {task.channels[-1]}{', h, w' if axes == 4 else ''})"
                raise UsageError(f"task '{task.name}': for two images its head must give {wanted}, it gives {shape}")
            if not torch.isfinite(outputs[task.name]).all():
                raise UsageError(f"task '{task.name}' answers noise with numbers that are not finite; are its weights trained and loaded?")

    def predict(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """What the head stages give, computed by torch: probabilities of a batch (B, C, H, W)."""
        outputs = answers(self.module, torch.from_numpy(images))
        return {task.name: probabilities(task, outputs[task.name]).numpy() for task in self.tasks}


def probabilities(task: VisionTask, logits: Tensor) -> Tensor:
    """The end of a head stage: softmax over labels, or for edges a sigmoid."""
    return torch.sigmoid(logits) if task.kind == "edge" else torch.softmax(logits, 1)


def answers(module: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits of every task, in evaluation mode and without gradients. Raises `UsageError` in a sentence where the module fails."""
    module.eval()
    try:
        with torch.inference_mode():
            features = cast(Splittable, module).backbone(images)
            return {name: head(features) for name, head in cast(Splittable, module).heads.items()}
    except Exception as error:  # whatever a user's module may do
        said = " ".join(str(error).split())[:200]
        raise UsageError(f"the module fails on images {tuple(images.shape)}: {type(error).__name__}: {said}") from error
