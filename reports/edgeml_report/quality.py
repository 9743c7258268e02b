"""The sections about quality: what it costs in size and time, where it was lost, and how far it carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeml_report import plots
from edgeml_report.content import Block, Cell, Column, Plot, Section, Table, Whisker
from edgeml_report.runs import (
    Quality,
    Record,
    documents,
    figure,
    frontier,
    grouped,
    items,
    labels,
    mapping,
    numbered,
    qualities_of,
    rows_in,
    rows_of,
    rows_told,
    text,
    weights_of,
)
from edgeml_report.text import UNMEASURED, clean, count, interval, listed, mib, milliseconds, named, percent, plural, points, ratio

__all__ = ["OURS", "domains", "indices", "kept_interval", "tradeoffs", "unchanged"]

OURS = "The formulas of DSI, GG and CDTR are edgeml's own, not a standard's."
#: Heat levels: retention from here upwards, and what the legend says.
LEVELS = (
    (0.99, "99 % and more"),
    (0.97, "97 to 99 %"),
    (0.95, "95 to 97 %"),
    (0.90, "90 to 95 %"),
    (0.80, "80 to 90 %"),
    (-9.0, "below 80 %"),
)
SHADES = [(number, words) for number, (_, words) in enumerate(LEVELS)]
INTERFERES = (2, "below 0: worse than no experts of a domain")
UNDEFINED = "undefined"
SCORES = ("retention.value", "mean")
FEWEST = 30
MOST_POINTS, MOST_GROUPS, MOST_REASONS = 60, 4, 6


@dataclass(frozen=True)
class _Configuration:
    """What was scored and timed together; `costs` in bytes and seconds, None where unmeasured."""

    name: str
    quality: Quality
    costs: Mapping[str, float | None]


def tradeoffs(records: Sequence[Record], scored: Sequence[Quality], others: Sequence[Quality] = ()) -> Section:
    """Quality against the memory that weights take and against latency, the configurations that nothing beats marked.

    `scored` share their rows. Quality is retention where all have one against the same reference, and else the mean score of all.
    `others`, on other rows, are only named.
    """
    missing = Section(
        "tradeoffs",
        "Quality, size and speed",
        "No variant has both a quality and a size yet: `edgeml eval BUNDLE --reference FULL --data DATA --records FILE` scores them, "
        "`edgeml bench BUNDLE --records FILE` times them.",
    )
    found = _configurations(records, scored)
    kept = _all_kept(found)
    key = "retention.value" if kept else "mean"
    what = "retention" if kept else "mean score"
    found = [one for one in found if figure(one.quality.figures, key) is not None]
    if not found:
        return missing
    scores = [figure(one.quality.figures, key) or 0.0 for one in found]
    best: dict[int, list[str]] = {}
    drawn: list[Block] = []
    for axis, title, scale in (("size", "weights in memory, MiB", 1 << 20), ("latency", "median latency, ms", 1e-3)):
        costs = {number: one.costs[axis] for number, one in enumerate(found)}
        known = {number: cost / scale for number, cost in costs.items() if cost is not None}
        numbers = list(known)
        edge = frontier([(cost, scores[number]) for number, cost in known.items()])
        for place in edge:
            best.setdefault(numbers[place], []).append(axis)
        if len(numbers) > 1:
            first, last = (found[numbers[edge[end]]].name for end in (0, -1))
            unbeaten = f"{len(edge)} of them, from {first} to {last}" if len(edge) > 1 else first
            alt = f"{len(numbers)} configurations, {what} in % against {title}. Nothing beats {unbeaten}."
            shown = sorted([*edge, *(place for place in range(len(numbers)) if place not in set(edge))][:MOST_POINTS])
            drawing = [numbers[place] for place in shown]
            ends = [_ends(found[number].quality.retention if kept else None) for number in drawing]
            places = [(known[number], 100 * scores[number]) for number in drawing]
            filled = [shown.index(place) for place in edge if place in shown]
            draw = plots.pareto(places, ends, [number + 1 for number in drawing], filled, title, f"{what}, %")
            drawn.append(Plot(f"pareto-{axis}", f"{what.capitalize()} against {axis}", alt, draw, height=280, wide=False))
    rows = [
        [
            Cell(f"{number + 1}. {one.name}"),
            Cell(percent(scores[number])),
            *([_surely(one.quality.retention), Cell(percent(figure(one.quality.figures, "mean")))] if kept else []),
            Cell(mib(one.costs["size"])),
            Cell(milliseconds(one.costs["latency"])),
            Cell(" and ".join(best.get(number, [])) or "\u2013"),
        ]
        for number, one in enumerate(found)
    ]
    heads = ("configuration", what, *(["95 % interval", "mean score"] if kept else []), "weights in memory", "median latency", "best in")
    columns = [Column(head, head not in ("configuration", "best in")) for head in heads]
    lead = f"A configuration is best in size or latency when no other has as high a {what} for less."
    lead += f" All were scored on the same {rows_of(found[0].quality)}."
    said: list[Block] = []
    if not kept and any(one.quality.retention for one in found):
        said.append("The mean score is compared, because not all of them have a retention against the same reference.")
    if others:
        names = listed([f"{clean(one.name)} ({rows_of(one)})" for one in others], 4)
        said.append(f"Left out, because their scores are of other rows and do not compare: {names}.")
    rows = [rows[number] for number in _first(len(rows), best)]
    if len(rows) < len(found):
        said.append(f"Shown are {count(len(rows))} of {count(len(found))} configurations, those that nothing beats first to stay.")
    return Section("tradeoffs", missing.title, lead, [*drawn, Table(f"Configurations with {what}, size and latency", columns, rows), *said])


def _first(amount: int, best: Mapping[int, Any]) -> list[int]:
    """The places of at most `MOST_POINTS` rows, the unbeaten before others, in their order."""
    return sorted([*best, *(number for number in range(amount) if number not in best)][:MOST_POINTS])


def _all_kept(found: Sequence[_Configuration]) -> bool:
    """Whether all have a retention, and against one reference."""
    every = all(figure(one.quality.retention, "value") is not None for one in found)
    return every and len({one.quality.reference for one in found}) == 1


def unchanged(found: object) -> float | None:
    """Of n rows none of whose answers differ in score from the reference's, the share that differs in truth: less than this, with 95 %.

    A bootstrap of equal rows has an interval of no width, which says nothing; 3 / n is the rule of three (J. A. Hanley, A. Lippman-Hand,
    "If nothing goes wrong, is everything all right?", JAMA 249, 1983). None for any other interval.
    """
    value, low, high, rows = (figure(found, key) for key in ("value", "low", "high", "n"))
    same = None not in (value, low, high) and low == high and abs((value or 0) - 1) < 1e-9
    return 3 / rows if same and rows is not None and rows >= 3 else None


def _surely(found: Mapping[str, Any]) -> Cell:
    """The same as a cell."""
    told, _, more = kept_interval(found).partition(" (")
    return Cell(told, more.rstrip(")"))


def kept_interval(found: Mapping[str, Any]) -> str:
    """A retention's interval; where nothing differed, that instead."""
    share = unchanged(found)
    return interval(found) if share is None else f"none of {count(figure(found, 'n'))} differs (95 %: under {percent(share)})"


