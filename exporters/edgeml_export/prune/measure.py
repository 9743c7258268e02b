"""What a network costs and how well it does: task losses on calibration data, multiply-accumulates, parameters."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from edgeml.errors import DataError, UsageError

__all__ = ["Batch", "Calibration", "Cost", "Losses", "Objective", "cost_function", "lay_out", "macs_and_parameters", "ratio"]

#: (input, whatever the losses need): the input is a float tensor (batch, ...).
Batch = Sequence[Any]
#: A task's mean loss over a batch (a scalar tensor, never negative), from the network's outputs and the batch.
Objective = Callable[[Any, Any], Tensor]
Losses = dict[str, float]
Cost = Callable[[nn.Module], float]


class Calibration:
    """The calibration split and its fixed subset. Made once, read by every measurement.

    Raises `UsageError` where there is no task, `DataError` where there is no batch.
    """

    def __init__(self, batches: Sequence[Batch], objectives: Mapping[str, Objective], share: float = 0.5) -> None:
        if not objectives:
            raise UsageError("pruning needs at least one task: a name and a loss of (outputs, batch)")
        if any(not isinstance(batch[0], Tensor) or not batch[0].is_floating_point() for batch in batches):
            raise DataError("calibration inputs are float tensors (batch, ...); give batches of (input, labels)")
        if not batches or any(len(batch[0]) == 0 for batch in batches):
            raise DataError("the calibration set is empty or holds an empty batch; give batches of (input, labels)")
        self.batches = list(batches)
        self.objectives = dict(objectives)
        # Every 1/share-th batch: spread over the set, so that a set sorted by class is still seen as a whole.
        self.step = max(1, round(1 / share))
        self.subset = self.batches[:: self.step]

    def losses(self, module: nn.Module) -> tuple[Losses, Losses]:
        """Each task's mean loss over all samples, and over the subset's. Not finite stays so: such a candidate is to be refused."""
        every = [self._batch(module, batch) for batch in self.batches]
        return _mean(every), _mean(every[:: self.step])

    def subset_losses(self, module: nn.Module) -> Losses:
        """The same over the subset alone."""
        return _mean([self._batch(module, batch) for batch in self.subset])

    def within(self, module: nn.Module, limits: Losses) -> bool:
        """Whether no task's mean loss over the subset passes its limit. Losses are never negative: it stops once the sum is beyond."""
        left = {task: limit * sum(len(batch[0]) for batch in self.subset) for task, limit in limits.items()}
        for batch in self.subset:
            size, losses = self._batch(module, batch)
            left = {task: budget - size * losses[task] for task, budget in left.items()}
            if not all(budget >= 0 for budget in left.values()):
                return False
        return True

    def _batch(self, module: nn.Module, batch: Batch) -> tuple[int, Losses]:
        module.eval()
        with torch.no_grad():
            try:
                outputs = module(batch[0])
            except (RuntimeError, ValueError, TypeError) as error:
                text = " ".join(str(error).split())[:120]
                raise DataError(f"the network does not run on a calibration input of {tuple(batch[0].shape)} ({text})") from error
            return len(batch[0]), {task: float(self.loss(task, outputs, batch)) for task in self.objectives}

    def loss(self, task: str, outputs: Any, batch: Batch) -> Tensor:
        """One task's loss of one batch; labels that are missing or do not fit are a `DataError` that names the task."""
        try:
            value = self.objectives[task](outputs, batch)
        except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())[:120]
            raise DataError(
                f"the loss of task '{task}' cannot be computed on the calibration set ({type(error).__name__}: {text}); "
                "check that each batch is (input, labels) and has this task's labels"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise DataError(f"the loss of task '{task}' is not a scalar tensor; return the mean over the batch")
        return value

    def reference(self, module: nn.Module) -> Losses:
        """The unpruned network's losses, refused where they cannot serve as a base."""
        losses, _ = self.losses(module)
        for task, value in losses.items():
            if not math.isfinite(value):
                raise DataError(f"the loss of task '{task}' is {value} before anything is pruned; check its labels and the network")
            if value < 0:
                raise DataError(f"the loss of task '{task}' is {value:.4g}; a bound on its ratio needs a loss that is never negative")
        return losses


def lay_out(module: nn.Module, example: Tensor, calibration: Calibration) -> None:
    """Channels last, where the network reads pictures and takes them so (a `view` in it may not): a third off the search's time."""
    if any(tensor.dim() != 4 for tensor in (example, *(batch[0] for batch in calibration.batches))):
        return
    changed = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        with torch.no_grad():
            changed(example.expand(2, -1, -1, -1).contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    calibration.batches = [(batch[0].contiguous(memory_format=torch.channels_last), *batch[1:]) for batch in calibration.batches]
    calibration.subset = calibration.batches[:: calibration.step]


def _mean(batches: Sequence[tuple[int, Losses]]) -> Losses:
    count = sum(size for size, _ in batches)
    return {task: sum(size * losses[task] for size, losses in batches) / count for task in batches[0][1]}


def ratio(new: float, old: float) -> float:
    """new / old, with 1 where both are 0 and infinity where the loss grew from 0 or is not finite."""
    if not math.isfinite(new):
        return math.inf
    if old == 0:
        return 1.0 if new == 0 else math.inf
    return new / old


def macs_and_parameters(module: nn.Module, example: Tensor) -> tuple[float, float]:
    """Multiply-accumulates for `example` and the number of parameters, by Torch-Pruning's counter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        macs, parameters = tp.utils.count_ops_and_params(module, example)
    return float(macs), float(parameters)


def cost_function(cost: Literal["macs"] | Cost, example: Tensor) -> Cost:
    """The cost to lower: MACs, or the caller's own measure of a network (say, seconds on the target)."""
    if cost == "macs":
        return lambda module: macs_and_parameters(module, example)[0]
    if not callable(cost):
        raise UsageError(f"cost is 'macs' or a function that takes a network and gives a number such as its seconds, not {cost!r}")
    return cost
