"""The two references: a small residual encoder with two classifiers, and one with two decoders for answers a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from edgeml_export.vision import MultiTaskCNN
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["classifier", "dense"]


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(inputs, outputs, 3, stride), conv(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class Encoder(nn.Module):
    """A stem and a block for each width, each halving the sides but the first; gives every scale, or the last alone."""

    def __init__(self, channels: int, widths: Sequence[int], stem: int, every_scale: bool) -> None:
        super().__init__()
        self.stem = conv(channels, stem)
        inputs = [stem, *widths[:-1]]
        first = 2 if every_scale else 1  # the stem is a scale of its own where all are given
        self.blocks = nn.ModuleList(Block(i, o, first if n == 0 else 2) for n, (i, o) in enumerate(zip(inputs, widths, strict=True)))
        self.every_scale = every_scale

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        scales = [F.relu(self.stem(x))]
        for block in self.blocks:
            scales.append(block(scales[-1]))
        return tuple(scales) if self.every_scale else scales[-1]


class Classifier(nn.Module):
    """A convolution, the mean over the image, a linear layer."""

    def __init__(self, inputs: int, hidden: int, labels: int) -> None:
        super().__init__()
        self.conv, self.out = conv(inputs, hidden), nn.Linear(hidden, labels)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(F.relu(self.conv(features)).mean((2, 3)))


class Decoder(nn.Module):
    """From the coarsest scale to the image's own: double, add the next finer scale, convolve."""

    def __init__(self, scales: Sequence[int], widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.deepest = conv(scales[-1], widths[0], 1)
        self.sides = nn.ModuleList(conv(side, width, 1) for side, width in zip(scales[-2::-1], widths[1:], strict=True))
        self.ups = nn.ModuleList(conv(a, b, 1) for a, b in pairwise(widths))
        self.mixes = nn.ModuleList(conv(width, width) for width in widths[1:])
        self.out = nn.Conv2d(widths[-1], outputs, 1)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        x = F.relu(self.deepest(features[-1]))
        for up, side, mix, finer in zip(self.ups, self.sides, self.mixes, features[-2::-1], strict=True):
            # The 1 x 1 convolution before the doubling costs a quarter of what it would cost after it.
            x = F.interpolate(up(x), scale_factor=2.0, mode="nearest") + side(finer)
            x = F.relu(mix(F.relu(x)))
        return self.out(x)


def classifier(heads: dict[str, int], seed: int = 0) -> MultiTaskCNN:
    """Grey images of 36 x 36 to one classifier for each task; `heads` gives their numbers of labels."""
    torch.manual_seed(seed)
    encoder = Encoder(1, (32, 64, 128, 256), 32, every_scale=False)
    return MultiTaskCNN(encoder, {name: Classifier(256, 64, labels) for name, labels in heads.items()})


def dense(heads: dict[str, int], seed: int = 0) -> MultiTaskCNN:
    """Colour images, sides in multiples of 8, to maps of their own size; `heads` gives their numbers of channels."""
    torch.manual_seed(seed)
    scales, widths = (16, 32, 64, 160), (64, 48, 32, 16)
    encoder = Encoder(3, scales[1:], scales[0], every_scale=True)
    return MultiTaskCNN(encoder, {name: Decoder(scales, widths, outputs) for name, outputs in heads.items()})
