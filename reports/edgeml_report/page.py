"""A document as one HTML page that needs nothing else: styles and plots are in it, scripts are forbidden by its own policy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files

from edgeml_report import plots
from edgeml_report.bounds import MOST_ROWS, bounded
from edgeml_report.content import Block, Cell, Code, Document, Plot, Section, Table, Tile, Whisker
from edgeml_report.text import UNMEASURED, listed

__all__ = ["to_html"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
UNPLOTTED = "Plots are left out, the tables have their figures: `pip install matplotlib` and make the report again to see them."

#: Bytes of a page and of its plots, and rows of a table, fewer where the page would be too large.
MOST_BYTES, MOST_DRAWN, ROWS = 2_000_000, 1_200_000, (MOST_ROWS, 60, 20, 6)


def to_html(document: Document, plotted: bool | None = None) -> str:
    """The page. `plotted`: with plots, by default where matplotlib is installed; without, a sentence says how to get them.

    It stays below `MOST_BYTES`: the largest plots are left out before tables end early, and the page says which.
    """
    drawn = plots.available() if plotted is None else plotted
    drawings = _drawings(document) if drawn else {}
    left = [f"\u201c{plot.title}\u201d" for plot in _plots_of(document) if drawn and plot.name not in drawings]
    note = f"Left out, to keep the page small: the plots {listed(left)}. The tables have their figures." if left else ""
    for rows in ROWS:
        page = "\n".join(_page(bounded(document, rows), drawings, drawn, note)) + "\n"
        if len(page.encode()) <= MOST_BYTES:
            break
    return page


def _plots_of(document: Document) -> list[Plot]:
    return [block for section in document.sections for block in section.blocks if isinstance(block, Plot)]


def _drawings(document: Document) -> dict[str, str]:
    """Each plot's `<svg>` elements by its name, without the largest where all are too large."""
    found = {}
    for plot in _plots_of(document):
        found[plot.name] = "\n".join(plots.svg(plot, wide) for wide in ((True, False) if plot.wide else (False,)))
    while sum(map(len, found.values())) > MOST_DRAWN:
        del found[max(found, key=lambda name: len(found[name]))]
    return found


def _page(document: Document, drawings: Mapping[str, str], drawn: bool, note: str) -> Iterator[str]:
    style = files("edgeml_report").joinpath("page.css").read_text("utf-8")
    filled = [section for section in document.sections if section.filled]
    empty = [section for section in document.sections if not section.filled]
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<link rel="icon" href="data:,">'
    yield f"<title>{escape(document.title)}: edgeml report</title>\n<style>\n{style}</style>\n</head>"
    yield f'<body class="{"drawn" if drawn else "undrawn"}">\n<a class="skip" href="#main">Skip to the figures</a>'
    yield f'<header>\n<p class="brand">edgeml report</p>\n<h1>{_inline(document.title)}</h1>'
    yield f"<p>{_inline(document.subtitle)}</p>\n</header>"
    yield '<nav aria-label="Sections">\n<ul>'
    yield from (f'<li><a href="#{section.name}">{escape(section.title)}</a></li>' for section in filled)
    yield "</ul>\n</nav>" if not empty else '<li><a href="#unmeasured">Not measured yet</a></li></ul>\n</nav>'
    yield '<main id="main" tabindex="-1">\n<section aria-labelledby="headline">'
    yield '<h2 id="headline" class="unseen">In short</h2>\n<dl class="tiles">'
    yield from map(_tile, document.tiles)
    yield "</dl>"
    about = (document.about, note, "" if drawn or not filled else UNPLOTTED)
    yield from (f'<p class="about">{_inline(said)}</p>' for said in about if said)
    yield "</section>"
    for section in filled:
        yield from _section(section, drawings)
    if empty:
        yield '<section aria-labelledby="unmeasured">\n<h2 id="unmeasured">Not measured yet</h2>\n<dl class="missing">'
        yield from (f'<dt id="{section.name}">{escape(section.title)}</dt><dd>{_inline(section.lead)}</dd>' for section in empty)
        yield "</dl>\n</section>"
    yield "</main>\n</body>\n</html>"


def _tile(tile: Tile) -> str:
    kind = " nothing" if tile.answer is None else "" if any(char.isdigit() for char in tile.answer) else " name"
    answer = f'<dd class="answer{kind}">{_inline(tile.answer or UNMEASURED)}</dd>'
    warning = f'<dd class="warning">{_inline(tile.warning)}</dd>' if tile.warning else ""
    return f"<div><dt>{escape(tile.question)}</dt>{answer}<dd>{_inline(tile.detail)}</dd>{warning}</div>"


