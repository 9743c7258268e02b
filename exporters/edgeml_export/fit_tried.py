"""What an export to a device has tried: which candidate was chosen and why, or why none was and what would fit.

The document of it stands in the bundle's evidence below `fit`, so that the device can be told how to run the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeml.errors import QualityRefused, UsageError
from edgeml.sizes import format_bytes
from edgeml_export.fit import Estimate, Sketch, Target, estimate, others

__all__ = ["Fitting", "NothingFits", "Tried", "duration"]

MANY = 4  # of other devices that a refusal names
LAST = 3  # of the files, the smallest, that are predicted for other devices


@dataclass
class Tried:
    """A candidate, what was predicted of it, and what became of it. `lost` in points of the mean score on validation, None unmeasured.

    `how` says how it is run, `covered` the share of the usage that a masked set serves; `refused` the limit of the recipe it breaks.
    """

    name: str
    how: str
    sketch: Sketch = field(repr=False)
    found: Estimate
    missed: tuple[str, ...] = ()
    lost: float | None = None
    covered: float | None = None
    retention: float | None = None
    refused: str | None = None
    chosen: bool = False

    @property
    def fits(self) -> bool:
        """Whether it keeps to the limits of the device, by what is predicted."""
        return not self.missed

    @property
    def title(self) -> str:
        """Name and way of running."""
        return f"{self.name}, {self.how}" if self.how else self.name

    @property
    def memory(self) -> str | None:
        """The memory option that gives its budget; None where nothing is paged."""
        budget = self.found.budget
        return None if not budget.pageable_pages else "100%" if budget.complete else f"{-(-budget.total_bytes // 1024)}KiB"

    def as_json(self) -> dict[str, Any]:
        """For the evidence and --json."""
        found = self.found
        paged = self.memory is not None
        return {
            "name": self.name,
            "title": self.title,
            "residency": found.residency if paged else None,
            "memory": self.memory,
            "memory_budget_bytes": found.budget.total_bytes if paged else None,
            "pages_held": found.budget.pages if paged else None,
            "usage_covered": self.covered,
            "bytes": self.sketch.bytes,
            "task": found.task,
            "latency_s": found.latency.as_json(),
            "peak_memory_bytes": found.memory.as_json(),
            "lost_points": self.lost,
            "retention": self.retention,
            "missed": list(self.missed),
            "refused": self.refused,
            "chosen": self.chosen,
        }


class NothingFits(QualityRefused):
    """No candidate keeps to the limits; `document` says what was tried and what would fit."""

    def __init__(self, sentence: str, document: dict[str, Any]) -> None:
        super().__init__(sentence)
        self.document = document


@dataclass
class Fitting:
    """The candidates of one export, in the order they were tried."""

    target: Target
    tried: list[Tried] = field(default_factory=list)

    def add(self, name: str, how: str, sketch: Sketch, found: Estimate) -> Tried:
        """Note a candidate and judge it by the limits of the device."""
        self.tried.append(Tried(name, how, sketch, found, found.missed(self.target)))
        return self.tried[-1]

    def document(self) -> dict[str, Any]:
        """What stands in the evidence; of the chosen one also how to run it, and that in a sentence."""
        target, chosen = self.target, next((each for each in self.tried if each.chosen), None)
        document = {
            "device": target.profile.name,
            "title": target.profile.title,
            "threads": target.threads,
            "tokens": target.tokens,
            "max_latency_s": target.max_latency_s,
            "max_memory_bytes": target.max_memory_bytes,
            "usable_bytes": int(target.profile.need("memory.usable_bytes").value),
            "confident": target.confident,
            "tried": [each.as_json() for each in self.tried],
        }
        if chosen is None:
            return document
        option = f" with --memory {chosen.memory} --residency {chosen.found.residency} --threads {target.threads}" if chosen.memory else ""
        slow, large = chosen.found.latency, chosen.found.memory
        ends = f"{duration(slow.low)} to {duration(slow.high)}"
        said = f"run it{option}" if option else "everything is held"
        figures = f"predicted {duration(slow.value)} ({ends}) and {format_bytes(int(large.value))} at its peak"
        if chosen.found.residency == "masked" and chosen.lost is not None:
            figures += f"; masked like that it loses {chosen.lost:.2f} points on validation"
            figures += "" if chosen.retention is None else f" and retains {chosen.retention:.1%}"
        run = {key: chosen.as_json()[key] for key in ("name", "memory", "memory_budget_bytes", "residency")}
        return document | {"run": run, "said": f"{target.profile.title}: {said}, {figures}"}

    def nothing(self, more: Sequence[Tried] = (), hint: str = "") -> NothingFits:
        """The refusal. `more`: candidates that were not tried under these limits but might do under others."""
        # A way to store it that the recipe refused with exact answers is refused whatever its budget: it would fit nowhere.
        broken = {each.name for each in self.tried if each.refused is not None and each.found.residency == "exact"}
        target, open_ones = self.target, [each for each in self.tried if each.refused is None and each.name not in broken]
        more = [each for each in more if each.name not in broken]
        parts = []
        refused = next((each for each in self.tried if each.refused is not None and each.fits), None)
        if refused is not None:
            parts.append(f"{refused.title} would, but {refused.refused}")
        if open_ones:
            nearest = min(open_ones, key=self._excess)
            parts.append(f"{'of the rest ' if parts else ''}{nearest.title} is the nearest, with {self._missed(nearest)}")
        would = self._would([*open_ones, *more])
        says = [f"--max-latency {duration(would['max_latency_s'])}"] if would["max_latency_s"] else []
        says += [f"--max-memory {_size(would['max_memory_bytes'])}"] if would["max_memory_bytes"] else []
        both = " and " if would["together"] else " or "
        ways = [f"with {both.join(says)}"] if says else []
        ways += [f"on {', '.join(would['devices'][:MANY])}"] if would["devices"] else []
        parts.append(f"by the predictions it would fit {' or '.join(ways)}" if ways else "more memory or time alone would not help")
        sentence = f"nothing was written, since nothing fits {target.profile.title}: {'; '.join([*parts, *([hint] if hint else [])])}"
        return NothingFits(sentence, {**self.document(), "would_fit": would})

    def _excess(self, one: Tried) -> float:
        latency = self.target.figure(one.found.latency) / self.target.max_latency_s if self.target.max_latency_s else 0.0
        return max(latency, self.target.figure(one.found.memory) / self.target.memory_bytes)

    def _missed(self, one: Tried) -> str:
        """Which limits, and by how much."""
        target, words = self.target, []
        if "latency" in one.missed and target.max_latency_s is not None:
            slow = target.figure(one.found.latency)
            low = " (only the low end keeps to it)" if one.found.latency.low <= target.max_latency_s else ""
            words.append(
                f"{duration(slow)} for task {one.found.task}, {duration(slow - target.max_latency_s)} above "
                f"--max-latency {duration(target.max_latency_s)}{low}"
            )
        if "memory" in one.missed:
            large, limit = target.figure(one.found.memory), target.memory_bytes
            asked = target.max_memory_bytes is not None and target.max_memory_bytes <= limit
            what = f"--max-memory {format_bytes(limit)}" if asked else f"the {format_bytes(limit)} that are usable there"
            words.append(f"{format_bytes(int(large))} of memory, {format_bytes(math.ceil(large - limit))} above {what}")
        return " and ".join(words)

    def _would(self, candidates: Sequence[Tried]) -> dict[str, Any]:
        """The least limits, one changed or else both, and the devices that come with edgeml, under which one of these would fit."""
        target = self.target
        usable = target.profile.need("memory.usable_bytes").value
        slow = [(target.figure(one.found.latency), target.figure(one.found.memory)) for one in candidates]
        slow = [(latency, memory) for latency, memory in slow if memory <= usable]
        limit = math.inf if target.max_latency_s is None else target.max_latency_s
        latency = min((latency for latency, memory in slow if memory <= target.memory_bytes), default=None)
        memory = min((memory for latency, memory in slow if latency <= limit), default=None)
        together = latency is None and memory is None and bool(slow)
        if together:
            latency, memory = min(slow)
        return {
            "max_latency_s": None if latency is None or latency <= limit else _upwards(latency),
            "max_memory_bytes": None if memory is None or memory <= target.memory_bytes else _round(memory),
            "together": together,
            "devices": self._elsewhere(candidates),
        }

    def _elsewhere(self, candidates: Sequence[Tried]) -> list[str]:
        """Other devices on which one of the last files would keep to the same limits, all of it held in memory."""
        last = list({id(one.sketch): one for one in candidates}.values())[-LAST:]
        found = []
        for profile in others(self.target.profile):
            there = self.target.on(profile)
            try:
                fits = any(not estimate(one.sketch, there).missed(there) for one in reversed(last))
            except UsageError:  # a profile that lacks a figure says nothing
                continue
            found += [profile.name] if fits else []
        return found


def duration(seconds: float) -> str:
    """As the option takes it, with three figures: `143ms`, `1.25s`."""
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
    unit, scale = next((each for each in units if seconds >= 0.9995 * each[1]), units[-1])
    value = seconds / scale
    return f"{value:.3g}{unit}" if value < 999.5 else f"{value:.0f}{unit}"


def _upwards(seconds: float) -> float:
    """The next time of two figures: a limit that is easy to write."""
    step = 10.0 ** (math.floor(math.log10(seconds)) - 1)
    return math.ceil(seconds / step + 1e-6) * step


def _round(size: float) -> int:
    """The next size of whole MiB, or KiB where that would be rough."""
    unit = 1 << (20 if size >= 16 << 20 else 10)
    return math.ceil(size / unit) * unit


def _size(size: int) -> str:
    """As the option takes it."""
    return f"{size >> 20}MiB" if size % (1 << 20) == 0 else f"{size >> 10}KiB"
