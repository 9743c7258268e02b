"""The document of `edgeml eval` for people: figures in hundredths, differences in points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgeml.commands._eval_document import spread
from edgeml.commands._options import printable

__all__ = ["table"]

MOST_PAIRS = 8


def table(document: Mapping[str, Any]) -> Iterator[str]:
    """The document, line by line."""
    yield from _tasks(document)
    yield from _sums(document)
    if len(document["variants"]) > 1:
        yield ""
        yield from _variants(document["variants"], document["reference"] is not None)
    if document["reference"] is not None and len(document["domains"]) > 1:
        yield ""
        yield from _domains(document["variants"])
        yield from _gaps(document["variants"])
    if document["transfer"] is not None:
        yield ""
        yield from _specialised(document)
    if any(entry["gg"] is not None for entry in document["variants"]) or document["transfer"] is not None:
        yield ""
        yield document["formulas"]
    if "learned" in document:
        yield ""
        yield from _learned(document["learned"])


def _tasks(document: Mapping[str, Any]) -> Iterator[str]:
    compared = document["reference_mean"] is not None
    width = max(len("mean"), *(len(name) for name in document["tasks"]))
    domains = max(len("domain"), *(len(printable(task["domain"])) for task in document["tasks"].values()))
    yield f"{'task':<{width}}  {'domain':<{domains}}  {'metric':<8}  {'n':>6}  chance  score" + ("  reference   diff" if compared else "")
    for name, task in document["tasks"].items():
        line = f"{name:<{width}}  {printable(task['domain']):<{domains}}  {task['metric']:<8}  {task['n']:>6}  "
        line += f"{task['chance']:>6.1%}  {task['score']:>5.1%}".replace("%", "")
        yield line + _difference(task["score"], task["reference_score"])
    blank = f"{'mean':<{width}}  {'':<{domains}}  {'':<8}  {'':>6}  {'':>6}  "
    yield blank + f"{100 * document['mean']:>5.1f}" + _difference(document["mean"], document["reference_mean"])


def _sums(document: Mapping[str, Any]) -> Iterator[str]:
    if document["reference_mean"] is not None:
        kept = document["retention"]
        if kept is None and len(document["excluded"]) < len(document["tasks"]):
            yield "retention: none, the tasks have fewer than 30 rows in all"
        elif kept is None:
            yield "retention: none, no reference score is 10 points above chance"
        else:
            between = "" if kept["low"] is None else f", 95 % between {kept['low']:.1%} and {kept['high']:.1%}"
            yield f"retention: {kept['value']:.1%}{between} ({kept['n']} rows)"
    if document["excluded"]:
        yield f"left out of retention, the reference is less than 10 points above chance: {', '.join(document['excluded'])}"
    if document["skipped"]:
        yield f"skipped, the bundle has no such task: {printable(', '.join(document['skipped']))}"


def _variants(entries: Sequence[Mapping[str, Any]], compared: bool) -> Iterator[str]:
    """A line for each variant."""
    figures = [key for key in ("retention", "gg") if compared and any(entry[key] is not None for entry in entries)]
    heads = {"retention": "retention %", "gg": "GG points"}
    rows: list[Sequence[str]] = [("variant", "residency", "weights MiB", "experts", "mean", *(heads[key] for key in figures))]
    for entry in entries:
        kept = "all" if entry["experts_kept"] is None else f"{entry['experts_kept']:.0%}"
        kept += f" for {printable('+'.join(map(str, entry['kept_for'])))}" if entry["kept_for"] else ""
        weights = entry["memory_budget_bytes" if entry["pageable_pages"] else "graph_bytes"]  # of images the graphs are the weights
        cells = [printable(entry["name"]), entry["residency"] or "-", "-" if weights is None else f"{weights / 2**20:.1f}", kept]
        rows.append((*cells, f"{100 * entry['mean']:.1f}", *("-" if entry[key] is None else spread(entry[key], 100) for key in figures)))
    yield from _columns(rows, 1)


def _domains(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each domain's retention, a column for each variant."""
    yield "retention of each domain in %, corrected for chance (~: near chance, the interval is not to be trusted)"
    rows: list[Sequence[str]] = [("domain", "n", *(printable(entry["name"]) for entry in entries))]
    for name, first in entries[0]["domains"].items():
        cells = []
        for entry in entries:
            kept = entry["domains"][name]["retention"]
            text = "-" if kept is None else f"{100 * kept['value']:.1f} ({100 * kept['low']:.1f} to {100 * kept['high']:.1f})"
            cells.append(text + ("~" if kept and kept.get("near_clip") else ""))
        rows.append((printable(name), str(first["n"]), *cells))
    yield from _columns(rows, 1)


