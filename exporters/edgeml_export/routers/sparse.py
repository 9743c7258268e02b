"""SCAR's sparse attention in torch and in standard ONNX operators: who may look at whom is decided by where tokens lie.

After "Fragile Mastery" (2503.22698), repaired: centroids and prototypes are fitted once on calibration tokens and frozen, so an
answer depends on no batch mate. With x_i = LN0(token i), n its width:

    cluster_i = argmin_c |x_i - centroid_c|^2                    ties to the lowest
    p_i       = softmax( Wr x_i / (sqrt(n) temperature) );  domain_i = argmax p_i;  conf_i = max p_i
    allow_ij  = real_j and ( i = j  or  i < g  or  j < g  or  cluster_i = cluster_j
                             or  domain_i = domain_j and conf_i > theta and conf_j > theta )
    y_i       = sum_j softmax_{j: allow_ij}( q_i k_j / sqrt(dh) ) v_j,   0 where i is padding

`draw_sparse_attention` spells the mask out, N x N, which is right for a router's 256 tokens; it is the one place to change for an
operator that never does.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeml_export.graphs import Graph, numpy_of
from edgeml_export.routers.stage import NEVER, draw_range

__all__ = ["Buckets", "density", "draw_sparse_attention", "sparse_attention"]


class Buckets(nn.Module):
    """Frozen centroids (K, d) and prototypes (D, d): each token's cluster, domain, and whether the domain is sure."""

    centroids: Tensor
    prototypes: Tensor
    temperature: Tensor

    def __init__(self, centroids: Tensor, prototypes: Tensor, temperature: float = 1.0, theta: float = 0.65, leading: int = 1) -> None:
        super().__init__()
        self.theta, self.leading = theta, leading
        for name, value in (("centroids", centroids), ("prototypes", prototypes), ("temperature", torch.tensor(float(temperature)))):
            self.register_buffer(name, value.float())

    @classmethod
    def fitted(cls, x: Tensor, group: Tensor, clusters: int, groups: int, theta: float = 0.65, seed: int = 0) -> Buckets:
        """From calibration tokens x (N, d), already normalised, and the group (N,) each one's request belongs to."""
        prototypes = torch.stack([x[group == g].mean(0) if bool((group == g).any()) else torch.zeros_like(x[0]) for g in range(groups)])
        prototypes = prototypes - prototypes.mean(0)
        logits = x @ prototypes.T / x.shape[-1] ** 0.5
        candidates = [0.01 * 1.25**step for step in range(40)]
        losses = [float(F.cross_entropy(logits / temperature, group)) for temperature in candidates]
        return cls(_kmeans(x, clusters, seed), prototypes, candidates[int(np.argmin(losses))], theta)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, d) -> cluster, domain (B, N) int64, and sure (B, N) bool."""
        cluster = (self.centroids.square().sum(-1) - 2 * x @ self.centroids.T).argmin(-1)
        p = F.softmax(x @ self._scaled().T, dim=-1)
        return cluster, p.argmax(-1), p.max(-1).values > self.theta

    def allowed(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, d), mask (B, N) -> allow (B, N, N) bool."""
        cluster, domain, sure = self(x)
        place = torch.arange(x.shape[1])
        first = place < self.leading
        near = (place[:, None] == place) | first[:, None] | first
        same = (domain[:, :, None] == domain[:, None]) & sure[:, :, None] & sure[:, None]
        near = near | (cluster[:, :, None] == cluster[:, None]) | same
        return near & (mask[:, None] > 0)

    def draw(self, g: Graph, x: str) -> str:
        """allow (B, N, N), from the name of x (B, N, d)."""
        distance = g.op("MatMul", x, g.constant("centroids", np.ascontiguousarray(-2 * numpy_of(self.centroids).T)))
        distance = g.op("Add", distance, g.constant("centroids.square", numpy_of(self.centroids.square().sum(-1))))
        p = g.op("Softmax", g.op("MatMul", x, g.constant("prototypes", np.ascontiguousarray(numpy_of(self._scaled()).T))), axis=-1)
        sure = g.op("Greater", g.op("ReduceMax", p, axes=[-1], keepdims=0), g.scalar(self.theta))
        place = draw_range(g, g.op("Shape", x, start=1, end=2))
        first = g.op("Less", place, g.integers(self.leading))
        near = _pairs(g, "Or", g.op("Unsqueeze", first, g.integers(0)))
        near = g.op("Or", near, _pairs(g, "Equal", g.op("Unsqueeze", place, g.integers(0))))
        near = g.op("Or", near, _pairs(g, "Equal", g.op("ArgMin", distance, axis=-1, keepdims=0)))
        same = _pairs(g, "Equal", g.op("ArgMax", p, axis=-1, keepdims=0))
        near = g.op("Or", near, g.op("And", same, _pairs(g, "And", sure)))
        return g.op("And", near, g.op("Unsqueeze", g.op("Greater", "mask", g.scalar(0.0)), g.integers(1)))

    def _scaled(self) -> Tensor:
        return self.prototypes / (self.prototypes.shape[-1] ** 0.5 * self.temperature)


def density(allow: Tensor, mask: Tensor) -> float:
    """Allowed pairs over all pairs of real tokens, mean over requests: allow (B, N, N), mask (B, N)."""
    real = mask > 0
    pairs = (allow & real[:, :, None]).flatten(1).sum(-1)
    return float((pairs / real.sum(-1).clamp(min=1).square()).mean())


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, allow: Tensor, mask: Tensor) -> Tensor:
    """q, k, v (B, N, H, dh), allow (B, N, N), mask (B, N) -> (B, N, H dh)."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    mixed = F.softmax(scores.masked_fill(~allow[:, None], NEVER), dim=-1)
    return torch.einsum("bhij,bjhd->bihd", mixed, v).flatten(2) * mask[..., None]


def draw_sparse_attention(g: Graph, qkv: str, allow: str, heads: int, width: int) -> str:
    """The same from qkv (B, N, 3 H dh), its parts one after the other; `width` is dh."""
    by_head = g.op("Transpose", g.op("Reshape", qkv, g.integers(0, 0, 3 * heads, width)), perm=[0, 2, 1, 3])
    q, k, v = g.split("Split", by_head, names=[g.scope + part for part in ("query", "key", "value")], axis=1)
    scores = g.op("Mul", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), g.scalar(width**-0.5))
    scores = g.op("Where", g.op("Unsqueeze", allow, g.integers(1)), scores, g.scalar(NEVER))
    mixed = g.op("Transpose", g.op("MatMul", g.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    return g.op("Mul", g.op("Reshape", mixed, g.integers(0, 0, heads * width)), g.op("Unsqueeze", "mask", g.integers(2)))


def _pairs(g: Graph, kind: str, x: str) -> str:
    """`kind` of every two tokens: x (B, N) -> (B, N, N)."""
    return g.op(kind, g.op("Unsqueeze", x, g.integers(2)), g.op("Unsqueeze", x, g.integers(1)))


def _kmeans(x: Tensor, clusters: int, seed: int, rounds: int = 20) -> Tensor:
    """Lloyd's centroids of x (N, d); one that nobody is nearest to stays where it was."""
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randperm(len(x), generator=generator)[:clusters]].clone()
    for _ in range(rounds):
        nearest = (centres.square().sum(-1) - 2 * x @ centres.T).argmin(-1)
        counts = torch.bincount(nearest, minlength=len(centres)).float()[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres
