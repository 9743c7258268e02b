"""Records to a document: the headline, every section in the order people ask, and the figures for a table program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgeml_report import diff_section, quality, speed
from edgeml_report.bounds import MOST_ROWS, bounded
from edgeml_report.content import Cell, Column, Document, Section, Table, Tile
from edgeml_report.devices import devices
from edgeml_report.reproduce import reproduce
from edgeml_report.runs import (
    Quality,
    Record,
    comparable,
    documents,
    figure,
    labels,
    mapping,
    qualities,
    qualities_of,
    quality_of,
    rows_of,
    text,
    weights_of,
)
from edgeml_report.text import UNMEASURED, clean, count, listed, mib, milliseconds, named, percent, plural, points, size

__all__ = ["document"]

#: What is said of a machine first, and under which name; whatever else a record knows of it follows under its own.
ENVIRONMENT = {
    "board": "board",
    "cpu": "processor",
    "architecture": "architecture",
    "processors": "processors used",
    "memory_bytes": "memory",
    "governor": "governor",
    "disk": "disk",
    "kernel": "kernel",
    "python": "Python",
    "numpy": "NumPy",
    "onnxruntime": "onnxruntime",
    "tool_version": "edgeml",
}


def document(records: Sequence[Record]) -> Document:
    """The report of `records`, in their order."""
    scored = qualities(records)
    compared, others = comparable(records, scored)
    sections = [
        quality.tradeoffs(records, compared, others),
        quality.domains([*compared, *others], records),
        quality.indices([*compared, *others], records),
        diff_section.lost(records),
        speed.latency(records),
        speed.paging(records),
        speed.memory(records),
        speed.experts(records),
        devices(records),
        _environment(records),
        reproduce(records),
    ]
    bundles = list(dict.fromkeys(text(record, "bundle") or "unnamed" for record in records))
    machines = list(dict.fromkeys(_machine(record) for record in records))
    subtitle = f"{plural(len(records), 'record')} measured on {listed(machines, 3)}"
    tiles, about = _headline(records, compared, others)
    filled = [one for one in sections if one is not None]
    return bounded(Document(listed(bundles, 3), subtitle, about, tiles, filled, _Figures(records)), MOST_ROWS)


def _headline(records: Sequence[Record], scored: Sequence[Quality], others: Sequence[Quality]) -> tuple[list[Tile], str]:
    """Five questions. They are about the first variant that is not the reference itself, one that was also timed before others."""
    timed = [record for record, _ in documents(records, "bench")]
    used = {id(one) for one in qualities_of(timed, scored)}
    lossy = [one for one in scored if not one.itself]
    best = next((one for one in lossy if id(one) in used), next(iter(lossy or scored), None))
    record = next((one for one in timed if best is None or quality_of(one, [best])), timed[0] if timed else None)
    own = best if record is None or best is None or quality_of(record, [best]) else None
    tiles = [_fast(record), _large(record, best), _worse(best), _where(best), _sure(best)]
    said = []
    if record is not None and len(timed) > 1:
        said.append(f"Timed: {labels(timed)[0][timed.index(record)]}.")
    if best is not None and len(scored) + len(others) > 1:
        said.append(f"Scored: {named(best.name)}" + (f", on {rows_of(best)}." if others else "."))
    if best is not None and own is None:
        said.append("What was timed is not what was scored: their bundle, residency or budget differ.")
    return tiles, " ".join(said)


def _fast(record: Record | None) -> Tile:
    seconds = figure(record, "latency_s.p50")
    if record is None or seconds is None:
        return Tile("How fast", None, "`edgeml bench` times answers")
    cold = figure(record, "cold.latency_s.p50")
    parts = (
        [f"95 of 100 answers within {milliseconds(figure(record, 'latency_s.p95'))}"] if figure(record, "latency_s.p95") is not None else []
    )
    parts += [f"{milliseconds(cold)} cold"] if cold is not None else []
    rounds = figure(record, "rounds")
    parts += [plural(int(rounds), "round")] if rounds is not None else []
    slowed = "The processor slowed itself down meanwhile." if record.get("throttled") is True else ""
    return Tile("How fast", milliseconds(seconds), "median; " + ", ".join(parts), slowed)


def _large(record: Record | None, best: Quality | None) -> Tile:
    budget, peak = weights_of(best.figures if record is None and best else record or {}), figure(record, "peak_rss_bytes")
    if budget is None:
        return Tile("How large", None, "`edgeml bench` measures memory")
    return Tile(
        "How large",
        size(budget),
        "weights in memory" + (f"; the whole process {mib(peak)} at its peak" if peak is not None else ""),
    )


def _worse(best: Quality | None) -> Tile:
    question = "How much worse"
    if best is None:
        return Tile(question, None, "`edgeml eval` scores it")
    kept, score, reference = (figure(best.figures, key) for key in ("retention.value", "mean", "reference_mean"))
    if kept is None:
        detail = "mean score; a reference would say how much was lost"
        return Tile(question, None, f"{percent(score)} {detail}" if score is not None else "`edgeml eval` scores it")
    held = f"{percent(kept)} of the reference's score above chance is kept ({quality.kept_interval(best.retention)})"
    if score is None or reference is None:
        return Tile(question, f"{percent(abs(1 - kept))} {_lost(1 - kept)}", held)
    lost = f"{points(abs(reference - score)).lstrip('+')} {_lost(reference - score)}"
    return Tile(question, lost, f"mean score {percent(score)}, was {percent(reference)}; {held}")


def _lost(amount: float) -> str:
    return "gained" if amount < 0 else "lost"


def _where(best: Quality | None) -> Tile:
    """The domain that lost most, of those whose interval lies below 100 %."""
    known = {name: mapping(one, "retention") for name, one in mapping(best.figures if best else {}, "domains").items()}
    values = {name: value for name, one in known.items() if (value := figure(one, "value")) is not None and not one.get("near_clip")}
    if not values:
        return Tile("Where", None, "`edgeml eval` compares domains")
    sure = [name for name in values if (high := figure(known[name], "high")) is not None and high < 1]
    name = min(sure or values, key=lambda one: values[one])
    told = f"{percent(values[name])} kept ({quality.kept_interval(known[name])})"
    if not sure:
        least = f"the least is {named(name)}, {told}" if values[name] < 1 else f"each kept at least {percent(values[name])}"
        return Tile("Where", "nowhere for sure", f"no interval of {plural(len(values), 'domain')} lies below 100\u00a0%; {least}")
    more = f"; {len(sure)} of {plural(len(values), 'domain')} surely lost some" if len(values) > 1 else ""
    return Tile("Where", named(name), f"lost most: {told}{more}")


def _sure(best: Quality | None) -> Tile:
    question = "How sure"
    kept = best.retention if best else {}
    low, high, rows = (figure(kept, key) for key in ("low", "high", "n"))
    domains = mapping(best.figures if best else {}, "domains")
    near = [name for name, one in domains.items() if mapping(one, "retention").get("near_clip")]
    warning = f"Near chance, so not to be trusted: {listed(near, 3)}." if near else ""
    if low is None or high is None:
        few = "no interval without a reference" if rows is None else f"only {plural(int(rows), 'row')}: too few for an interval"
        return Tile(question, None, few, warning)
    over = f" of {plural(len(domains), 'domain')}" if domains else ""
    share = quality.unchanged(kept)
    if share is not None:
        found = f"no answer of {plural(int(rows or 0), 'test row')}{over} differs in score from the reference's"
        return Tile(question, f"0 of {count(rows)} differ", f"{found} (95 %: fewer than {percent(share)} do, rule of three)", warning)
    width = f"\u00b1{50 * (high - low):.1f}\u00a0points"
    return Tile(question, width, f"95 % interval of what is kept, from {plural(int(rows or 0), 'test row')}{over}", warning)


def _environment(records: Sequence[Record]) -> Section:
    found: list[dict[str, Any]] = []
    for device, version in _told_machines(records):
        if device:
            told = {**device, "tool_version": version}
            same = next((one for one in found if all(one.get(key) in (None, told[key]) or told[key] is None for key in told)), None)
            if same is None:
                found.append(told)
            else:
                same.update({key: same.get(key) if value is None else value for key, value in told.items()})
    title = "Environment"
    if not found:
        return Section("environment", title, "No record says where it was measured: records of `edgeml bench` do.")
    keys = [key for key in ENVIRONMENT if any(key in one for one in found) and (key != "board" or any(one.get(key) for one in found))] + [
        key for one in found for key in one if key not in ENVIRONMENT
    ]
    rows = [
        [Cell(ENVIRONMENT.get(key) or clean(key).replace("_", " ")), *(Cell(_told(one, key)) for one in found)]
        for key in dict.fromkeys(keys)
    ]
    heads = [Column("part"), *(Column("this machine" if len(found) == 1 else f"machine {number}") for number in range(1, len(found) + 1))]
    return Section(
        "environment",
        title,
        "As far as the machine says itself; nothing is guessed.",
        [Table("Where the records were measured", heads, rows)],
    )


def _told_machines(records: Sequence[Record]) -> list[tuple[Mapping[str, Any], Any]]:
    """Each machine once, as it was told."""
    seen: dict[str, tuple[Mapping[str, Any], Any]] = {}
    for record in records:
        told = (mapping(record, "device"), record.get("tool_version"))
        seen.setdefault(str(told), told)
    return list(seen.values())


def _told(machine: Mapping[str, Any], key: str) -> str:
    value = machine.get(key)
    if isinstance(value, Mapping | list):
        parts = value.items() if isinstance(value, Mapping) else [(one, one) for one in value]
        return (
            clean(", ".join(str(name if inner is True else inner) for name, inner in parts if inner is not None and inner is not False))
            or UNMEASURED
        )
    if key.endswith("_bytes"):
        return size(figure(machine, key))
    return UNMEASURED if value is None or value == "" else {True: "yes", False: "no"}[value] if isinstance(value, bool) else clean(value)


def _machine(record: Record) -> str:
    return clean(text(record, "device.board") or text(record, "device.cpu") or "an unnamed machine")


class _Figures:
    """Every number of every record, looked for when somebody asks."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return _figures(self._records)


def _figures(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """Every number of every record, a row each; an interval is one row."""
    for place, record in enumerate(records, 1):
        head = {
            "record": place,
            **{key: record.get(key) for key in ("kind", "bundle", "bundle_id", "residency", "memory_budget_bytes", "threads", "to")},
        }
        for metric, found in _leaves(record, ""):
            if metric not in ("schema", "memory_budget_bytes", "threads"):
                yield {**head, "metric": metric, **found}


def _leaves(value: object, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, Mapping):
        if {"value", "low", "high", "n"} <= value.keys():
            yield path, {key: value[key] for key in ("value", "low", "high", "n")}
            return
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{number}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, {"value": value}
