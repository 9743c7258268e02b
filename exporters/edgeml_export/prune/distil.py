"""Fine-tuning that needs no labels: the pruned network learns the reference's answers to every task at once.

Per task the loss is that of Hinton et al. (2015), T^2 KL(softmax(z_ref / T) | softmax(z / T)), over classes, and per pixel for
maps. A single channel is one logit: the same with two classes. SGD with momentum, the rate rising for 15 % of the steps and then
falling along a cosine. Where objectives are given too, the tasks' own losses are added with weight `labels`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeml.errors import DataError, UsageError
from edgeml_export.prune.groups import flatten
from edgeml_export.prune.measure import Batch, Objective

__all__ = ["Distillation", "FineTune"]

#: Trains a network in place, in round 1, 2, ...
FineTune = Callable[[nn.Module, int], None]


@dataclass
class Distillation:
    """A fine-tuning step for `prune`. `batches` is called with the epoch (from 0) and gives that epoch's training batches.

    `labels` is the weight of the tasks' own losses (`objectives`), 0 for soft targets alone; `soft` that of the soft targets, 0
    for plain fine-tuning under the same schedule. The reference is copied and stays as it is.
    """

    reference: nn.Module
    batches: Callable[[int], Sequence[Batch]]
    epochs: int = 3
    rate: float = 0.03
    temperature: float = 4.0
    soft: float = 1.0
    labels: float = 0.0
    objectives: Mapping[str, Objective] = field(default_factory=dict)
    momentum: float = 0.9
    decay: float = 5e-4
    progress: Callable[[int, float], None] | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.rate > 0 or not self.temperature > 0:
            raise UsageError("distillation needs at least one epoch, and a rate and a temperature above 0")
        if self.labels and not self.objectives:
            raise UsageError("distillation with labels needs the tasks' objectives")
        self.reference = copy.deepcopy(self.reference).eval()

    def __call__(self, module: nn.Module, round_: int) -> None:
        """Train in place and leave in evaluation mode. Raises `DataError` where the loss is no longer a number."""
        steps = len(self.batches(0)) * self.epochs
        if not steps:
            raise DataError("distillation has no training batch")
        optimizer = torch.optim.SGD(module.parameters(), self.rate, self.momentum, weight_decay=self.decay, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=steps, pct_start=0.15)
        module.train()
        for epoch in range(self.epochs):
            total, batches = 0.0, self.batches(epoch)
            for batch in batches[: steps // self.epochs]:
                loss = self._loss(module, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach())
            mean = total / len(batches)
            if not mean == mean or mean == float("inf"):
                raise DataError(f"fine-tuning left the numbers in epoch {epoch}; try a lower rate than {self.rate}")
            if self.progress is not None:
                self.progress(epoch, mean)
        module.eval()

    def _loss(self, module: nn.Module, batch: Batch) -> Tensor:
        outputs = module(batch[0])
        loss = torch.zeros(())
        if self.soft:
            with torch.no_grad():
                wanted = flatten(self.reference(batch[0]))
            for given, target in zip(flatten(outputs), wanted, strict=True):
                loss = loss + self.soft * soft_loss(given, target, self.temperature)
        for objective in self.objectives.values() if self.labels else ():
            loss = loss + self.labels * objective(outputs, batch)
        return loss


def soft_loss(given: Any, wanted: Any, temperature: float) -> Tensor:
    """T^2 KL between two logit tensors (batch, classes, ...) at a temperature; one channel is a binary logit."""
    if given.shape[1] == 1:
        given, wanted = (torch.cat([torch.zeros_like(logit), logit], 1) for logit in (given, wanted))
    divergence = F.kl_div(F.log_softmax(given / temperature, 1), F.log_softmax(wanted / temperature, 1), reduction="none", log_target=True)
    return divergence.sum(1).mean() * temperature**2
