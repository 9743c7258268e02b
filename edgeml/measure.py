"""Timed rounds and what they cost: the measurements behind `edgeml bench`. Knows no session: it is handed a function.

Glossary: an iteration is one call; warm-up iterations are run first and kept apart; cold means no pageable page is resident.
Percentiles are nearest-rank, so every figure printed is one that was measured; p99 is null below 100 iterations.
"""

from __future__ import annotations

import math
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA", "Timing", "environment", "peak_rss_bytes", "percentile", "record", "time_rounds"]

SCHEMA = 1
P99_AT_LEAST = 100


@dataclass
class Timing:
    """Latencies in seconds: `cold_s` of calls that began without pageable pages, `warm_s` of the others in order."""

    cold_s: list[float] = field(default_factory=list)
    warm_s: list[float] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    page_in_bytes: int = 0
    page_wait_s: float = 0.0


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile, None of nothing. `share` in (0, 1]."""
    if not values:
        return None
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def time_rounds(
    call: Callable[[int], Any],
    make_cold: Callable[[], None],
    iterations: int,
    warmup: int = 3,
    cold: int = 3,
    tick: Callable[[], None] = lambda: None,
) -> Timing:
    """Call `call(i)` cold, then to warm up, then `iterations` times. `call` returns counters: hits, misses, page_in_bytes, page_wait_s.

    Only the warm iterations are counted in hits, misses, bytes and waits.
    """
    timing = Timing()
    for index in range(cold):
        make_cold()
        timing.cold_s.append(_timed(call, index)[0])
        tick()
    for index in range(warmup):
        call(index)
        tick()
    for index in range(iterations):
        elapsed, counters = _timed(call, index)
        timing.warm_s.append(elapsed)
        timing.hits += counters.hits
        timing.misses += counters.misses
        timing.page_in_bytes += counters.page_in_bytes
        timing.page_wait_s += counters.page_wait_s
        tick()
    return timing


def _timed(call: Callable[[int], Any], index: int) -> tuple[float, Any]:
    started = time.perf_counter()
    counters = call(index)
    return time.perf_counter() - started, counters


def record(timing: Timing, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One record: the settings, the environment, and the figures of a timing. Unmeasured figures are null."""
    warm = timing.warm_s
    return {
        "schema": SCHEMA,
        **settings,
        "rounds": len(warm),
        "latency_s": {
            "min": min(warm, default=None),
            "p50": percentile(warm, 0.5),
            "p90": percentile(warm, 0.9),
            "p95": percentile(warm, 0.95),
            "p99": percentile(warm, 0.99) if len(warm) >= P99_AT_LEAST else None,
            "max": max(warm, default=None),
        },
        "cold_latency_s": {"p50": percentile(timing.cold_s, 0.5), "max": max(timing.cold_s, default=None), "rounds": len(timing.cold_s)},
        "hits": timing.hits,
        "misses": timing.misses,
        "page_in_bytes": timing.page_in_bytes,
        "page_wait_s": timing.page_wait_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "device": environment(),
    }


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment() -> dict[str, Any]:
    """The machine, as far as it tells: nothing here is guessed."""
    model = None
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "throttled": None,
    }
