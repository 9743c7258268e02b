"""The steps of an export. A pass says what it needs, does one thing, and says what then holds.

`split` is the only data a pass can see: it is handed a `View` of that split and nothing else, so what calibrates (train), what
accepts (validation) and what is reported (test) cannot mix. A broken limit raises `QualityRefused` with the figures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgeml.data import Row, TaskData
from edgeml.errors import QualityRefused, UsageError
from edgeml.metrics import retention
from edgeml_export.evidence import agreement, evaluate
from edgeml_export.model import Model
from edgeml_export.quantize import QuantizePlan
from edgeml_export.reference import Reference

__all__ = ["PASSES", "Agree", "Bar", "Job", "Pass", "Quantize", "Sets", "Usage", "Verify", "View"]

#: Shows progress: called with a label and a length, gives a function that takes how much more is done.
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

DEAD = 0.002  # of a site's usage: an expert that no task uses more than this is reported


@dataclass(frozen=True)
class View:
    """One split of the model's tasks below `root`."""

    root: Path
    tasks: Sequence[TaskData]
    split: str

    def rows(self, number: int, limit: int | None = None) -> list[Row]:
        """A task's rows, or the first `limit`."""
        return self.tasks[number].rows(self.split, limit)


@dataclass
class Job:
    """What passes work on. `bundle` is the written candidate, in `folder`, which only this export uses."""

    model: Model
    folder: Path
    bar: Bar
    show: bool = False
    plan: QuantizePlan = field(default_factory=QuantizePlan)
    usage: dict[str, list[list[float]]] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    bundle: Path | None = None
    _scores: dict[tuple[str, int | None], dict[str, float]] = field(default_factory=dict)

    def written(self) -> Path:
        """The candidate's path; passes that ask for it require the fact `bundle`."""
        if self.bundle is None:
            raise UsageError("this pass measures the written bundle, which is not there yet")
        return self.bundle

    def reference_scores(self, view: View, limit: int | None = None) -> dict[str, float]:
        """Each task's score of the torch module on a split, measured once."""
        key = (view.split, limit)
        if key not in self._scores:
            reference, rows = Reference(self.model), [view.rows(number, limit) for number in range(len(view.tasks))]
            with self.bar(f"torch on {view.split}", sum(map(len, rows))) as tick:
                self._scores[key] = {task.name: reference.score(task.name, rows[n], tick) for n, task in enumerate(view.tasks)}
        return self._scores[key]


class Pass(ABC):
    """One step; its fields are its parameters in the recipe."""

    kind: ClassVar[str]
    split: ClassVar[str | None] = None
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def apply(self, job: Job, view: View | None) -> None:
        """Do it. `view` is the split that the pass declares, None where it declares none."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Choose how weights are stored."""

    kind = "quantize"
    ensures = frozenset({"plan"})

    experts: str = "int4"
    shared: str = "int4"
    dense: str = "int8"
    embeddings: str = "int8"
    scales: str = "best"

    def apply(self, job: Job, view: View | None) -> None:
        job.plan = QuantizePlan(self.experts, self.shared, self.dense, self.embeddings, self.scales)


