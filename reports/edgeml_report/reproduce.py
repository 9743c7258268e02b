"""The commands that would make these records again, from the settings in them.

What a record does not hold is not guessed: no command is printed for it, and a sentence says what is missing. Files are known by name.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from edgeml_report.content import Block, Cell, Code, Column, Section, Table
from edgeml_report.runs import Record, figure, items, mapping, text
from edgeml_report.text import UNMEASURED, clean, count, listed

__all__ = ["reproduce"]

#: Values of options that need no saying.
DEFAULTS = {"memory": "auto", "residency": "exact", "split": "test", "experts_kept": "all", "kept_by": "usage"}
COLUMNS = {"text_column": "text", "pair_column": "text_pair", "label_column": "label"}
TOKENS, ROUNDS, WARMUP, COLD, SECONDS = 32, 30, 3, 3, 120
#: Options of bench that take lists.
SWEPT = ("memory", "residency")


class _Missing(Exception):
    """What a command needs and the record does not hold."""


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
    lines, missing = _commands(records)
    blocks: list[Block] = [Code(lines)] if lines else []
    if missing:
        told = listed([f"{what} ({why})" for what, why in dict.fromkeys(missing)], 8)
        blocks.append(f"Not reproducible from the record: {told}.")
    lead = "The same bundle, data and versions give the same records up to noise; DATA stands for your data, other files have their names."
    return Section("reproduce", "How to reproduce", lead, [*blocks, table, *([f"Seeds: {listed(seeds)}."] if seeds else [])])


def _commands(records: Sequence[Record]) -> tuple[list[str], list[tuple[str, str]]]:
    """One command a record, those of bench that are all combinations of a list as one; and of which records something is missing."""
    groups: dict[Any, list[tuple[str, ...]]] = {}
    missing: list[tuple[str, str]] = []
    judged = {mapping(record, "compare.with").get("bundle_id") for record in records}
    for number, record in enumerate(records):
        if record.get("arm") == "B" and record.get("bundle_id") in judged:
            continue  # the command of arm A measured it too
        try:
            verb, before, after = _command(record)
        except _Missing as error:
            missing.append((f"{clean(record.get('kind'))} of {clean(record.get('bundle') or 'a bundle')}", str(error)))
            continue
        swept = tuple(clean(record.get(key) or DEFAULTS[key]) for key in SWEPT)
        together = verb == ("bench",) and not mapping(record, "compare")
        groups.setdefault((-1 if together else number, verb, before, after), []).append(swept)
    lines: list[str] = []
    for (number, verb, before, after), members in groups.items():
        pairs = list(dict.fromkeys(members))
        lists = [list(dict.fromkeys(values)) for values in zip(*pairs, strict=True)]
        whole = [lists] if len(pairs) == len(list(product(*lists))) else [[[value] for value in pair] for pair in pairs]
        budgeted = number < 0 or _budgeted(records[number])
        for values in whole:
            sweep = [part for key, some in zip(SWEPT, values, strict=True) for part in _swept(key, some) if budgeted]
            parts = ["edgeml", *verb, *before, *sweep, *after, "--records", "records.jsonl"]
            lines.append(" ".join(map(shlex.quote, parts)))
    return list(dict.fromkeys(lines)), missing


def _command(record: Record) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The command's name, and what stands before and after memory and residency. Raises `_Missing`."""
    kind = record.get("kind")
    make = {"bench": _bench, "device": _bench, "profile": _profile, "eval": _eval, "routing": _routing, "diff": _diff}.get(str(kind))
    if make is None:
        raise _Missing("no command writes records of this kind")
    verb: tuple[str, ...] = (str(kind),)
    before: list[str] = []
    if kind == "device":
        verb = ("device", "run", "--device", _known(record, "device_run.profile", "the device"), "--emulate")
    elif text(record, "to"):
        verb, before = ("device", str(kind)), ["--to", clean(record["to"])]
    options = _options(record, ("variant", "threads"))
    return verb, tuple(make(record)), (*options, *before, *_after(record))


def _known(record: object, path: str, what: str) -> str:
    found = text(record, path)
    if found is None:
        raise _Missing(what)
    return clean(found)


