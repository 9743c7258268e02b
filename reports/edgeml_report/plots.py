"""Plots as inline SVG by matplotlib (extra `plots`), in the page's own colours and fonts.

matplotlib draws with colours that stand for roles (`ROLES`); afterwards each becomes a CSS variable, so that a plot follows the page
into dark mode and onto paper. Text stays text. Every id is prefixed with the plot's name, whatever nobody refers to has none.
The functions here return a `draw(figure, wide)`; without matplotlib a document is the same, only nobody draws it.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from edgeml_report.content import Plot
from edgeml_report.text import clean

__all__ = ["REST", "USAGE_LEVELS", "available", "curves", "pareto", "spreads", "stacks", "svg", "timeline", "trail", "usage"]

#: Role -> the colour that stands for it while drawing.
ROLES = {
    name: f"#0102{number:02x}"
    for number, name in enumerate(("ink", "muted", "grid", "surface", "s1", "s2", "s3", "s4", *(f"u{n}" for n in range(6))))
}
INK, MUTED, GRID, SURFACE = (ROLES[name] for name in ("ink", "muted", "grid", "surface"))
SERIES = [ROLES[f"s{number}"] for number in range(1, 5)]
_ROLE = re.compile(r"#0102([0-9a-f]{2})")
_NAMES = list(ROLES)
#: matplotlib names the fonts it measured with; the page has its own.
_FONT = re.compile(r"font-family: [^;]*(; )?")
#: A hundredth of a pixel is enough for a path.
_LONG = re.compile(r"(\.[0-9]{2})[0-9]+")
WIDE, NARROW = 960, 376
#: Times an expert's even share, from where the next shade begins.
USAGE_LEVELS = ((0.0, "never"), (0.5, "under \u00bd"), (1.0, "\u00bd to 1"), (2.0, "1 to 2"), (4.0, "2 to 4"), (float("inf"), "over 4"))
DASHES = ["-", (0, (6, 2)), (0, (2, 1.5)), "-.", (0, (9, 3)), ":"]
MOST_COLUMNS, MOST_SITES, MOST_MARKS = 128, 40, 300
#: Where a point's number may stand, in pixels from it, the best place first.
ASIDE = [(9, 10), (-9, 10), (9, -11), (-9, -11), (14, 0), (-14, 0), (9, 23), (-9, 23), (9, -24), (-9, -24), (23, 10), (23, -11)]
#: The part of memory that is nothing in particular.
REST = "everything else"
HREF = "{http://www.w3.org/1999/xlink}href"

Spread = Mapping[str, float | None]
Draw = Callable[[Any, bool], None]


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def svg(plot: Plot, wide: bool) -> str:
    """The plot as an `<svg>` element for a page, named and described."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": plot.name,
        "figure.facecolor": "none",
        "text.parse_math": False,
        "font.size": 12,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 1,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "ytick.major.size": 0,
        "axes.unicode_minus": True,
    }
    out = io.BytesIO()
    with warnings.catch_warnings(), importlib.import_module("matplotlib").rc_context(style):
        warnings.simplefilter("ignore")  # a name with letters that the measuring font lacks
        figure = _library("figure").Figure(figsize=((WIDE if wide else NARROW) / 72, plot.height / 72), dpi=72)
        _library("backends.backend_svg").FigureCanvasSVG(figure)
        plot.draw(figure, wide)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return _inline(out.getvalue().decode("utf-8"), f"{plot.name}-{'wide' if wide else 'narrow'}", plot.title, plot.alt)


def _library(module: str) -> Any:
    """A module of matplotlib, untyped: its types differ between its versions."""
    return importlib.import_module(f"matplotlib.{module}")


