"""Sizes as people write them: `64MiB`, `1.5GB`, `50%`, `auto`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edgeml.errors import UsageError

__all__ = ["MemorySize", "format_bytes", "parse_bytes", "parse_memory"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*|%)\s*", re.ASCII)
_HINT = "write 64MiB, 1.5GB, 50% or auto"


@dataclass(frozen=True)
class MemorySize:
    """A memory budget as asked for: `value` bytes, percent of the pageable bytes, or whatever this machine has free."""

    kind: Literal["bytes", "percent", "auto"]
    value: float = 0.0


def parse_memory(text: str | int) -> MemorySize:
    """Read a budget: an integer or a size in bytes, `P%` with 0 <= P <= 100, or `auto`. Raises `UsageError`."""
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise UsageError(f"a memory budget cannot be {text!r}: {_HINT}")
    if isinstance(text, int):
        if text < 0:
            raise UsageError(f"a memory budget cannot be negative ({text})")
        return MemorySize("bytes", text)
    if text.strip().lower() == "auto":
        return MemorySize("auto")
    match = _SIZE.fullmatch(text)
    if match and match[2] == "%":
        percent = float(match[1])
        if percent > 100:
            raise UsageError(f"'{text}' is more than everything: 100% holds all experts")
        return MemorySize("percent", percent)
    return MemorySize("bytes", parse_bytes(text))


def parse_bytes(text: str) -> int:
    """`64MiB` (powers of 1024), `1.5GB` (powers of 1000) or plain bytes, rounded down. Raises `UsageError`."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"'{text}' is not a size: {_HINT}")
    whole, _, fraction = match[1].partition(".")
    return int(whole) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)


def format_bytes(count: int) -> str:
    """A count of bytes in binary units with three figures, such as `23.4 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 999.5 or unit == "GiB":
            break
        value /= 1024
    if unit == "B":
        return f"{count} B"
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"
