"""Mean-pooled linear routing: the baseline any other router has to beat.

    z = W LN0( (1/n) sum_i x_i ) + b

the router of Twin-Merging ("Modular Integration of Specialized Experts", 2406.15479) in its smallest form: a linear classifier
on the mean hidden state. It cannot see which tokens a mean was made of.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from edgeml_export.encoder import mean_pool
from edgeml_export.graphs import Graph, numpy_of
from edgeml_export.routers.stage import GroupRouter, draw_mean, draw_plain_norm, plain_norm

__all__ = ["LinearRouter"]


class LinearRouter(GroupRouter):
    """One linear layer on the normalised mean of the real tokens."""

    def __init__(self, hidden: int, groups: int) -> None:
        super().__init__()
        self.hidden, self.groups = hidden, groups
        self.classify = nn.Linear(hidden, groups)

    def logits(self, hidden0: Tensor, mask: Tensor) -> Tensor:
        """hidden0 (B, T, d), mask (B, T) -> (B, G)."""
        out: Tensor = self.classify(plain_norm(mean_pool(hidden0, mask)))
        return out

    def draw(self, g: Graph) -> str:
        mean = draw_plain_norm(g, draw_mean(g, "hidden0"), self.hidden)
        weight = g.constant("classify.weight", np.ascontiguousarray(numpy_of(self.classify.weight).T))
        return g.op("Add", g.op("MatMul", mean, weight), g.constant("classify.bias", numpy_of(self.classify.bias)))