def domains(scored: Sequence[Quality], records: Sequence[Record]) -> Section:
    """Retention of each domain by each variant, the loss as colour; a table for the variants that share their rows."""
    title = "Where quality was lost"
    compared = [one for one in scored if any(figure(each, "reference_score") is not None for each in _domains(one).values())]
    if not compared:
        how = "No domain has been compared with a reference: `edgeml eval BUNDLE --reference FULL --data DATA --records FILE` does that."
        return Section("domains", title, how)
    groups = grouped([one for one in compared if not one.itself] or compared)
    blocks = [block for group in groups[:MOST_GROUPS] for block in _heat_of(group, len(groups) > 1)]
    if len(groups) > MOST_GROUPS:
        left = plural(len(groups) - MOST_GROUPS, "more evaluation")
        blocks.append(f"Left out: {left} of other rows; `edgeml report --format csv` has them.")
    near = any(mapping(each, "retention").get("near_clip") for one in compared for each in map(mapping, _domains(one).values()))
    if near:
        blocks.append("Near chance: the variant's score comes down to chance, where such an interval is known to be too narrow.")
    excluded = list(dict.fromkeys(clean(name) for _, document in documents(records, "eval") for name in items(document, "excluded")))
    if excluded:
        why = "Left out of the retention of all tasks, because the reference itself is hardly above chance"
        blocks.append(f"{why}: {listed(excluded)}.")
    lead = "100 % is as good as the reference, 0 % is chance; above 100 % the variant does better."
    return Section("domains", title, lead, blocks)


