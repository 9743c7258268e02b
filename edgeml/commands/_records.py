"""Records of `edgeml bench` as a Markdown table, CSV or JSON, a row at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["FORMATS", "document", "head", "row"]

FORMATS = ("md", "json", "jsonl", "csv")

Column = tuple[str, str, float | None]
#: Head of a column, where its figure is in a record, and what divides it for the unit in the head (None: text as it is).
COLUMNS: tuple[Column, ...] = (
    ("memory", "memory", None),
    ("weights MiB", "memory_budget_bytes", 1 << 20),
    ("residency", "residency", None),
    ("threads", "threads", None),
    ("backend", "backend", None),
    ("p50 ms", "latency_s.p50", 1e-3),
    ("p50 from to", "latency_s.p50_interval", 1e-3),
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
#: Columns of requests that overlap, in place of the cold rounds; which of two that are compared; and of networks for images.
MIX: tuple[Column, ...] = (
    ("answers/s", "mix.answered_per_s", 1),
    ("refused", "mix.refused", None),
    ("late", "mix.late", None),
    ("stand-in %", "stand_in_share", 1e-2),
)
ARM: Column = ("arm", "arm", None)
IMAGES: tuple[Column, ...] = (("variant", "variant", None), ("graphs MiB", "graph_bytes", 1 << 20))
PAGING = ("memory", "weights MiB", "residency", "backend", "cold p50 ms", "tokens/s", "hits", "misses", "read MiB", "wait ms")


def head(kind: str, record: Mapping[str, Any]) -> str | None:
    """What stands before the first row, None where nothing does."""
    if kind == "csv":
        return _csv(_keys(record))
    if kind != "md":
        return None
    machine = record["device"]["cpu"] or "this machine"
    what = f"task {record['task']}, {record['rounds']} warm rounds of one input"
    if "mix" in record:
        workload, requests = record["workload"], record["mix"]["requests"]
        arrival = ", ".join(f"{key} {value}" for key, value in workload["arrival"].items())
        what = f"workload {workload['file']}, {requests} requests, {arrival.removeprefix('kind ')}"
    what = f"`{record['bundle']}`, {what} on {machine}"
    paging = "" if _on_images(record) else "; hits, misses, reads and waits in all"
    widths = [_width(name) for name, _, _ in _columns(record)]
    cells = " | ".join(name.rjust(width) for (name, _, _), width in zip(_columns(record), widths, strict=True))
    rules = " | ".join("-" * (width - 1) + ":" for width in widths)
    return f"{what}{paging}\n\n| {cells} |\n| {rules} |"


def row(kind: str, record: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> str | None:
    """One record; None for json, where `document` comes at the end. CSV has the columns of the `first` record."""
    if kind == "jsonl":
        return json.dumps(record, allow_nan=False)
    flat = flatten(record)
    if kind == "csv":
        return _csv("" if (value := flat.get(key)) is None else value for key in _keys(record if first is None else first))
    if kind == "md":
        return "| " + " | ".join(_cell(_at(flat, key), unit).rjust(_width(name)) for name, key, unit in _columns(record)) + " |"
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


def _keys(record: Mapping[str, Any]) -> list[str]:
    """CSV's columns: what has no fixed place in every record is left to JSON."""
    own = ("compare", "mix.by_task", "notes", "workload.tasks")
    known = [key for key in flatten(record) if not key.startswith(own)]
    return [*known, *(f"compare.ratio.{key}" for key in ("value", "low", "high", "n"))] if "compare" in record else known


def _on_images(record: Mapping[str, Any]) -> bool:
    return "image" in record.get("workload", {}).get("kind", "")


def _columns(record: Mapping[str, Any]) -> list[Column]:
    """Networks for images have variants and no paging, mixtures the other way round."""
    found = [*IMAGES, *(column for column in COLUMNS if column[0] not in PAGING)] if _on_images(record) else list(COLUMNS)
    if "mix" in record:
        found = [column for column in found if column[0] != "cold p50 ms"] + list(MIX)
    return [ARM, *found] if "arm" in record else found


def _at(flat: Mapping[str, Any], key: str) -> Any:
    """A figure; of an interval its ends, None where one of them is."""
    ends = [flat.get(f"{key}.low"), flat.get(f"{key}.high")]
    return (None if None in ends else ends) if key.endswith("_interval") else flat.get(key)


def _width(name: str) -> int:
    return max(len(name), 10 if name == "backend" else 7)


def _cell(value: Any, unit: float | None) -> str:
    if value is None:
        return "-"
    if unit is None:
        return str(value)
    if isinstance(value, list):  # an interval
        return "-".join(_cell(end, unit) for end in value)
    scaled = value / unit
    return f"{scaled:.0f}" if scaled >= 1000 else f"{scaled:.1f}" if scaled >= 10 else f"{scaled:.2f}"


def _csv(cells: Any) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells)
    return out.getvalue()
