"""DSI, GG and CDTR: what specialising and compressing a model does to domains it was not made for.

The formulas are edgeml's own; no standard has them, so wherever they are printed that is said. Input is a table of scores in [0, 1],
higher is better: `scores[0]` is the reference (uncompressed, all experts), every further row a variant, every column a domain. For
`dsi` and `cdtr` row i + 1 is the variant that was specialised for domain i. Retention corrected for chance is

    A[v, j] = max(0, S[v, j] - chance_j) / max(0.01, S[0, j] - chance_j)         1: as good as the reference, 0: chance

A domain whose reference is less than 0.01 above chance can tell nothing: it is left out, row and column, and listed. What is
undefined is None, never 0. Everything here is arithmetic on one table; intervals are the business of `domains`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeml.errors import DataError, UsageError

__all__ = ["EPSILON", "OURS", "Dsi", "Gap", "Transfer", "cdtr", "corrected", "dsi", "dsi_route", "forgetting", "gg", "near_chance"]

EPSILON = 0.01
SHUFFLES = 200
#: The most choices whose labels NumPy can shuffle; the correction is far below a millionth there.
MOST_CHOICES = 10**9 - 1
OURS = "DSI, GG, CDTR and forgetting are edgeml's own formulas (docs/metrics.md), not a standard's"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Dsi:
    """Domain specialisation: `value` the mean over the variants, `most` the largest, `each` by domain; None where undefined."""

    value: float | None
    most: float | None
    each: tuple[float | None, ...]
    excluded: tuple[int, ...]


@dataclass(frozen=True)
class Gap:
    """Generalisation gap in score points of 1: `value` is GG, `raw` the textbook gap (mean seen less mean unseen), not to be gated on."""

    value: float | None
    raw: float | None
    excluded: tuple[int, ...]


@dataclass(frozen=True)
class Transfer:
    """Cross-domain transfer: `value` is CDTR, `ratios[i][j]` T of domain i's set on domain j, `above_one` the pairs with T > 1."""

    value: float | None
    ratios: tuple[tuple[float | None, ...], ...]
    above_one: tuple[tuple[int, int], ...]
    excluded: tuple[int, ...]


def near_chance(scores: ArrayLike, chance: ArrayLike) -> tuple[int, ...]:
    """The domains to leave out: their reference is less than 0.01 above chance. `scores` (1 + V, D), `chance` (D,)."""
    table, floor = _table(scores), _row(chance, "chance", scores)
    return tuple(int(column) for column in np.flatnonzero(~(table[0] - floor >= EPSILON)))


def corrected(scores: ArrayLike, chance: ArrayLike) -> Floats:
    """A[v, j] of every row, the reference's included. `scores` (1 + V, D), `chance` (D,)."""
    table, floor = _table(scores), _row(chance, "chance", scores)
    found: Floats = np.maximum(0, table - floor) / np.maximum(EPSILON, table[0] - floor)
    return found


def dsi(scores: ArrayLike, chance: ArrayLike, excluded: Collection[int] | None = None) -> Dsi:
    """Domain specialisation index of D variants, each in [-1, 1]: 0 equally good everywhere, 1 works only at home.

        DSI_i = (A[i, i] - o_i) / (A[i, i] + o_i),    o_i the mean of A[i, j] over the other domains; 0 where both are 0

    `scores` (1 + D, D), `chance` (D,). `excluded`: columns to leave out, by default `near_chance`. None where fewer than two remain.
    """
    out = tuple(near_chance(scores, chance) if excluded is None else sorted(excluded))
    kept = corrected(_square(scores), chance)[1:]
    columns = [column for column in range(kept.shape[1]) if column not in out]
    each: list[float | None] = [None] * kept.shape[1]
    if len(columns) > 1:
        for own in columns:
            home = float(kept[own, own])
            away = float(np.mean([kept[own, other] for other in columns if other != own]))
            each[own] = (home - away) / (home + away) if home + away else 0.0
    found = [value for value in each if value is not None]
    return Dsi(float(np.mean(found)) if found else None, max(found, default=None), tuple(each), out)


def gg(scores: ArrayLike, variant: int, seen: Collection[int], unseen: Collection[int], excluded: Collection[int] = ()) -> Gap:
    """Generalisation gap of row `variant` in [-2, 2]: how much more it loses on domains that calibration did not see.

        GG     = mean over unseen of (S[0, j] - S[v, j]) - mean over seen of (S[0, j] - S[v, j])
        GG_raw = mean over seen of S[v, j] - mean over unseen of S[v, j]

    `scores` (1 + V, D); `seen`, `unseen`: columns. None where either has none left after `excluded`.
    """
    table = _table(scores)
    if not 0 < variant < len(table):
        raise UsageError(f"variant must be a row from 1 to {len(table) - 1}, not {variant}")
    if set(seen) & set(unseen) or not all(0 <= column < table.shape[1] for column in (*seen, *unseen)):
        raise UsageError(f"seen and unseen must be different columns from 0 to {table.shape[1] - 1}")
    out = tuple(sorted(set(excluded)))
    home, away = ([column for column in part if column not in out] for part in (seen, unseen))
    if not home or not away:
        return Gap(None, None, out)
    dropped = table[0] - table[variant]
    value = float(np.mean(dropped[away]) - np.mean(dropped[home]))
    return Gap(value, float(np.mean(table[variant, home]) - np.mean(table[variant, away])), out)


