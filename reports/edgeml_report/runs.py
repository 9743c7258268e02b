"""What the records are about: configurations that were timed, variants that were scored, and which belong together.

Readers here are forgiving: a field that is missing or of another type counts as not measured. Whether a line is a record at all is
checked where it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeml_report.text import clean, mib, plural

__all__ = ["Quality", "documents", "figure", "frontier", "items", "labels", "mapping", "qualities", "quality_of", "text", "weights_of"]

Record = Mapping[str, Any]
TASK = 2  # the place of the task among the parts of a name


def mapping(record: object, path: str = "") -> Mapping[str, Any]:
    """The object at a dotted path, empty where there is none."""
    for key in filter(None, path.split(".")):
        record = record.get(key) if isinstance(record, Mapping) else None
    return record if isinstance(record, Mapping) else {}


def figure(record: object, path: str) -> float | None:
    """The number at a dotted path, None where there is none."""
    place, _, key = path.rpartition(".")
    value = mapping(record, place).get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def items(record: object, path: str) -> list[Any]:
    """The list at a dotted path, empty where there is none."""
    place, _, key = path.rpartition(".")
    value = mapping(record, place).get(key)
    return list(value) if isinstance(value, list | tuple) else []


def text(record: object, path: str) -> str | None:
    """The text at a dotted path, None where there is none."""
    place, _, key = path.rpartition(".")
    value = mapping(record, place).get(key)
    return value if isinstance(value, str) and value else None


def documents(records: Sequence[Record], kind: str) -> list[tuple[Record, Mapping[str, Any]]]:
    """The records of one kind with the document they carry; of `bench` that is the record itself."""
    found = [(record, record if kind == "bench" else mapping(record, kind)) for record in records if record.get("kind") == kind]
    return [(record, document) for record, document in found if document]


@dataclass(frozen=True)
class Quality:
    """One scored variant of an evaluation. `bundle_id` and the four after it say which configuration it was.

    `kept`: only some of its experts were allowed, with all of them in memory, so that it is nothing that can be timed or weighed.
    `itself`: it is the reference.
    """

    name: str
    figures: Mapping[str, Any]
    bundle_id: str | None
    variant: str | None
    residency: str
    memory_budget_bytes: float | None
    memory: str | None
    kept: bool = False
    itself: bool = False

    @property
    def retention(self) -> Mapping[str, Any]:
        return mapping(self.figures, "retention")

    def score(self) -> float | None:
        """What its place on a quality axis is: retention, or without a reference the mean score."""
        kept = figure(self.figures, "retention.value")
        return figure(self.figures, "mean") if kept is None else kept


def qualities(records: Sequence[Record]) -> list[Quality]:
    """All scored variants; of those measured twice the last. An evaluation of one bundle alone is its only variant."""
    found: dict[tuple[Any, ...], Quality] = {}
    for record, document in documents(records, "eval"):
        variants = [mapping(one) for one in items(document, "variants")] or [document]
        reference = mapping(document, "reference")
        for figures in variants:
            own = {**record, **figures}
            name = text(own, "name") or text(own, "variant") or text(own, "bundle") or "unnamed"
            residency, kept = text(own, "residency") or "exact", own.get("experts_kept") not in (None, "all")
            place = (text(own, "bundle_id"), text(own, "variant"), residency, figure(own, "memory_budget_bytes"), text(own, "memory"))
            itself = not kept and (*place[:2], residency) == (text(reference, "bundle_id"), text(reference, "variant"), "exact")
            found.pop((name, *place), None)
            found[(name, *place)] = Quality(name, figures, *place, kept, itself)
    return list(found.values())


def quality_of(record: Record, found: Sequence[Quality]) -> Quality | None:
    """The evaluation that speaks of a timed configuration.

    Exact answers do not depend on the budget, so neither does their quality; masked ones depend on how many experts fit.
    """
    residency, memory, budget = record.get("residency"), text(record, "memory"), figure(record, "memory_budget_bytes")
    for one in found:
        same = one.bundle_id is not None and (one.bundle_id, one.variant, one.residency) == (
            record.get("bundle_id"),
            text(record, "variant"),
            residency,
        )
        share = memory is not None and memory.endswith("%") and memory == one.memory
        if same and not one.kept and (residency == "exact" or share or (budget is not None and budget == one.memory_budget_bytes)):
            return one
    return None


def weights_of(record: Record) -> float | None:
    """Bytes of weights in memory: the budget, or of a network without pages its graphs."""
    budget, graphs = figure(record, "memory_budget_bytes"), figure(record, "graph_bytes")
    return budget if figure(record, "pageable_pages") or graphs is None else graphs


def labels(records: Sequence[Record]) -> tuple[list[str], str]:
    """A short name for each record, of what differs between them, and in one phrase what they share. Equal ones get a number."""
    parts = [_parts(record) for record in records]
    columns = list(zip(*parts, strict=True))
    differs = [number for number, column in enumerate(columns) if len(set(column)) > 1]
    shared = ", ".join(column[0] for number, column in enumerate(columns) if number not in differs and column[0])
    without, having = (len(set(zip(*columns[:end], strict=True))) for end in (TASK, TASK + 1))
    if TASK in differs and without == having:
        differs.remove(TASK)  # each bundle was asked one task: its name says it
    names = [", ".join(part[number] for number in differs if part[number]) or (part[0] or "run") for part in parts]
    return [_numbered(name, names, place) for place, name in enumerate(names)], shared


def _numbered(name: str, names: Sequence[str], place: int) -> str:
    return name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"


def _parts(record: Record) -> list[str]:
    memory, budget, threads = text(record, "memory"), figure(record, "memory_budget_bytes"), figure(record, "threads")
    paged = figure(record, "pageable_pages") != 0  # a network without experts has one residency and one budget
    share = f"{clean(memory)[:-1]}\u00a0% of experts" if memory and memory.endswith("%") else None
    return [
        clean(text(record, "bundle") or "").removesuffix(".edgeml"),
        clean(text(record, "variant") or ""),
        f"task {clean(record['task'])}" if text(record, "task") else "",
        clean(text(record, "residency") or "") if paged else "",
        (share or ("" if budget is None else mib(budget))) if paged else "",
        plural(int(threads), "thread") if threads else "",
        f"arm {clean(record['arm'])}" if text(record, "arm") else "",
        clean(text(record, "backend") or ""),
        clean(text(record, "device.board") or text(record, "device.cpu") or ""),
        f"on {clean(record['to'])}" if text(record, "to") else "",
    ]


def frontier(places: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of (cost, quality) that no other beats in both, by cost."""
    best, kept = -math.inf, []
    for number in sorted(range(len(places)), key=lambda number: (places[number][0], -places[number][1])):
        if places[number][1] > best:
            best = places[number][1]
            kept.append(number)
    return kept
