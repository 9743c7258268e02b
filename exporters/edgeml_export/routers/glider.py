"""GLIDER ("Glider: Global and Local Instruction-Driven Expert Router", 2410.07172): PHATGOOSE's logits plus a global term.

    z_ei = LN0(x_i) . LN0(v_e) / sqrt(d) + alpha cos(u, u_e)

u describes the whole request, u_e expert e's task: the same for every token, so it is known before anything runs. The paper lets a
language model write the description that u embeds; on a device u is P times the mean of `hidden0`, P any projection. Its alpha
(3 to 1000, a constant for each benchmark) drowns or is drowned; here it is calibrated: the median global margin, best minus
second best, becomes the median local one (`calibrated`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeml_export.encoder import mean_pool
from edgeml_export.graphs import Graph, numpy_of
from edgeml_export.routers.phatgoose import PhatgooseRouter
from edgeml_export.routers.stage import BiasRouter, draw_mean

__all__ = ["GliderRouter"]


class GliderRouter(BiasRouter):
    """`local` gates, `experts_of` (S, E, m) the embeddings u_e, `project` (m, d) the P of u = P mean(hidden0)."""

    described: Tensor
    project: Tensor

    def __init__(self, local: PhatgooseRouter, experts_of: Tensor, project: Tensor, alpha: float = 1.0) -> None:
        super().__init__()
        if local.keep is not None or experts_of.shape[:2] != (local.sites, local.experts):
            raise ValueError("GLIDER takes local gates that keep every expert, and one embedding for each of them")
        self.hidden, self.sites, self.experts, self.alpha = local.hidden, local.sites, local.experts, alpha
        self.local = local
        self.register_buffer("described", F.normalize(experts_of.float(), dim=-1))
        self.register_buffer("project", project.float())

    def cosines(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """cos(u, u_e) (B, S, E)."""
        u = F.normalize(mean_pool(hidden0, mask) @ self.project.T, dim=-1)
        return torch.einsum("bm,sem->bse", u, self.described)

    def calibrated(self, hidden0: Tensor, mask: Tensor) -> GliderRouter:
        """The same router with the alpha at which both terms have the same median margin on these calibration requests."""
        local = _margin(self.local.token_logits(hidden0)[mask > 0])
        return type(self)(self.local, self.described, self.project, local / max(_margin(self.cosines(hidden0, mask)), 1e-12))

    def forward(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """hidden0 (B, T, d), mask (B, T) -> bias (B, S, E)."""
        bias: Tensor = self.local(hidden0, mask) + self.alpha * self.cosines(hidden0, mask)
        return bias

    def draw(self, g: Graph) -> None:
        by_site = g.integers(0, self.sites, self.experts)
        local = g.op("Reshape", draw_mean(g, self.local.draw_logits(g)), by_site)
        u = g.op("MatMul", draw_mean(g, "hidden0"), g.constant("project", np.ascontiguousarray(numpy_of(self.project).T)))
        u = g.op("LpNormalization", u, axis=-1, p=2)
        rows = numpy_of(self.described * self.alpha).reshape(self.sites * self.experts, -1)
        cosines = g.op("Reshape", g.op("MatMul", u, g.constant("described", np.ascontiguousarray(rows.T))), by_site)
        g.op("Add", local, cosines, name="bias")


def _margin(logits: Tensor) -> float:
    """The median of best minus second best."""
    best = logits.topk(2, dim=-1).values
    return float((best[..., 0] - best[..., 1]).median())
