"""SCAR's sparse attention in torch and as a graph: who may look at whom is decided by where tokens lie.

After "Fragile Mastery" (2503.22698), repaired: centroids and prototypes are fitted once on calibration tokens and frozen, so an
answer depends on no batch mate. With x_i = LN0(token i), n its width:

    cluster_i = argmin_c |x_i - centroid_c|^2                    ties to the lowest
    p_i       = softmax( Wr x_i / (sqrt(n) temperature) );  domain_i = argmax p_i;  conf_i = max p_i
    allow_ij  = real_j and ( i = j  or  i < g  or  j < g  or  cluster_i = cluster_j
                             or  domain_i = domain_j and conf_i > theta and conf_j > theta )
    y_i       = sum_j softmax_{j: allow_ij}( q_i k_j / sqrt(dh) ) v_j,   0 where i is padding

In torch the mask is spelt out, N x N, for training on short texts. The graph has the operator `edgeml.ScarAttention`, which sorts
tokens into buckets and never does: 4,096 tokens are no more than 64 times the work of 64.
"""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn import functional as F

from edgeml_export.graphs import Graph, numpy_of
from edgeml_export.routers.stage import NEVER

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

    def draw(self, g: Graph, x: str) -> tuple[str, str, str]:
        """cluster, domain (B, N) int32 and confidence (B, N), from the name of x (B, N, d)."""
        distance = g.op("MatMul", x, g.constant("centroids", np.ascontiguousarray(-2 * numpy_of(self.centroids).T)))
        distance = g.op("Add", distance, g.constant("centroids.square", numpy_of(self.centroids.square().sum(-1))))
        p = g.op("Softmax", g.op("MatMul", x, g.constant("prototypes", np.ascontiguousarray(numpy_of(self._scaled()).T))), axis=-1)
        confidence = g.op("ReduceMax", p, axes=[-1], keepdims=0)
        cluster, domain = (
            g.op("Cast", g.op(kind, of, axis=-1, keepdims=0), to=TensorProto.INT32) for kind, of in (("ArgMin", distance), ("ArgMax", p))
        )
        return cluster, domain, confidence

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


def draw_sparse_attention(g: Graph, qkv: str, x: str, buckets: Buckets, heads: int) -> str:
    """The same from qkv (B, N, 3 H dh), its parts one after the other, and the x (B, N, d) that `buckets` sorts."""
    q, k, v = g.split("Split", qkv, names=[g.scope + part for part in ("query", "key", "value")], axis=2)
    pad = g.op("Less", "mask", g.scalar(0.5))
    sizes = {"clusters": len(buckets.centroids), "domains": len(buckets.prototypes), "heads": heads, "global_tokens": buckets.leading}
    return g.ours("ScarAttention", q, k, v, *buckets.draw(g, x), pad, threshold=buckets.theta, **sizes)


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
