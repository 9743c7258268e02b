"""The pruner's entry: rounds of search and, where wanted, fine-tuning, under a bound on every task's loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from edgeml.errors import QualityRefused, UsageError
from edgeml_export.prune.distil import FineTune
from edgeml_export.prune.find import find_groups
from edgeml_export.prune.groups import Group, Refusal, group_of
from edgeml_export.prune.journal import Journal, fingerprint
from edgeml_export.prune.measure import Batch, Calibration, Cost, Losses, Objective, cost_function, lay_out, macs_and_parameters
from edgeml_export.prune.reach import Goal, reach
from edgeml_export.prune.result import GroupResult, PruneResult
from edgeml_export.prune.schedule import tolerances
from edgeml_export.prune.search import Cut, Plan, Search, Step

__all__ = ["Progress", "prune"]


@dataclass(frozen=True)
class Progress:
    """One decided cut: the round, the pass within it, the cut, and each task's loss ratio and the cost share left so far."""

    round: int
    sweep: int
    cut: Cut


def prune(
    module: nn.Module,
    example: Tensor,
    losses: Mapping[str, Objective],
    calibration: Sequence[Batch],
    *,
    bound: float = 1.10,
    delta0: float | None = None,
    align: int = 8,
    cost: Literal["macs"] | Cost = "macs",
    protect: Collection[str] = (),
    only: Collection[str] | None = None,
    target_macs: float | None = None,
    target_parameters: float | None = None,
    target_cost: float | None = None,
    rounds: int = 1,
    keep: float = 1.0,
    subset: float = 0.5,
    compensate: bool = True,
    fine_tune: FineTune | None = None,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
) -> PruneResult:
    """Remove output channels of `module` while no task's calibration loss passes `bound` times the unpruned one.

    The procedure is PAGCP (Ye et al. 2023, arXiv 2303.11923) with the bound kept to the end; see search.py for what a pass does
    and schedule.py for the tolerances. Nothing of `module` is changed.

    module: any network whose first argument is a float tensor (batch, ...); its outputs may be nested.
    example: one input (1, ...), for tracing and for counting MACs.
    losses: per task, a function of (outputs, batch) that gives the mean loss over the batch, at least 0.
    calibration: batches (input, labels ...); must be neither the data that accepts the result nor that which reports it.
    bound: the largest loss ratio of any task, at least 1. Round r of R may use bound^(r/R).
    delta0: the first group's tolerance; None gives all groups the same.
    align: channel counts stay multiples of it and never fall below it.
    cost: what is to fall: "macs", or a function of a network, such as its measured seconds on the target.
    protect, only: module names; a container stands for what it holds. Groups that end in an output are never cut.
    target_macs, target_parameters, target_cost: in place of `bound`, shares to remove (0 to 1): the cheapest cuts are made until
        all that are given are reached (reach.py); `delta0` and `keep` do not matter then.
    rounds: how often search, then `fine_tune`, are run.
    keep: the share of a pass's cuts that the filter by loss per cost leaves.
    subset: the share of the calibration batches on which cuts are searched; the whole set confirms what a bound allows.
    compensate: least squares for the layers behind a cut; False only removes channels.
    fine_tune: trains a network in place (`Distillation`, or any function of the network and the round).
    checkpoint: a file for decisions; the same call with the same file goes on where it was broken off.

    Raises `UsageError` for settings and networks that cannot be pruned, `DataError` for calibration data or losses that cannot
    serve, `QualityRefused` where a target cannot be reached.
    """
    targets = target_macs, target_parameters, target_cost
    wanted = any(target is not None for target in targets)
    settings = {
        "bound": None if wanted else bound, "targets": targets, "delta0": delta0, "align": align, "rounds": rounds,
        "keep": keep, "subset": subset, "compensate": compensate, "seed": seed, "protect": sorted(protect),
        "only": only and sorted(only), "tasks": list(losses), "batches": len(calibration), "tuned": fine_tune is not None,
        "cost": "macs" if cost == "macs" else "own",
    }  # fmt: skip
    _check(bound, delta0, align, targets, rounds, keep, subset)
    data = Calibration(calibration, losses, subset)
    work = copy.deepcopy(module).eval()
    found, refused = find_groups(work, example, protect, only)
    journal = Journal(
        Path(checkpoint) if checkpoint is not None else None, fingerprint(module, [batch[0] for batch in calibration], settings)
    )
    lay_out(work, example, data)
    plan = Plan(align, delta0, keep, compensate, seed)
    run = _Run(work, example, data, cost_function(cost, example), plan, journal, found, refused, progress)
    for number in range(1, rounds + 1):
        share = number / rounds
        if wanted:
            run.towards(number, [(target or 0.0) * share for target in targets], own_cost=cost != "macs")
        else:
            run.within(number, bound**share)
        if fine_tune is not None:
            run.tune(number, fine_tune, None if wanted else bound**share)
    return run.result(module, None if wanted else bound)


