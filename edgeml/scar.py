"""Bucketed sparse attention, slow and obvious: what the kernels behind `native.scar_attention` must equal.

Two masks, both (N, N) with queries as rows. `allowed` is ours: a query meets the global tokens, the tokens of its cluster, and,
where both are sure, the tokens of its domain. `published` is the one of the SCAR paper's code (arXiv 2503.22698): a query meets
the tokens of its cluster and all those whose one-bit confidence flag equals its own, padding included. That mask always admits at
least half of all pairs: of n tokens of which m are sure, m^2 + (n - m)^2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["allowed", "attention", "density", "published"]

Mask = NDArray[np.bool_]


def allowed(
    cluster: NDArray[np.integer[Any]],
    domain: NDArray[np.integer[Any]],
    confidence: NDArray[np.floating[Any]],
    threshold: float,
    *,
    pad: Mask | None = None,
    global_tokens: int = 0,
    causal: bool = False,
) -> Mask:
    """Which query meets which key: all arguments (N,), the result (N, N). NaN in confidence counts as not sure.

    Every token meets itself; padded ones (`pad`) neither meet nor are met.
    """
    numbers, sure = np.arange(len(cluster)), np.asarray(confidence) > threshold
    first = numbers < global_tokens
    mask = numbers[:, None] == numbers
    mask |= first[:, None] | first
    mask |= cluster[:, None] == cluster
    mask |= (domain[:, None] == domain) & sure[:, None] & sure
    if pad is not None:
        mask &= ~pad[:, None] & ~pad
    if causal:
        mask &= numbers <= numbers[:, None]
    return np.asarray(mask, np.bool_)


def published(cluster: NDArray[np.integer[Any]], confidence: NDArray[np.floating[Any]], threshold: float) -> Mask:
    """The paper's mask: one cluster, or one flag."""
    flag = np.asarray(confidence) > threshold
    return np.asarray((cluster[:, None] == cluster) | (flag[:, None] == flag))


def density(mask: Mask) -> float:
    """Share of all pairs that meet; 0 without tokens."""
    return float(mask.mean()) if mask.size else 0.0


def attention(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: Mask) -> NDArray[np.float64]:
    """Masked softmax attention of q, k, v (..., N, size) in double precision; a query that meets no key gets 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.where(mask, q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]), -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray(weights @ v / np.where(total == 0, 1.0, total), np.float64)