@dataclass(frozen=True)
class Usage(Pass):
    """Record which experts each task uses, on the first `rows` training rows; sentence vectors take some of every task's."""

    kind = "usage"
    split = "train"
    ensures = frozenset({"usage"})

    rows: int = 200

    def apply(self, job: Job, view: View | None) -> None:
        assert view is not None
        reference = Reference(job.model)
        rows = [view.rows(number, self.rows) for number in range(len(view.tasks))]
        few = max(self.rows // max(len(rows), 1), 1)
        mixed = [Row(row.text) for part in rows for row in part[:few]]
        with job.bar("recording usage", sum(map(len, rows)) + len(mixed)) as tick:
            for number, task in enumerate(view.tasks):
                job.usage[task.name] = reference.usage(task.name, rows[number], task.pair, tick)
            if job.model.embedding is not None:
                job.usage[job.model.embedding] = reference.usage(job.model.embedding, mixed, False, tick)
        most = np.array(list(job.usage.values())).max(0)
        job.evidence["dead_experts"] = int((most < DEAD).sum())


@dataclass(frozen=True)
class Agree(Pass):
    """Compare the bundle's choices with the torch module's on `rows` training rows of each task."""

    kind = "agree"
    split = "train"
    requires = frozenset({"bundle"})
    ensures = frozenset({"agreement"})

    rows: int = 8
    min_router_agreement: float = 0.0

    def apply(self, job: Job, view: View | None) -> None:
        assert view is not None
        rows = {task.name: view.rows(number, self.rows) for number, task in enumerate(view.tasks)}
        with job.bar("comparing routers", sum(map(len, rows.values()))) as tick:
            share = agreement(job.model, job.written(), rows, job.folder, tick)
        job.evidence["router_agreement"] = round(share, 6)
        if share < self.min_router_agreement:
            raise _refused([f"routers agree on {share:.1%} of their choices, at least {self.min_router_agreement:.1%} is asked"])


@dataclass(frozen=True)
class Sets(Pass):
    """Keep `share` of each site's experts, chosen by a task's usage, and see what is retained on validation."""

    kind = "sets"
    split = "validation"
    requires = frozenset({"bundle", "usage"})
    ensures = frozenset({"sets"})

    share: float = 0.5
    min_retention: float = 0.0
    rows: int = 0

    def apply(self, job: Job, view: View | None) -> None:
        assert view is not None
        limit = self.rows or None
        reference = job.reference_scores(view, limit)
        found = evaluate(job.written(), view, limit, job.show, experts_kept=self.share)
        names = list(found)
        scores, chances = ([found[name][key] for name in names] for key in ("score", "chance"))
        (kept,), _ = retention([[reference[name] for name in names], scores], chances)
        job.evidence["kept"] = {"share": self.share, "retention": kept, "split": view.split}
        if kept is not None and kept < self.min_retention:
            raise _refused([f"with {self.share:.0%} of the experts {kept:.1%} is retained, at least {self.min_retention:.1%} is asked"])


@dataclass(frozen=True)
class Verify(Pass):
    """Compare the written bundle with the torch module on validation: differences in points, of the mean and of each larger task."""

    kind = "verify"
    split = "validation"
    requires = frozenset({"bundle"})
    ensures = frozenset({"verified"})

    max_mean_drop: float = 0.5
    max_task_drop: float = 2.0
    min_rows: int = 500
    rows: int = 0

    def apply(self, job: Job, view: View | None) -> None:
        assert view is not None
        limit = self.rows or None
        reference, found = job.reference_scores(view, limit), evaluate(job.written(), view, limit, job.show)
        mean = sum(reference[name] - task["score"] for name, task in found.items()) / len(found)
        job.evidence["acceptance"] = {"split": view.split, "mean_drop_points": round(100 * mean, 4)}
        self.check(reference, found)

    def check(self, reference: Mapping[str, float], found: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise `QualityRefused` where scores `found` fall too far below the reference's."""
        drops = {name: 100 * (reference[name] - task["score"]) for name, task in found.items()}
        mean = sum(drops.values()) / len(drops)
        broken = [f"the mean score falls by {mean:.2f} points (limit {self.max_mean_drop:g})"] if mean > self.max_mean_drop else []
        for name, drop in drops.items():
            if found[name]["n"] >= self.min_rows and drop > self.max_task_drop:
                broken.append(f"task '{name}' falls by {drop:.2f} points (limit {self.max_task_drop:g})")
        if broken:
            raise _refused(broken)


def _refused(broken: Sequence[str]) -> QualityRefused:
    return QualityRefused(f"the bundle is refused and nothing was written: {'; '.join(broken)}")


#: Kind in the recipe -> pass.
PASSES: Mapping[str, type[Pass]] = {kind.kind: kind for kind in (Quantize, Usage, Agree, Sets, Verify)}
