"""Timed rounds and what they cost: the measurements behind `edgeml bench`. Knows no session: it is handed functions.

Glossary: an iteration (a round) is one call; warm-up rounds are run first and left out; a cold round begins without any
pageable page in memory. Percentiles are nearest-rank, so every figure printed is one that was measured; p99 is null below
100 rounds. Peak memory is the process's largest resident set, weights and interpreter together.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = ["SCHEMA", "Counted", "Phase", "Timing", "environment", "peak_rss_bytes", "percentile", "record", "rss_bytes", "time_rounds"]

SCHEMA = 2
P99_AT_LEAST = 100


class Counted(Protocol):
    """What a call says it cost: pages found and fetched, bytes, seconds spent waiting for them, and tokens."""

    hits: int
    misses: int
    page_in_bytes: int
    page_wait_s: float
    tokens: int
    masked_tokens: int


@dataclass
class Phase:
    """The rounds of one kind: `latency_s` of each in order, and the sums of what they cost."""

    latency_s: list[float] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    page_in_bytes: int = 0
    page_wait_s: float = 0.0
    tokens: int = 0
    masked_tokens: int = 0

    def add(self, latency_s: float, counters: Counted) -> None:
        """Count one round."""
        self.latency_s.append(latency_s)
        self.hits += counters.hits
        self.misses += counters.misses
        self.page_in_bytes += counters.page_in_bytes
        self.page_wait_s += counters.page_wait_s
        self.tokens += counters.tokens
        self.masked_tokens += counters.masked_tokens


@dataclass
class Timing:
    """Cold and warm rounds of one configuration; `throttled` says whether the processor slowed itself down meanwhile, None if unknown."""

    cold: Phase = field(default_factory=Phase)
    warm: Phase = field(default_factory=Phase)
    throttled: bool | None = None


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest-rank percentile, None of nothing. `share` in (0, 1]."""
    if not values:
        return None
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


def time_rounds(
    call: Callable[[int], Counted],
    make_cold: Callable[[], None],
    iterations: int,
    warmup: int,
    cold: int,
    tick: Callable[[], None] = lambda: None,
) -> Timing:
    """Call `call(i)` cold, then to warm up, then `iterations` times. `call` returns its counters; `tick` is called after each round."""
    timing, before = Timing(), _throttle_events()
    for index in range(cold):
        make_cold()
        timing.cold.add(*_timed(call, index))
        tick()
    for index in range(warmup):
        call(index)
        tick()
    for index in range(iterations):
        timing.warm.add(*_timed(call, index))
        tick()
    after = _throttle_events()
    timing.throttled = None if before is None or after is None else after > before
    return timing


def _timed(call: Callable[[int], Counted], index: int) -> tuple[float, Counted]:
    started = time.perf_counter()
    counters = call(index)
    return time.perf_counter() - started, counters


def record(timing: Timing, settings: Mapping[str, Any], kind: str = "run") -> dict[str, Any]:
    """One record: the settings, the environment, and the figures of a timing. Unmeasured figures are null."""
    warm, cold = timing.warm, timing.cold
    seconds = sum(warm.latency_s)
    return {
        "schema": SCHEMA,
        "kind": kind,
        **settings,
        "rounds": len(warm.latency_s),
        "latency_s": _spread(warm.latency_s),
        "tokens_per_s": warm.tokens / seconds if seconds and warm.tokens else None,
        **_quality(warm, settings.get("masked_retention")),
        **_costs(warm),
        "cold": {"rounds": len(cold.latency_s), "latency_s": _spread(cold.latency_s), **_costs(cold)} if cold.latency_s else None,
        "peak_rss_bytes": peak_rss_bytes(),
        "throttled": timing.throttled,
        "device": environment(),
    }


def _quality(phase: Phase, masked_retention: float | None) -> dict[str, float | None]:
    """What share of the tokens ran with experts forbidden, and the retention that is expected of such answers with all the others."""
    share = phase.masked_tokens / phase.tokens if phase.tokens else None
    if not share or masked_retention is None:
        return {"masked_share": share, "expected_retention": 1.0 if share == 0 else None}
    return {"masked_share": share, "expected_retention": 1 - share * (1 - masked_retention)}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {
        "min": min(values, default=None),
        "p50": percentile(values, 0.5),
        "p90": percentile(values, 0.9),
        "p95": percentile(values, 0.95),
        "p99": percentile(values, 0.99) if len(values) >= P99_AT_LEAST else None,
        "max": max(values, default=None),
    }


def _costs(phase: Phase) -> dict[str, Any]:
    return {
        "hits": phase.hits,
        "misses": phase.misses,
        "page_in_bytes": phase.page_in_bytes,
        "page_wait_s": phase.page_wait_s,
        "tokens": phase.tokens,
    }


def peak_rss_bytes() -> int:
    """Peak resident memory of this process. Not `ru_maxrss` where it can be helped: that one begins at the parent's peak."""
    peak = _status_bytes("VmHWM:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def rss_bytes() -> int | None:
    """Resident memory of this process now, None where the system does not say."""
    return _status_bytes("VmRSS:")


def _status_bytes(key: str) -> int | None:
    for line in _text("/proc/self/status").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None


def environment() -> dict[str, Any]:
    """The machine, as far as it tells: nothing here is guessed."""
    models = [line.split(":", 1)[1].strip() for line in _text("/proc/cpuinfo").splitlines() if line.startswith(("model name", "Model"))]
    return {
        "cpu": models[0] if models else None,
        "board": _text("/proc/device-tree/model").strip("\0 \n") or None,
        "architecture": platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "onnxruntime": _version("onnxruntime"),
    }


def _throttle_events() -> int | None:
    """How often the processors have slowed down for heat since boot, None where they do not count it."""
    files = sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    counts = [_text(str(file)).strip() for file in files]
    return sum(int(count) for count in counts if count.isdigit()) if counts else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""
