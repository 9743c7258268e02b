"""The sections about time and memory: latency, page-ins, what holds the memory, which experts work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgeml_report import plots
from edgeml_report.content import Block, Cell, Column, Plot, Section, Table
from edgeml_report.runs import Record, documents, figure, items, labels, mapping, runs_of, text
from edgeml_report.text import UNMEASURED, clean, count, interval, listed, mib, milliseconds, named, number, percent, plural, ratio

__all__ = ["experts", "latency", "memory", "paging"]

Spread = Mapping[str, float | None]
PERCENTILES = ("min", "p50", "p90", "p95", "p99", "max")
MOST_DRAWN = 16
#: So many profiles and routing records are shown in detail.
MOST_DETAILED = 6
NONE = "\u2013"


def latency(records: Sequence[Record]) -> Section:
    """Percentiles of every timed configuration, warm and cold."""
    title = "Latency"
    timed = [record for record, _ in documents(records, "bench") if figure(record, "latency_s.p50") is not None]
    if not timed:
        return Section("latency", title, "Nothing was timed: `edgeml bench BUNDLE --task TASK --records FILE` does that.")
    names, shared = labels(timed)
    rows: list[list[Cell]] = []
    drawn: list[tuple[str, Spread, Spread]] = []
    slowest = max(figure(record, f"{phase}latency_s.p50") or 0 for record in timed for phase in ("", "cold."))
    for name, record in zip(names, timed, strict=True):
        warm, cold = _spread(record), _spread(mapping(record, "cold"))
        drawn.append((name, warm, cold))
        rows.append(_percentiles(name, _hidden_costs(record), record, warm, slowest))
        if cold.get("p50") is not None:
            rows.append(_percentiles(name, "cold: no expert in memory", mapping(record, "cold"), cold, slowest))
    medians = sorted((spread["p50"] or 0, name) for name, spread, _ in drawn)
    alt = f"Median latency of {plural(len(drawn), 'configuration')}: {milliseconds(medians[0][0])} ({medians[0][1]})"
    alt += f" to {milliseconds(medians[-1][0])} ({medians[-1][1]})." if len(drawn) > 1 else "."
    drawn = drawn[:MOST_DRAWN]
    plot = Plot(
        "latency",
        "Latency, from the quickest answer to the slowest",
        alt,
        plots.spreads(drawn),
        height=96 + (48 if len(rows) > len(timed) else 36) * len(drawn),
    )
    caption = "Latency of an answer in ms" + (f"; {shared}" if shared else "")
    columns = [
        Column("configuration"),
        *(Column({"p50": "p50 (median)"}.get(key, key), True) for key in PERCENTILES),
        Column("rounds", True),
    ]
    lead = (
        "Half of the answers took no longer than p50, 95 of 100 no longer than p95. p99 is given from 100 rounds on. Below: 95 % intervals."
    )
    doubtful = [name for name, record in zip(names, timed, strict=True) if record.get("throttled") is True or record.get("valid") is False]
    notes = [f"Not valid, the processor slowed itself down meanwhile: {listed(doubtful)}."] if doubtful else []
    return Section("latency", title, lead, [plot, Table(caption, columns, rows), *notes, *_load(names, timed), *_compared(names, timed)])


def _compared(names: Sequence[str], timed: Sequence[Record]) -> list[Block]:
    """What `edgeml bench --compare` found."""
    rows = []
    for name, record in zip(names, timed, strict=True):
        found = mapping(record, "compare")
        ends = {end: figure(found, f"ratio.{end}") for end in ("low", "high")}
        if found and None not in ends.values():
            verdict = text(found, "difference") or "no difference found"
            other = clean(text(found, "with.bundle") or text(found, "with.records") or "another")
            refused = "more than was allowed" if found.get("refused") is True else ""
            rows.append(
                [
                    Cell(name, f"against {other}"),
                    Cell(ratio(figure(found, "ratio.value"))),
                    Cell(interval(ends, ratio)),
                    Cell(verdict, refused),
                ]
            )
    heads = ("configuration", "its time over the other's", "98 % interval", "verdict")
    return [Table("Comparison in turns", [Column(head, 0 < place < 3) for place, head in enumerate(heads)], rows)] if rows else []


def _load(names: Sequence[str], timed: Sequence[Record]) -> list[Block]:
    """Of workloads whose requests overlap: what came, what was answered, and what was not."""
    rows = []
    for name, record in zip(names, timed, strict=True):
        mix = mapping(record, "mix")
        if mix:
            rates = [number(figure(mix, key)) if figure(mix, key) is not None else NONE for key in ("offered_per_s", "answered_per_s")]
            amounts = [count(figure(mix, key)) for key in ("requests", "refused", "late")]
            share = figure(record, "stand_in_share")
            rows.append([Cell(name), *map(Cell, (*rates, *amounts, NONE if share is None else percent(share, False)))])
    heads = ("configuration", "requests/s offered", "answered/s", "requests", "refused", "too late", "stand-in %")
    caption = "Load: requests that overlap; their latency counts from when each was meant to come"
    return [Table(caption, [Column(head, place > 0) for place, head in enumerate(heads)], rows)] if rows else []


def paging(records: Sequence[Record]) -> Section:
    """When pages came in, and what that cost."""
    title = "Page-ins"
    blocks: list[Block] = []
    found = [(record, document) for record, document in documents(records, "profile") if items(document, "page_ins")]
    for place, ((_, document), name) in enumerate(zip(found[:MOST_DETAILED], runs_of(found), strict=False), 1):
        blocks += _timeline(document, place, name, len(found) > 1)
    blocks.sort(key=lambda block: isinstance(block, str))  # plots stand beside each other
    blocks += _left_out(len(found), "profile")
    timed = [record for record, _ in documents(records, "bench") if figure(record, "pageable_pages")]
    if timed:
        names, shared = labels(timed)
        columns = [
            Column("configuration"),
            Column("hit rate", True),
            Column("page-ins", True),
            Column("read MiB", True),
            Column("waited ms", True),
        ]
        rows = []
        for name, record in zip(names, timed, strict=True):
            rounds, hits, misses = (figure(record, key) for key in ("rounds", "hits", "misses"))
            wanted = (hits or 0) + (misses or 0)
            each = [
                None if not rounds or figure(record, key) is None else float(figure(record, key) or 0) / rounds
                for key in ("misses", "page_in_bytes", "page_wait_s")
            ]
            rows.append(
                [
                    Cell(name),
                    Cell(percent((hits or 0) / wanted) if wanted else "none wanted"),
                    Cell(number(each[0])),
                    Cell(mib(each[1], False)),
                    Cell(milliseconds(each[2], False)),
                ]
            )
        blocks.append(Table("Page-ins of an answer, warm" + (f"; {shared}" if shared else ""), columns, rows))
    if not any(isinstance(block, Plot) for block in blocks):
        blocks = [*blocks, "`edgeml profile BUNDLE --records FILE` records when each page came in."] if blocks else []
    if not blocks:
        return Section("paging", title, "No page-in was recorded: `edgeml profile BUNDLE --records FILE` does that.")
    return Section("paging", title, "An expert that is not in memory is a page that has to be read before the answer can go on.", blocks)


def memory(records: Sequence[Record]) -> Section:
    """What the process's memory is made of."""
    title = "Memory by part"
    timed = [record for record, _ in documents(records, "bench") if figure(record, "peak_rss_bytes") is not None]
    if not timed:
        return Section("memory", title, "Memory was not measured: `edgeml bench BUNDLE --records FILE` does that.")
    names, shared = labels(timed)
    parts = [_parts(record) for record in timed]
    keys = [key for key in dict.fromkeys(key for part in parts for key in part) if any(part.get(key) for part in parts)]
    shown = [part for part in parts if all(part.get(key, 0.0) is not None for key in keys)][:MOST_DRAWN]
    drawn: list[Block] = []
    if len(shown) == min(len(parts), MOST_DRAWN):
        figures = {key: [float(part.get(key) or 0) / (1 << 20) for part in shown] for key in keys}
        total = [sum(float(part.get(key) or 0) for key in keys) for part in shown]
        alt = (
            f"Peak memory by part: {named(names[0])} takes {mib(total[0])}, of which "
            + listed([f"{mib(shown[0].get(key, 0.0))} {key}" for key in keys], 9)
            + "."
        )
        draw = plots.stacks(names[:MOST_DRAWN], figures)
        drawn.append(Plot("memory", "Peak memory of the process by part", alt, draw, height=100 + 42 * len(shown)))
    columns = [Column("configuration"), *(Column(key, True) for key in keys), Column("peak of the process", True)]
    rows = [
        [Cell(name), *(Cell(mib(part.get(key, 0.0), False)) for key in keys), Cell(mib(figure(record, "peak_rss_bytes"), False))]
        for name, part, record in zip(names, parts, timed, strict=True)
    ]
    paged = "Pinned weights, slots for experts and scratch are the memory budget; the rest is "
    lead = f"{paged if 'scratch' in keys else 'Everything else is '}Python, its libraries and what answering takes."
    return Section("memory", title, lead, [*drawn, Table("Memory in MiB" + (f"; {shared}" if shared else ""), columns, rows)])


