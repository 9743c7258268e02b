"""What a report is made of, before anybody decides how it looks: plain text, tables and plots.

Strings hold no markup but backticks around code; names that come from records have gone through `text.clean`, which leaves none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Block", "Cell", "Code", "Column", "Document", "Plot", "Section", "Table", "Tile", "Whisker"]


@dataclass(frozen=True)
class Whisker:
    """An interval to draw beside its figure: all on one axis from `start` to `end`, with a line at `mark`."""

    low: float
    value: float
    high: float
    start: float
    end: float
    mark: float | None = None


@dataclass(frozen=True)
class Cell:
    """A cell's text, a smaller line below it, and what may be drawn: a `bar` (share of the longest), a heat `level`, a whisker."""

    text: str
    note: str = ""
    bar: float | None = None
    level: int | None = None
    whisker: Whisker | None = None


@dataclass(frozen=True)
class Column:
    """A column's head; figures stand to the right."""

    name: str
    figures: bool = False


@dataclass(frozen=True)
class Table:
    """The first cell of a row is its head. `heat` tables colour their cells by `level`; `legend` explains the colours."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    legend: Sequence[tuple[int, str]] = ()
    folded: bool = False


@dataclass(frozen=True)
class Plot:
    """A picture: `draw(figure, wide)` draws it on a figure of matplotlib, `alt` says in words what it shows.

    `wide`: there is a second layout for wide screens. `name` is unique in a document.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[Any, bool], None]
    height: float = 240.0
    wide: bool = True


@dataclass(frozen=True)
class Code:
    """Commands, a line each."""

    lines: Sequence[str]


Block = str | Table | Plot | Code


@dataclass(frozen=True)
class Section:
    """`lead`: one sentence below the title. `filled`: whether there are data; without, the lead says which command makes them."""

    name: str
    title: str
    lead: str
    blocks: Sequence[Block] = ()

    @property
    def filled(self) -> bool:
        return bool(self.blocks)


@dataclass(frozen=True)
class Tile:
    """One question of the headline with its answer; `answer` None where nothing was measured."""

    question: str
    answer: str | None
    detail: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Document:
    """A whole report. `figures`: rows of the CSV, see `markdown.to_csv`."""

    title: str
    subtitle: str
    about: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    figures: Iterable[dict[str, Any]] = field(default=())
