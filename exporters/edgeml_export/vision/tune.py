"""Training of a multi-task CNN, for those who bring data and no trainer; pruned copies learn from their reference instead (`prune`).

Every random choice comes from the seed. With a checkpoint file, a training that was interrupted goes on at the epoch where it
stopped, and ends with the same weights.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeml.errors import InputError, UsageError
from edgeml_export.vision.model import Augment, Labels, TaskLoss

__all__ = ["Training", "fit"]

MOMENTUM, WARM_UP = 0.9, 0.15


@dataclass(frozen=True)
class Training:
    """How long and how fast; `rate` is the highest, reached after 15 % of the steps."""

    epochs: int = 8
    rate: float = 0.1
    batch: int = 128
    decay: float = 5e-4
    seed: int = 0


def fit(
    module: nn.Module,
    images: Tensor,
    labels: Labels,
    losses: Mapping[str, TaskLoss],
    how: Training,
    *,
    augment: Augment | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train `module` in place on images (n, C, H, W) and labels; it ends in evaluation mode.

    `progress` gets each finished epoch's number and mean loss. Raises `UsageError` when a task's loss is no longer a number.
    """
    steps = max(len(images) // how.batch, 1)
    if how.epochs < 1:
        return
    optimizer = torch.optim.SGD(module.parameters(), how.rate, MOMENTUM, weight_decay=how.decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, total_steps=steps * how.epochs, pct_start=WARM_UP)
    state = _State(module, optimizer, schedule, torch.Generator().manual_seed(how.seed))
    first = 0 if checkpoint is None else state.load(checkpoint, how)
    for epoch in range(first, how.epochs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed * 1_000_003 + epoch)  # what a module draws itself, such as dropout
            loss = _epoch(state, images, labels, losses, how, augment, steps)
        if checkpoint is not None:
            state.save(checkpoint, how, epoch + 1)
        if progress is not None:
            progress(epoch, loss)
    module.eval()


def _epoch(
    state: _State, images: Tensor, labels: Labels, losses: Mapping[str, TaskLoss], how: Training, augment: Augment | None, steps: int
) -> float:
    """One pass over the images in a new order; the mean loss."""
    state.module.train()
    order, total = torch.randperm(len(images), generator=state.random), 0.0
    for step in range(steps):
        rows = order[step * how.batch : (step + 1) * how.batch]
        x, y = images[rows], {name: values[rows] for name, values in labels.items()}
        if augment is not None:
            x, y = augment(x, y, state.random)
        loss = _loss(state.module, x, y, losses)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.schedule.step()
        total += float(loss.detach())
    return total / steps


def _loss(module: nn.Module, x: Tensor, y: Labels, losses: Mapping[str, TaskLoss]) -> Tensor:
    outputs = module(x)
    total = torch.zeros(())
    for name, loss in losses.items():
        value = loss(outputs[name], y[name])
        if not torch.isfinite(value):
            raise UsageError(f"the loss of task '{name}' is no longer a number; try a lower learning rate, or look at its labels")
        total = total + value
    return total


@dataclass
class _State:
    """All that an epoch changes."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    random: torch.Generator

    def save(self, path: Path, how: Training, epoch: int) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("module", "optimizer", "schedule")}
        whole = {**parts, "random": self.random.get_state(), "epoch": epoch, "how": asdict(how)}
        part = path.with_name(f".{path.name}.part")
        torch.save(whole, part)
        os.replace(part, path)

    def load(self, path: Path, how: Training) -> int:
        """Finished epochs of a checkpoint; 0 where there is none, or it is of another training."""
        if not path.exists():
            return 0
        try:
            whole: dict[str, Any] = torch.load(path, weights_only=True)
            if whole["how"] != asdict(how):
                return 0
            for name in ("module", "optimizer", "schedule"):
                getattr(self, name).load_state_dict(whole[name])
            self.random.set_state(whole["random"])
            return int(whole["epoch"])
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError, EOFError) as error:
            raise InputError(f"{path}: this is no checkpoint of this training; remove it to start anew") from error
