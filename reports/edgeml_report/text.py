"""Figures and names as people read them: three significant digits, one unit a column, a true minus, names that cannot do harm."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "OUT_OF_RANGE",
    "UNMEASURED",
    "clean",
    "count",
    "interval",
    "listed",
    "mib",
    "milliseconds",
    "named",
    "number",
    "percent",
    "plural",
    "points",
    "ratio",
    "size",
]

UNMEASURED = "not measured"
#: Of a figure that no machine measures.
OUT_OF_RANGE = "out of range"
LARGEST = 1e18
LONGEST = 96
#: A space that does not break, between a figure and its unit.
NBSP = "\u00a0"


def clean(value: object, longest: int = LONGEST) -> str:
    """A text from a record: one line of at most `longest` characters, without backticks or anything that turns writing around."""
    line = " ".join(str(value)[: 8 * longest].split()).replace("`", "'")
    shown = "".join(char if char.isprintable() else "\ufffd" for char in line)
    return shown if len(shown) <= longest else shown[: longest - 1] + "\u2026"


def named(value: object) -> str:
    """A name inside a sentence: cleaned, and held together where it is written from right to left."""
    text = clean(value)
    turned = any(unicodedata.bidirectional(char) in ("R", "AL", "AN") for char in text)
    return f"\u2068{text}\u2069" if turned else text


def listed(values: Sequence[object], most: int = 6) -> str:
    """Names in a sentence: `a, b and c`, or `a, b and 7 more`."""
    shown = [named(value) for value in values]
    if len(shown) > most:
        shown = [*shown[: most - 1], f"{len(shown) - most + 1} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def plural(amount: int, what: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count(amount)} {what}" + ("" if amount == 1 else "s")


def count(value: float | None) -> str:
    """A whole number with thousands apart."""
    return _wrong(value) or _signed(f"{value:,.0f}").replace(",", "\u202f")


def number(value: float | None, digits: int = 3, most: int = 9) -> str:
    """A figure with three significant digits, but no more than `most` decimals; thousands in full."""
    if value is None or _wrong(value):
        return _wrong(value)
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)) + 1e-12))
    rounded = f"{value:.{min(decimals, most)}f}"
    if not float(rounded):
        return f"under\u00a0{10.0**-most:g}"
    return count(value) if abs(value) >= 1000 else _signed(rounded)


def milliseconds(value: float | None, unit: bool = True) -> str:
    """Seconds as milliseconds, at most three decimals."""
    return _wrong(value) or number(1e3 * (value or 0), most=3) + (f"{NBSP}ms" if unit else "")


def mib(value: float | None, unit: bool = True) -> str:
    """Bytes as MiB, at most two decimals."""
    return _wrong(value) or number((value or 0) / (1 << 20), most=2) + (f"{NBSP}MiB" if unit else "")


def size(value: float | None) -> str:
    """Bytes in the unit that fits."""
    units = ("B", "KiB", "MiB", "GiB")
    scale = 0 if not value or value < 1 or _wrong(value) else min(int(math.log2(value) / 10 + 0.0005), 3)
    return _wrong(value) or f"{number((value or 0) / (1 << 10 * scale), most=3 if scale else 0)}{NBSP}{units[scale]}"


def percent(value: float | None, unit: bool = True) -> str:
    """A share as a percentage with one decimal."""
    return _wrong(value) or _signed(f"{100 * (value or 0):.1f}") + (f"{NBSP}%" if unit else "")


def points(value: float | None, unit: bool = True) -> str:
    """A difference of shares in points, with its sign."""
    if value is None or _wrong(value):
        return _wrong(value)
    shown = _signed(f"{100 * value:+.1f}")
    return ("0.0" if shown[1:] == "0.0" else shown) + (f"{NBSP}points" if unit else "")


def ratio(value: float | None, unit: bool = True) -> str:
    """An index, which has no unit, with two decimals."""
    return _wrong(value) or _signed(f"{value:.2f}")


def interval(found: Mapping[str, Any] | None, show: Any = percent) -> str:
    """The ends of an interval as `99.1 to 100.1`, or why there are none."""
    if not found:
        return UNMEASURED
    if found.get("low") is None and found.get("high") is None:
        return "no interval: too few examples"
    low, high = (None if found.get(end) is None else show(found[end], False) for end in ("low", "high"))
    return f"{low}{NBSP}to{NBSP}{high}" if low and high else f"at least {low}" if low else f"at most {high}"


def _wrong(value: float | None) -> str:
    """What stands where no figure can: it was not measured, or is none; empty for one that can be shown."""
    return UNMEASURED if value is None else "" if abs(value) < LARGEST else OUT_OF_RANGE


def _signed(text: str) -> str:
    text = text[1:] if text.startswith("-") and not text.strip("-0.") else text
    return text.replace("-", "\u2212")
