"""Bits, budget and residency of a mixture for a device.

Order. Exact answers first, by bits: everything in f32, then 8 bits, then 4, experts before what runs for every token, since each
token passes few experts and all dense layers. A file that is too large for the memory is paged, which loses nothing but time. Only
when no exact candidate fits are experts masked away, the set that serves most of the tasks' usage first. The passes of the recipe that
need no bundle run once; those that do run on each candidate that fits by prediction, and a limit they find broken leads to the next.

A masked candidate is measured under its mask and held to the limit of the recipe's `sets` pass, or else to that of `verify`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from edgeml.errors import QualityRefused, UsageError
from edgeml.metrics import retention
from edgeml.predict import MEMORY_STRUCTURE
from edgeml.resident import best_pages, covered
from edgeml_export.evidence import evaluate
from edgeml_export.fit import TEXTS, Estimate, Sketch, Target, estimate
from edgeml_export.fit_tried import Fitting, Tried
from edgeml_export.passes import Job, Sets, Verify, View
from edgeml_export.quantize import QuantizePlan
from edgeml_export.recipe import Recipe

__all__ = ["fit_mixture", "plans"]

WIDTHS = ("f32", "int8", "int4")


def plans(base: QuantizePlan, experts: str | None = None, dense: str | None = None) -> list[QuantizePlan]:
    """The ways to store weights, what loses least first; a part that the command line decides has one way."""
    chosen = [(e, d) for e in ([experts] if experts else WIDTHS) for d in ([dense] if dense else WIDTHS)]
    chosen.sort(key=lambda each: (each[1] == "int4", each[0] == "int4", each[1] == "int8", each[0] == "int8"))
    return [base.override(*each) for each in chosen]


def fit_mixture(
    job: Job,
    recipe: Recipe,
    views: Mapping[str, View],
    held: tuple[str | None, str | None],
    write: Callable[[], None],
    target: Target,
) -> Fitting:
    """Leave the job with the candidate that is chosen, written and checked. `held`: experts and dense of the command line.

    `write` writes the job's bundle by its plan. Raises `NothingFits`.
    """
    target.check(TEXTS)
    target.check_reading()
    if target.tokens is not None and target.tokens > job.model.max_tokens:
        raise UsageError(f"--tokens {target.tokens}: the model reads at most {job.model.max_tokens}")
    for step in recipe.passes:
        if "bundle" not in step.requires:
            step.apply(job, None if step.split is None else views[step.split])
    search = _Search(job, recipe, views, write, Fitting(target))
    for plan in plans(job.plan, *held):
        if search.exact(plan):
            return search.fitting
    for place, slots in search.masks():
        if search.masked(place, slots):
            return search.fitting
    usable = any(len(rows) for rows in job.usage.values())
    hint = "" if usable else "experts could be masked if their usage were recorded: name the data with --data"
    raise search.fitting.nothing(list(search.smaller()), hint)


class _Search:
    """The candidates of one job."""

    def __init__(self, job: Job, recipe: Recipe, views: Mapping[str, View], write: Callable[[], None], fitting: Fitting) -> None:
        self.job, self.recipe, self.views, self.write, self.fitting = job, recipe, views, write, fitting
        self.target = fitting.target
        self.whole: list[tuple[QuantizePlan, Sketch, Estimate]] = []  # with everything in memory

    def exact(self, plan: QuantizePlan) -> bool:
        """Whether this plan does, with everything in memory or as much of it as there is room for."""
        self._write(plan)
        sketch = Sketch.read(self.job.written())
        found = self._estimate(sketch, "100%", "exact", plan)
        self.whole.append((plan, sketch, found))
        tried = self.fitting.add(_name(plan), "all in memory", sketch, found)
        if "memory" in tried.missed:
            slots = max(_room(found, self.target), 1)
            found = self._estimate(sketch, _budget(found, slots), "exact", plan)
            tried = self.fitting.add(_name(plan), f"paged, {slots} of {found.budget.pageable_pages} in memory", sketch, found)
        return tried.fits and self._accepted(tried)

    def masks(self) -> Iterator[tuple[int, int]]:
        """Where something is left out: the plan's place and the pages there is room for, what serves most of the usage first."""
        ranked = []
        for place, (_, sketch, found) in enumerate(self.whole):
            slots = _room(found, self.target)
            served = _served(sketch, slots) if 0 < slots < found.budget.pageable_pages else None
            if served is not None:
                ranked.append((-round(served, 3), place, slots))
        yield from ((place, slots) for _, place, slots in sorted(ranked))

    def masked(self, place: int, slots: int) -> bool:
        """Whether this plan does with the experts that fit, and no others."""
        plan, sketch, whole = self.whole[place]
        found = self._estimate(sketch, _budget(whole, slots), "masked", plan)
        tried = self.fitting.add(_name(plan), f"masked to {slots} of {whole.budget.pageable_pages}", sketch, found)
        tried.covered = _served(sketch, slots)
        if not tried.fits:
            return False
        self._write(plan)
        return self._accepted(tried)

    def smaller(self) -> Iterator[Tried]:
        """Of each plan the smallest budget with which exact answers keep to the limit on latency."""
        for plan, sketch, whole in self.whole:
            if not whole.budget.pageable_pages or "latency" in whole.missed(self.target):
                continue
            low, high = 0, whole.budget.pageable_pages  # too few, enough
            while high - low > 1:
                slots = (low + high) // 2
                found = estimate(sketch, self.target, _budget(whole, slots), only=whole.task)
                low, high = (slots, high) if "latency" in found.missed(self.target) else (low, slots)
            found = self._estimate(sketch, _budget(whole, high), "exact", plan)
            yield Tried(_name(plan), "paged", sketch, found)

    def _write(self, plan: QuantizePlan) -> None:
        self.job.plan = plan
        with self.job.bar(f"writing {_name(plan)}", 1) as tick:
            self.write()
            tick(1)

    def _estimate(self, sketch: Sketch, memory: str | int, residency: str, plan: QuantizePlan) -> Estimate:
        with self.job.bar(f"predicting {_name(plan)}", len(sketch.manifest.tasks)) as tick:
            return estimate(sketch, self.target, memory, residency, tick=tick)

    def _accepted(self, tried: Tried) -> bool:
        """Whether the written candidate keeps to the recipe's limits. Otherwise what it measured is forgotten."""
        job, before = self.job, dict(self.job.evidence)
        try:
            for step in self.recipe.passes:
                if "bundle" in step.requires:
                    step.apply(job, None if step.split is None else self.views[step.split])
            tried.lost = job.evidence.get("acceptance", {}).get("mean_drop_points")
            if tried.found.residency == "masked" and "validation" in self.views:
                self._check_mask(tried)
        except QualityRefused as refused:
            tried.refused = str(refused).partition("nothing was written: ")[2] or str(refused)
            tried.lost = job.evidence.get("acceptance", {}).get("mean_drop_points") if tried.lost is None else tried.lost
            job.evidence = before
            return False
        tried.chosen = True
        return True

    def _check_mask(self, tried: Tried) -> None:
        """Measure a masked candidate as it will run. Raises `QualityRefused`."""
        sets = next((step for step in self.recipe.passes if isinstance(step, Sets)), None)
        verify = next((step for step in self.recipe.passes if isinstance(step, Verify)), None)
        view, limited_by = self.views["validation"], sets or verify
        limit = (limited_by.rows or None) if limited_by is not None else None
        reference = self.job.reference_scores(view, limit)
        budget = tried.found.budget
        share = 100 * (budget.pages + 0.01) / budget.pageable_pages  # of the pages: bytes would depend on this machine's threads
        found = evaluate(self.job.written(), view, limit, self.job.show, memory=f"{share:.6f}%", residency="masked")
        names = list(found)
        scores, chances = ([found[name][key] for name in names] for key in ("score", "chance"))
        (kept,), _ = retention([[reference[name] for name in names], scores], chances)
        tried.retention, tried.lost = kept, 100 * sum(reference[name] - found[name]["score"] for name in names) / len(names)
        if sets is not None and kept is not None and kept < sets.min_retention:
            raise QualityRefused(f"masked it retains {kept:.1%}, and at least {sets.min_retention:.1%} is asked")
        if sets is None and verify is not None:
            verify.check(reference, found)