def _heat_of(compared: Sequence[Quality], several: bool) -> list[Block]:
    """One table of domains and, folded away, one of tasks."""
    about = f"; {rows_of(compared[0])}" if several else ""
    variants = numbered([clean(one.name) for one in compared])
    names = list(dict.fromkeys(name for one in compared for name in _domains(one)))
    rows = [[Cell(clean(name), _rows_of(compared, name)), *(_heat(_domains(one), name) for one in compared)] for name in names]
    if any(one.retention for one in compared):
        rows.append([Cell("all tasks"), *(_kept(one.figures.get("retention")) for one in compared)])
    caption = f"Retention: the share of the reference's score above chance that is kept, with its 95 % interval{about}"
    table = Table(caption, [Column("domain"), *(Column(name, True) for name in variants)], rows, SHADES)
    return [table, *_tasks(compared, variants, about)]


def _tasks(compared: Sequence[Quality], variants: Sequence[str], about: str) -> list[Block]:
    """Scores of each task, folded away."""
    names = list(dict.fromkeys(name for one in compared for name in mapping(one.figures, "tasks")))
    rows = []
    for name in names:
        found = [mapping(one.figures, "tasks").get(name) for one in compared]
        first = next((mapping(one) for one in found if mapping(one)), {})
        reference = figure(first, "reference_score")
        kind = ", ".join(clean(first[key]) for key in ("domain", "metric") if text(first, key))
        cells = [Cell(percent(figure(one, "score"), False), _change(figure(one, "score"), reference)) for one in found]
        rows.append([Cell(clean(name), kind), Cell(count(figure(first, "n"))), Cell(percent(reference, False)), *cells])
    columns = [Column("task"), Column("n", True), Column("reference", True), *(Column(name, True) for name in variants)]
    return [Table(f"Scores of each task in %, with the difference in points{about}", columns, rows, folded=True)] if rows else []


def _change(score: float | None, reference: float | None) -> str:
    return "" if score is None or reference is None else points(score - reference, False)


def indices(scored: Sequence[Quality], records: Sequence[Record]) -> Section:
    """DSI, GG and CDTR with intervals and what they mean."""
    title = "Brittleness"
    rows: list[list[Cell]] = []
    whys: list[str] = []
    tables: list[Block] = []
    evaluations = [document for _, document in documents(records, "eval")]
    names = _evaluations(records)
    telling = [document for document in evaluations if any(mapping(document, key) for key in ("dsi", "cdtr", "transfer"))]
    for name, document in zip(names, evaluations, strict=True):
        about = name if len(telling) > 1 else ""
        tables += _transfer(mapping(document, "transfer"), about)
        for key, index, meaning in (("dsi", "DSI", _dsi_meaning), ("cdtr", "CDTR", _cdtr_meaning)):
            if mapping(document, key):
                rows.append(_index(index, about, mapping(document, key), ratio, meaning))
        of = f" of {name}" if len(evaluations) > 1 else ""
        whys += [f"No DSI and CDTR{of}: {clean(why, 300)}." for why in (text(document, "why"),) if why]
        told = figure(document, "dsi_route")
        if told is not None:
            says = "Without labels: how much of a text's domain its choice of experts tells (0: nothing, 1: all of it)."
            head = f"DSI by routing, {about}" if about else "DSI by routing"
            rows.append([Cell(head, says), Cell(ratio(told), f"{count(figure(document, 'routed_choices'))} choices")])
    several = len(grouped(scored)) > 1
    for one, name in zip(scored, numbered([clean(one.name) + (f", {rows_of(one)}" if several else "") for one in scored]), strict=True):
        if mapping(one.figures, "gg") and not one.itself:
            rows.append(_index("GG", name if len(scored) > 1 else "", mapping(one.figures, "gg"), points, _gg_meaning))
        whys += [f"No GG of {named(name)}: {clean(why, 300)}." for why in (text(one.figures, "why"),) if why and not one.itself]
    reasons = list(dict.fromkeys(whys))
    if len(reasons) > MOST_REASONS:
        reasons = [*reasons[:MOST_REASONS], f"{plural(len(reasons) - MOST_REASONS, 'more reason')} of this kind."]
    if not rows:
        how = "DSI, GG and CDTR need at least two domains: `edgeml eval BUNDLE --reference FULL --data DATA --records FILE` measures them."
        return Section("indices", title, " ".join([how, *reasons]))
    columns = [Column("index and what it means"), Column("value and 95 % interval")]
    table = Table("Indices, with intervals by a paired bootstrap over the test rows", columns, rows)
    return Section("indices", title, OURS, [table, *reasons, *_explained(), *tables])


