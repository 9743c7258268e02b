"""Performance-aware global channel pruning of multi-task networks: every task's loss within a bound, cost as low as that allows.

    result = prune(module, example, {"digit": loss, ...}, calibration, bound=1.10)
    result.module, result.ratios, result.macs_removed

Rooms: groups (what goes together, and the cut), find (which groups can be cut, probed), schedule (tolerances, order, widths),
measure (losses and cost), compensate (which channels matter, and least squares behind a cut), search (a pass under a bound), reach
(the cheapest cuts towards a target), distil (fine-tuning), journal (resuming), pruner (the entry).
"""

from __future__ import annotations

from edgeml.errors import MissingExtra

try:
    import torch_pruning as _torch_pruning  # noqa: F401
except ImportError as error:
    raise MissingExtra("pruning", "export") from error

from edgeml_export.prune.distil import Distillation, FineTune
from edgeml_export.prune.find import find_groups
from edgeml_export.prune.groups import Refusal
from edgeml_export.prune.measure import Batch, Cost, Objective, macs_and_parameters
from edgeml_export.prune.pruner import Progress, prune
from edgeml_export.prune.result import GroupResult, PruneResult
from edgeml_export.prune.search import Cut

__all__ = [
    "Batch",
    "Cost",
    "Cut",
    "Distillation",
    "FineTune",
    "GroupResult",
    "Objective",
    "Progress",
    "PruneResult",
    "Refusal",
    "find_groups",
    "macs_and_parameters",
    "prune",
]
