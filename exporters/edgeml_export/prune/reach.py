"""Cuts until wanted shares of the network are gone, cheapest first; what `target_macs` and `target_parameters` do.

A bound says how much loss may be spent, a target says how much must go. Under a target the greedy search of search.py turns
round: of all groups' next cuts the one with the lowest price is made,

    price = mean over tasks of log(L_t(cut) / L_t)  /  way saved ,

each measured, as there, on the network pruned so far. The way that is left is the sum of what MACs and parameters still exceed
their targets by, as shares of the reference, so that nothing is paid for what is not wanted; with a cost of the caller's, it is
that cost. A price is measured again only when its group comes up first (prices seldom fall as others are cut); so a cut takes
about two measurements, not one per group.

Equal tolerances, raised pass by pass until the target is met, were tried before: they spend as much on a group that holds little
cost as on one that holds much, which on the network of benchmarks/pruning paid seven times as much loss per MAC in the last layers
as in the first, and took eight times as long.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from edgeml_export.prune.measure import Losses, macs_and_parameters, ratio
from edgeml_export.prune.schedule import next_width
from edgeml_export.prune.search import Cut, Maker, Search, Step

__all__ = ["Goal", "reach"]

LAST = 1e300  # the price of a cut by which a measured cost does not fall (it may be noise, or channels that a vector unit pads)


@dataclass(frozen=True)
class Goal:
    """Shares to remove of the network that had `macs` and `parameters`; 0 where there is none."""

    macs: float
    parameters: float
    share_macs: float
    share_parameters: float = 0.0
    own_cost: bool = False  # prices are per cost of the caller's, which need not be in proportion to either

    def way(self, macs: float, parameters: float) -> float:
        """How far there is to go, in shares of the reference; 0 where both targets are met."""
        left = macs / self.macs - (1 - self.share_macs), parameters / self.parameters - (1 - self.share_parameters)
        return max(left[0], 0.0) + max(left[1], 0.0)


@dataclass(order=True)
class _Offer:
    """A group's next cut: what it costs, and when that was measured (the number of cuts made before)."""

    price: float
    name: str
    made: int = field(default=-1, compare=False)
    keep: Sequence[int] = field(default=(), compare=False)


def reach(search: Search, key: str, start: Step, names: Sequence[str], goal: Goal) -> tuple[Step, list[Cut]]:
    """Cut until the way to `goal` is 0 or no group has a width left. `key` names the round in the journal."""
    descent = _Descent(search, key, start, goal)
    offers = [_Offer(-math.inf, name) for name in names]
    heapq.heapify(offers)
    while offers and descent.left > 0:
        offer = heapq.heappop(offers)
        if offer.made < len(descent.cuts):
            offer = descent.priced(offer.name)
            if math.isinf(offer.price):
                continue  # no width left, or none that the losses survive
            if offers and offers[0] < offer:
                heapq.heappush(offers, offer)
                continue
        descent.take(offer)
        heapq.heappush(offers, _Offer(offer.price, offer.name))
    return search.measured(descent.module), descent.cuts


class _Descent:
    """The network on its way down."""

    def __init__(self, search: Search, key: str, start: Step, goal: Goal) -> None:
        self.search, self.key, self.goal = search, key, goal
        self.cuts: list[Cut] = []
        self._arrive(start.module, start.subset)

    def priced(self, name: str) -> _Offer:
        """The group's next cut, measured on the network as it is now; a price of infinity says that there is none."""
        place = f"{self.key}/{len(self.cuts)}/{name}"
        answer = self.search.journal.recorded(place)
        if answer is None:
            answer = self._measured(name)
            self.search.journal.record(place, answer)
        price, keep = answer
        return _Offer(math.inf if price is None else price, name, len(self.cuts), keep)

    def take(self, offer: _Offer) -> None:
        """Make a cut that was priced on this network."""
        if offer.name not in self._tried:
            self._try(Maker(self.search, self.module, offer.name), offer.keep)
        module, losses, channels = self._tried[offer.name]
        growth = max(ratio(losses[task], self.losses[task]) for task in losses)
        before = self.cost
        self._arrive(module, losses)
        self.cuts.append(Cut(offer.name, tuple(offer.keep), channels, growth, before - self.cost))
        self.search.report(self.cuts[-1])

    def _measured(self, name: str) -> tuple[float | None, list[int]]:
        maker = Maker(self.search, self.module, name)
        width = next_width(maker.channels, self.search.plan.align)
        if not width:
            return None, []
        keep = maker.kept(width)
        module, losses, _ = self._try(maker, keep)
        growth = [ratio(losses[task], self.losses[task]) for task in losses]
        way, saved = self.left - self._left(module), self.cost - self.search.cost(module)
        if not way > 0 or not all(map(math.isfinite, growth)):
            return None, []
        if self.goal.own_cost and not saved > 0:
            return LAST, keep
        spent = sum(math.log(max(value, 1e-12)) for value in growth) / len(growth)
        return spent / (saved if self.goal.own_cost else way), keep

    def _try(self, maker: Maker, keep: Sequence[int]) -> tuple[nn.Module, Losses, int]:
        module = maker.build(keep)
        self._tried[maker.name] = module, self.search.calibration.subset_losses(module), maker.channels
        return self._tried[maker.name]

    def _arrive(self, module: nn.Module, losses: Losses) -> None:
        self.module, self.losses, self.cost, self.left = module, losses, self.search.cost(module), self._left(module)
        self._tried: dict[str, tuple[nn.Module, Losses, int]] = {}

    def _left(self, module: nn.Module) -> float:
        return self.goal.way(*macs_and_parameters(module, self.search.example))
