"""How much each group may cost: the tolerance schedule, the order of the groups, and the widths that are allowed.

The schedule is that of PAGCP (Ye et al. 2023, arXiv 2303.11923, section on the sequential greedy): with L groups, group number i
may raise any task's loss by the factor 1 + delta_0 lambda^i, and lambda solves

    prod_{i=0}^{L-1} (1 + delta_0 lambda^i) = bound .

Where lambda <= 1 the groups go by falling cost, else by rising cost: the costly ones get the larger tolerance either way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgeml.errors import UsageError

__all__ = ["next_width", "order", "tolerances", "widths"]


def tolerances(bound: float, groups: int, delta0: float | None = None) -> list[float]:
    """delta_0 lambda^i for each group, with product of (1 + delta) equal to `bound` (a loss ratio >= 1).

    Without `delta0`, lambda is 1: every group gets bound^(1/L) - 1. Raises `UsageError` for a bound below 1 and a delta0 that no
    lambda can bring to the bound.
    """
    if not bound >= 1 or math.isinf(bound):
        raise UsageError(f"the bound is a loss ratio of at least 1, such as 1.10 for ten percent more loss, not {bound}")
    if groups == 0:
        return []
    if delta0 is None or bound == 1:
        return [bound ** (1 / groups) - 1] * groups
    if not 0 < delta0 <= bound - 1:
        raise UsageError(f"delta0 is the first group's tolerance: above 0 and at most the bound less 1 ({bound - 1:.4g}), not {delta0}")
    if groups == 1:
        return [bound - 1]

    def excess(ratio: float) -> float:
        return sum(math.log1p(delta0 * ratio**i) for i in range(groups)) - math.log(bound)

    low, high = 0.0, 1.0
    while excess(high) < 0:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return [delta0 * low**i for i in range(groups)]


def order(savings: Mapping[str, float], schedule: list[float]) -> list[str]:
    """The groups' names in the order in which they are cut; `savings` is the cost that a trial cut of each one removes."""
    falling = len(schedule) < 2 or schedule[-1] <= schedule[0]
    return sorted(savings, key=lambda name: (-savings[name] if falling else savings[name], name))


def widths(channels: int, align: int) -> list[int]:
    """Smaller channel counts that are allowed, widest first: multiples of `align`, so never below it."""
    return list(range((channels - 1) // align * align, 0, -align))


def next_width(channels: int, align: int) -> int:
    """One cut further: about an eighth of the channels fewer, a multiple of `align`; 0 where no width is left."""
    return next((width for width in widths(channels, align) if width <= channels * 7 / 8), 0) or min(widths(channels, align), default=0)
