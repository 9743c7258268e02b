"""What the records are about: configurations that were timed, variants that were scored, and which belong together.

Readers here are forgiving: a field that is missing or of another type counts as not measured. Whether a line is a record at all is
checked where it is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeml_report.text import LARGEST, clean, count, listed, mib, plural

__all__ = [
    "Quality",
    "comparable",
    "documents",
    "figure",
    "frontier",
    "grouped",
    "items",
    "labels",
    "mapping",
    "numbered",
    "qualities",
    "qualities_of",
    "quality_of",
    "rows_in",
    "rows_of",
    "rows_told",
    "runs_of",
    "text",
    "weights_of",
]

Record = Mapping[str, Any]
Rows = tuple[str, tuple[tuple[str, float], ...]]
TASK = 2  # the place of the task among the parts of a name


def mapping(record: object, path: str = "") -> Mapping[str, Any]:
    """The object at a dotted path, empty where there is none."""
    for key in filter(None, path.split(".")):
        record = record.get(key) if isinstance(record, Mapping) else None
    return record if isinstance(record, Mapping) else {}


def figure(record: object, path: str) -> float | None:
    """The number at a dotted path, None where there is none or one that nothing measures."""
    place, _, key = path.rpartition(".")
    value = mapping(record, place).get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST else None


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
    `itself`: it is the reference. `rows`: on which it was scored, as (split, ((task, n), ...)): only scores of equal rows compare.
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
    rows: Rows = ("", ())

    @property
    def retention(self) -> Mapping[str, Any]:
        return mapping(self.figures, "retention")

    @property
    def reference(self) -> tuple[float | None, ...]:
        """The reference's scores, task by task: retentions compare where they are the same."""
        return tuple(figure(one, "reference_score") for _, one in sorted(mapping(self.figures, "tasks").items(), key=lambda item: item[0]))


def qualities(records: Sequence[Record]) -> list[Quality]:
    """All scored variants; of those measured twice on the same rows the last. An evaluation of one bundle alone is its only variant."""
    found: dict[tuple[Any, ...], Quality] = {}
    for record, document in documents(records, "eval"):
        variants = [mapping(one) for one in items(document, "variants")] or [document]
        reference = mapping(document, "reference")
        for figures in variants:
            own = {**record, **figures}
            name = text(own, "name") or text(own, "variant") or text(own, "bundle") or "unnamed"
            residency, kept = text(own, "residency") or "exact", own.get("experts_kept") not in (None, "all")
            place = (text(own, "bundle_id"), text(own, "variant"), residency, figure(own, "memory_budget_bytes"), text(own, "memory"))
            compared_with = (text(reference, "bundle_id"), text(reference, "variant"), "exact")
            itself = not kept and place[0] is not None and (*place[:2], residency) == compared_with
            rows = rows_in(record, figures)
            found.pop((name, *place, rows), None)
            found[(name, *place, rows)] = Quality(name, figures, *place, kept, itself, rows)
    return list(found.values())


def comparable(records: Sequence[Record], scored: Sequence[Quality]) -> tuple[list[Quality], list[Quality]]:
    """The largest group of variants that were scored on the same rows, and the others.

    Large is what has many variants and timed configurations; of equal ones what has more rows.
    """
    groups = grouped(scored)
    timed = [record for record, _ in documents(records, "bench")]

    def worth(group: Sequence[Quality]) -> tuple[int, float]:
        return len(group) + sum(one is not None for one in qualities_of(timed, group)), sum(n for _, n in group[0].rows[1])

    best = max(groups, key=worth, default=[])
    return best, [one for one in scored if one.rows != (best[0].rows if best else None)]


def grouped(scored: Sequence[Quality]) -> list[list[Quality]]:
    """The variants that were scored on the same rows, together."""
    groups: dict[Any, list[Quality]] = {}
    for one in scored:
        groups.setdefault(one.rows, []).append(one)
    return list(groups.values())


def rows_in(record: Record, figures: Mapping[str, Any]) -> Rows:
    """On which rows a variant was scored."""
    return text(record, "split") or "", tuple(sorted((task, figure(one, "n") or 0) for task, one in mapping(figures, "tasks").items()))


def rows_of(one: Quality) -> str:
    """On how many rows of which tasks a variant was scored, in words."""
    return rows_told(one.rows)


def rows_told(rows: Rows) -> str:
    """The same of rows."""
    split, tasks = rows
    names = listed([task for task, _ in tasks]) if len(tasks) < 4 else plural(len(tasks), "task")
    told = f"{count(sum(n for _, n in tasks))} rows of {names}" if tasks else "unknown rows"
    return told + (f", split {clean(split)}" if split not in ("", "test") else "")


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


def qualities_of(records: Sequence[Record], found: Sequence[Quality]) -> list[Quality | None]:
    """`quality_of` each; of equal settings it is looked for once."""
    known: dict[Any, Quality | None] = {}
    answers = []
    for record in records:
        key = tuple(str(record.get(name)) for name in ("bundle_id", "variant", "residency", "memory", "memory_budget_bytes"))
        if key not in known:
            known[key] = quality_of(record, found)
        answers.append(known[key])
    return answers


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
    return numbered([", ".join(part[number] for number in differs if part[number]) or (part[0] or "run") for part in parts]), shared


def runs_of(found: Sequence[tuple[Record, Mapping[str, Any]]]) -> list[str]:
    """A name for each document of profiles, evaluations or routing: its bundle, and what tells it from the others."""
    own = [{**record, "task": text(document, "task") or text(record, "task")} for record, document in found]
    names = labels(own)[0] if own else []
    bundles = [clean(text(record, "bundle") or "unnamed").removesuffix(".edgeml") for record in own]
    joined = [name if name.startswith(bundle) else f"{bundle}, {name}" for name, bundle in zip(names, bundles, strict=True)]
    return joined if len(own) > 1 else bundles


def numbered(names: Sequence[str]) -> list[str]:
    """The names, equal ones told apart by numbers."""
    often, seen = Counter(names), Counter[str]()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if often[name] == 1 else f"{name} ({seen[name]})")
    return found


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
    """The indices of (cost, quality) that no other beats in both, by cost; equals are all kept."""
    best, kept = -math.inf, list[int]()
    for number in sorted(range(len(places)), key=lambda number: (places[number][0], -places[number][1])):
        if places[number][1] > best or (kept and places[number] == places[kept[-1]]):
            best = places[number][1]
            kept.append(number)
    return kept