def _file(record: object, path: str, what: str = "its bundle") -> str:
    """A file's name, which is no option whatever it begins with."""
    name = _known(record, path, what)
    return f"./{name}" if name.startswith("-") else name


def _swept(key: str, values: Sequence[str]) -> list[str]:
    return [] if list(values) == [DEFAULTS[key]] else [f"--{key}", ",".join(values)]


def _budgeted(record: Record) -> bool:
    """Whether memory and residency may be given: diff, kept experts and kept answers have everything in memory."""
    asked = record.get("kind") != "diff" and record.get("experts_kept") in (None, "all")
    return asked and not (record.get("kind") == "eval" and _rescored(record))


def _options(record: Record, keys: Sequence[str]) -> list[str]:
    known = {key: record[key] for key in keys if record.get(key) not in (None, DEFAULTS.get(key))}
    return [part for key, value in known.items() for part in (f"--{key.replace('_', '-')}", clean(value))]


def _number(option: str, value: float | None, default: float | None = None) -> list[str]:
    return [] if value in (None, default) else [option, f"{value:.9g}"]


def _inputs(record: Record, document: Mapping[str, Any]) -> list[str]:
    """What was asked in a round; `document` has the task, the workload and the files."""
    kind, files = text(document, "workload.kind"), [clean(name) for name in items(document, "input_files")]
    if kind == "mix":
        return ["--workload", _known(document, "workload.file", "its workload's file")]
    task = ["--task", _known(document, "task", "its task")]
    if kind == "random":
        return task + _number("--tokens", figure(document, "workload.tokens"), TOKENS)
    if kind == "random image":
        return task
    rows = figure(document, "workload.rows")
    if kind == "texts" and len(files) == 1:
        return [*task, "--input", files[0]]
    if kind == "images" and files and len(files) == rows:
        return [*task, *(part for name in files for part in ("--image", name))]
    raise _Missing("its texts, which were given on the command line" if kind == "texts" else "its inputs")


def _cold(document: Mapping[str, Any]) -> list[str]:
    """Rounds that began without experts; a pass over images and a workload have none whatever is asked."""
    paged = text(document, "workload.kind") in ("random", "texts") and "cold" in document
    return _number("--cold", figure(document, "cold.rounds") or 0, COLD) if paged else []


def _bench(record: Record) -> list[str]:
    return [_file(record, "bundle"), *_inputs(record, record)]


def _profile(record: Record) -> list[str]:
    return [_file(record, "bundle"), *_inputs(record, mapping(record, "profile"))]


def _after(record: Record) -> list[str]:
    """Options for which memory and residency do not matter."""
    kind, profile = record.get("kind"), mapping(record, "profile")
    if kind == "profile":
        warm = _number("--iterations", figure(profile, "warm.rounds"), ROUNDS)
        return [*warm, *_cold(profile), *(["--no-operators"] if profile.get("operators", True) is None else [])]
    if kind not in ("bench", "device"):
        return []
    mix, compared = mapping(record, "mix"), mapping(record, "compare")
    rounds = figure(mix, "requests") if mix else figure(record, "rounds")
    if text(compared, "how") == "turns" or record.get("arm") == "B":
        rounds = figure(compared, "iterations")
        if rounds is None:
            raise _Missing("how many rounds of the comparison were asked for")
    warmup = _number("--warmup", figure(record, "warmup"), None if mix else WARMUP)
    return [*_number("--iterations", rounds), *warmup, *_cold(record), *(_compare(record, compared) if compared else [])]


def _compare(record: Record, compared: Mapping[str, Any]) -> list[str]:
    """`--compare`: the other bundle, under what differs, or the file of earlier records."""
    other = mapping(compared, "with")
    if text(compared, "how") == "records":
        named = _file(other, "records", "the records it was compared with")
    else:
        differs = [key for key in ("memory", "residency", "threads", "variant") if other.get(key) not in (None, record.get(key))]
        named = ",".join([_file(other, "bundle", "what it was compared with"), *(f"{key}={clean(other[key])}" for key in differs)])
    allowed = figure(compared, "max_slowdown")
    slower = ["--max-slowdown", f"{100 * allowed:.6g}%"] if allowed else []
    return ["--compare", named, *slower, *_number("--seconds", figure(compared, "seconds"), SECONDS)]


