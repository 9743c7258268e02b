"""Local routing consistency: how far a fixed group of experts could serve a window of consecutive tokens.

Over every window of m tokens of a text (stride 1) and every expert, let a be how many tokens of the window choose the expert,
N(a) how often that count occurs. Holding the experts with a >= t for the whole window covers `sum a N(a)` of the choices and
implies `m sum N(a)`; SRP(m), the segment routing best performance, is the best F1 of the two over t. One t serves everything that
is summed into N: texts, experts, sites. SRP(1) is 1, and m = 16 is the usual headline.

A random router does not score 0, because the best t fits each short window: `null` is what choices with the same mean rate but
without any locality would score. Windows never cross from one text to the next, and shared experts are no part of it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import UsageError
from edgeml.metrics import FEWEST_EXAMPLES, RESAMPLES, Interval

__all__ = ["chosen_mask", "null", "srp", "srp_interval", "window_counts"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def chosen_mask(ids: Ints, experts: int) -> NDArray[np.bool_]:
    """Choices (tokens, k), -1 for none, as a mask (tokens, experts)."""
    mask = np.zeros((len(ids), experts + 1), bool)
    mask[np.arange(len(ids))[:, None], ids] = True  # -1 falls on the last column
    return mask[:, :experts]


def window_counts(mask: NDArray[np.bool_], m: int) -> Ints:
    """N(0) .. N(m) of one text's mask (tokens, columns): how many (window, column) pairs hold that many choices. (m + 1,)."""
    if m < 1:
        raise UsageError(f"a window has at least one token, not {m}")
    if len(mask) < m:
        return np.zeros(m + 1, np.int64)
    sums = np.zeros((len(mask) + 1, mask.shape[1]), np.int64)
    np.cumsum(mask, axis=0, out=sums[1:])
    return np.bincount((sums[m:] - sums[:-m]).ravel(), minlength=m + 1)


def srp(counts: Ints | Floats) -> tuple[float, float] | None:
    """SRP and the chosen group's mean size in units of the active experts, of N(0) .. N(m); None where nothing was chosen."""
    value, best = _best(np.asarray(counts, np.float64)[None])
    if math.isnan(value[0]):
        return None
    m, kept = len(counts) - 1, np.asarray(counts, np.float64)
    return float(value[0]), float(m * kept[best[0] :].sum() / (np.arange(m + 1) * kept).sum())


def srp_interval(counts: Ints, seed: int, resamples: int = RESAMPLES) -> Interval | None:
    """SRP of texts together, their counts (texts, m + 1), with the basic bootstrap's 95 % interval over texts that have a window.

    None where nothing was chosen; without an interval below 30 texts.
    """
    used = counts[counts.sum(1) > 0]
    whole = srp(used.sum(0))
    if whole is None:
        return None
    if len(used) < FEWEST_EXAMPLES:
        return Interval(whole[0], None, None, len(used))
    drawn = np.random.default_rng(seed).multinomial(len(used), np.full(len(used), 1 / len(used)), resamples)
    values, _ = _best(drawn.astype(np.float64) @ used)
    low, high = np.percentile(values[~np.isnan(values)], [2.5, 97.5])
    return Interval(whole[0], float(2 * whole[0] - high), float(2 * whole[0] - low), len(used))


def null(m: int, rate: float) -> float | None:
    """SRP(m) of independent choices, each expert with probability `rate` (active over all experts); None for a rate of 0."""
    if not 0 <= rate <= 1:
        raise UsageError(f"a rate of choices is from 0 to 1, not {rate:g}")
    ways = np.array([float(math.comb(m, a)) if m <= 512 else math.nan for a in range(m + 1)])
    found = srp(ways * rate ** np.arange(m + 1) * (1 - rate) ** np.arange(m, -1, -1))
    return None if found is None else found[0]


def _best(counts: Floats) -> tuple[Floats, Ints]:
    """Best F1 over thresholds t >= 1 and that t, of each row of counts (rows, m + 1); NaN for a row without choices."""
    weighted = counts * np.arange(counts.shape[1])
    matches, held = (part[:, ::-1].cumsum(1)[:, ::-1] for part in (weighted, counts))
    total = weighted.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = 2 * matches / ((counts.shape[1] - 1) * held + total)
    f1 = np.where(total > 0, f1, np.nan)
    best: Ints = f1[:, 1:].argmax(1) + 1  # t = 0 is choosing everything; t = 1 does no worse with fewer
    return f1[np.arange(len(f1)), best], best
