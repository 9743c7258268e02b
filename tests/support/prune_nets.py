"""Small networks of the kinds that pruners get wrong, each able to mask its own channels without any graph.

`streams` maps a stream (a tensor whose channels can go) to the layer that a pruner must name as its group's member. `forward(x,
masks)` multiplies each stream that `masks` names by its mask: that is the masked original, by hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Masks = dict[str, Tensor]


class Masked(nn.Module):
    streams: dict[str, str]

    def masked(self, name: str, tensor: Tensor, masks: Masks | None) -> Tensor:
        return tensor if not masks or name not in masks else tensor * masks[name].view(1, -1, *[1] * (tensor.dim() - 2))


def unit(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs))


class Residual(Masked):
    """stem -> (a -> b) + identity, `blocks` times -> one linear head per task."""

    def __init__(self, width: int, inner: int, blocks: int, classes: tuple[int, ...] = (3, 4)) -> None:
        super().__init__()
        self.stem = unit(2, width)
        self.a = nn.ModuleList(unit(width, inner) for _ in range(blocks))
        self.b = nn.ModuleList(unit(inner, width) for _ in range(blocks))
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in classes)
        self.streams = {"stream": "stem.0"} | {f"inner{i}": f"a.{i}.0" for i in range(blocks)}

    def forward(self, x: Tensor, masks: Masks | None = None) -> dict[str, Tensor]:
        x = self.masked("stream", torch.relu(self.stem(x)), masks)
        for number, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            inner = self.masked(f"inner{number}", torch.relu(a(x)), masks)
            x = self.masked("stream", torch.relu(b(inner) + x), masks)
        return {f"task{number}": head(x.mean((2, 3))) for number, head in enumerate(self.heads)}


class Concatenated(Masked):
    """Two branches side by side, pooled to 1 x 1 before the linear layer, and a convolution over both."""

    def __init__(self, left: int, right: int, inner: int) -> None:
        super().__init__()
        self.left, self.right, self.join = unit(2, left), unit(2, right, 1), unit(left + right, inner)
        self.head = nn.Linear(inner, 3)
        self.streams = {"left": "left.0", "right": "right.0", "joined": "join.0"}

    def forward(self, x: Tensor, masks: Masks | None = None) -> tuple[Tensor, ...]:
        left = self.masked("left", torch.relu(self.left(x)), masks)
        right = self.masked("right", torch.relu(self.right(x)), masks)
        joined = self.masked("joined", torch.relu(self.join(torch.cat([left, right], 1))), masks)
        return (self.head(joined.mean((2, 3))),)


class Depthwise(Masked):
    """Expansion -> depthwise -> projection, with a residual around it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.stem, self.expand, self.deep = unit(2, width), unit(width, inner, 1), unit(inner, inner, 3, groups=inner)
        self.project, self.head = unit(inner, width, 1), nn.Conv2d(width, 2, 1)
        self.streams = {"stream": "stem.0", "inner": "expand.0"}

    def forward(self, x: Tensor, masks: Masks | None = None) -> Tensor:
        x = self.masked("stream", torch.relu(self.stem(x)), masks)
        inner = torch.nn.functional.hardswish(self.deep(self.masked("inner", torch.nn.functional.relu6(self.expand(x)), masks)))
        inner = self.masked("inner", inner, masks)
        return self.head(self.masked("stream", self.project(inner) + x, masks))


class Shared(Masked):
    """One module applied twice: its inputs and outputs are one stream."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.stem, self.a, self.b = unit(2, width), unit(width, inner), unit(inner, width)
        self.head = nn.Linear(width, 3)
        self.streams = {"stream": "stem.0", "inner": "a.0"}

    def forward(self, x: Tensor, masks: Masks | None = None) -> Tensor:
        x = self.masked("stream", torch.relu(self.stem(x)), masks)
        for _ in range(2):
            inner = self.masked("inner", torch.relu(self.a(x)), masks)
            x = self.masked("stream", torch.relu(self.b(inner) + x), masks)
        return self.head(x.mean((2, 3)))


def settled(net: nn.Module, seed: int) -> Any:
    """Batch norms with statistics and affine parameters that are nobody's identity."""
    generator = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low in ((layer.weight, 0.5), (layer.bias, -0.3), (layer.running_mean, -0.3), (layer.running_var, 0.5)):
                tensor.data = low + torch.rand(tensor.shape, generator=generator)
    return net.eval()