def experts(records: Sequence[Record]) -> Section:
    """How often each expert of each site was chosen."""
    title = "Which experts work"
    blocks: list[Block] = []
    used = _usage(records)
    for place, (name, site_counts) in enumerate(used[:MOST_DETAILED], 1):
        blocks += _usage_map(name, site_counts, place)
    blocks += _left_out(len(used), "count of experts", "counts of experts")
    followed = documents(records, "routing")
    for place, ((_, document), name) in enumerate(zip(followed[:MOST_DETAILED], runs_of(followed), strict=False), 1):
        blocks += _locality(document, place, name, len(followed) > 1)
    blocks += _left_out(len(followed), "routing record")
    if not blocks:
        return Section("experts", title, "No choice of experts was counted: `edgeml profile BUNDLE --records FILE` does that.")
    return Section("experts", title, "A site is a place in the network where each token chooses some of its experts.", blocks)


def _left_out(amount: int, what: str, many: str = "") -> list[str]:
    left = amount - MOST_DETAILED
    told = f"{count(left)} more {what if left == 1 else many or what + 's'}"
    return [f"Left out: {told}; a report of fewer records shows them."] if left > 0 else []


def _spread(found: Mapping[str, Any]) -> Spread:
    return {key: figure(found, f"latency_s.{key}") for key in PERCENTILES}


