"""One pass over all groups: the sequential greedy search of PAGCP (Ye et al. 2023, arXiv 2303.11923), with its bound kept.

Joint saliency: the loss that a pruned set costs is, along any order of the groups, exactly the sum of what each group costs on
the network pruned so far. So each group is measured there and not on the original. With base b_t of task t and tolerance delta,
a group is cut as far as every task allows,

    L_t(cut) <= (1 + delta) b_t   for all t,     then   b_t <- max(b_t, L_t(cut)) ,

and since the product of all (1 + delta) is the pass's bound, no task ends above bound * L_t. How far is found by doubling and then
halving over the widths that are allowed, on the calibration subset; the whole calibration split then confirms it, or the group is
narrowed less until it does. Each width is tried with the channels that matter least gone and the layers behind made up for it
(compensate.py), that is, as it would be kept.

Filter: of the cuts made, the share with the least loss per cost removed stays. The others are given back, which changes what the
kept ones were measured on, so the pass is rebuilt from its start and measured again; while a task is beyond the bound, the worst
cut left is given back too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from edgeml_export.prune.compensate import Compensation
from edgeml_export.prune.groups import cut, group_of
from edgeml_export.prune.journal import Journal
from edgeml_export.prune.measure import Calibration, Cost, Losses, ratio
from edgeml_export.prune.schedule import order, tolerances, widths

__all__ = ["Cut", "Maker", "Plan", "Search", "Step"]

TRIAL = 0.3  # of a group's channels: the cut that tells how much cost it holds


@dataclass(frozen=True)
class Plan:
    """The settings of a pass. `keep` is the share of cuts that the filter leaves; `compensate` False only removes channels."""

    align: int = 8
    delta0: float | None = None
    keep: float = 1.0
    compensate: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """A network on the way, with what was measured of it."""

    module: nn.Module
    losses: Losses  # whole calibration split
    subset: Losses
    cost: float


@dataclass(frozen=True)
class Cut:
    """One group narrowed: which of its channels stay, what every task's loss became, the cost before and after."""

    group: str
    keep: tuple[int, ...]
    channels: int
    growth: float  # largest loss ratio over tasks, against the network before this cut
    saved: float
    given_back: bool = field(default=False)

    @property
    def price(self) -> float:
        """Loss (logarithm of the ratio) per cost removed: what the filter sorts by."""
        return math.log(max(self.growth, 1e-12)) / self.saved if self.saved > 0 else math.inf