def _evaluations(records: Sequence[Record]) -> list[str]:
    """A name for each evaluation: its bundle and rows."""
    names = []
    for record, document in documents(records, "eval"):
        first = mapping(next(iter(items(document, "variants")), None)) or document
        bundle = clean(text(record, "bundle") or "unnamed").removesuffix(".edgeml")
        names.append(f"{bundle}, {rows_told(rows_in(record, first))}")
    return numbered(names)


def _configurations(records: Sequence[Record], scored: Sequence[Quality]) -> list[_Configuration]:
    """Every timed configuration with a quality, then what was scored and not timed; with one cost at least."""
    bench = [record for record, _ in documents(records, "bench")]
    timed = [(record, quality) for record, quality in zip(bench, qualities_of(bench, scored), strict=True) if quality is not None]
    names = labels([record for record, _ in timed])[0] if timed else []
    pairs = [
        (name, quality, {"size": weights_of(record), "latency": figure(record, "latency_s.p50")})
        for name, (record, quality) in zip(names, timed, strict=True)
    ]
    used = {id(quality) for _, quality in timed}
    pairs += [
        (clean(one.name), one, {"size": None if one.kept else weights_of(one.figures), "latency": None})
        for one in scored
        if id(one) not in used
    ]
    return [
        _Configuration(name, quality, costs)
        for name, quality, costs in pairs
        if any(cost is not None for cost in costs.values()) and any(figure(quality.figures, key) is not None for key in SCORES)
    ]


def _ends(found: object) -> tuple[float, float] | None:
    low, high = figure(found, "low"), figure(found, "high")
    return None if low is None or high is None else (100 * low, 100 * high)


def _domains(one: Quality) -> Mapping[str, Any]:
    return mapping(one.figures, "domains")


def _rows_of(compared: Sequence[Quality], name: str) -> str:
    sizes = [figure(_domains(one).get(name), "n") for one in compared]
    return next((f"{count(size)} rows" for size in sizes if size is not None), "")


def _heat(found: Mapping[str, Any], name: str) -> Cell:
    domain = found.get(name)
    if not mapping(domain):
        return Cell(UNMEASURED)
    if mapping(domain, "retention"):
        return _kept(mapping(domain, "retention"))
    size, chance, reference = figure(domain, "n"), figure(domain, "chance"), figure(domain, "reference_score")
    if size is not None and size < FEWEST:
        return Cell("not given", f"{count(size)} rows are too few")
    if None not in (chance, reference) and float(reference or 0) - float(chance or 0) < 0.01:
        return Cell("not given", "reference at chance")
    return Cell(UNMEASURED)


def _kept(found: object) -> Cell:
    value = figure(found, "value")
    if value is None:
        return Cell(UNMEASURED)
    if mapping(found).get("near_clip"):
        return Cell(percent(value), f"{interval(mapping(found))}, near chance")
    return Cell(percent(value), kept_interval(mapping(found)), level=_level(value))


def _level(value: float) -> int:
    return next((number for number, (least, _) in enumerate(LEVELS) if round(value, 3) >= least), len(LEVELS) - 1)


