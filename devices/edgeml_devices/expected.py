"""What a profile says of something that was measured, to stand beside it: the same task, budget, residency, threads and length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeml.bundle import Bundle
from edgeml.device import Profile
from edgeml.errors import EdgemlError
from edgeml.manifest import load_manifest
from edgeml.variants import Wish
from edgeml_devices.fit import fit_bundle

__all__ = ["expected", "sentence"]


def expected(bundle: Bundle, profile: Profile, record: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction for a record of `edgeml bench`: latency_s, peak_memory_bytes and page_in_bytes (a request), each an interval.

    `assumed` names the figures of the profile that nobody measured. What cannot be predicted is null, and `why` says so.
    """
    unknown: dict[str, Any] = {"profile": profile.name, "latency_s": None, "peak_memory_bytes": None, "page_in_bytes": None, "assumed": []}
    if "mix" in record or "," in record["task"]:
        return unknown | {"why": "requests that overlap, and several tasks at once, are not predicted"}
    tokens, memory, budget = record.get("tokens"), str(record.get("memory") or ""), record.get("memory_budget_bytes")
    try:
        found = fit_bundle(
            bundle,
            load_manifest(bundle),
            profile,
            task=record["task"],
            memory=memory if memory.endswith("%") or budget is None else str(budget),
            tokens=max(round(tokens / record["rounds"]), 1) if tokens else 1,
            threads=record["threads"],
            residency=record["residency"],
            wish=Wish(variant=record.get("variant")),
        ).prediction
    except EdgemlError as error:
        return unknown | {"why": str(error)}
    figures = {key: getattr(found, key).as_json() for key in ("latency_s", "peak_memory_bytes", "page_in_bytes")}
    return unknown | figures | {"assumed": list(found.assumed), "why": None}


def sentence(found: Mapping[str, Any]) -> str:
    """The prediction for people."""
    if found["why"] is not None:
        return f"predicted for {found['profile']}: nothing ({found['why']})"
    time, peak, read = (found[key] for key in ("latency_s", "peak_memory_bytes", "page_in_bytes"))
    guessed = f"; {len(found['assumed'])} of its figures are assumed" if found["assumed"] else ""
    return (
        f"predicted for {found['profile']}: {_range(time, 1e3)} ms, peak {_range(peak, 1 / (1 << 20))} MiB, "
        f"{_range(read, 1 / (1 << 20))} MiB read a request{guessed}"
    )


def _range(found: Mapping[str, Any], by: float) -> str:
    value, low, high = (f"{found[key] * by:.3g}" for key in ("value", "low", "high"))
    return value if low == high else f"{value} ({low} to {high})"