def _inline(source: str, name: str, title: str, alt: str) -> str:
    """A document of matplotlib as an element of a page."""
    root = ElementTree.fromstring(source)
    used = set(re.findall(r"url\(#([^)]+)\)", source)) | {element.get(HREF, "").removeprefix("#") for element in root.iter()}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{name}-{own}")
        link = element.attrib.pop(HREF, None)
        if link is not None:
            element.set("href", f"#{name}-{link.removeprefix('#')}")
        for key, value in element.items():
            element.set(key, _value(key, value, name))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "title"):
                parent.remove(child)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-alt", "class": name.rpartition("-")[2]}
    for place, (key, words) in enumerate((("title", title), ("desc", alt))):
        told = ElementTree.Element(key, {"id": f"{name}-{'title' if key == 'title' else 'alt'}"})
        told.text = words
        root.insert(place, told)
    return ElementTree.tostring(root, encoding="unicode")


def _value(key: str, value: str, name: str) -> str:
    """An attribute with our ids, colours and fonts, and of a path no more digits than can be seen."""
    if key == "d":
        return _LONG.sub(r"\1", value)
    return _FONT.sub("", _ROLE.sub(_variable, value.replace("url(#", f"url(#{name}-")))


def _variable(match: re.Match[str]) -> str:
    number = int(match[1], 16)
    return f"var(--{_NAMES[number]})" if number < len(_NAMES) else match[0]


def _key(**look: Any) -> Any:
    """A line or a marker of a legend."""
    return _library("lines").Line2D([], [], **look)


def _patch(**look: Any) -> Any:
    """A filled box of a legend."""
    return _library("patches").Patch(**look)


def _axes(figure: Any, wide: bool, height: float, left: float, bottom: float = 44, top: float = 10, right: float = 14) -> Any:
    """Axes with margins in pixels."""
    width = WIDE if wide else NARROW
    return figure.add_axes((left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height))


def _height(figure: Any) -> float:
    return float(figure.get_figheight() * 72)


def pareto(
    places: Sequence[tuple[float, float]],
    ends: Sequence[tuple[float, float] | None],
    numbers: Sequence[int],
    edge: Sequence[int],
    across: str,
    up: str,
) -> Draw:
    """Points (cost, quality) with intervals of quality, numbered as in the table; those that nothing beats are filled, bold and joined."""

    def draw(figure: Any, wide: bool) -> None:
        axes = _axes(figure, wide, _height(figure), left=62)
        line = [places[number] for number in edge]
        axes.step([x for x, _ in line], [y for _, y in line], where="post", color=SERIES[0], linewidth=1.5, alpha=0.6, zorder=2)
        for number, ((x, y), ends_of) in enumerate(zip(places, ends, strict=True)):
            colour = SERIES[0] if number in edge else MUTED
            if ends_of is not None:
                axes.plot([x, x], ends_of, color=colour, linewidth=1.5, zorder=2.5, solid_capstyle="butt")
            fill = colour if number in edge else SURFACE
            axes.plot([x], [y], marker="o", markersize=9, color=fill, markeredgecolor=colour, markeredgewidth=1.75, zorder=3)
        axes.margins(0.12, 0.16)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        if min(x for x, _ in places) > 0 and max(x for x, _ in places) > 20 * min(x for x, _ in places):
            _logarithmic(axes)
        else:
            axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
        _number(axes, places, numbers, edge)
        axes.locator_params(axis="y", nbins=6)
        axes.yaxis.set_major_formatter(_library("ticker").StrMethodFormatter("{x:g}"))

    return draw


def _number(axes: Any, places: Sequence[tuple[float, float]], numbers: Sequence[int], edge: Sequence[int]) -> None:
    """Each point's number beside it, where neither a point nor another number stands."""
    points = axes.transData.transform(places).tolist()
    taken = [(x, y) for x, y in points]
    for number, (x, y) in enumerate(points):
        others = [place for index, place in enumerate(taken) if index != number]
        free = [(dx, dy) for dx, dy in ASIDE if all(abs(x + dx - a) > 9 or abs(y + dy - b) > 10 for a, b in others)]
        dx, dy = (free or ASIDE)[0]
        taken.append((x + dx, y + dy))
        look = {"fontsize": 11, "fontweight": "bold" if number in edge else "normal", "ha": "center", "va": "center_baseline"}
        axes.annotate(str(numbers[number]), places[number], (dx, dy), textcoords="offset points", zorder=4, **look)