def _section(section: Section, drawings: Mapping[str, str]) -> Iterator[str]:
    yield f'<section aria-labelledby="{section.name}">\n<h2 id="{section.name}">{escape(section.title)}</h2>'
    yield f"<p>{_inline(section.lead)}</p>"
    pictures: list[Plot] = []
    for number, block in enumerate(section.blocks):
        if isinstance(block, Plot):
            pictures.append(block)
            continue
        yield from _figures(pictures, drawings)
        pictures = []
        yield from _block(block, f"{section.name}-{number}")
    yield from _figures(pictures, drawings)
    yield "</section>"


def _figures(pictures: Sequence[Plot], drawings: Mapping[str, str]) -> Iterator[str]:
    """Plots that stand next to each other where there is room."""
    shown = [plot for plot in pictures if plot.name in drawings]
    if shown:
        yield '<div class="plots">'
        for plot in shown:
            yield f'<figure class="{"both" if plot.wide else "one"}">\n<figcaption>{_inline(plot.title)}</figcaption>'
            yield f"{drawings[plot.name]}\n</figure>"
        yield "</div>"


def _block(block: Block, name: str) -> Iterator[str]:
    if isinstance(block, str):
        yield f"<p>{_inline(block)}</p>"
    elif isinstance(block, Code):
        lines = "\n".join(escape(line) for line in block.lines)
        yield f'<pre tabindex="0" role="region" aria-label="Commands"><code>{lines}</code></pre>'
    elif isinstance(block, Table):
        yield from _table(block, name)


def _table(table: Table, name: str) -> Iterator[str]:
    each = 8 if any(cell.note for row in table.rows for cell in row[1:]) else 6
    kind = f' heat" style="min-width:{9 + each * (len(table.columns) - 1)}rem' if table.legend else ""
    if table.folded:
        yield f"<details><summary>{_inline(table.caption)}</summary>"
    yield f'<div class="scroll" role="region" aria-labelledby="{name}-caption" tabindex="0">\n<table class="figures{kind}">'
    yield f'<caption id="{name}-caption"><span>{_inline(table.caption)}</span></caption>\n<thead><tr>'
    yield from (f'<th scope="col"{" class=number" if column.figures else ""}>{_inline(column.name)}</th>' for column in table.columns)
    yield "</tr></thead>\n<tbody>"
    for row in table.rows:
        cells = [_cell(cell, column.figures, place == 0) for place, (cell, column) in enumerate(zip(row, table.columns, strict=True))]
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody>\n</table>\n</div>"
    if table.legend:
        shades = "".join(
            f'<li><span class="shade h{level}" aria-hidden="true"></span>{escape(words)}</li>' for level, words in table.legend
        )
        yield f'<ul class="legend" aria-label="Shades of the table">{shades}</ul>'
    if table.folded:
        yield "</details>"


def _cell(cell: Cell, figures: bool, head: bool) -> str:
    classes = [
        name
        for name, wanted in (("number", figures), ("nothing", cell.text == UNMEASURED), (f"h{cell.level}", cell.level is not None))
        if wanted
    ]
    look = f' class="{" ".join(classes)}"' if classes else ""
    bar = "" if cell.bar is None else f'<span class="bar" aria-hidden="true"><span style="width:{100 * cell.bar:.1f}%"></span></span>'
    note = f"<small>{_inline(cell.note)}</small>" if cell.note else ""
    whisker = "" if cell.whisker is None else _whisker(cell.whisker)
    inner = f"{_inline(cell.text)}{note}{bar}{whisker}"
    return f'<th scope="row"{look}>{inner}</th>' if head else f"<td{look}>{inner}</td>"


def _whisker(whisker: Whisker) -> str:
    def at(value: float) -> float:
        return 100 * (value - whisker.start) / ((whisker.end - whisker.start) or 1.0)

    mark = "" if whisker.mark is None else f'<span class="mark" style="left:{at(whisker.mark):.1f}%"></span>'
    line = f'<span class="line" style="left:{at(whisker.low):.1f}%;width:{max(0.0, at(whisker.high) - at(whisker.low)):.1f}%"></span>'
    return f'<span class="whisker" aria-hidden="true">{mark}{line}<span class="dot" style="left:{at(whisker.value):.1f}%"></span></span>'


def _inline(text: str) -> str:
    """Escaped, with `code` between backticks."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
