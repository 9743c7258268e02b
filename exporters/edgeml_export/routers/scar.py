"""The SCAR router: queries, one an expert, look for the few tokens that speak for them.

Defined in this project after the idea of "Fragile Mastery" (2503.22698), whose own router does not learn; with x_i = LN0(token i):

    t_i  = Pk x_i + Wo scar_attention(Wq x, Wk x, Wv x)_i        see `sparse`; left out without buckets
    a_ei = U_e t_i / sqrt(dr)
    r_e  = mean of the s largest a_e,:                           of min(s, real tokens)
    p    = softmax( C r + c ) over the task groups

Where a mean dilutes the three words that tell a bank's customer from an assistant's, r keeps them: s is small and does not grow
with the text. The bias for the experts is the chosen group's (`group_graph`'s table).
"""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, nn

from edgeml_export.graphs import Graph, numpy_of
from edgeml_export.routers.sparse import Buckets, draw_sparse_attention, sparse_attention
from edgeml_export.routers.stage import NEVER, GroupRouter, draw_plain_norm, draw_range, plain_norm

__all__ = ["ScarRouter"]


class ScarRouter(GroupRouter):
    """`queries` expert queries of width `width` (dr), each reading its `top` (s) tokens, and a linear read-out to the groups."""

    def __init__(
        self, hidden: int, groups: int, queries: int, width: int = 64, top: int = 16, heads: int = 2, buckets: Buckets | None = None
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the width {width} must be a multiple of the {heads} heads")
        self.hidden, self.groups, self.queries, self.width, self.top, self.heads = hidden, groups, queries, width, top, heads
        self.buckets = buckets
        self.key = nn.Linear(hidden, width, bias=False)
        if buckets is not None:
            self.qkv = nn.Linear(hidden, 3 * width, bias=False)
            self.output = nn.Linear(width, width, bias=False)
        self.query = nn.Parameter(torch.randn(queries, width))
        self.read = nn.Linear(queries, groups)

    def tokens(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """t (B, T, dr)."""
        x = plain_norm(hidden0)
        t: Tensor = self.key(x)
        if self.buckets is not None:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
            t = t + self.output(sparse_attention(q, k, v, self.buckets.allowed(x, mask), mask))
        return t

    def responses(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """r (B, Q): what each query found."""
        a = self.tokens(hidden0, mask) @ self.query.T / self.width**0.5
        a = a.masked_fill(mask[..., None] == 0, NEVER)
        values = a.topk(min(self.top, a.shape[1]), dim=1).values
        there = mask.sum(-1).clamp(1, self.top)[:, None, None]
        keep = torch.arange(values.shape[1])[:, None] < there
        return (torch.where(keep, values, 0.0) / there).sum(1)

    def logits(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """hidden0 (B, T, d), mask (B, T) -> (B, G)."""
        out: Tensor = self.read(self.responses(hidden0, mask))
        return out

    def draw(self, g: Graph) -> str:
        x = draw_plain_norm(g, "hidden0", self.hidden)
        t = g.op("MatMul", x, _turned(g, "key", self.key.weight))
        if self.buckets is not None:
            qkv = g.op("MatMul", x, _turned(g, "qkv", self.qkv.weight))
            mixed = draw_sparse_attention(g, qkv, x, self.buckets, self.heads)
            t = g.op("Add", t, g.op("MatMul", mixed, _turned(g, "output", self.output.weight)))
        a = g.op("MatMul", t, _turned(g, "query", self.query / self.width**0.5))
        r = self._draw_responses(g, g.op("Transpose", a, perm=[0, 2, 1]))
        return g.op("Add", g.op("MatMul", r, _turned(g, "read", self.read.weight)), g.constant("read.bias", numpy_of(self.read.bias)))

    def _draw_responses(self, g: Graph, a: str) -> str:
        """a (B, Q, T) -> r (B, Q)."""
        real = g.op("Unsqueeze", g.op("Greater", "mask", g.scalar(0.0)), g.integers(1))
        a = g.op("Where", real, a, g.scalar(NEVER))
        count = g.op("Min", g.op("Shape", "mask", start=1, end=2), g.integers(self.top))
        values, _ = g.split("TopK", a, count, names=["largest", "largest_at"], axis=-1)
        there = g.op("Min", g.op("Max", g.op("ReduceSum", "mask", g.integers(1), keepdims=1), g.scalar(1.0)), g.scalar(float(self.top)))
        there = g.op("Unsqueeze", there, g.integers(2))  # (B, 1, 1)
        rank = g.op("Cast", draw_range(g, count), to=TensorProto.FLOAT)
        kept = g.op("Where", g.op("Less", rank, there), g.op("Div", values, there), g.scalar(0.0))
        return g.op("ReduceSum", kept, g.integers(2), keepdims=0)


def _turned(g: Graph, name: str, weight: Tensor) -> str:
    return g.constant(f"{name}.weight", np.ascontiguousarray(numpy_of(weight).T))