def _gaps(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not any(entry["gg"] is not None for entry in entries) and len({entry["why"] for entry in entries}) == 1:
        yield f"GG: none, {entries[0]['why']}"
        return
    for entry in entries:
        name = printable(entry["name"])
        if entry["gg"] is None:
            yield f"GG of {name}: none, {entry['why']}"
        else:
            unseen = printable(", ".join(entry["unseen"]))
            yield f"GG of {name}: {spread(entry['gg'], 100)} points more lost on {unseen} than on the domains it was made with"
            if entry["forgetting"] is not None:
                yield f"forgetting of {name}: {spread(entry['forgetting'], 100)} % of what is above chance is lost there"


def _specialised(document: Mapping[str, Any]) -> Iterator[str]:
    names, moved = [printable(name) for name in document["transfer"]["domains"]], document["transfer"]
    share = "" if document["specialised_share"] is None else f" of {document['specialised_share']:.0%} of the experts"
    yield f"sets{share}, by domain: score of the set (row) on the domain (column)"
    rows: list[Sequence[str]] = [("set", *names)]
    rows += [(name, *(f"{100 * score:.1f}" for score in row)) for name, row in zip(names, moved["scores"], strict=True)]
    if moved["baseline"] is not None:
        rows.append(("none", *(f"{100 * score:.1f}" for score in moved["baseline"])))
    yield from _columns(rows, 1)
    if document["dsi"] is None:
        yield f"DSI: none, {document['why']}"
    else:
        most = document["dsi_max"]["value"]
        yield f"DSI: {spread(document['dsi'], digits=3)}, largest {most:.3f}; 0 equally good everywhere, 1 only at home"
    if document["dsi_route"] is not None:
        yield f"DSI_route: {document['dsi_route']:.3f}; 0 routing ignores the domain, 1 the experts tell it"
    if document["cdtr"] is not None:
        yield f"CDTR: {spread(document['cdtr'], digits=3)}; 1 another domain's set is as good, 0 no help, below interference"
        if moved["above_one"]:
            pairs = [f"{home} on {away}" for home, away in moved["above_one"]]
            more = f" and {len(pairs) - MOST_PAIRS} more" if len(pairs) > MOST_PAIRS else ""
            yield f"better than the domain's own set: {printable(', '.join(pairs[:MOST_PAIRS]))}{more}"
    elif document["why"] is None:
        why = "some site has no shared expert" if moved["baseline"] is None else "no set is a point better than none"
        yield f"CDTR: none, {why}"
    if document["excluded_domains"]:
        yield f"left out, the reference is less than 1 point above chance: {printable(', '.join(document['excluded_domains']))}"


def _learned(told: Mapping[str, Any]) -> Iterator[str]:
    yield "T of each domain's resident set (row) on the domain (column): above 0, it may stand in where a deadline is near"
    names = [printable(name) for name in told["domains"]]
    rows = [(name, *("-" if ratio is None else f"{ratio:.2f}" for ratio in row)) for name, row in zip(names, told["ratios"], strict=True)]
    yield from _columns([("set", *names), *rows], 1)


def _difference(score: float, reference: float | None) -> str:
    return "" if reference is None else f"  {100 * reference:>9.1f}  {round(100 * (score - reference), 1) + 0.0:>+5.1f}"


def _columns(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Cells under each other, the first `left` columns flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (f"{cell:<{w}}" if n < left else f"{cell:>{w}}" for n, (cell, w) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join(cells).rstrip()
