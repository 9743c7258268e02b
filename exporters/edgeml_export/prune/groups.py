"""Which channels go together, and the cut itself.

The groups are Torch-Pruning's: its dependency graph says which layers must lose the same output channels (the members) and
which lose the matching inputs (the consumers). Nothing is traced here. Where that graph is wrong, find.py refuses the group.

A group is named after its root, the layer with which the graph begins; `keep` and `drop` number the root's output channels in
the network at hand, from 0.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from edgeml.errors import UsageError

__all__ = ["CHANNELED", "Group", "Refusal", "cut", "describe", "flatten", "graph_of", "group_of"]

CHANNELED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


@dataclass(frozen=True)
class Group:
    """Layers that are cut together. The root's channel c is in `members[layer][c]` of a member's outputs (the root is one) and in
    `slots[layer][c]` of a consumer's inputs."""

    name: str
    channels: int
    members: dict[str, list[list[int]]] = field(repr=False)
    slots: dict[str, list[list[int]]] = field(repr=False)

    @property
    def layers(self) -> set[str]:
        """All layers whose weights a cut changes."""
        return {*self.members, *self.slots}


@dataclass(frozen=True)
class Refusal:
    """A group that is left as it is, and why, in words that follow its name."""

    name: str
    members: tuple[str, ...]
    reason: str


def flatten(outputs: Any) -> list[Tensor]:
    """A network's outputs, whatever their nesting, as a list of tensors."""
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for value in values for tensor in flatten(value)]


def cut(module: nn.Module, example: Tensor, name: str, drop: Sequence[int]) -> nn.Module:
    """A copy of `module` without the output channels `drop` of layer `name` and all that hangs on them; smaller in memory."""
    copied = copy.deepcopy(module)
    if drop:
        graph = graph_of(copied, example)
        layer = copied.get_submodule(name)
        graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(drop)).prune(record_history=False)
    return copied.eval()


def group_of(module: nn.Module, example: Tensor, name: str) -> Group:
    """The group of root `name` as it is in `module` now. Tracing leaves the module in evaluation mode, its parameters with gradients."""
    graph = graph_of(module, example)
    return describe(graph, _full(graph, module.get_submodule(name)))


def graph_of(module: nn.Module, example: Tensor) -> Any:
    """Torch-Pruning's graph of a network; a network it cannot follow is a `UsageError` that names the place."""
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    running: list[str] = []

    def enters(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leaves(*_: Any) -> None:
        running.pop()

    handles = [layer.register_forward_pre_hook(enters(name)) for name, layer in module.named_modules()]
    handles += [layer.register_forward_hook(leaves) for layer in module.modules()]
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            module.eval()
            outputs = flatten(module(example))
            loose = next((number for number, output in enumerate(outputs) if output.grad_fn is None), None)
            if loose is not None:
                kind = type(module).__name__
                raise UsageError(f"{kind} cannot be pruned: no gradient reaches its output {loose}; remove detach or no_grad")
            for handle in handles:
                handle.remove()
            return tp.DependencyGraph().build_dependency(module, (example,), verbose=False)
    except UsageError:
        raise
    except Exception as error:  # whatever the user's forward or the tracer raises
        place = f"module '{running[-1]}'" if running and running[-1] else type(module).__name__
        text = " ".join(str(error).split())[:160]
        raise UsageError(
            f"the tracer cannot follow {place} on an input of {tuple(example.shape)} ({type(error).__name__}: {text}); "
            "give an example of the right shape, or prune the parts without it"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _full(graph: Any, layer: nn.Module) -> Any:
    pruner = graph.get_pruner_of_module(layer)
    return graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(pruner.get_out_channels(layer))))


def describe(graph: Any, raw: Any) -> Group:
    """A group of Torch-Pruning's, taken with all of its channels, in our words."""
    names = graph._module2name
    root = raw[0].dep.target.module
    members: dict[str, list[list[int]]] = {}
    slots: dict[str, list[list[int]]] = {}
    channels = len(raw[0].idxs)
    for item in raw:
        layer, handler = item.dep.target.module, item.dep.handler
        if not isinstance(layer, nn.Module) or names.get(layer) is None:
            continue
        outwards = graph.is_out_channel_pruning_fn(handler)
        if outwards or isinstance(layer, CHANNELED):
            places = (members if outwards else slots).setdefault(names[layer], [[] for _ in range(channels)])
            for index, channel in zip(item.idxs, item.root_idxs, strict=True):
                places[channel].append(index)
    return Group(names[root], channels, members, slots)
