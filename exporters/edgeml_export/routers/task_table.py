"""PreMoe ("Lightening MoEs on Constrained Memory by Expert Pruning and Retrieval", 2505.17639): a table of task patterns.

A pattern is what a task uses of every site; a request finds the nearest one and may use no other experts. With z(x) the first
site's router logits, c(x) its K largest and pi(x) = softmax(z(x)[c(x)]), the paper's key of a text X is

    TCESS_e = (1/|X|) sum_{x in X} z_e(x) 1[e in c(x)] 1[pi_e(x) >= r]                     `repaired=False`

and its nearest pattern the one at the least distance. A logit that is chosen though negative counts against its expert there, so
the key is repaired by default: z_e gives way to pi_e, never negative and 1 in sum. Distance is 1 - cosine; beyond `cutoff`, the 95th
percentile within tasks, the general pattern answers, where the paper's nearest neighbour always does. A site keeps the experts
whose recorded usage (mean combine weight) sums to `share`, and at least `least`; the paper keeps M everywhere.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeml_export.encoder import mean_pool
from edgeml_export.graphs import Graph, numpy_of
from edgeml_export.routers.stage import NEVER, BiasRouter, draw_mean, draw_top_mask, top_mask

__all__ = ["TaskTableRouter", "kept_experts"]


class TaskTableRouter(BiasRouter):
    """`gate` (F, d) is the first site's router, read on `hidden0`; `keys` (P, F); `usage` (P, S, E), 1 in sum per site."""

    gate: Tensor
    keys: Tensor
    table: Tensor

    def __init__(
        self,
        gate: Tensor,
        keys: Tensor,
        usage: Tensor,
        cutoff: float,
        candidates: int = 6,
        threshold: float = 0.0,
        repaired: bool = True,
        share: float = 0.95,
        least: int = 1,
    ) -> None:
        super().__init__()
        self.hidden = gate.shape[1]
        self.patterns, self.sites, self.experts = usage.shape
        self.cutoff, self.candidates, self.threshold, self.repaired = cutoff, candidates, threshold, repaired
        kept = kept_experts(torch.cat([usage, usage.mean(0, keepdim=True)]).float(), share, least)
        self.register_buffer("gate", gate.float())
        self.register_buffer("keys", F.normalize(keys.float(), dim=-1))
        self.register_buffer("table", torch.where(kept, 0.0, -torch.inf))

    @classmethod
    def fitted(cls, gate: Tensor, usage: Tensor, hidden0: Tensor, mask: Tensor, task: Tensor, candidates: int = 6) -> TaskTableRouter:
        """Keys and cut-off from calibration requests hidden0 (N, T, d), mask (N, T) of the tasks `task` (N)."""
        blank = cls(gate, torch.ones(len(usage), len(gate)), usage, 2.0, candidates)
        found = F.normalize(blank.key(hidden0, mask), dim=-1)
        keys = torch.stack([found[task == number].mean(0) for number in range(len(usage))])
        within = 1 - (found * F.normalize(keys, dim=-1)[task]).sum(-1)
        return cls(gate, keys, usage, float(within.quantile(0.95)), candidates)

    def key(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """The request's key (B, F)."""
        z = hidden0 @ self.gate.T
        chosen = top_mask(z, self.candidates) > 0
        pi = F.softmax(z.masked_fill(~chosen, NEVER), dim=-1)
        return mean_pool(pi if self.repaired else torch.where(chosen & (pi >= self.threshold), z, 0.0), mask)

    def pattern(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """The nearest pattern of each request (B), or P, the general one."""
        cosine = (F.normalize(self.key(hidden0, mask), dim=-1) @ self.keys.T).max(-1)
        return torch.where(1 - cosine.values > self.cutoff, self.patterns, cosine.indices)

    def forward(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """hidden0 (B, T, d), mask (B, T) -> bias (B, S, E), 0 or minus infinity."""
        return self.table[self.pattern(hidden0, mask)]

    def draw(self, g: Graph) -> None:
        z = g.op("MatMul", "hidden0", g.constant("gate", np.ascontiguousarray(numpy_of(self.gate).T)))
        chosen = draw_top_mask(g, z, self.candidates)
        pi = g.op("Softmax", g.op("Where", chosen, z, g.scalar(NEVER)), axis=-1)
        if not self.repaired:
            sure = g.op("And", chosen, g.op("GreaterOrEqual", pi, g.scalar(self.threshold)))
            pi = g.op("Where", sure, z, g.scalar(0.0))
        key = g.op("LpNormalization", draw_mean(g, pi), axis=-1, p=2)
        cosine = g.op("MatMul", key, g.constant("keys", np.ascontiguousarray(numpy_of(self.keys).T)))
        distance = g.op("Sub", g.scalar(1.0), g.op("ReduceMax", cosine, axes=[-1], keepdims=0))
        far = g.op("Greater", distance, g.constant("cutoff", np.array(self.cutoff, np.float32)))
        general = g.constant("general", np.array(self.patterns, np.int64))
        nearest = g.op("Where", far, general, g.op("ArgMax", cosine, axis=-1, keepdims=0))
        g.op("Gather", g.constant("table", numpy_of(self.table)), nearest, name="bias", axis=0)


def kept_experts(usage: Tensor, share: float, least: int) -> Tensor:
    """Of usage (..., E) the fewest experts whose sum reaches `share`, and at least `least`: bool, the first of equal ones."""
    order = torch.sort(usage, dim=-1, descending=True, stable=True)
    before = order.values.cumsum(-1) - order.values
    kept = (before < share * usage.sum(-1, keepdim=True)) | (torch.arange(usage.shape[-1]) < least)
    return torch.zeros_like(kept).scatter_(-1, order.indices, kept)
