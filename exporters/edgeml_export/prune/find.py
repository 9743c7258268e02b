"""Which groups can be cut, and why the others cannot.

Torch-Pruning's graph guesses at operations it does not know, and is wrong for some it does (concatenation followed by flattening,
grouped convolutions). So each group is probed: channels are cut, a forward pass runs, and the outputs must equal those of the
uncut network whose consumers read zeros in these channels. That also refuses what no graph can see, such as a normalisation over
channels, which changes when one is removed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from edgeml.errors import UsageError
from edgeml_export.prune.groups import CHANNELED, Group, Refusal, cut, describe, flatten, graph_of

__all__ = ["find_groups"]

AGREE = 1e-4  # of the largest output: rounding stays far below it, a wrong index far above


def find_groups(
    module: nn.Module, example: Tensor, protect: Collection[str] = (), only: Collection[str] | None = None
) -> tuple[list[Group], list[Refusal]]:
    """Groups that can be cut, in the graph's order, and those that cannot, with reasons.

    `protect` and `only` name modules; a container's name stands for all layers in it. Raises `UsageError` for a name that is not
    there, for a layer of `only` that cannot be cut, and where nothing can be cut at all.
    """
    for name in (*protect, *(only or ())):
        if name not in dict(module.named_modules()):
            raise UsageError(f"the network has no module '{name}' to protect or prune; names are those of named_modules()")
    module = copy.deepcopy(module).eval()
    graph = graph_of(module, example)
    found: list[Group] = []
    refused: list[Refusal] = []
    seen: set[str] = set()
    for raw in graph.get_all_groups(root_module_types=list(CHANNELED)):
        group = describe(graph, raw)
        reason = _reason(module, example, graph, raw, group, seen, protect)
        seen |= set(group.members)
        if reason is None and only is not None and not any(_inside(layer, only) for layer in group.members):
            reason = "was not asked for"
        elif reason is not None and only is not None and any(_inside(layer, only) for layer in group.members):
            raise UsageError(f"layer '{group.name}' cannot be pruned: it {reason}; leave it out of `only`, or protect it")
        if reason is None:
            found.append(group)
        else:
            refused.append(Refusal(group.name, tuple(group.members), reason))
    if not found:
        why = "; ".join(f"'{refusal.name}' {refusal.reason}" for refusal in refused[:3]) or "it has no convolution or linear layer"
        raise UsageError(f"nothing in {type(module).__name__} can be pruned: {why}")
    return found, refused


def _reason(module: nn.Module, example: Tensor, graph: Any, raw: Any, group: Group, seen: set[str], protect: Collection[str]) -> str | None:
    """Why this group must stay as it is, or None."""
    for layer in group.members:
        if _inside(layer, protect):
            return f"is protected by '{layer}'"
    for item in raw:
        node = item.dep.target
        if isinstance(node.module, tp.ops._OutputOp) or (graph.is_out_channel_pruning_fn(item.dep.handler) and not node.outputs):
            return "ends in an output of the network"
    if group.name in seen:
        return f"overlaps the group of another layer at '{group.name}'"
    tied = _tied(module, group.layers)
    if tied:
        return f"shares its weights with '{tied}' under another name"
    return probe(module, example, group)


def _inside(layer: str, names: Collection[str]) -> bool:
    return any(not name or layer == name or layer.startswith(f"{name}.") for name in names)


def _tied(module: nn.Module, layers: set[str]) -> str | None:
    owners: dict[int, str] = {}
    for name, layer in module.named_modules():
        for parameter in layer.parameters(recurse=False):
            first = owners.setdefault(id(parameter), name)
            if first != name and (first in layers or name in layers):
                return name
    return None


def probe(module: nn.Module, example: Tensor, group: Group) -> str | None:
    """Why a group cannot be cut, or None: scattered channels are cut and compared with consumers that read zeros there."""
    grouped = next((n for n in sorted(group.layers) if _grouped(module.get_submodule(n))), None)
    if grouped is not None:
        return f"feeds or holds the grouped convolution '{grouped}', which Torch-Pruning cuts wrongly"
    if not group.slots:
        return "feeds no layer that could read fewer channels"
    generator = torch.Generator().manual_seed(group.channels)
    inputs = torch.randn((2, *example.shape[1:]), generator=generator)
    for drop in (_scattered(group.channels, share, generator) for share in (0.5, 0.25)):
        if not drop:
            return "has a single channel"
        try:
            with torch.no_grad(), blinded(module, group, drop):
                wanted = flatten(module(inputs))
            smaller = cut(module, example, group.name, drop)
            with torch.no_grad():
                given = flatten(smaller(inputs))
        except Exception as error:  # a wrong graph makes shapes that torch refuses, in many ways
            return f"is wrong in Torch-Pruning's graph (cut, it does not run: {' '.join(str(error).split())[:100]})"
        for number, (one, other) in enumerate(zip(wanted, given, strict=True)):
            if one.shape != other.shape:
                return f"changes the shape of output {number}"
            if not float((one - other).abs().max()) <= AGREE * (1e-6 + float(one.abs().max())):
                return f"is wrong in Torch-Pruning's graph (cut, it changes output {number}), or feeds a normalisation over channels"
    return None


@contextmanager
def blinded(module: nn.Module, group: Group, drop: Collection[int]) -> Iterator[None]:
    """While open, every consumer of the group reads zeros in these of its channels."""

    def hook(places: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def alter(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            dark = inputs[0].clone()
            dark[(..., places) if isinstance(layer, nn.Linear) else (slice(None), places)] = 0
            return (dark, *inputs[1:])

        return alter

    handles = [
        module.get_submodule(name).register_forward_pre_hook(hook([index for channel in drop for index in places[channel]]))
        for name, places in group.slots.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _grouped(layer: nn.Module) -> bool:
    """A grouped convolution that is not depthwise."""
    return getattr(layer, "groups", 1) > 1 and not layer.groups == layer.in_channels == layer.out_channels


def _scattered(channels: int, share: float, generator: torch.Generator) -> list[int]:
    count = max(1, int(channels * share)) if channels > 1 else 0
    return sorted(torch.randperm(channels, generator=generator)[:count].tolist())