@dataclass
class _Run:
    """One call of `prune` on its way."""

    module: nn.Module
    example: Tensor
    data: Calibration
    cost: Cost
    plan: Plan
    journal: Journal
    found: list[Group]
    refused: list[Refusal]
    progress: Callable[[Progress], None] | None = None
    decisions: list[tuple[int, Cut]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.at = (0, 0)
        self.reference: Losses = self.data.reference(self.module)
        self.search = Search(self.example, self.data, self.cost, self.plan, self.journal, self._report)
        self.step: Step = self.search.measured(self.module)
        self.start, self.size = self.step, macs_and_parameters(self.module, self.example)

    def within(self, round_: int, bound: float) -> None:
        """A round under a bound on the reference's losses."""
        self.at = round_, 1
        limits = {task: bound * base for task, base in self.reference.items()}
        self.step, cuts = self.search.sweep(f"{round_}/1", self.step, [group.name for group in self.found], limits)
        self.decisions += [(round_, made) for made in cuts]

    def towards(self, round_: int, shares: Sequence[float], own_cost: bool) -> None:
        """A round that makes the cheapest cuts until these shares of MACs, parameters and cost are gone."""
        self.at = round_, 1
        macs, parameters, cost = shares
        goal = Goal((*self.size, self.start.cost), (macs, parameters, cost), own_cost)
        self.step, cuts, left = reach(self.search, f"{round_}", self.step, [group.name for group in self.found], goal)
        self.decisions += [(round_, made) for made in cuts]
        if left > 0:
            after = (*macs_and_parameters(self.step.module, self.example), self.step.cost)
            kinds = zip(("MACs", "parameters", "cost"), after, goal.reference, shares, strict=True)
            short = [f"{share:.0%} of the {kind} ({1 - now / before:.0%} is all)" for kind, now, before, share in kinds if share]
            raise QualityRefused(
                f"no cut removes {' and '.join(short)} that {len(self.found)} groups of at least {self.plan.align} channels hold; "
                "lower the target or align, or protect less"
            )

    def tune(self, round_: int, fine_tune: FineTune, bound: float | None) -> None:
        """Fine-tune; weights that break the bound are not taken."""
        tuned = copy.deepcopy(self.step.module)
        if not self.journal.weights(round_, tuned):
            fine_tune(tuned, round_)
            self.journal.keep_weights(round_, tuned)
        after = self.search.measured(tuned.eval())
        if bound is None or all(after.losses[task] <= bound * base for task, base in self.reference.items()):
            self.step = after

    def result(self, module: nn.Module, bound: float | None) -> PruneResult:
        """The report on where this run stands."""
        before, after = self.size, macs_and_parameters(self.step.module, self.example)
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        final = copy.deepcopy(self.step.module)
        widths = [GroupResult(g.name, g.channels, group_of(final, self.example, g.name).channels) for g in self.found]
        for name, parameter in final.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return PruneResult(
            module=final.to(memory_format=torch.contiguous_format).eval(),  # type: ignore[call-overload]
            bound=bound,
            groups=widths,
            refused=self.refused,
            losses_before=self.reference,
            losses_after=self.step.losses,
            macs=(before[0], after[0]),
            parameters=(before[1], after[1]),
            cost=(self.start.cost, self.step.cost),
            decisions=self.decisions,
        )

    def _report(self, made: Cut) -> None:
        if self.progress is not None:
            self.progress(Progress(*self.at, made))


def _check(
    bound: float, delta0: float | None, align: int, targets: tuple[float | None, ...], rounds: int, keep: float, subset: float
) -> None:
    """Refuse settings before any work."""
    if targets == (None, None, None):
        tolerances(bound, 1 if delta0 is None else 2, delta0)
    for name, target in zip(("target_macs", "target_parameters", "target_cost"), targets, strict=True):
        if target is not None and not 0 < target < 1:
            raise UsageError(f"{name} is the share to remove, between 0 and 1, not {target}")
    if align < 1 or rounds < 1:
        raise UsageError(f"align and rounds are at least 1, not {align} and {rounds}")
    if not 0 < keep <= 1 or not 0 < subset <= 1:
        raise UsageError(f"keep and subset are shares above 0 and at most 1, not {keep} and {subset}")