def _percentiles(name: str, note: str, found: Mapping[str, Any], spread: Spread, slowest: float) -> list[Cell]:
    """A row of the table; the bar is for pages without plots."""
    rounds = figure(found, "rounds")
    cells = [_time(found, key, spread[key], rounds) for key in PERCENTILES]
    middle = PERCENTILES.index("p50")
    cells[middle] = replace(cells[middle], bar=min(1.0, (spread["p50"] or 0) / slowest) if slowest else None)
    return [Cell(name, note), *cells, Cell(count(rounds))]


def _time(found: object, key: str, value: float | None, rounds: float | None) -> Cell:
    if value is None:
        return Cell("not given") if key == "p99" and rounds is not None else Cell(UNMEASURED)
    sure = {end: figure(found, f"latency_s.{key}_interval.{end}") for end in ("low", "high")}
    whole = None not in sure.values() or (key == "p99" and sure["low"] is not None)
    return Cell(milliseconds(value, False), interval(sure, milliseconds) if whole else "")


def _hidden_costs(record: Record) -> str:
    """What a quick answer may have cost in quality."""
    share = figure(record, "masked_share")
    return f"{percent(share)} of tokens ran masked" if share else ""


def _parts(record: Record) -> dict[str, float | None]:
    """Bytes by what they are for; of a network without pages its weights are its graphs."""
    known = {
        "pinned weights": figure(record, "pinned_bytes"),
        "slots for experts": _slots(record),
        "scratch": figure(record, "scratch_bytes"),
    }
    if figure(record, "pageable_pages") == 0:
        known = {"graphs with their weights": figure(record, "graph_bytes")}
    peak = figure(record, "peak_rss_bytes")
    rest = None if peak is None or None in known.values() else max(0.0, peak - sum(value or 0 for value in known.values()))
    return {**known, plots.REST: rest}


def _slots(record: Record) -> float | None:
    slots, each = figure(record, "slots"), figure(record, "slot_bytes")
    return None if slots is None or each is None else slots * each


def _timeline(document: Mapping[str, Any], place: int, name: str, several: bool) -> list[Block]:
    events = [mapping(one) for one in items(document, "page_ins")]
    found = [(figure(one, "start_s"), figure(one, "end_s"), figure(one, "bytes")) for one in events]
    known = sorted((start, end, size) for start, end, size in found if start is not None and end is not None and size is not None)
    if not known:
        return []
    total, busy = sum(size for _, _, size in known), max(end for _, end, _ in known)
    alt = f"{plural(len(known), 'page-in')} of {mib(total)} in {milliseconds(busy)}; "
    alt += f"half of the bytes had come by {milliseconds(_half(known, total))}."
    draw = plots.timeline([(1e3 * start, 1e3 * end, size / (1 << 20)) for start, end, size in known])
    alt = f"{name}: {alt}" if several else alt
    return [Plot(f"timeline-{place}", f"When pages came in, {name}", alt, draw, height=250, wide=False), alt]


def _half(events: Sequence[tuple[float, float, float]], total: float) -> float:
    done = 0.0
    for _, end, size in events:
        done += size
        if 2 * done >= total:
            return end
    return 0.0