def _name(plan: QuantizePlan) -> str:
    return f"experts {plan.experts}, dense {plan.dense}"


def _room(whole: Estimate, target: Target) -> int:
    """How many pages there is room for, from the prediction with all of them: memory is linear in slots. Below 1: not even for one."""
    budget, excess = whole.budget, target.figure(whole.memory) - target.memory_bytes
    each = budget.slot_bytes * (1 + MEMORY_STRUCTURE if target.confident else 1)
    return budget.pageable_pages - max(math.ceil(excess / each), 0) if each else 0


def _budget(whole: Estimate, slots: int) -> int:
    """The bytes of a budget with so many slots."""
    return whole.budget.total_bytes - (whole.budget.slots - slots) * whole.budget.slot_bytes


def _served(sketch: Sketch, slots: int) -> float | None:
    """The share of the usage that the best set of so many pages serves, mean over tasks; None where masking cannot be done."""
    manifest, shares = sketch.manifest, []
    for usage in manifest.usage.values():
        cost = {ref.page: 1 for site in manifest.sites for ref in site.experts}
        pages = set(best_pages(manifest.sites, usage, cost, slots))
        if any(not site.shared and not pages & {ref.page for ref in site.experts} for site in manifest.sites):
            return None
        shares.append(covered(manifest.sites, usage, pages))
    return sum(shares) / len(shares) if shares else None