def _logarithmic(axes: Any) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(_library("ticker").LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(_library("ticker").FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(_library("ticker").NullFormatter())


def _rows(axes: Any, names: Sequence[str], wide: bool, above: float = 0.16) -> None:
    """One row a name from the top down, the name above its row."""
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    for row, name in enumerate(names):
        axes.annotate(
            clean(name, 110 if wide else 52),
            (0, row - above),
            xycoords=("axes fraction", "data"),
            fontsize=11.5,
            va="bottom",
            annotation_clip=False,
        )


def spreads(rows: Sequence[tuple[str, Spread, Spread]]) -> Draw:
    """Latencies of each row, warm and below it cold: thin from min to max, thick from p50 to p95, a dot at p50. Seconds, drawn in ms."""

    def draw(figure: Any, wide: bool) -> None:
        axes = _axes(figure, wide, _height(figure), left=8, top=26 if wide else 44)
        _rows(axes, [name for name, _, _ in rows], wide, 0.16 if any(cold.get("p50") is not None for _, _, cold in rows) else 0.22)
        for row, (_, *phases) in enumerate(rows):
            for lower, seconds in enumerate(phases):
                _spread(axes, row + 0.22 * lower, {key: 1e3 * value for key, value in seconds.items() if value is not None}, bool(lower))
        known = [1e3 * value for _, *phases in rows for one in phases for value in one.values() if value]
        if known and max(known) > 20 * min(known):
            _logarithmic(axes)
        else:
            axes.set_xlim(left=0)
        axes.set_xlabel("latency of an answer, ms")
        _legend(figure, _spread_keys(rows), 5 if wide else 3)

    return draw


def _spread(axes: Any, row: float, at: Mapping[str, float], cold: bool) -> None:
    colour = SERIES[1] if cold else SERIES[0]
    if "min" in at and "max" in at:
        axes.plot([at["min"], at["max"]], [row, row], color=MUTED, linewidth=1.5, solid_capstyle="butt")
    if "p50" in at and "p95" in at:
        axes.plot([at["p50"], at["p95"]], [row, row], color=colour, linewidth=6, solid_capstyle="butt")
    if "p99" in at:
        axes.plot([at["p99"]] * 2, [row - 0.1, row + 0.1], color=INK, linewidth=1.5)
    if "p50" in at:
        axes.plot(
            [at["p50"]], [row], marker="o", markersize=8.5, color=SURFACE if cold else colour, markeredgecolor=colour, markeredgewidth=2
        )


def _spread_keys(rows: Sequence[tuple[str, Spread, Spread]]) -> list[Any]:
    keys = [
        _key(color=SERIES[0], marker="o", markersize=8, linestyle="none", label="median"),
        _key(color=SERIES[0], linewidth=6, label="median to p95"),
        _key(color=MUTED, linewidth=1.5, label="least to most"),
    ]
    if any(one.get("p99") is not None for _, *phases in rows for one in phases):
        keys.append(_key(color=INK, marker="|", markersize=9, markeredgewidth=1.5, linestyle="none", label="p99"))
    if any(cold.get("p50") is not None for _, _, cold in rows):
        look = {"color": SURFACE, "markeredgecolor": SERIES[1], "markeredgewidth": 2, "marker": "o", "markersize": 8}
        keys.append(_key(linestyle="none", label="cold median", **look))
    return keys


def _legend(figure: Any, keys: Sequence[Any], columns: int, length: float = 1.3) -> None:
    figure.legend(
        handles=keys,
        loc="upper left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        fontsize=11,
        handlelength=length,
        handletextpad=0.5,
        columnspacing=1.2,
        borderaxespad=0.1,
        borderpad=0.2,
    )


def stacks(names: Sequence[str], parts: Mapping[str, Sequence[float]]) -> Draw:
    """One bar a name, of `parts` in MiB from left to right."""

    def draw(figure: Any, wide: bool) -> None:
        axes = _axes(figure, wide, _height(figure), left=8, top=26 if wide else 44)
        _rows(axes, names, wide, 0.24)
        begun = [0.0] * len(names)
        looks = [(part, GRID if part[0] == REST else colour) for part, colour in zip(parts.items(), SERIES, strict=False)]
        for (_, sizes), colour in looks:
            axes.barh(
                range(len(names)), sizes, left=begun, height=0.36, color=colour, edgecolor=MUTED if colour == GRID else SURFACE, linewidth=1
            )
            begun = [start + size for start, size in zip(begun, sizes, strict=True)]
        axes.set_xlabel("MiB")
        _legend(figure, [_patch(color=colour, label=key) for (key, _), colour in looks], 4 if wide else 2)

    return draw


def timeline(events: Sequence[tuple[float, float, float]]) -> Draw:
    """Page-ins (start ms, end ms, MiB): a line each at the foot while it was read, above them what had come in by then."""

    def draw(figure: Any, wide: bool) -> None:
        axes = _axes(figure, wide, _height(figure), left=62, top=30)
        at, came = _risen(events)
        total = came[-1]
        axes.fill_between(at, came, step="post", color=SERIES[0], alpha=0.18, linewidth=0)
        axes.step(at, came, where="post", color=SERIES[0], linewidth=2)
        marks = [place for start, end in _joined(events) for place in (start, end, float("nan"))]
        axes.plot(marks, [-0.055 * total] * len(marks), color=SERIES[1], linewidth=6, solid_capstyle="butt")
        axes.set_ylim(-0.1 * total, 1.05 * total)
        axes.margins(x=0.01)
        axes.set_xlabel("time, ms")
        axes.set_ylabel("read so far, MiB")
        looks = ((SERIES[0], 2, "read so far"), (SERIES[1], 6, "a page being read"))
        _legend(figure, [_key(color=colour, linewidth=width, label=words) for colour, width, words in looks], 2)

    return draw


def _risen(events: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    """Times and what had come by then, in at most about `MOST_MARKS` steps: the last of those that a reader could not tell apart."""
    at, came, total = [min(start for start, _, _ in events)], [0.0], 0.0
    step = (max(end for _, end, _ in events) - at[0]) / MOST_MARKS
    since = at[0]
    for _, end, size in sorted(events, key=lambda event: event[1]):
        total += size
        if end - since < step and len(at) > 1:
            at[-1], came[-1] = end, total
        else:
            at.append(end)
            came.append(total)
            since = end
    return at, came


def _joined(events: Sequence[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """When pages were being read, as at most about `MOST_MARKS` spans: those that touch, or nearly, are one; none is too thin to see."""
    gap = (max(end for _, end, _ in events) - min(start for start, _, _ in events)) / MOST_MARKS
    spans: list[tuple[float, float]] = []
    for start, end, _ in sorted(events):
        if spans and start - spans[-1][1] < gap:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return [(start, max(end, start + gap)) for start, end in spans]


def curves(found: Mapping[str, Mapping[float, float]]) -> Draw:
    """Hit rate of each policy, capacity ratio -> share; told apart by dashes too."""

    def draw(figure: Any, wide: bool) -> None:
        axes = _axes(figure, wide, _height(figure), left=62, top=30 if wide else 48)
        looks = [(name, SERIES[number % len(SERIES)] if number else INK, DASHES[number % len(DASHES)]) for number, name in enumerate(found)]
        for name, colour, dashes in looks:
            at = sorted(found[name].items())
            axes.plot([x for x, _ in at], [100 * y for _, y in at], color=colour, linewidth=2, linestyle=dashes, marker="o", markersize=4)
        axes.set_xlabel("experts held, in units of those one token uses")
        axes.set_ylabel("hit rate, %")
        axes.set_ylim(top=101)
        axes.set_xlim(left=0)
        _legend(
            figure,
            [_key(color=colour, linewidth=2, linestyle=dashes, label=clean(name, 24)) for name, colour, dashes in looks],
            6 if wide else 3,
            2.4,
        )

    return draw


def trail(names: Sequence[str], errors: Sequence[float], alone: Sequence[float]) -> Draw:
    """Errors in % after each part as a line, and what each part adds by itself as bars; the parts' numbers below."""

    def draw(figure: Any, wide: bool) -> None:
        axes = _axes(figure, wide, _height(figure), left=62, top=30)
        places = range(1, len(names) + 1)
        axes.bar(places, alone, width=0.6, color=SERIES[1])
        axes.plot(places, errors, color=SERIES[0], linewidth=2, marker="o", markersize=4)
        shown = [at for at in places if wide or at % 2 or len(names) < 10]
        axes.set_xticks(shown, [str(at) for at in shown])
        axes.set_xlabel(f"from {clean(names[0], 30)} to {clean(names[-1], 30)}")
        axes.set_ylabel("error, %")
        axes.set_ylim(bottom=0)
        keys = [_key(color=SERIES[0], linewidth=2, marker="o", label="so far"), _patch(color=SERIES[1], label="alone")]
        _legend(figure, keys, 2)

    return draw


def usage(sites: Sequence[tuple[str, Sequence[float]]]) -> Draw:
    """A row a site, a column an expert (the mean of neighbours where there are many), shaded by its share of the choices."""

    def draw(figure: Any, wide: bool) -> None:
        shown, names = sites[:MOST_SITES], _shortened([name for name, _ in sites[:MOST_SITES]], 20 if wide else 10)
        left = 14 + 6.5 * max(map(len, names))
        axes = _axes(figure, wide, _height(figure), left=left, top=26 if wide else 44)
        levels: list[list[tuple[float, float, float]]] = [[] for _ in USAGE_LEVELS]
        for row, (_, shares) in enumerate(shown):
            step = -(-len(shares) // MOST_COLUMNS)
            for start in range(0, len(shares), step):
                some = shares[start : start + step]
                levels[_level(sum(some) / len(some) * len(shares))].append((start, row, len(some)))
        for level, boxes in enumerate(levels):
            if boxes:
                corners = [point for x, y, w in boxes for point in ((x, y), (x + w, y), (x + w, y + 1), (x, y + 1), (x, y))]
                codes = [1, 2, 2, 2, 79] * len(boxes)  # move, three lines, close
                cells = _library("path").Path(corners, codes)
                axes.add_patch(_library("patches").PathPatch(cells, facecolor=ROLES[f"u{level}"], edgecolor=SURFACE, linewidth=1))
        axes.set_xlim(0, max(len(shares) for _, shares in shown))
        axes.set_ylim(len(shown), 0)
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.set_yticks([row + 0.5 for row in range(len(shown))], names, fontsize=10.5)
        axes.set_xlabel("expert")
        keys = [
            _patch(facecolor=ROLES[f"u{level}"], edgecolor=MUTED, linewidth=0.5, label=words)
            for level, (_, words) in enumerate(USAGE_LEVELS)
        ]
        _legend(figure, keys, 6 if wide else 3)

    return draw


def _shortened(names: Sequence[str], most: int) -> list[str]:
    """Names of sites without the parts that all share at their start, and their ends where they are long."""
    shared = len(os.path.commonprefix(names).rpartition(".")[0]) if len(names) > 1 else 0
    short = [clean(name[shared:].lstrip(".") or name) for name in names]
    return ["\u2026" + name[-most + 1 :] if len(name) > most else name for name in short]


def _level(times: float) -> int:
    return 0 if times == 0 else next(level for level, (most, _) in enumerate(USAGE_LEVELS) if level and times <= most)
