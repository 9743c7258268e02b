"""The two-task network of the pruning benchmark, its data, its training and its scores; nothing in here prunes.

A residual encoder of four blocks with two heads on multi_fashion_mnist (a digit over a garment, 36 x 36). 9,000 training pictures
(the first 1,024 of them calibrate), 1,000 for validation, 2,000 for the report. Every training run, of the reference and of each
row, is SGD with Nesterov momentum under one cycle of the learning rate, with pictures shifted by up to two pixels.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from edgeml_export.prune.distil import soft_loss
from torch import Tensor, nn

TASKS = ("y_digit", "y_fashion")
EXAMPLE = torch.zeros(1, 1, 36, 36)
CALIBRATION, BATCH, TRAIN = 1024, 128, 0.9

TEMPERATURE = 4.0

Split = tuple[Tensor, Tensor]
Logits = dict[str, Tensor]


def unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = unit(inputs, outputs, 3, stride), unit(outputs, outputs)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else unit(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))) + self.shortcut(x))


class Head(nn.Module):
    """One task: a convolution, the mean over places, ten classes."""

    def __init__(self, inputs: int, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.out = unit(inputs, hidden), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.conv(x)).mean((2, 3)))


class Net(nn.Module):
    """picture (n, 1, 36, 36) -> {task: logits (n, 10)}"""

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256)) -> None:
        super().__init__()
        self.stem = unit(1, widths[0])
        self.blocks = nn.Sequential(*[Block(widths[max(i - 1, 0)], width, 1 if i == 0 else 2) for i, width in enumerate(widths)])
        self.heads = nn.ModuleDict({task: Head(widths[-1]) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.blocks(F.relu(self.stem(x)))
        return {task: head(x) for task, head in self.heads.items()}


def load(folder: Path) -> dict[str, Split]:
    """train, validation, test and calibration (a part of train): pictures and labels (n, tasks)."""

    def split(name: str) -> Split:
        with np.load(folder / "multi_fashion_mnist" / f"{name}.npz", allow_pickle=False) as file:
            pictures = torch.from_numpy(file["x"]).float().div(255).sub(0.2).div(0.33)[:, None]
            return pictures, torch.stack([torch.from_numpy(file[task]).long() for task in TASKS], 1)

    pictures, labels = split("train")
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    count = round(TRAIN * len(order))
    train, held = order[:count], order[count:]
    return {
        "train": (pictures[train], labels[train]),
        "calibration": (pictures[train[:CALIBRATION]], labels[train[:CALIBRATION]]),
        "validation": (pictures[held], labels[held]),
        "test": split("test"),
    }


def batches(split: Split, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """In order, as `prune` takes them."""
    return list(zip(split[0].split(size), split[1].split(size), strict=True))


def objectives() -> dict[str, Callable[[Any, Any], Tensor]]:
    """Cross-entropy per task."""
    return {task: lambda outputs, batch, n=n, task=task: F.cross_entropy(outputs[task], batch[1][:, n]) for n, task in enumerate(TASKS)}


def answers(net: nn.Module, given: Sequence[Split]) -> list[Logits]:
    """A reference's logits for each batch."""
    net = copy.deepcopy(net).to(memory_format=torch.channels_last).eval()
    with torch.no_grad():
        return [net(pictures) for pictures, _ in given]


def towards_answers(outputs: Logits, batch: Any) -> Tensor:
    """Soft targets over both tasks: the reference's answers are the batch's last part."""
    return torch.stack([soft_loss(outputs[task], batch[-1][task], TEMPERATURE) for task in TASKS]).sum()


def shuffled(split: Split, seed: int) -> Callable[[int], list[tuple[Tensor, Tensor]]]:
    """Epoch -> shuffled, shifted batches; the same for everyone with this seed."""

    def epoch(number: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        order = torch.randperm(len(split[0]), generator=generator)[: len(split[0]) // BATCH * BATCH]
        made = []
        for picks in order.split(BATCH):
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            made.append((torch.roll(split[0][picks], shift, (2, 3)).contiguous(memory_format=torch.channels_last), split[1][picks]))
        return made

    return epoch


def scores(net: nn.Module, split: Split) -> dict[str, float]:
    """Accuracy per task, in percent."""
    net.eval()
    right = dict.fromkeys(TASKS, 0)
    with torch.no_grad():
        for pictures, labels in batches(split, 500):
            outputs = net(pictures)
            for number, task in enumerate(TASKS):
                right[task] += int((outputs[task].argmax(1) == labels[:, number]).sum())
    return {task: 100 * count / len(split[0]) for task, count in right.items()}


def losses(net: nn.Module, given: Sequence[Split]) -> dict[str, float]:
    """Mean cross-entropy per task."""
    with torch.no_grad():
        answered = [(net(batch[0]), batch) for batch in given]
        count = sum(len(batch[0]) for batch in given)
        return {
            task: sum(float(loss(outputs, batch)) * len(batch[0]) for outputs, batch in answered) / count
            for task, loss in objectives().items()
        }


def drop(found: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Mean over tasks of the relative change, in percent; negative is a loss."""
    return float(np.mean([100 * (found[task] - reference[task]) / reference[task] for task in TASKS]))


def digest(net: nn.Module) -> str:
    """Tells whether two rows rest on the same reference."""
    content = b"".join(tensor.detach().contiguous().numpy().tobytes() for _, tensor in sorted(net.state_dict().items()))
    return hashlib.sha256(content).hexdigest()[:16]
