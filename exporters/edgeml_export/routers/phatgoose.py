"""PHATGOOSE ("Learning to Route Among Specialized Experts for Zero-Shot Generalization", 2402.05859): a gate vector an expert.

With LN0 layer norm without scale and shift, x_i the tokens, v_e expert e's gate, d the width:

    training, expert frozen:  y = W x + sigmoid(v_e . x) expert_e(x), v_e from 0, some 100 steps        `train_gate`
    routing:                  z_ei = LN0(x_i) . LN0(v_e) / sqrt(d);  w_i = softmax_e(z_i), keep top k    `token_weights`

Experts never see each other: one more is one more row, and no row changes (`with_expert`). Here every site has its rows, all of
them read `hidden0` (the site's own input is not there yet), and a request's bias is the mean of its tokens' logits, which the
site's own logits are added to; with `keep`, experts below a site's `keep` largest mean weights get minus infinity.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from edgeml_export.encoder import mean_pool
from edgeml_export.graphs import Graph, numpy_of
from edgeml_export.routers.stage import BiasRouter, draw_mean, draw_plain_norm, draw_top_mask, plain_norm, top_mask

__all__ = ["PhatgooseRouter", "train_gate"]


class PhatgooseRouter(BiasRouter):
    """Gates (S, E, d), one row an expert; `top_k` experts a token; `keep` experts a site (None: all)."""

    gates: Tensor

    def __init__(self, gates: Tensor, top_k: int = 2, keep: int | None = None) -> None:
        super().__init__()
        self.sites, self.experts, self.hidden = gates.shape
        self.top_k, self.keep = top_k, keep
        self.register_buffer("gates", gates.float())

    def with_expert(self, rows: Tensor) -> PhatgooseRouter:
        """A router with one expert more at every site, whose gates are `rows` (S, d); nothing is trained again."""
        return type(self)(torch.cat([self.gates, rows[:, None].float()], dim=1), self.top_k, self.keep)

    def token_logits(self, hidden0: Tensor) -> Tensor:
        """z (B, T, S, E)."""
        rows = plain_norm(self.gates) / self.hidden**0.5
        return torch.einsum("btd,sed->btse", plain_norm(hidden0), rows)

    def token_weights(self, hidden0: Tensor) -> Tensor:
        """w (B, T, S, E): the top k of the softmax, divided by their sum + 1e-6 as the paper's code does."""
        w = torch.softmax(self.token_logits(hidden0), dim=-1)
        kept = w * top_mask(w, self.top_k)
        return kept / (kept.sum(-1, keepdim=True) + 1e-6)

    def forward(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """hidden0 (B, T, d), mask (B, T) -> bias (B, S, E)."""
        bias = mean_pool(self.token_logits(hidden0).flatten(2), mask).unflatten(-1, (self.sites, self.experts))
        if self.keep is None:
            return bias
        mean = mean_pool(self.token_weights(hidden0).flatten(2), mask).unflatten(-1, (self.sites, self.experts))
        return bias.masked_fill(top_mask(mean, self.keep) == 0, -torch.inf)

    def draw(self, g: Graph) -> None:
        z = self.draw_logits(g)
        by_site = g.integers(0, self.sites, self.experts)
        if self.keep is None:
            g.op("Reshape", draw_mean(g, z), by_site, name="bias")
            return
        bias = g.op("Reshape", draw_mean(g, z), by_site)
        w = g.op("Softmax", g.op("Reshape", z, g.integers(0, 0, self.sites, self.experts)), axis=-1)
        kept = g.op("Where", draw_top_mask(g, w, self.top_k), w, g.scalar(0.0))
        total = g.op("Add", g.op("ReduceSum", kept, g.integers(-1), keepdims=1), g.scalar(1e-6))
        mean = draw_mean(g, g.op("Reshape", g.op("Div", kept, total), g.integers(0, 0, self.sites * self.experts)))
        used = draw_top_mask(g, g.op("Reshape", mean, by_site), self.keep)
        g.op("Where", used, bias, g.scalar(-np.inf), name="bias")

    def draw_logits(self, g: Graph) -> str:
        """z (B, T, S E)."""
        rows = numpy_of(plain_norm(self.gates) / self.hidden**0.5).reshape(-1, self.hidden)
        return g.op("MatMul", draw_plain_norm(g, "hidden0", self.hidden), g.constant("gates", np.ascontiguousarray(rows.T)))


def train_gate(
    expert: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: list[tuple[Tensor, Tensor, Tensor]],
    rate: float = 5e-3,
) -> Tensor:
    """The gate (d) of a frozen expert, one step a batch (x (N, d), W x (N, n), target); `loss` takes an output and a target."""
    gate = nn.Parameter(torch.zeros(batches[0][0].shape[-1]))
    optimiser = torch.optim.Adam([gate], rate)
    for x, base, target in batches:
        with torch.no_grad():
            own = expert(x)
        optimiser.zero_grad()
        loss(base + torch.sigmoid(x @ gate)[:, None] * own, target).backward()
        optimiser.step()
    return gate.detach()