def _transfer(found: Mapping[str, Any], about: str) -> list[Block]:
    """T of every domain's set on every domain, as a table; nothing where it was not measured."""
    names = [clean(name) for name in items(found, "domains")]
    rows = [items({"row": row}, "row") for row in items(found, "ratios")]
    if not names or len(rows) != len(names) or any(len(row) != len(names) for row in rows):
        return []
    cells = [[_ratio(value) for value in row] for row in rows]
    caption = "Transfer in %: what the experts of the row's domain bring on the column's, of what its own bring"
    if any(value is None for row in rows for value in row):
        caption += "; undefined where even those bring next to nothing"
    caption += f"; {about}" if about else ""
    heads = [Column("experts of"), *(Column(name, True) for name in names)]
    return [Table(caption, heads, [[Cell(name), *row] for name, row in zip(names, cells, strict=True)], [INTERFERES], True)]


def _ratio(value: object) -> Cell:
    share = figure({"value": value}, "value")
    return Cell(UNDEFINED) if share is None else Cell(count(100 * share), level=INTERFERES[0] if share < 0 else None)


def _index(name: str, variant: str, found: Mapping[str, Any], show: Any, meaning: Any) -> list[Cell]:
    value, low, high = (figure(found, key) for key in ("value", "low", "high"))
    whisker = None
    if value is not None and low is not None and high is not None:
        whisker = _whisker(name, low, value, high)
    doubt = " Scores here are near chance, so the interval is not to be trusted." if found.get("near_clip") else ""
    says = meaning(value, low, high) + doubt if value is not None else UNMEASURED
    head = Cell(f"{name}, {variant}" if variant else name, says)
    rows = count(figure(found, "n"))
    told = f"{interval(found, show)}, n\u00a0=\u00a0{rows}"
    if name == "GG" and value == low == high == 0:
        told, whisker = f"no interval: no answer of {rows} differs", None
    return [head, Cell(show(value), told, whisker=whisker)]


def _whisker(name: str, low: float, value: float, high: float) -> Whisker:
    """DSI on [-1, 1], CDTR on [0, 1], GG on a few points around 0; wider where the interval is."""
    start, end, mark = {"DSI": (-1.0, 1.0, 0.0), "CDTR": (0.0, 1.0, 1.0), "GG": (-0.02, 0.02, 0.0)}[name]
    return Whisker(low, value, high, min(start, low), max(end, high), mark)


def _sure(low: float | None, high: float | None, level: float = 0.0) -> bool:
    """Whether the interval keeps clear of `level`."""
    return low is not None and high is not None and not low <= level <= high


def _dsi_meaning(value: float, low: float | None, high: float | None) -> str:
    if low is not None and high is not None and not _sure(low, high):
        return "No sign that a set made for one domain is better at home than elsewhere."
    if value < 0:
        return "Sets made for one domain keep less at home than elsewhere: the specialisation failed or is mislabelled."
    amount = "hardly more" if value < 0.05 else "somewhat more" if value < 0.2 else "much more"
    return f"A set of experts made for one domain keeps {amount} at home than elsewhere (0: the same everywhere, 1: only at home)."


def _gg_meaning(value: float, low: float | None, high: float | None) -> str:
    if low is None or not _sure(low, high):
        return "Unseen domains did not measurably lose more than the ones calibration saw."
    if value < 0:
        return f"Unseen domains lost {points(-value).lstrip('+')} less than the ones calibration saw."
    return f"Brittle: unseen domains lost {points(value).lstrip('+')} more than the ones calibration saw."


def _cdtr_meaning(value: float, low: float | None, high: float | None) -> str:
    if value < 0:
        return "Another domain's experts are worse than none: they interfere."
    return f"Another domain's experts bring {percent(min(value, 9.0))} of what the right ones bring (1: as good, 0: no help)."


def _explained() -> list[str]:
    return [
        "DSI, domain specialisation: how much more a set made for one domain keeps at home than on the others. "
        "GG, generalisation gap: the loss on domains that calibration did not see, less the loss on those it saw. "
        "CDTR, cross-domain transfer: what other domains' experts gain over none, as a share of what the right ones gain."
    ]
