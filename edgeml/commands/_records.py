"""Records of `edgeml bench` as a Markdown table, CSV or JSON, a row at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["FORMATS", "document", "head", "row"]

FORMATS = ("md", "json", "jsonl", "csv")

#: Head of a column, where its figure is in a record, and what divides it for the unit in the head (None: text as it is).
COLUMNS: tuple[tuple[str, str, float | None], ...] = (
    ("memory", "memory", None),
    ("weights MiB", "memory_budget_bytes", 1 << 20),
    ("residency", "residency", None),
    ("threads", "threads", None),
    ("backend", "backend", None),
    ("p50 ms", "latency_s.p50", 1e-3),
    ("p90 ms", "latency_s.p90", 1e-3),
    ("p95 ms", "latency_s.p95", 1e-3),
    ("p99 ms", "latency_s.p99", 1e-3),
    ("cold p50 ms", "cold.latency_s.p50", 1e-3),
    ("tokens/s", "tokens_per_s", 1),
    ("hits", "hits", None),
    ("misses", "misses", None),
    ("read MiB", "page_in_bytes", 1 << 20),
    ("wait ms", "page_wait_s", 1e-3),
    ("after open MiB", "rss_after_open_bytes", 1 << 20),
    ("peak MiB", "peak_rss_bytes", 1 << 20),
)


def head(kind: str, record: Mapping[str, Any]) -> str | None:
    """What stands before the first row, None where nothing does."""
    if kind == "csv":
        return _csv(flatten(record).keys())
    if kind != "md":
        return None
    machine = record["device"]["cpu"] or "this machine"
    what = f"`{record['bundle']}`, task {record['task']}, {record['rounds']} warm rounds of one input on {machine}"
    paging = "" if _on_images(record) else "; hits, misses, reads and waits in all"
    widths = [_width(name) for name, _, _ in _columns(record)]
    cells = " | ".join(name.rjust(width) for (name, _, _), width in zip(_columns(record), widths, strict=True))
    rules = " | ".join("-" * (width - 1) + ":" for width in widths)
    return f"{what}{paging}\n\n| {cells} |\n| {rules} |"


def row(kind: str, record: Mapping[str, Any]) -> str | None:
    """One record; None for json, where `document` comes at the end."""
    if kind == "jsonl":
        return json.dumps(record, allow_nan=False)
    flat = flatten(record)
    if kind == "csv":
        return _csv("" if value is None else value for value in flat.values())
    if kind == "md":
        return "| " + " | ".join(_cell(flat.get(key), unit).rjust(_width(name)) for name, key, unit in _columns(record)) + " |"
    return None


def document(records: Sequence[Mapping[str, Any]]) -> str:
    """All records as the one document of `--json`."""
    return json.dumps({"records": list(records)}, allow_nan=False)


def flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """Nested objects become dotted keys; lists become JSON."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _on_images(record: Mapping[str, Any]) -> bool:
    return "image" in record.get("workload", {}).get("kind", "")


def _columns(record: Mapping[str, Any]) -> list[tuple[str, str, float | None]]:
    """Networks for images have variants and no paging, mixtures the other way round."""
    if not _on_images(record):
        return list(COLUMNS)
    paging = ("memory", "weights MiB", "residency", "backend", "cold p50 ms", "tokens/s", "hits", "misses", "read MiB", "wait ms")
    return [
        ("variant", "variant", None),
        ("graphs MiB", "graph_bytes", 1 << 20),
        *(column for column in COLUMNS if column[0] not in paging),
    ]


def _width(name: str) -> int:
    return max(len(name), 10 if name == "backend" else 7)


def _cell(value: Any, unit: float | None) -> str:
    if value is None:
        return "-"
    if unit is None:
        return str(value)
    scaled = value / unit
    return f"{scaled:.0f}" if scaled >= 1000 else f"{scaled:.1f}" if scaled >= 10 else f"{scaled:.2f}"


def _csv(cells: Any) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells)
    return out.getvalue()