def _usage(records: Sequence[Record]) -> list[tuple[str, list[tuple[str, list[float]]]]]:
    """Of each profile or routing record: its name and its sites with how often each expert was chosen."""
    found = []
    kinds = {kind: documents(records, kind) for kind in ("profile", "routing")}
    for kind, of_kind in kinds.items():
        for name_of, (_, document) in zip(runs_of(of_kind), of_kind, strict=True):
            run = f"{kind} of {name_of}" if all(kinds.values()) else name_of
            sites = [
                (
                    clean(text(one, "name") or "site"),
                    [max(0.0, figure({"n": n}, "n") or 0.0) for n in items(one, "expert_calls") or items(one, "usage")],
                )
                for one in map(mapping, items(document, "sites"))
            ]
            sites = [(name, calls) for name, calls in sites if calls and sum(calls) > 0]
            if sites:
                found.append((run, sites))
    return found


def _usage_map(run: str, sites: Sequence[tuple[str, list[float]]], place: int) -> list[Block]:
    shares = [(name, [value / sum(calls) for value in calls]) for name, calls in sites]
    idle = sum(value == 0 for _, calls in sites for value in calls)
    total = sum(len(calls) for _, calls in sites)
    alt = f"{plural(len(sites), 'site')} with {plural(total, 'expert')}: {count(idle)} were never chosen."
    rows = []
    for name, calls in shares:
        order = sorted(range(len(calls)), key=lambda expert: -calls[expert])
        quarter = sum(sorted(calls, reverse=True)[: max(1, len(calls) // 4)])
        rows.append(
            [
                Cell(name),
                Cell(count(len(calls))),
                Cell(percent(quarter)),
                Cell(count(sum(value == 0 for value in calls))),
                Cell(", ".join(map(str, order[:4]))),
            ]
        )
    columns = [
        Column("site"),
        Column("experts", True),
        Column("choices of the busiest quarter", True),
        Column("never chosen", True),
        Column("busiest experts"),
    ]
    title = f"How often each expert was chosen, in times its even share; {run}"
    plot = Plot(f"usage-{place}", title, alt, plots.usage(shares), height=96 + 20 * min(len(sites), 40))
    return [plot, Table(f"Experts by site, {run}", columns, rows, folded=len(rows) > 12)]


def _locality(document: Mapping[str, Any], place: int, bundle: str, several: bool) -> list[Block]:
    """What routing's own document says in short: its advice, what a cache makes of the choices, and how predictable they are."""
    of = f", {bundle}" if several else ""
    blocks: list[Block] = [f"Advice of `edgeml routing`{of}: {clean(advice, 600)}" for advice in (text(document, "advice"),) if advice]
    curves = {clean(name): _curve(document, name) for name in mapping(document, "hit_rate")}
    curves = {name: curve for name, curve in curves.items() if curve}
    if curves:
        ratios = sorted({held for curve in curves.values() for held in curve})
        least = {name: curve[min(curve)] for name, curve in curves.items()}
        told = listed([f"{percent(rate)} under {name}" for name, rate in least.items()], 9)
        alt = f"Hit rate against how many experts are held. With the fewest, {number(min(ratios))} times those a token uses: {told}."
        blocks.append(
            Plot(f"hits-{place}", f"How often an expert is in memory, by policy; {bundle}", alt, plots.curves(curves), height=290)
        )
        if "belady" in curves and place == 1:
            blocks.append("belady knows the future: no policy can do better.")
        rows = [[Cell(f"{number(held)} times"), *(Cell(percent(curve.get(held))) for curve in curves.values())] for held in ratios]
        heads = [Column("held, of those a token uses"), *(Column(name, True) for name in curves)]
        blocks.append(Table(f"Hit rate by policy, all sites sharing one cache, warm; {bundle}", heads, rows, folded=True))
    lengths = sorted(mapping(document, "srp"), key=lambda length: (len(length), length))
    rows = [_predictable(document, length) for length in lengths if mapping(document, f"srp.{length}")]
    if rows:
        caption = f"SRP: of the choices in a segment, the share that its best fixed set covers; {bundle}"
        blocks.append(
            Table(caption, [Column("segment"), Column("SRP", True), Column("95 % interval", True), Column("by chance", True)], rows)
        )
    return blocks


def _curve(document: Mapping[str, Any], name: str) -> dict[float, float]:
    """Capacity ratio -> hit rate of a policy; what is not a pair of numbers is left out."""
    pairs = [{"pair": pair} for pair in items(document, f"hit_rate.{name}")] if "." not in name else []
    found = [(items(pair, "pair")) for pair in pairs]
    known = [(figure({"x": pair[0]}, "x"), figure({"y": pair[1]}, "y")) for pair in found if len(pair) == 2]
    return {held: rate for held, rate in known if held is not None and held > 0 and rate is not None}


def _predictable(document: Mapping[str, Any], length: str) -> list[Cell]:
    found = mapping(document, f"srp.{length}")
    share, chance = figure(found, "value"), figure(document, f"srp_null.{length}")
    return [Cell(f"{clean(length)} tokens"), Cell(ratio(share)), Cell(interval(found, ratio)), Cell(ratio(chance))]