def cdtr(scores: ArrayLike, baseline: ArrayLike, excluded: Collection[int] = ()) -> Transfer:
    """Cross-domain transfer ratio, at most 1 up to noise: 1 another domain's set is as good as the right one, below 0 it interferes.

        T[i, j] = (S[i, j] - b_j) / (S[j, j] - b_j)    where S[j, j] - b_j >= 0.01
        CDTR    = sum of (S[i, j] - b_j) / sum of (S[j, j] - b_j)    over the same pairs i != j

    `scores` (1 + D, D); `baseline` (D,) without any specialised expert. None where no pair is defined.
    """
    table, floor = _square(scores)[1:], _row(baseline, "baseline", scores)
    out = tuple(sorted(set(excluded)))
    columns = [column for column in range(len(floor)) if column not in out]
    ratios: list[list[float | None]] = [[None] * len(floor) for _ in floor]
    above, gained, possible = [], 0.0, 0.0
    for j in columns:
        own = float(table[j, j] - floor[j])
        if own < EPSILON:
            continue
        for i in columns:
            ratio = float(table[i, j] - floor[j]) / own
            ratios[i][j] = ratio
            if i != j:
                gained, possible = gained + float(table[i, j] - floor[j]), possible + own
                above += [(i, j)] if ratio > 1 else []
    return Transfer(gained / possible if possible else None, tuple(map(tuple, ratios)), tuple(sorted(above)), out)


def forgetting(
    scores: ArrayLike, chance: ArrayLike, variant: int, unseen: Collection[int], excluded: Collection[int] | None = None
) -> float | None:
    """Mean of 1 - A[variant, j] over the domains that the variant was not calibrated on; below 0 where it gained. None without any."""
    out = near_chance(scores, chance) if excluded is None else excluded
    columns = [column for column in unseen if column not in out]
    return float(np.mean(1 - corrected(scores, chance)[variant, columns])) if columns else None


def dsi_route(counts: ArrayLike, seed: int = 0, shuffles: int = SHUFFLES) -> float | None:
    """How much of a text's domain its experts tell, in [0, 1], without any label of a task: I(J; E) / H(J), domains equally weighted.

    `counts` (D, E): how often tokens of domain j chose expert e. Plug-in entropies; since few choices seem to tell more than they
    do, the mean over `shuffles` of the choices' domains is subtracted, and what is below 0 is 0. Domains without choices are
    left out; None where fewer than two remain.
    """
    found = np.asarray(counts)
    if found.ndim != 2 or found.dtype.kind not in "iuf" or not np.isfinite(found).all() or (found < 0).any():
        raise DataError("counts must be a table (domains, experts) of numbers that are not negative")
    table = np.rint(found).astype(np.int64)
    table = table[table.sum(1) > 0]
    if len(table) < 2:
        return None
    if table.sum() > MOST_CHOICES:
        raise UsageError(f"at most {MOST_CHOICES} choices can be shuffled, not {table.sum()}; count fewer texts")
    rng = np.random.default_rng(seed)
    chance = [_told(_shuffled(table, rng)) for _ in range(shuffles)]
    return max(0.0, _told(table) - float(np.mean(chance))) if chance else _told(table)


def _told(counts: NDArray[np.int64]) -> float:
    """I(J; E) / H(J), from the share of each expert in each domain."""
    shares = counts / counts.sum(1, keepdims=True)
    overall = shares.mean(0)
    there = shares > 0
    logs = np.log(np.divide(shares, overall, out=np.ones_like(shares), where=there))
    return float((shares * logs).sum() / len(counts) / np.log(len(counts)))


def _shuffled(counts: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """The same choices dealt to the domains at random, to each as many as it had."""
    left, dealt = counts.sum(0), []
    for amount in counts.sum(1):
        dealt.append(rng.multivariate_hypergeometric(left, int(amount), method="marginals"))
        left = left - dealt[-1]
    return np.stack(dealt)


def _table(scores: ArrayLike) -> Floats:
    table = np.asarray(scores, np.float64)
    if table.ndim != 2 or len(table) < 2 or not table.shape[1]:
        raise UsageError(f"scores must be a table (1 + variants, domains) with the reference first, not of shape {table.shape}")
    if not np.isfinite(table).all():
        row, column = (int(place[0]) for place in np.nonzero(~np.isfinite(table)))
        raise DataError(f"the score of row {row} on domain {column} is not a number")
    return table


def _square(scores: ArrayLike) -> Floats:
    table = _table(scores)
    if len(table) != 1 + table.shape[1]:
        raise UsageError(f"scores must have the reference and a row for each of the {table.shape[1]} domains, not {len(table)} rows")
    return table


def _row(values: ArrayLike, name: str, scores: ArrayLike) -> Floats:
    row, wanted = np.asarray(values, np.float64), np.shape(scores)[-1:]
    if row.shape != wanted or not np.isfinite(row).all():
        raise UsageError(f"{name} must be one number a domain, of shape {wanted}, not {row.shape}")
    return row
