"""Cuts until wanted shares of the network are gone, cheapest first; what `target_macs` and its like do.

A bound says how much loss may be spent, a target says how much must go. Under a target the greedy search of search.py turns
round: of all groups' next cuts the one with the lowest price is made,

    price = mean over tasks of log(L_t(cut) / L_t)  /  way saved ,

each measured, as there, on the network pruned so far. The way that is left is the sum of what MACs and parameters still exceed
their targets by, as shares of the reference, so that nothing is paid for what is not wanted; with a cost of the caller's, what
is saved is that cost. A price is measured again only when its group comes up first (prices seldom fall as others are cut); so a cut takes
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

#: Of a measured cost a cut is credited with at least this part of its share of the MACs: a reading that does not fall may be noise,
#: or channels that a vector unit pads, of which a further cut will be rid.
CREDIT = 0.25


@dataclass(frozen=True)
class Goal:
    """Shares to remove of the reference's MACs, parameters and cost; 0 where there is no target."""

    reference: tuple[float, float, float]
    shares: tuple[float, float, float]
    own_cost: bool = False  # prices are per cost of the caller's, which need not be in proportion to MACs

    def way(self, measured: Sequence[float]) -> float:
        """How far there is to go, in shares of the reference; 0 where all targets are met."""
        each = zip(measured, self.reference, self.shares, strict=True)
        return sum(max(now / before - (1 - share), 0.0) for now, before, share in each if share)


@dataclass(order=True)
class _Offer:
    """A group's next cut: what it costs, and when that was measured (the number of cuts made before)."""

    price: float
    name: str
    made: int = field(default=-1, compare=False)
    keep: Sequence[int] = field(default=(), compare=False)


def reach(search: Search, key: str, start: Step, names: Sequence[str], goal: Goal) -> tuple[Step, list[Cut], float]:
    """Cut until the way to `goal` is 0 or no group has a width left; the way is given too. `key` names the round in the journal."""
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
    return search.measured(descent.module), descent.cuts, descent.left


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
        saved = self._saved(module)
        if not all(map(math.isfinite, growth)) or not saved > 0:
            return None, []
        return sum(math.log(max(value, 1e-12)) for value in growth) / len(growth) / saved, keep

    def _saved(self, module: nn.Module) -> float:
        cost, left, macs = self._size(module)
        if not self.goal.own_cost:
            return self.left - left
        all_macs, _, whole = self.goal.reference
        return max((self.cost - cost) / whole, CREDIT * (self.macs - macs) / all_macs)

    def _try(self, maker: Maker, keep: Sequence[int]) -> tuple[nn.Module, Losses, int]:
        module = maker.build(keep)
        self._tried[maker.name] = module, self.search.calibration.subset_losses(module), maker.channels
        return self._tried[maker.name]

    def _arrive(self, module: nn.Module, losses: Losses) -> None:
        self.module, self.losses, (self.cost, self.left, self.macs) = module, losses, self._size(module)
        self._tried: dict[str, tuple[nn.Module, Losses, int]] = {}

    def _size(self, module: nn.Module) -> tuple[float, float, float]:
        """What the network costs, the way that it leaves, and its MACs."""
        cost, (macs, parameters) = self.search.cost(module), macs_and_parameters(module, self.search.example)
        return cost, self.goal.way((macs, parameters, cost)), macs
