"""The commands that would make these records again, from the settings in them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from edgeml_report.content import Cell, Code, Column, Section, Table
from edgeml_report.runs import Record, figure, items, mapping, text
from edgeml_report.text import UNMEASURED, clean, count, listed

__all__ = ["reproduce"]

#: Keys of a record that are options of its command, and the values that need no saying.
OPTIONS = ("task", "variant", "memory", "residency", "threads", "split", "limit", "specialise", "experts_kept", "kept_by", "kept_for")
DEFAULTS = {"memory": "auto", "residency": "exact", "split": "test", "experts_kept": "all", "kept_by": "usage"}
#: Options of bench that take lists.
SWEPT = ("--memory", "--residency")
NEEDS = {"eval": ["--data", "DATA"], "routing": ["--data", "DATA"], "bench": [], "profile": []}


def reproduce(records: Sequence[Record]) -> Section:
    """The section of commands, bundles and seeds."""
    bundles = dict.fromkeys((text(record, "bundle") or "unnamed", text(record, "bundle_id") or "") for record in records)
    table = Table(
        "Bundles",
        [Column("bundle"), Column("identity (SHA-256)")],
        [[Cell(clean(name)), Cell(clean(identity) or UNMEASURED)] for name, identity in bundles],
    )
    found = [(record, figure(record, f"{record.get('kind')}.seed")) for record in records]
    seeds = list(dict.fromkeys(f"{clean(record.get('kind'))} {count(seed)}" for record, seed in found if seed is not None))
    lead = "The same bundle, data and versions give the same records up to noise; DATA and FULL stand for your data and the reference."
    return Section(
        "reproduce", "How to reproduce", lead, [Code(_commands(records)), table, *([f"Seeds: {listed(seeds)}."] if seeds else [])]
    )


def _commands(records: Sequence[Record]) -> list[str]:
    """One command a record; those of bench that are all combinations of a list are one command."""
    options = [_options(record) for record in records]
    groups: dict[Any, list[dict[str, str]]] = {}
    for number, (record, own) in enumerate(zip(records, options, strict=True)):
        rest = tuple(item for item in own.items() if item[0] not in SWEPT)
        alone = number if record.get("kind") != "bench" else -1
        groups.setdefault((alone, _verb(record), clean(record.get("bundle") or "BUNDLE"), rest), []).append(own)
    lines: list[str] = []
    for (number, verb, bundle, rest), members in groups.items():
        kind = verb[-1]
        lists = [list(dict.fromkeys(one.get(option, DEFAULTS[option[2:]]) for one in members)) for option in SWEPT]
        pairs = list(dict.fromkeys(tuple(one.get(option, DEFAULTS[option[2:]]) for option in SWEPT) for one in members))
        whole = [lists] if len(pairs) == len(list(product(*lists))) else [[[value] for value in pair] for pair in pairs]
        more = _evaluated(records[number]) if kind == "eval" else _compared(records[number]) if kind == "diff" else []
        reference = [clean(text(mapping(records[number], "diff"), "reference_bundle") or "FULL")] if kind == "diff" else []
        for values in whole:
            sweep = [part for option, some in zip(SWEPT, values, strict=True) for part in _swept(option, some)]
            parts = ["edgeml", *verb, *reference, bundle, *NEEDS.get(kind, []), *(part for item in rest for part in item), *sweep, *more]
            lines.append(" ".join(map(shlex.quote, [*parts, "--records", "records.jsonl"])))
    return list(dict.fromkeys(lines))


def _verb(record: Record) -> tuple[str, ...]:
    """The command's name; of one that ran on another machine, or under a device's limits, as `edgeml device` has it."""
    kind, run = clean(record.get("kind")), mapping(record, "device_run")
    if kind == "device":
        return ("device", "run", "--device", clean(text(run, "profile") or "DEVICE"), "--emulate")
    return ("device", kind) if text(record, "to") else (kind,)


def _swept(option: str, values: Sequence[str]) -> list[str]:
    return [] if list(values) == [DEFAULTS[option[2:]]] else [option, ",".join(values)]


def _options(record: Record) -> dict[str, str]:
    if record.get("kind") == "diff":  # it has everything in memory
        return {f"--{key}": clean(record[key]) for key in ("variant", "threads") if record.get(key) is not None}
    own = {f"--{key.replace('_', '-')}": clean(record[key]) for key in OPTIONS if record.get(key) not in (None, DEFAULTS.get(key))}
    rounds, to = figure(record, "rounds"), text(record, "to")
    own |= {"--to": clean(to)} if to else {}
    return own | ({"--iterations": f"{rounds:.0f}"} if record.get("kind") in ("bench", "device") and rounds else {})


def _evaluated(record: Record) -> list[str]:
    """What an evaluation compared: its reference, the other variants, and the domains that were seen."""
    document = mapping(record, "eval")
    parts = ["--reference", "FULL"] if mapping(document, "reference") else []
    for one in map(mapping, items(document, "variants")[1:]):
        parts += ["--also", _also(one, record)]
    seen = items(document, "domains_seen")
    return parts + (["--domains-seen", ",".join(clean(name) for name in seen)] if seen else [])


def _compared(record: Record) -> list[str]:
    """What a diff ran on, and the variant of its reference."""
    document = mapping(record, "diff")
    variant, split, limit = text(document, "reference_variant"), text(document, "split"), figure(document, "limit")
    parts = ["--reference-variant", clean(variant)] if variant else []
    if split is None:
        given = ["--image", "FILE"] if document.get("images") is True else ["--text", "TEXT"]
        return [*parts, "--task", ",".join(clean(task) for task in items(document, "tasks")), *given]
    return [*parts, "--data", "DATA", "--split", clean(split), *(["--limit", f"{limit:.0f}"] if limit is not None else [])]


def _also(one: Mapping[str, Any], record: Record) -> str:
    name = clean(one.get("name") or "variant")
    name += f"={clean(one['bundle'])}" if text(one, "bundle") not in (None, text(record, "bundle")) else ""
    keys = ("memory", "residency", "experts_kept", "kept_by", "kept_for", "variant")
    said = [f"{key.replace('_', '-')}={clean(one[key])}" for key in keys if one.get(key) not in (None, DEFAULTS.get(key))]
    return ",".join([name, *said])
