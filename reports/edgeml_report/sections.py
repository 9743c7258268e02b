"""Records to a document: the headline, every section in the order people ask, and the figures for a table program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgeml_report import diff_section, quality, speed
from edgeml_report.content import Cell, Column, Document, Section, Table, Tile
from edgeml_report.devices import devices
from edgeml_report.reproduce import reproduce
from edgeml_report.runs import Quality, Record, documents, figure, labels, mapping, qualities, quality_of, text, weights_of
from edgeml_report.text import UNMEASURED, clean, interval, listed, mib, milliseconds, named, percent, plural, size

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
    sections = [
        quality.tradeoffs(records, scored),
        quality.domains(scored, records),
        quality.indices(scored, records),
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
    tiles, about = _headline(records, scored)
    return Document(listed(bundles, 3), subtitle, about, tiles, [one for one in sections if one is not None], list(_figures(records)))


def _headline(records: Sequence[Record], scored: Sequence[Quality]) -> tuple[list[Tile], str]:
    """Five questions. They are about the variant that was scored first and is not the reference itself, and about its timing."""
    best = next((one for one in scored if not one.itself), scored[0] if scored else None)
    timed = [record for record, _ in documents(records, "bench")]
    record = next((one for one in timed if best is None or quality_of(one, [best])), timed[0] if timed else None)
    own = best if record is None or best is None or quality_of(record, [best]) else None
    tiles = [_fast(record), _large(record, best), _worse(best), _where(best), _sure(best)]
    said = []
    if record is not None and len(timed) > 1:
        said.append(f"Timed: {labels(timed)[0][timed.index(record)]}.")
    if best is not None and len(scored) > 1:
        said.append(f"Scored: {named(best.name)}.")
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
    kept = figure(best.figures, "retention.value")
    if kept is None:
        mean = figure(best.figures, "mean")
        detail = "mean score; a reference would say how much was lost"
        return Tile(question, None, f"{percent(mean)} {detail}" if mean is not None else "`edgeml eval` scores it")
    score, reference = figure(best.figures, "mean"), figure(best.figures, "reference_mean")
    scores = "" if score is None or reference is None else f"; mean score {percent(score)}, was {percent(reference)}"
    return Tile(question, percent(kept), f"of the reference's quality kept ({interval(best.retention)}){scores}")


def _where(best: Quality | None) -> Tile:
    known = {name: mapping(one, "retention") for name, one in mapping(best.figures if best else {}, "domains").items()}
    values = {name: value for name, one in known.items() if (value := figure(one, "value")) is not None and not one.get("near_clip")}
    if not values:
        return Tile("Where", None, "`edgeml eval` compares domains")
    name = min(values, key=lambda one: values[one])
    if values[name] >= 0.9995:
        return Tile("Where", "nowhere", f"each of {plural(len(values), 'domain')} kept at least {percent(values[name])}")
    others = f"; {plural(len(values) - 1, 'other domain')} kept at least as much" if len(values) > 1 else ""
    return Tile("Where", named(name), f"lost most: {percent(values[name])} kept ({interval(known[name])}){others}")


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
    width = f"\u00b1{50 * (high - low):.1f}\u00a0points"
    return Tile(question, width, f"95 % interval from {plural(int(rows or 0), 'test row')}{over}", warning)


def _environment(records: Sequence[Record]) -> Section:
    found: list[dict[str, Any]] = []
    for record in records:
        device = mapping(record, "device")
        if device:
            told = {**device, "tool_version": record.get("tool_version")}
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
