"""What an export to a device tried, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgeml.sizes import format_bytes
from edgeml_export.fit_tried import duration

__all__ = ["fit_lines"]

HEADS = ("candidate", "size", "latency ms", "memory MiB", "points lost", "verdict")


def fit_lines(fit: Mapping[str, Any]) -> list[str]:
    """The lines of the table under a line that says for which device and limits; ranges are in brackets."""
    rows = [HEADS, *(_row(one, fit) for one in fit["tried"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ["  ".join(map(_padded, row, widths, range(len(HEADS)))).rstrip() for row in rows]
    limits = [] if fit["max_latency_s"] is None else [f"within {duration(fit['max_latency_s'])}"]
    limits += [f"in {format_bytes(min(fit['max_memory_bytes'] or fit['usable_bytes'], fit['usable_bytes']))} of memory"]
    sure = ", by the whole predicted range" if fit["confident"] else ""
    return [f"tried for {fit['title']}, {' and '.join(limits)}{sure}:", *aligned]


def _padded(cell: str, width: int, column: int) -> str:
    """Words to the left, figures to the right."""
    return cell.ljust(width) if column in (0, len(HEADS) - 1) else cell.rjust(width)


def _row(one: Mapping[str, Any], fit: Mapping[str, Any]) -> tuple[str, ...]:
    lost = "" if one["lost_points"] is None else f"{one['lost_points']:.2f}"
    latency, memory = _interval(one["latency_s"], 1e3, _figure), _interval(one["peak_memory_bytes"], 1 / (1 << 20), "{:.1f}".format)
    return one["title"], format_bytes(one["bytes"]), latency, memory, lost, _verdict(one, fit)


def _verdict(one: Mapping[str, Any], fit: Mapping[str, Any]) -> str:
    if one["chosen"]:
        return "chosen"
    if one["refused"] is not None:
        return f"refused: {one['refused']}"
    words = {"latency": "too slow", "memory": "too large"}
    if "latency" in one["missed"] and one["latency_s"]["low"] <= fit["max_latency_s"]:
        words["latency"] = "too slow but for the low end"
    return " and ".join(words[limit] for limit in one["missed"]) or "fits, with more lost"


def _interval(found: Mapping[str, float], scale: float, written: Callable[[float], str]) -> str:
    value, low, high = (written(found[key] * scale) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _figure(value: float) -> str:
    """Three figures, or all of the whole ones."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
