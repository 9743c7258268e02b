"""The section about other machines: what `edgeml device` measured there or under their limits, beside what was predicted for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeml_report.content import Block, Cell, Column, Section, Table
from edgeml_report.runs import Record, documents, figure, items, labels, mapping, text
from edgeml_report.text import UNMEASURED, clean, interval, listed, mib, milliseconds, named, number, percent, plural

__all__ = ["devices"]

HEADS = ("device", "processor, kernels", "p50 ms", "p95 ms", "predicted ms", "peak MiB", "predicted MiB", "energy")


def devices(records: Sequence[Record]) -> Section | None:
    """Records of kind device, which were measured under a device's limits, and those of bench and eval that came from another machine.

    None where there are none: not everybody has another machine.
    """
    timed = [record for record in records if record.get("kind") == "device" or (record.get("kind") == "bench" and _there(record))]
    timed = [record for record in timed if figure(record, "latency_s.p50") is not None]
    blocks: list[Block] = []
    if timed:
        names, shared = labels([{**record, "device": None, "backend": None, "to": None} for record in timed])
        own = [name.split(" (")[0] for name in names]
        rows = [_row(record, name if len(set(own)) > 1 else "", records) for record, name in zip(timed, own, strict=True)]
        caption = "Answers on each device" + (f"; {shared}" if shared else "")
        blocks.append(Table(caption, [Column(head, place > 1) for place, head in enumerate(HEADS)], rows))
        blocks += _notes(timed)
    scored = [(record, document) for record, document in documents(records, "eval") if text(record, "to")]
    if scored:
        blocks += _scores(scored)
    if not blocks:
        return None
    lead = "Below a time its 95 % interval, or of a prediction its range; a prediction was made from the device's profile alone."
    return Section("devices", "Devices", lead, blocks)


def _there(record: Record) -> bool:
    return bool(text(record, "to") or mapping(record, "device_run"))


def _emulated(record: Record) -> bool:
    return mapping(record, "device_run").get("emulated") is True


def _row(record: Record, name: str, records: Sequence[Record]) -> list[Cell]:
    run = mapping(record, "device_run")
    said = mapping(run, "predicted")
    device = text(record, "to") or text(run, "profile") or "this machine"
    processor = clean(text(record, "device.board") or text(record, "device.cpu") or UNMEASURED)
    time, tail = (figure(record, f"latency_s.{key}") for key in ("p50", "p95"))
    cells = [
        Cell(clean(device), ", ".join(filter(None, ("emulated" if _emulated(record) else "", name)))),
        Cell(processor, _kernels(text(record, "backend"))),
    ]
    scaled = mapping(run, "scaled_latency_s")
    if _emulated(record):
        ends = f"{interval(scaled, milliseconds)}, scaled; " if scaled else ""
        cells += [Cell(milliseconds(figure(scaled, "value"), False), f"{ends}{milliseconds(time, False)} here"), Cell(UNMEASURED)]
    else:
        cells += [_measured(record, "p50", time), _measured(record, "p95", tail)]
    cells += [
        _predicted(said, "latency_s", milliseconds),
        Cell(mib(figure(record, "peak_rss_bytes"), False)),
        _predicted(said, "peak_memory_bytes", mib),
        _energy(record, records),
    ]
    return cells


def _kernels(backend: str | None) -> str:
    return UNMEASURED if backend is None else "NumPy (pure wheel)" if backend == "numpy" else clean(backend)


def _measured(record: Record, key: str, value: float | None) -> Cell:
    sure = {end: figure(record, f"latency_s.{key}_interval.{end}") for end in ("low", "high")}
    return Cell(milliseconds(value, False), interval(sure, milliseconds) if set(sure.values()) != {None} else "")


def _predicted(said: Mapping[str, Any], key: str, show: Any) -> Cell:
    value = figure(said, f"{key}.value")
    if value is None:
        return Cell("not predicted", clean(text(said, "why") or "") if key == "latency_s" else "")
    return Cell(show(value, False), interval(mapping(said, key), show))


def _energy(record: Record, records: Sequence[Record]) -> Cell:
    """What a profile of the same bundle on the same machine drew; no single answer can be told apart in it."""
    for other, document in documents(records, "profile"):
        same = all(other.get(key) == record.get(key) for key in ("to", "bundle_id", "memory", "residency", "threads"))
        drawn = figure(document, "energy.energy_j") if same and not _emulated(record) else None
        if drawn is not None:
            watts = figure(document, "energy.mean_w")
            return Cell(f"{number(drawn)}\u00a0J", "a whole profile" + (f", {number(watts)}\u00a0W" if watts is not None else ""))
    return Cell(UNMEASURED)


def _notes(timed: Sequence[Record]) -> list[Block]:
    """Which limits held, and how much of the predictions is assumed; a sentence for each device."""
    said: dict[str, None] = {}
    for record in timed:
        run = mapping(record, "device_run")
        profile = named(text(run, "profile") or text(run, "predicted.profile") or "")
        if _emulated(record):
            held, missing = ([clean(one, 200) for one in items(run, key) if isinstance(one, str)] for key in ("held", "not_held"))
            by = figure(run, "scale.value")
            told = f"{profile} was emulated: held were {'; '.join(held) or 'no limits'}."
            told += f" Not held: {'; '.join(missing)}." if missing else ""
            scaled = "was not scaled" if by is None else f"is scaled by {number(by)} ({interval(mapping(run, 'scale'), _plain)})"
            said[f"{told} The processor {scaled}, not emulated."] = None
        assumed = items(run, "predicted.assumed")
        if assumed:
            said[f"{plural(len(assumed), 'figure')} behind a prediction for {profile}: assumed, not measured."] = None
    return list(said)


def _plain(value: float, _: bool = False) -> str:
    return number(value)


def _scores(scored: Sequence[tuple[Record, Mapping[str, Any]]]) -> list[Block]:
    """Answers do not depend on the machine: whether that was so is a sentence."""
    rows = []
    for record, document in scored:
        kept = mapping(document, "retention")
        rows.append(
            [
                Cell(clean(record["to"]), clean(text(record, "bundle") or "")),
                Cell(_kernels(text(record, "backend"))),
                Cell(plural(len(mapping(document, "tasks")), "task")),
                Cell(percent(figure(document, "mean"))),
                Cell(percent(figure(kept, "value")), interval(kept) if figure(kept, "value") is not None else ""),
            ]
        )
    heads = ("device", "kernels", "scored", "mean score", "retention")
    table = Table("Scores of each device's own answers", [Column(head, place > 2) for place, head in enumerate(heads)], rows)
    found: dict[tuple[object, ...], set[float]] = {}
    for record, document in scored:
        for task in mapping(document, "tasks"):
            score = figure(mapping(document, "tasks").get(task), "score")
            if score is not None:
                found.setdefault((*(record.get(key) for key in ("bundle_id", "residency", "memory", "limit")), task), set()).add(score)
    differ = sorted({str(key[-1]) for key, scores in found.items() if len(scores) > 1})
    several = len({text(record, "to") for record, _ in scored}) > 1
    told = f"Devices differ in {listed(differ)}." if differ else "Each task scores the same on every device that answered it."
    return [table, told] if several else [table]
