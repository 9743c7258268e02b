"""A document as Markdown for a pull request, and its figures as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from edgeml_report.content import Block, Cell, Code, Document, Plot, Table
from edgeml_report.text import UNMEASURED

__all__ = ["to_csv", "to_markdown"]

HEAD = ("record", "kind", "bundle", "bundle_id", "residency", "memory_budget_bytes", "threads", "metric", "value", "low", "high", "n", "to")
_SPECIAL = re.compile(r"([\\*_\[\]~|#])")


def to_markdown(document: Document) -> str:
    """The same sentences and tables; of a plot, what it shows in words."""
    return "\n".join(_lines(document)).rstrip() + "\n"


def to_csv(document: Document) -> str:
    """Every number of every record: `HEAD`, a row each, an interval with its ends. Empty is not measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEAD)
    writer.writerows([_plain(row.get(key)) for key in HEAD] for row in document.figures)
    return out.getvalue()


def _lines(document: Document) -> Iterator[str]:
    yield from (f"# {_escaped(document.title)}", "", _escaped(document.subtitle), "", "| | | |", "|---|---|---|")
    for tile in document.tiles:
        detail = f"{tile.detail} {tile.warning}".strip()
        yield f"| {_escaped(tile.question)} | **{_escaped(tile.answer or UNMEASURED)}** | {_escaped(detail)} |"
    yield from ("", _escaped(document.about), "") if document.about else ("",)
    for section in document.sections:
        if section.filled:
            yield from (f"## {_escaped(section.title)}", "", _escaped(section.lead), "")
            drawn = {block.alt for block in section.blocks if isinstance(block, Plot)}
            for block in section.blocks:
                if isinstance(block, str) and block in drawn:
                    continue  # the plot's words are these
                yield from _block(block)
                yield ""
    missing = [section for section in document.sections if not section.filled]
    if missing:
        yield from ("## Not measured yet", "", *(f"- {_escaped(section.title)}. {_escaped(section.lead)}" for section in missing))


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, str):
        yield _escaped(block)
    elif isinstance(block, Plot):
        yield _escaped(block.alt)
    elif isinstance(block, Code):
        yield from ("```sh", *block.lines, "```")
    elif isinstance(block, Table):
        yield from (f"{_escaped(block.caption)}:", "")
        yield "| " + " | ".join(_escaped(column.name) for column in block.columns) + " |"
        yield "|" + "|".join("---:" if column.figures else "---" for column in block.columns) + "|"
        yield from ("| " + " | ".join(map(_cell, row)) + " |" for row in block.rows)


def _cell(cell: Cell) -> str:
    return _escaped(f"{cell.text} ({cell.note})" if cell.note else cell.text)


def _escaped(text: str) -> str:
    """Nothing in a name is markup, a link or somebody's handle; backticks are ours."""
    parts = text.split("`")
    for number in range(0, len(parts), 2):
        plain = _SPECIAL.sub(r"\\\1", parts[number])
        parts[number] = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")
    return "`".join(parts)


def _plain(value: object) -> object:
    """A cell that no table program takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
