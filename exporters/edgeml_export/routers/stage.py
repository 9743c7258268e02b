"""What every router here is: a torch module that can draw itself as a stage's graph.

Two kinds share one contract (B requests, T tokens, d hidden, S sites, E experts a site, G groups):

    BiasRouter     hidden0 (B, T, d), mask (B, T) -> bias (B, S, E): added to the sites' logits, minus infinity forbids
    GroupRouter    hidden0, mask -> groups (B, G), probabilities; and, with a table, bias of the likeliest group

`forward` is the paper's equation in torch, `draw` the same in standard ONNX operators (opset 17). Both see padding: a token
whose mask is 0 changes nothing. A request decides once, before the trunk runs, so its pages are known before they are needed.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, ValueInfoProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

from edgeml_export.graphs import Graph

__all__ = [
    "BiasRouter",
    "GroupRouter",
    "bias_graph",
    "draw_mean",
    "draw_plain_norm",
    "draw_range",
    "draw_top_mask",
    "group_graph",
    "plain_norm",
    "top_mask",
]

NORM_EPS = 1e-5
NEVER = -1e30  # a padded token's score: finite, so that no infinity meets a zero

Floats = NDArray[np.float32]


class BiasRouter(nn.Module):
    """Says which experts a request should use. `hidden` is the width d of `hidden0`."""

    hidden: int
    sites: int
    experts: int

    @abstractmethod
    def forward(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """hidden0 (B, T, d), mask (B, T) -> bias (B, S, E)."""

    @abstractmethod
    def draw(self, g: Graph) -> None:
        """Add nodes that read `hidden0` and `mask` and end in `bias`."""


class GroupRouter(nn.Module):
    """Says which of `groups` task groups a request belongs to."""

    hidden: int
    groups: int

    @abstractmethod
    def logits(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """hidden0 (B, T, d), mask (B, T) -> one logit a group (B, G)."""

    @abstractmethod
    def draw(self, g: Graph) -> str:
        """Add nodes that read `hidden0` and `mask`; returns the name of the logits (B, G)."""

    def forward(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """The groups' probabilities (B, G)."""
        return F.softmax(self.logits(hidden0, mask), dim=-1)


def bias_graph(router: BiasRouter, name: str = "router") -> bytes:
    """The stage's model: hidden0, mask -> bias."""
    g = Graph(name)
    router.draw(g)
    return g.finish(_inputs(router.hidden), [_floats("bias", "batch", router.sites, router.experts)])


def group_graph(router: GroupRouter, table: Floats | None = None, name: str = "router") -> bytes:
    """The stage's model: hidden0, mask -> groups, and bias where `table` (G, S, E) says which bias each group has."""
    g = Graph(name)
    outputs = [_floats("groups", "batch", router.groups)]
    g.op("Softmax", router.draw(g), name="groups", axis=-1)
    if table is not None:
        if table.ndim != 3 or len(table) != router.groups:
            raise ValueError(f"the bias table must be (groups, sites, experts) with {router.groups} groups, not {table.shape}")
        likeliest = g.op("ArgMax", "groups", axis=-1, keepdims=0)
        g.op("Gather", g.constant("group_bias", np.ascontiguousarray(table, np.float32)), likeliest, name="bias", axis=0)
        outputs.append(_floats("bias", "batch", *table.shape[1:]))
    return g.finish(_inputs(router.hidden), outputs)


def plain_norm(x: Tensor) -> Tensor:
    """LN0: layer norm without scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def draw_plain_norm(g: Graph, x: str, width: int) -> str:
    """LN0 of `x`, whose last axis has `width` values."""
    ones = g.constant(f"ones.{width}", np.ones(width, np.float32), shared=True)
    return g.op("LayerNormalization", x, ones, axis=-1, epsilon=NORM_EPS)


def draw_mean(g: Graph, x: str) -> str:
    """The mean over the real tokens: x (B, T, n) -> (B, n)."""
    total = g.op("Squeeze", g.op("MatMul", g.op("Unsqueeze", "mask", g.integers(1)), x), g.integers(1))
    return g.op("Div", total, g.op("Max", g.op("ReduceSum", "mask", g.integers(1), keepdims=1), g.scalar(1.0)))


def draw_range(g: Graph, count: str) -> str:
    """0, 1, ... of as many as `count` (1) int64 says."""
    first, step = (g.constant(f"from.{value}", np.array(value, np.int64), shared=True) for value in (0, 1))
    return g.op("Range", first, g.op("Squeeze", count), step)


def top_mask(values: Tensor, count: int) -> Tensor:
    """1 for the `count` largest of the last axis, else 0; of equal ones the first count."""
    chosen = torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(values).scatter_(-1, chosen, 1.0)


def draw_top_mask(g: Graph, values: str, count: int) -> str:
    """The same as booleans: ONNX's TopK also takes the first of equal ones."""
    _, chosen = g.split("TopK", values, g.integers(count), names=[f"{values}_top", f"{values}_chosen"], axis=-1)
    nothing = g.op("Mul", values, g.scalar(0.0))
    ones = g.op("Expand", g.scalar(1.0), g.op("Shape", chosen))
    return g.op("Greater", g.op("ScatterElements", nothing, chosen, ones, axis=-1), g.scalar(0.0))


def _inputs(hidden: int) -> list[ValueInfoProto]:
    return [_floats("hidden0", "batch", "tokens", hidden), _floats("mask", "batch", "tokens")]


def _floats(name: str, *shape: int | str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
