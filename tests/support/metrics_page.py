"""docs/metrics.md as a table, to compare with what commands write and print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TEXT.splitlines() if line.startswith("| `")]
KEYS = [key for row in ROWS if not row[0].startswith("`report`") for key in re.findall(r"`([^`]+)`", row[0])]
#: A cell names one column, which may have a comma in it, or several.
PRINTED = {name.strip() for row in ROWS for name in (row[1], *row[1].split(","))} - {""}
INTERVAL = {"value", "low", "high", "n", "near_clip"}


def _pattern(key: str) -> re.Pattern[str]:
    """`a.*` is everything within a, and a itself where it is empty."""
    inner = r"(\..+)?" if key.endswith(".*") else ""
    return re.compile(re.escape(key.removesuffix(".*")).replace(r"\*", ".+") + inner + r"(\[\])*")


PATTERNS = [_pattern(key) for key in KEYS]


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Every key of a record, dotted; an interval is one figure."""
    if isinstance(value, dict) and value and not (path and set(value) <= INTERVAL and "value" in value):
        for name, inner in value.items():
            yield from keys(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for entry in value:
            yield from keys(entry, f"{path}[]")
    else:
        yield path


def undefined(record: dict[str, Any]) -> list[str]:
    """Keys of a record that the page does not define."""
    return sorted({key for key in keys(record) if not any(known.fullmatch(key) for known in PATTERNS)})


def heads(printed: str) -> Iterator[str]:
    """The column heads of the tables that a command printed, in Markdown or with columns two spaces apart."""
    for block in re.split(r"\n\s*\n", printed):
        lines = [line for line in block.splitlines() if line.strip()]
        for line in lines:
            cells = [
                cell.strip() for cell in (line.strip().strip("|").split("|") if line.startswith("|") else re.split(r" {2,}", line.strip()))
            ]
            if len(cells) > 1:
                yield from (cell for cell in cells if cell)
                break
