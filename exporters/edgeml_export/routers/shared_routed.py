"""DeepSeekMoE (2401.06066): shared experts that always run, many small routed ones of which few do.

With u a token, e_i the centroid of routed expert i, Ks shared experts and k routed ones a token:

    h   = u + sum_{i <= Ks} FFN_i(u) + sum_{i > Ks} g_i FFN_i(u)
    s_i = softmax_i(u . e_i) over the routed experts;  g_i = s_i if s_i is among the k largest, else 0

The gates are not divided by their sum, so forbidding an expert takes its part away and changes no other: `bias_mode` is
`selection`, `renormalised` false, and a bias says which experts may be chosen, not how much they weigh. Shared experts are outside
of it. As a stage, the router reads every site's affinities on `hidden0` and leaves the `keep` experts of largest mean gate; where a
trunk chooses token by token, `choice_graph` is its part.
"""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from edgeml_export.encoder import mean_pool
from edgeml_export.graphs import Graph, numpy_of
from edgeml_export.routers.stage import BiasRouter, draw_mean, draw_top_mask, top_mask

__all__ = ["SharedRoutedRouter"]


class SharedRoutedRouter(BiasRouter):
    """Centroids (S, E, d) of the routed experts; `top_k` of them a token, `keep` a request."""

    centroids: Tensor

    def __init__(self, centroids: Tensor, top_k: int, keep: int) -> None:
        super().__init__()
        self.sites, self.experts, self.hidden = centroids.shape
        if not 1 <= top_k <= keep <= self.experts:
            raise ValueError(f"top_k {top_k} and keep {keep} must be from 1 to the {self.experts} experts, in this order")
        self.top_k, self.keep = top_k, keep
        self.register_buffer("centroids", centroids.float())

    def gates(self, x: Tensor) -> Tensor:
        """g (B, T, S, E) of tokens x (B, T, d), the same x for every site."""
        s = F.softmax(torch.einsum("btd,sed->btse", x, self.centroids), dim=-1)
        return s * top_mask(s, self.top_k)

    def forward(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """hidden0 (B, T, d), mask (B, T) -> bias (B, S, E), 0 or minus infinity."""
        mean = mean_pool(self.gates(hidden0).flatten(2), mask).unflatten(-1, (self.sites, self.experts))
        return torch.where(top_mask(mean, self.keep) > 0, 0.0, -torch.inf)

    def choose(self, site: int, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, d), bias (N, E) -> ids (N, k) int64 and weights (N, k); -1 and 0 where fewer than k may be chosen."""
        s = F.softmax(x @ self.centroids[site].T, dim=-1)
        order = torch.sort(s + bias, dim=-1, descending=True, stable=True)
        ids = order.indices[:, : self.top_k]
        absent = torch.isneginf(order.values[:, : self.top_k])
        return ids.masked_fill(absent, -1), s.gather(-1, ids).masked_fill(absent, 0.0)

    def draw(self, g: Graph) -> None:
        rows = numpy_of(self.centroids).reshape(-1, self.hidden)
        z = g.op("MatMul", "hidden0", g.constant("centroids", np.ascontiguousarray(rows.T)))
        s = g.op("Softmax", g.op("Reshape", z, g.integers(0, 0, self.sites, self.experts)), axis=-1)
        gates = g.op("Where", draw_top_mask(g, s, self.top_k), s, g.scalar(0.0))
        mean = draw_mean(g, g.op("Reshape", gates, g.integers(0, 0, self.sites * self.experts)))
        kept = draw_top_mask(g, g.op("Reshape", mean, g.integers(0, self.sites, self.experts)), self.keep)
        g.op("Where", kept, g.scalar(0.0), g.scalar(-np.inf), name="bias")

    def choice_graph(self, site: int) -> bytes:
        """`choose` as a model: x (N, d), bias (N, E) -> ids, weights (N, k)."""
        g = Graph(f"choose_{site}")
        s = g.op("Softmax", g.op("MatMul", "x", g.constant("centroids", np.ascontiguousarray(numpy_of(self.centroids[site]).T))), axis=-1)
        scores, ids = g.split("TopK", g.op("Add", s, "bias"), g.integers(self.top_k), names=["scores", "chosen"], axis=-1)
        absent = g.op("IsInf", scores)
        g.op("Where", absent, g.constant("nobody", np.array(-1, np.int64)), ids, name="ids")
        g.op("Where", absent, g.scalar(0.0), g.op("GatherElements", s, ids, axis=-1), name="weights")
        kinds = (("x", self.hidden), ("bias", self.experts))
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("tokens", width)) for name, width in kinds]
        answers = (("ids", TensorProto.INT64), ("weights", TensorProto.FLOAT))
        return g.finish(inputs, [helper.make_tensor_value_info(name, kind, ("tokens", self.top_k)) for name, kind in answers])
