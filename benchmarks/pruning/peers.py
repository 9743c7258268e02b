"""The peers: Torch-Pruning's pruners as a user would call them, cut in one step to a wanted share of MACs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import network
import torch
import torch_pruning as tp
from edgeml_export.prune import macs_and_parameters
from torch import Tensor, nn

#: name -> (importance, whether channels compete over the whole network)
PEERS: dict[str, tuple[Callable[[], Any], bool]] = {
    "tp-magnitude": (lambda: tp.importance.MagnitudeImportance(p=1), True),
    "tp-group-norm": (lambda: tp.importance.GroupMagnitudeImportance(p=2), True),
    "tp-taylor": (lambda: tp.importance.GroupTaylorImportance(), True),
    "l1-uniform": (lambda: tp.importance.MagnitudeImportance(p=1), False),
}
HALVINGS, ALIGNS, NEAR, AT_MOST = 12, (8, 4), 0.015, 0.9


def cut(dense: nn.Module, name: str, share: float, calibration: network.Split) -> nn.Module:
    """The peer's network whose removed share of MACs is nearest to `share`: its ratio is halved towards it from the dense weights.

    Channels are multiples of 8, as ours are; of 4 where that is too coarse to come near the share, as for uniform ratios.
    """
    slopes = _gradients(dense, calibration) if name == "tp-taylor" else {}
    found: list[tuple[float, nn.Module]] = []
    for align in ALIGNS:
        found.append(_nearest(dense, name, share, slopes, align))
        if found[-1][0] <= NEAR:
            break
    return min(found, key=lambda one: one[0])[1]


def _nearest(dense: nn.Module, name: str, share: float, slopes: dict[str, Tensor], align: int) -> tuple[float, nn.Module]:
    base = macs_and_parameters(dense, network.EXAMPLE)[0]
    low, high = 0.0, 0.95
    best: tuple[float, nn.Module] | None = None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        smaller = _at(dense, name, ratio, slopes, align)
        removed = 1 - macs_and_parameters(smaller, network.EXAMPLE)[0] / base
        if best is None or abs(removed - share) < best[0]:
            best = abs(removed - share), smaller
        low, high = (ratio, high) if removed < share else (low, ratio)
    assert best is not None
    return best


def _at(dense: nn.Module, name: str, ratio: float, slopes: dict[str, Tensor], align: int) -> nn.Module:
    importance, everywhere = PEERS[name]
    net = copy.deepcopy(dense).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            net,
            network.EXAMPLE,
            importance(),
            global_pruning=everywhere,
            pruning_ratio=ratio,
            max_pruning_ratio=AT_MOST,
            round_to=align,
            ignored_layers=[head.out for head in net.heads.values()],
        )
    for parameter, slope in slopes.items():
        net.get_parameter(parameter).grad = slope.clone()
    pruner.step()
    net.zero_grad(set_to_none=True)
    return torch.nn.Module.eval(net)


def _gradients(dense: nn.Module, calibration: network.Split) -> dict[str, Tensor]:
    """The slopes that Taylor importance reads: of both tasks' losses, summed over half of the calibration pictures."""
    net = copy.deepcopy(dense).eval()
    for batch in network.batches((calibration[0][:512], calibration[1][:512])):
        outputs = net(batch[0])
        total: Any = sum(loss(outputs, batch) for loss in network.objectives().values())
        total.backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