class Search:
    """Passes over the groups of one network. `report` is called with each cut as it is decided."""

    def __init__(
        self, example: Tensor, calibration: Calibration, cost: Cost, plan: Plan, journal: Journal, report: Callable[[Cut], None]
    ) -> None:
        self.example, self.calibration, self.cost, self.plan = example, calibration, cost, plan
        self.journal, self.report = journal, report

    def measured(self, module: nn.Module) -> Step:
        """All that later decisions compare with."""
        return Step(module, *self.calibration.losses(module), self.cost(module))

    def sweep(self, key: str, start: Step, names: Sequence[str], limits: Losses) -> tuple[Step, list[Cut]]:
        """Cut every group once, so that no task's loss passes `limits`.

        `key` names the pass in the journal. Gives the network and the cuts in the order they were made.
        """
        bound = min(ratio(limits[task], start.losses[task]) for task in limits)
        if bound <= 1:
            return start, []
        savings = {name: start.cost - self.cost(self._trial(start.module, name)) for name in names}
        savings = {name: saved for name, saved in savings.items() if saved > 0}
        schedule = tolerances(bound, len(savings), self.plan.delta0 and min(self.plan.delta0, bound - 1))
        step, base, subset = start, start.losses, start.subset
        cuts: list[Cut] = []
        spent = 0
        for name in order(savings, schedule):
            delta = schedule[spent]
            found = self._narrow(f"{key}/{name}", step, name, _raised(base, delta), _raised(subset, delta))
            if found is None:
                continue
            spent += 1
            step, made = found
            base, subset = _larger(base, step.losses), _larger(subset, step.subset)
            cuts.append(made)
            self.report(made)
        return self._filter(start, step, cuts, limits)

    def _narrow(self, key: str, step: Step, name: str, limits: Losses, subset: Losses) -> tuple[Step, Cut] | None:
        """The group cut as far as the limits allow; None where not even the smallest cut is within them."""
        maker = Maker(self, step.module, name)
        keep: list[int] | None = self.journal.recorded(key)
        if keep is None:
            keep = self._furthest(maker, limits, subset)
            self.journal.record(key, keep)
        if not keep:
            return None
        after = maker.measured(keep)
        growth = max(ratio(after.losses[task], step.losses[task]) for task in limits)
        return after, Cut(name, tuple(keep), maker.channels, growth, step.cost - after.cost)

    def _furthest(self, maker: Maker, limits: Losses, subset: Losses) -> list[int]:
        """The channels left at the narrowest allowed width that holds on the subset and then on the whole split; none is uncut."""

        def keep(number: int) -> list[int]:
            return maker.kept(maker.widths[number - 1])

        def holds(number: int) -> bool:
            return self.calibration.within(maker.build(keep(number)), subset)

        reached = furthest(holds, len(maker.widths))
        while reached and not _within(maker.measured(keep(reached)).losses, limits):
            reached -= 1
        return keep(reached) if reached else []

    def _filter(self, start: Step, step: Step, cuts: list[Cut], limits: Losses) -> tuple[Step, list[Cut]]:
        """Give back the cuts that cost most loss per cost removed, then any more that the bound on the rebuilt network needs."""
        worst = sorted(cuts, key=lambda made: made.price)
        kept = {made.group for made in worst[: math.ceil(self.plan.keep * len(worst))]}
        while cuts and (len(kept) < len(cuts) or not _within(step.losses, limits)):
            step = self._rebuilt(start, [made for made in cuts if made.group in kept])
            if _within(step.losses, limits):
                break
            kept.discard(next(made.group for made in reversed(worst) if made.group in kept))
        return step, [made if made.group in kept else replace(made, given_back=True) for made in cuts]

    def _rebuilt(self, start: Step, cuts: Sequence[Cut]) -> Step:
        step = start
        for made in cuts:
            step = replace(step, module=Maker(self, step.module, made.group).build(made.keep))
        return self.measured(step.module) if cuts else start

    def _trial(self, module: nn.Module, name: str) -> nn.Module:
        channels = group_of(module, self.example, name).channels
        return cut(module, self.example, name, range(max(1, int(TRIAL * channels)))) if channels > 1 else module


class Maker:
    """Builds one group's candidates: the channels ranked once, each width on demand."""

    def __init__(self, search: Search, module: nn.Module, name: str) -> None:
        self.search, self.module, self.name = search, module, name
        self.group = group_of(module, search.example, name)
        self.channels = self.group.channels
        self.widths = widths(self.channels, search.plan.align)
        self._compensation: Compensation | None = None
        self._ranking: list[int] = []
        self._built: tuple[tuple[int, ...], nn.Module] | None = None
        self._measured: Step | None = None

    @property
    def compensation(self) -> Compensation:
        if self._compensation is None:
            batches = self.search.calibration.subset
            self._compensation = Compensation(self.module, self.group, batches, self.search.plan.seed)
        return self._compensation

    def kept(self, width: int) -> list[int]:
        """The channels that stay at this width."""
        if not self._ranking:
            self._ranking = self.compensation.ranking()
        return sorted(self._ranking[self.channels - width :])

    def build(self, keep: Sequence[int]) -> nn.Module:
        """The network with only `keep` of the group."""
        key = tuple(keep)
        if self._built is None or self._built[0] != key:
            drop = sorted(set(range(self.channels)) - set(keep))
            smaller = cut(self.module, self.search.example, self.name, drop)
            if self.search.plan.compensate:
                self.compensation.apply(smaller, keep)
            self._built, self._measured = (key, smaller), None
        return self._built[1]

    def measured(self, keep: Sequence[int]) -> Step:
        """The same, with its losses and costs."""
        module = self.build(keep)
        if self._measured is None:
            self._measured = self.search.measured(module)
        return self._measured


def furthest(holds: Callable[[int], bool], last: int) -> int:
    """The largest n in 0..last with holds(n), where holding is monotone and n = 0 holds: by doubling, then by halving."""
    low, high = 0, 1
    while high <= last and holds(high):
        low, high = high, 2 * high
    high = min(high, last + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _within(losses: Losses, limits: Losses) -> bool:
    return all(losses[task] <= limits[task] for task in limits)


def _raised(base: Losses, delta: float) -> Losses:
    return {task: value * (1 + delta) for task, value in base.items()}


def _larger(one: Losses, other: Losses) -> Losses:
    return {task: max(one[task], other[task]) for task in one}
