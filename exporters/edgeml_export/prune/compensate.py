"""Which channels of a group matter least, and how the layers behind make up for them.

Let a consumer read x (patches, for a convolution) and compute y = W x. Without the inputs that carry the dropped channels the
best linear stand-in, over calibration samples, is the least-squares one:

    W' = argmin E |W x - W' x_S|^2 + ridge = W M[:, S] (M[S, S] + lambda I)^-1 ,   M = E[x x^T] .

What stays is the error of what cannot be told from the kept channels. With M over channels rather than patch entries, taking out
channel c alone costs |W_c|^2 / (M^-1)_cc of squared output error: the optimal brain surgeon's saliency (Hassibi and Stork 1993)
for a whole channel, summed over the consumers. Channels go one by one, cheapest first, M^-1 being downdated after each, because
two channels that stand in for each other cannot both go. No gradient is needed, and batch normalisations keep their statistics:
what they read is what they read before, as nearly as can be. Measured on the network of benchmarks/pruning, this ranking beat L1
norms and squared gradients at gates (Taylor) once least squares follow, and new statistics after least squares only did harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeml_export.prune.groups import Group
from edgeml_export.prune.measure import Batch

__all__ = ["Compensation"]

Array = np.ndarray[Any, np.dtype[np.float32]]

RIDGE = 1e-3  # of the mean diagonal of M
ROWS = 4  # patches kept per unknown: enough for a stable inverse, few enough to be quick


class Compensation:
    """Second moments of what the consumers of one group read, in the network as it is now."""

    def __init__(self, module: nn.Module, group: Group, batches: Sequence[Batch], seed: int = 0) -> None:
        self.module, self.group = module, group
        self.moments = _moments(module, list(group.slots), batches, seed)

    def ranking(self) -> list[int]:
        """The group's channels, the one to drop first in front."""
        terms = [self._terms(name) for name in self.group.slots]
        ranking: list[int] = []
        for _ in range(self.group.channels):
            scores = np.sum([weight / inverse.diagonal() for weight, inverse in terms], axis=0)
            scores[ranking] = np.inf
            worst = int(scores.argmin())
            ranking.append(worst)
            for _, inverse in terms:
                column = inverse[:, worst].copy()
                inverse -= np.outer(column, column / column[worst])
                inverse[worst, worst] = 1.0
        return ranking

    def apply(self, smaller: nn.Module, keep: Sequence[int]) -> None:
        """Give the consumers in `smaller`, the cut network, the weights that stand in best for what went."""
        for name, moments in self.moments.items():
            layer: Any = smaller.get_submodule(name)
            old = self.module.get_submodule(name)
            inputs = sorted(index for channel in keep for index in self.group.slots[name][channel])
            others = {index for places in self.group.slots[name] for index in places}
            inputs = sorted([*inputs, *(set(range(_inputs(old))) - others)])
            if len(inputs) == _inputs(old):
                continue
            weight = _matrix(old)
            area = weight.shape[1] // _inputs(old)
            kept = (torch.tensor(inputs)[:, None] * area + torch.arange(area)).flatten()
            root = torch.linalg.cholesky(_ridged(moments[kept][:, kept]))
            solved = torch.cholesky_solve(moments[kept] @ weight.T, root).T
            with torch.no_grad():
                layer.weight.copy_(solved.reshape(layer.weight.shape))

    def _terms(self, name: str) -> tuple[Array, Array]:
        """A consumer's squared weights per channel, and the inverse of its channel moments."""
        layer, slots = self.module.get_submodule(name), self.group.slots[name]
        weight = _matrix(layer)
        width = _inputs(layer)
        area = weight.shape[1] // width
        squares = weight.square().sum(0).reshape(width, area).sum(1)
        channel = torch.eye(width)
        if name in self.moments:
            channel = self.moments[name].reshape(width, area, width, area).diagonal(dim1=1, dim2=3).mean(-1)
        gather = torch.zeros(len(slots), width)
        for number, places in enumerate(slots):
            gather[number, places] = 1.0
        joint = gather @ channel @ gather.T
        counts = gather.sum(1).clamp(min=1)
        joint = joint / counts
        return (gather @ squares).numpy(), torch.linalg.inv(_ridged((joint + joint.T) / 2)).numpy()


def _ridged(moments: Tensor) -> Tensor:
    """Never singular, whatever the layer reads."""
    return moments + (RIDGE * moments.diagonal().mean()).clamp(min=1e-12) * torch.eye(len(moments))


def _moments(module: nn.Module, names: Sequence[str], batches: Sequence[Batch], seed: int) -> dict[str, Tensor]:
    """E[x x^T] of the patches that each layer reads; layers whose patches cannot be formed are left out."""
    layers = {name: module.get_submodule(name) for name in names}
    layers = {name: layer for name, layer in layers.items() if _linear(layer)}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    generator = torch.Generator().manual_seed(seed)
    seen: dict[tuple[Any, ...], tuple[Tensor, Tensor, int]] = {}

    def hook(name: str, layer: nn.Module) -> Callable[..., None]:
        wanted = ROWS * _matrix(layer).shape[1] // len(batches) + 1

        def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            key = (id(inputs[0]), *_geometry(layer))
            if key not in seen:  # two heads that read one tensor share its moments; holding it keeps its id its own
                rows = _patches(layer, inputs[0], wanted, generator)
                seen[key] = inputs[0], rows.T @ rows, len(rows)
            sums[name] = sums.get(name, 0) + seen[key][1]
            counts[name] += seen[key][2]

        return take

    handles = [layer.register_forward_pre_hook(hook(name, layer)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                module(batch[0])
                seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def _geometry(layer: Any) -> tuple[Any, ...]:
    """What, beside the input, decides a layer's patches."""
    return () if isinstance(layer, nn.Linear) else (layer.kernel_size, layer.stride, layer.dilation, layer.padding)


def _patches(layer: Any, inputs: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """At most `wanted` rows (patch entries) of what the layer multiplies, drawn over samples and places."""
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        return rows[torch.randperm(len(rows), generator=generator)[:wanted]]
    size, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    (top, left) = layer.padding
    padded = F.pad(inputs, (left, left, top, top))
    views = padded
    for axis in (0, 1):
        views = views.unfold(2 + axis, dilation[axis] * (size[axis] - 1) + 1, stride[axis])
    views = views[..., :: dilation[0], :: dilation[1]]  # batch, channel, row, column, kernel row, kernel column
    batch, _, height, width = views.shape[:4]
    picks = torch.randperm(batch * height * width, generator=generator)[:wanted]
    return views.permute(0, 2, 3, 1, 4, 5)[picks // (height * width), picks // width % height, picks % width].flatten(1)


def _linear(layer: Any) -> bool:
    """Whether the layer is a product with patches that `_patches` can form."""
    if isinstance(layer, nn.Linear):
        return True
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return bool(plain)


def _matrix(layer: Any) -> Tensor:
    """The layer's weights as (outputs, inputs x kernel)."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        weight = weight.transpose(0, 1)
    return weight.flatten(1)


def _inputs(layer: Any) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