def _rescored(record: Record) -> bool:
    return "from_predictions" in record or record.get("threads") is None


def _tasks(record: Record, document: Mapping[str, Any]) -> list[str]:
    """Of a directory of data: the tasks that were asked for, or where a record does not say so those that it has."""
    asked = text(record, "tasks")
    if "tasks" in record:
        return ["--tasks", clean(asked, 2000)] if asked else []
    found = items(document, "tasks") or list(mapping(document, "tasks"))
    return ["--tasks", ",".join(clean(name) for name in found)] if found else []


def _eval(record: Record) -> list[str]:
    """What was scored, against which reference, beside which variants, and the domains that were seen."""
    document = mapping(record, "eval")
    seen = _seen(document)
    seeds = _number("--seed", figure(document, "seed"), 0)
    if _rescored(record):
        return ["--from-predictions", _file(record, "from_predictions", "the file of kept answers that was scored"), *seen, *seeds]
    parts = [_file(record, "bundle"), "--data", "DATA"]
    if text(record, "task"):
        parts += ["--task", clean(record["task"])]
        parts += [part for key, usual in COLUMNS.items() if record.get(key) != usual for part in _options(record, (key,))]
    else:
        parts += _tasks(record, document)
    parts += _options(record, ("split", "limit", "experts_kept", "kept_by", "kept_for", "specialise"))
    reference = mapping(document, "reference")
    if reference and not (record.get("specialise") and reference.get("bundle_id") == record.get("bundle_id")):
        parts += ["--reference", _file(reference, "bundle", "the name of its reference")]
    for one in map(mapping, items(document, "variants")[1:]):
        parts += ["--also", _also(one, record)]
    return [*parts, *seen, *seeds, *(["--learn"] if mapping(document, "learned") else [])]


def _seen(document: Mapping[str, Any]) -> list[str]:
    """Domains seen, where all variants saw the same: else it is their provenance that tells, and nothing was given."""
    seen = items(document, "domains_seen")
    alike = all(items(one, "domains_seen") == seen for one in map(mapping, items(document, "variants")) if "domains_seen" in one)
    return ["--domains-seen", ",".join(clean(name) for name in seen)] if seen and alike else []


def _also(one: Mapping[str, Any], record: Record) -> str:
    name = clean(one.get("name") or "variant")
    if "," in name or "=" in name:
        raise _Missing(f"a variant's name, {name}, which no option can have")
    name += f"={_file(one, 'bundle')}" if text(one, "bundle") not in (None, text(record, "bundle")) else ""
    share = figure(one, "experts_kept")
    if share is None:
        keys = ("memory", "residency", "variant")
        return ",".join([name, *(f"{key}={clean(one[key])}" for key in keys if one.get(key) not in (None, DEFAULTS.get(key)))])
    parts = [name, f"experts-kept={share:.6f}".rstrip("0").rstrip(".") if share else "experts-kept=none"]
    parts += [f"kept-by={clean(one['kept_by'])}"] if one.get("kept_by") not in (None, "usage") else []
    parts += [f"kept-for={'+'.join(clean(domain) for domain in items(one, 'kept_for'))}"] if items(one, "kept_for") else []
    return ",".join([*parts, *([f"variant={clean(one['variant'])}"] if text(one, "variant") else [])])


def _routing(record: Record) -> list[str]:
    parts = [_file(record, "bundle"), "--data", "DATA", *_tasks(record, mapping(record, "routing"))]
    return parts + _options(record, ("split", "limit"))


def _diff(record: Record) -> list[str]:
    """What a diff compared and ran on; its texts or images are not in the record."""
    document = mapping(record, "diff")
    parts = [_file(document, "reference_bundle", "the name of its reference"), _file(record, "bundle")]
    variant, limit = text(document, "reference_variant"), figure(document, "limit")
    parts += ["--reference-variant", clean(variant)] if variant else []
    split = _known(document, "split", "its texts or images, which were given on the command line")
    return [*parts, "--data", "DATA", "--split", split, *_tasks({}, document), *_number("--limit", limit)]
