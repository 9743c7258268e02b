"""What a session remembers to choose its resident sets by: the recorded usage, what this device showed, and how fast it is.

The decisions are `resident`'s, the file is `sidecar`'s; here they meet requests. Under "masked" the sidecar is read and nothing is
written: a masked request shows only what its mask let it choose. Under "hybrid", and under "exact" where a state folder is named,
unmasked requests run the trunk that tells its choices and are learned from, and what was learned is saved when the session closes.

Stand-ins. Where a deadline leaves no time to read a task's own set, another domain's takes its place, if it is in memory or can be read
in time and `resident.Transfer` says that it helps: of several the most helpful. What hybrid residency can read in time of the own set
competes by the share of the set's usage that it covers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.bundle import Bundle
from edgeml.errors import BudgetError, EdgemlError, UsageError
from edgeml.manifest import Manifest, Task, TaskStages
from edgeml.manifest_reader import is_number
from edgeml.native import Context, Request
from edgeml.preprocess import TextBatch
from edgeml.resident import (
    GENERAL,
    SEGMENT_TOKENS,
    Drift,
    Forecast,
    Transfer,
    Usage,
    Watched,
    all_pages,
    best_pages,
    blend,
    covered,
    cut_off,
    distance,
    expected_bytes,
    general_usage,
    key_of,
    mask_for_deadline,
    mean_usage,
)
from edgeml.router import ResidentSet, mask_of, share_of, usage_of
from edgeml.sidecar import Learned, load, place_of, save
from edgeml.store import STATED_RATE, Budget
from edgeml.trace import choices, tracing_stage

__all__ = ["Pick", "Residents"]

#: The resident set of a batch, None where nothing is to be masked.
Pick = Callable[[TextBatch], ResidentSet | None]
#: Recorded retention is taken to hold for a set that covers as much of the usage as the recorded one, less this.
COVERED_ALIKE = 0.01


class Residents:
    """Resident sets of one open bundle. Safe for several threads. `notes` are sentences a user should see."""

    def __init__(
        self, bundle: Bundle, manifest: Manifest, context: Context, budget: Budget, residency: str, state: str | None = None
    ) -> None:
        self._bundle, self._manifest, self._context, self._budget, self._residency = bundle, manifest, context, budget, residency
        self.notes: list[str] = []
        self._where = str(bundle.path)
        self._patterns: Mapping[str, Usage] = manifest.usage
        self._page_bytes = {page: bundle.pages[page].length for page in all_pages(manifest.sites)}
        self._slot_bytes = dict.fromkeys(self._page_bytes, 1)  # in memory each costs a slot, whatever its length
        self._known, self._fresh = Learned(), Learned()
        self._drift: dict[str, Drift] = {}
        self._segments: dict[str, Watched] = {}
        self._sets: dict[str, tuple[ResidentSet, float]] = {}
        self._warm: set[str] = set()
        self._lock = threading.RLock()
        self._place: Path | None = None
        self._sidecar = place_of(bundle.path, bundle.id, state)
        self._open(state)

    @property
    def learning(self) -> bool:
        """Whether unmasked requests are learned from."""
        return self._place is not None and self._residency != "masked"

    def resident_set(self, task: str) -> ResidentSet:
        """The pages a masked request of this task may use under the budget. Raises `BudgetError` if a site is left bare.

        It is chosen anew when the task's pattern changed, or twice as much was seen of it.
        """
        with self._lock:
            tokens = self._tokens(task)
            kept = self._sets.get(task)
            if kept is None or tokens > 2 * max(kept[1], SEGMENT_TOKENS):
                self._sets[task] = kept = (self._choose(task), tokens)
            return kept[0]

    def usage(self, task: str) -> Usage:
        """What the task is taken to use: its pattern, with what this device showed blended in. Raises `UsageError` for neither."""
        with self._lock:
            current = self._follow(task).current
            prior = self._patterns.get(current) or general_usage(self._manifest, self._patterns)
            seen = self._known.tasks.get(task)
            if prior is None and seen is None:
                return usage_of(self._manifest, task)
            if prior is None:
                prior = [[1 / len(site.experts)] * len(site.experts) for site in self._manifest.sites]
            return prior if seen is None else blend(prior, seen.watched.usage, seen.watched.tokens)

    def pick(self, task: str, resident: ResidentSet | None, deadline_s: float | None) -> Pick:
        """How the batches of a call that starts now are masked. `resident`: the set the call came with."""
        if deadline_s is not None and not (isinstance(deadline_s, int | float) and deadline_s > 0):
            raise UsageError(f"a deadline must be a positive number of seconds, not {deadline_s!r:.40}")
        own = self.resident_set(task) if resident is None and self._residency == "masked" else resident
        if resident is not None or self._residency == "exact" or deadline_s is None:
            return lambda _: own
        ends = time.perf_counter() + deadline_s
        return lambda batch: self._in_time(task, own, int(batch.mask.sum()), ends - time.perf_counter())

    def domain_set(self, domain: str) -> ResidentSet:
        """A domain's resident set under the budget, by the mean usage of its tasks. Raises `UsageError` where none has a usage."""
        tasks = [
            task.name for task in self._manifest.tasks if task.domain == domain and isinstance(task.stages, TaskStages) and task.labels
        ]
        with self._lock:
            return self._best(mean_usage([self.usage(task) for task in tasks]))

    def stand_ins(self, task: str) -> list[ResidentSet]:
        """The sets that may stand in for the task's own under this budget, the most helpful first."""
        return [resident for resident, _ in self._stand_ins(task)]

    @property
    def transfer(self) -> Transfer | None:
        """What domains' sets make of each other's data, None where that was not measured."""
        return self._known.transfer

    def keep(self, transfer: Transfer) -> Path:
        """Write a transfer matrix to the sidecar, and use it from now on; the sidecar's place. Raises as `sidecar.save`."""
        save(self._sidecar, self._bundle.id, self._manifest, Learned(transfer=transfer))
        self._known.transfer = transfer
        return self._sidecar

    def stages(self, task: Task, stages: TaskStages) -> TaskStages:
        """The stages to run: while learning, the trunk that tells its choices."""
        if not self.learning:
            return stages
        return replace(stages, trunk=tracing_stage(self._manifest, task, self._where))

    def loaded(self, task: str) -> None:
        """A task's graphs are there: from now on its requests tell how long computing takes."""
        self._warm.add(task)

    def hides(self, resident: ResidentSet | None) -> bool:
        """Whether this set forbids anything."""
        return resident is not None and len(resident.pages) < len(self._page_bytes)

    def ran(self, task: str, batch: TextBatch, tensors: Mapping[str, NDArray[Any]], request: Request, seconds: float, masked: bool) -> None:
        """Learn from a batch that has run, in `seconds` with its waits."""
        if not self.learning:
            return
        tokens, waited = int(batch.mask.sum()), request.page_wait_ns / 1e9
        with self._lock:
            for learned in (self._known, self._fresh):
                if request.page_in_bytes:
                    learned.reading.add(request.page_in_bytes, waited)
                if task in self._warm:
                    learned.computing.add(tokens, max(seconds - waited, 0.0))
            self._warm.add(task)
            if not masked and "ids_0" in tensors and tokens:
                self._watch(task, np.concatenate(list(choices(self._manifest, tensors, batch.mask, self._where))))

    def retention(self) -> float | None:
        """What masked answers are expected to retain under this budget, by the bundle's evidence; None where nothing was measured.

        The evidence is of sets with a share of each site by the task's usage: it holds for sets that cover as much of the usage.
        """
        kept = self._manifest.evidence.get("kept")
        if self._residency != "masked" or not isinstance(kept, Mapping) or not self._patterns:
            return None
        share: Any = kept.get("share")
        value: Any = kept.get("retention")
        if isinstance(value, Mapping):
            value = value.get("value")
        if not (is_number(share) and is_number(value) and 0 < share <= 1):
            return None
        try:
            scored = [task.name for task in self._manifest.tasks if task.labels and task.name in self._patterns]
            alike = bool(scored) and all(self._covers_alike(task, float(share)) for task in scored)
        except BudgetError:
            return None
        return float(value) if alike else None

    def close(self) -> None:
        """Save what was learned; where that fails, `notes` says so and nothing else is lost."""
        with self._lock:
            if self._place is None or not self.learning or not (self._fresh.computing.amount or self._fresh.tasks):
                return
            fresh, self._fresh = self._fresh, Learned()
        try:
            save(self._place, self._bundle.id, self._manifest, fresh)
        except EdgemlError as error:
            self.notes.append(f"what was learned is not kept: {error}")

    def _open(self, state: str | None) -> None:
        """Find and read the sidecar. Exact residency without a state folder leaves no trace and looks for none."""
        place = self._sidecar
        named = bool(state or os.environ.get("EDGEML_STATE"))
        if not any(isinstance(task.stages, TaskStages) for task in self._manifest.tasks) or (self._residency == "exact" and not named):
            return
        learned, problem = load(place, self._bundle.id, self._manifest)
        self.notes += [] if problem is None else [problem]
        if learned is None:
            return
        self._known, self._place = learned, place
        if self._residency != "masked":
            try:
                for task in self._manifest.tasks:
                    if isinstance(task.stages, TaskStages):
                        tracing_stage(self._manifest, task, self._where)
            except UsageError as error:
                self._place = None
                self.notes.append(f"nothing is learned from requests: {error}")
        if self.learning and not os.access(place.parent, os.W_OK):
            self.notes.append(f"{place.parent} cannot be written, so what is learned is not kept; name a folder with EDGEML_STATE")

    def _tokens(self, task: str) -> float:
        seen = self._known.tasks.get(task)
        return 0.0 if seen is None else seen.watched.tokens

    def _follow(self, task: str) -> Drift:
        """Which pattern the task follows: at first its own, or the one its key is near to."""
        if task not in self._drift:
            if task in self._patterns:
                current = task
            else:
                seen = self._known.tasks.get(task)
                known = seen is not None and seen.watched.tokens >= SEGMENT_TOKENS
                distances = self._distances(seen.watched.usage) if seen is not None and known else {}
                current = min(distances, key=distances.__getitem__, default=GENERAL)
                if current != GENERAL and distances[current] > self._limit():
                    current = GENERAL
            self._drift[task] = Drift(current)
        return self._drift[task]

    def _distances(self, usage: Usage) -> dict[str, float]:
        key = key_of(usage)
        return {name: distance(key_of(pattern), key) for name, pattern in self._patterns.items()}

    def _limit(self) -> float:
        return cut_off(self._patterns, [value for task in self._known.tasks.values() for value in task.distances])

    def _watch(self, task: str, ids: NDArray[np.int64]) -> None:
        """Count a batch's choices, and judge a segment once it is long enough."""
        for learned in (self._known, self._fresh):
            learned.task(self._manifest, task).watched.add(ids)
        segment = self._segments.setdefault(task, Watched.of(self._manifest.sites))
        segment.add(ids)
        if segment.tokens < SEGMENT_TOKENS:
            return
        del self._segments[task]
        drift, distances = self._follow(task), self._distances(segment.usage)
        if drift.current == task:
            for learned in (self._known, self._fresh):
                learned.task(self._manifest, task).segment(distances[task])
        if drift.segment(distances, self._limit()):
            self._sets.pop(task, None)

    def _choose(self, task: str) -> ResidentSet:
        if not self._budget.complete:
            return self._best(self.usage(task))
        return ResidentSet(tuple(sorted(self._page_bytes)), mask_of(self._manifest, self._page_bytes))

    def _best(self, usage: Usage) -> ResidentSet:
        pages = best_pages(self._manifest.sites, usage, self._slot_bytes, self._budget.pages)
        chosen = ResidentSet(pages, mask_of(self._manifest, set(pages)))
        bare = self._bare(chosen)
        if bare is not None:
            raise BudgetError(
                f"{self._where}: under this budget no expert of site '{bare}' may be used, and it has no shared one; "
                "give more memory or use residency exact"
            )
        return chosen

    def _bare(self, resident: ResidentSet) -> str | None:
        """A site that would have no expert at all, by name."""
        for site, row in zip(self._manifest.sites, resident.mask, strict=True):
            if not site.shared and np.isneginf(row).all():
                return site.name
        return None

    def _stand_ins(self, task: str) -> list[tuple[ResidentSet, float]]:
        """With their T, at most 1: a set is not taken to be better than the own one, whatever noise says."""
        domain = next(each.domain for each in self._manifest.tasks if each.name == task)
        transfer = self._known.transfer
        found = [] if transfer is None or self._budget.complete else transfer.stand_ins(domain)
        sets = [(ResidentSet(pages, mask_of(self._manifest, set(pages)), name), min(ratio, 1.0)) for name, ratio, pages in found]
        return [each for each in sets if len(each[0].pages) <= self._budget.pages and self._bare(each[0]) is None]

    def _in_time(self, task: str, own: ResidentSet | None, tokens: int, left_s: float) -> ResidentSet | None:
        """The set of a batch that has `left_s` seconds left, None where it may use all experts. `own`: what it has to use (masked).

        A mask leaves what is in memory of the task's set, and of the rest what can still be read in time; or a stand-in, where that is
        worth more. Where computing alone is too late, and where a site would be left bare, it leaves the whole set.
        """
        sites, usage = self._manifest.sites, self.usage(task)
        rate = self._known.reading.rate or STATED_RATE
        compute_s = tokens / speed if (speed := self._known.computing.rate) else 0.0
        resident = set(self._context.stats()["resident"])
        cost = {page: 0 if page in resident else length for page, length in self._page_bytes.items()}

        def fits(pages: Collection[int]) -> bool:
            return sum(cost[page] for page in pages) <= (left_s - compute_s) * rate

        def stand_in(worth: float) -> ResidentSet | None:
            return next((each for each, ratio in self._stand_ins(task) if ratio > worth and fits(each.pages)), None)

        if own is not None:
            return own if fits(own.pages) else stand_in(0) or own
        exact_s = expected_bytes(sites, usage, self._page_bytes, resident, tokens) / rate
        if compute_s + exact_s <= left_s:
            return None
        try:
            whole = self.resident_set(task)
        except BudgetError:  # no set fits, but an exact answer does, late as it may be
            return None
        mask = whole
        if left_s > compute_s:
            pages = best_pages(sites, usage, cost, (left_s - compute_s) * rate, set(whole.pages))
            readable = ResidentSet(pages, mask_of(self._manifest, set(pages)))
            mask = whole if self._bare(readable) is not None else readable
        kept = covered(sites, usage, mask.pages) / max(covered(sites, usage, whole.pages), 1e-9) if fits(mask.pages) else 0.0
        mask = stand_in(kept) or mask
        forecast = Forecast(compute_s, exact_s, sum(cost[page] for page in mask.pages) / rate)
        return mask if mask_for_deadline(forecast, left_s) else None

    def _covers_alike(self, task: str, share: float) -> bool:
        sites, usage = self._manifest.sites, self._patterns[task]
        measured: set[int] = set()
        for site, importance in zip(sites, usage, strict=True):
            order = sorted(range(len(site.experts)), key=lambda e: (-importance[e], e))
            measured |= {site.experts[e].page for e in order[: share_of(len(site.experts), share)]}
        return covered(sites, usage, self.resident_set(task).pages) >= covered(sites, usage, measured) - COVERED_ALIKE
