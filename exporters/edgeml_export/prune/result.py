"""What pruning gives: the smaller network, and everything a report says about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from edgeml_export.prune.groups import Refusal
from edgeml_export.prune.measure import Losses, ratio
from edgeml_export.prune.search import Cut

__all__ = ["GroupResult", "PruneResult"]


@dataclass(frozen=True)
class GroupResult:
    """One group's channels before and after."""

    name: str
    before: int
    after: int

    @property
    def removed(self) -> float:
        """Share of channels removed."""
        return 1 - self.after / self.before


@dataclass(frozen=True)
class PruneResult:
    """`module` is physically smaller and in evaluation mode; losses are means over the whole calibration split.

    `decisions` holds every cut in the order it was decided, with its round; `refused` the groups left as they are, with reasons.
    """

    module: nn.Module
    bound: float | None
    groups: list[GroupResult]
    refused: list[Refusal]
    losses_before: Losses
    losses_after: Losses
    macs: tuple[float, float]
    parameters: tuple[float, float]
    cost: tuple[float, float]
    decisions: list[tuple[int, Cut]] = field(repr=False, default_factory=list)

    @property
    def ratios(self) -> dict[str, float]:
        """Each task's loss after over before."""
        return {task: ratio(self.losses_after[task], before) for task, before in self.losses_before.items()}

    @property
    def holds(self) -> bool:
        """Whether every task is within the bound; True where none was set."""
        return self.bound is None or all(value <= self.bound for value in self.ratios.values())

    @property
    def macs_removed(self) -> float:
        """Share of multiply-accumulates removed."""
        return 1 - self.macs[1] / self.macs[0]

    @property
    def parameters_removed(self) -> float:
        """Share of parameters removed."""
        return 1 - self.parameters[1] / self.parameters[0]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, fit for JSON."""
        return {
            "bound": self.bound,
            "holds": self.holds,
            "loss_ratios": self.ratios,
            "losses": {"before": self.losses_before, "after": self.losses_after},
            "macs": {"before": self.macs[0], "after": self.macs[1], "removed": self.macs_removed},
            "parameters": {"before": self.parameters[0], "after": self.parameters[1], "removed": self.parameters_removed},
            "cost": {"before": self.cost[0], "after": self.cost[1]},
            "groups": [asdict(group) | {"removed": group.removed} for group in self.groups],
            "refused": [asdict(refusal) for refusal in self.refused],
            "decisions": [asdict(cut) | {"round": round_} for round_, cut in self.decisions],
        }
