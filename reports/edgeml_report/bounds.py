"""A document that stays small whatever the records hold: long tables and sections end early, and say so.

A page of more than about 2 MB is slow on a phone and refused by many a place that shows it. What is cut here is still in the CSV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgeml_report.content import Block, Code, Document, Section, Table
from edgeml_report.text import count

__all__ = ["MOST_ROWS", "bounded"]

MOST_ROWS, MOST_COLUMNS, MOST_BLOCKS = 200, 24, 48
CSV = "`edgeml report --format csv` has every figure"


def bounded(document: Document, rows: int) -> Document:
    """The document with at most so many rows in a table and commands in a list."""
    return replace(document, sections=[_section(section, rows) for section in document.sections])


def _section(section: Section, rows: int) -> Section:
    blocks = [part for block in section.blocks[:MOST_BLOCKS] for part in _block(block, rows)]
    left = len(section.blocks) - MOST_BLOCKS
    return replace(section, blocks=[*blocks, f"{count(left)} more tables and sentences are left out; {CSV}."] if left > 0 else blocks)


def _block(block: Block, rows: int) -> Sequence[Block]:
    if isinstance(block, Code):
        left = len(block.lines) - rows
        return [block] if left <= 0 else [Code(block.lines[:rows]), f"{count(left)} more commands are left out."]
    if not isinstance(block, Table):
        return [block]
    said = []
    if len(block.rows) > rows:
        said.append(f"{count(rows)} of {count(len(block.rows))} rows")
    if len(block.columns) > MOST_COLUMNS:
        said.append(f"{count(MOST_COLUMNS)} of {count(len(block.columns))} columns")
    if not said:
        return [block]
    cut = replace(block, columns=block.columns[:MOST_COLUMNS], rows=[row[:MOST_COLUMNS] for row in block.rows[:rows]])
    return [cut, f"The table above has the first {' and '.join(said)}; {CSV}."]
