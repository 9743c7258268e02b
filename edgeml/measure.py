"""Timed rounds and what they cost: the measurements behind `edgeml bench`. Knows no session: it is handed functions.

Glossary: an iteration (a round) is one call; warm-up rounds are run first and left out; a cold round begins without any
pageable page in memory. Percentiles are nearest-rank, so every figure printed is one that was measured; p99 is null below
100 rounds. Their 95 % intervals are two measured values too, found by rank, whatever the distribution; they take rounds for independent,
and know nothing of what would be different tomorrow. Peak memory is the process's largest resident set, weights and interpreter together.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol

__all__ = [
    "SCHEMA", "Counted", "Phase", "Timing", "environment", "peak_rss_bytes", "percentile", "percentile_interval", "record", "rss_bytes",
    "spread", "time_more", "time_rounds", "watched",
]  # fmt: skip

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


def percentile_interval(values: Sequence[float], share: float) -> dict[str, float | int | None] | None:
    """The 95 % interval of a percentile, None of nothing; `low` or `high` is null where so few values cannot bound it.

    Of n independent values, binomially many lie below the true percentile: P(x[l] <= q <= x[u]) = P(l <= B(n, share) < u) for ordered x,
    counted from 1. The ranks leave at most 2.5 % on each side.
    """
    if not values:
        return None
    n, ordered = len(values), sorted(values)
    low, high = _ranks(n, share)
    return {
        "value": percentile(ordered, share),
        "low": ordered[low - 1] if low >= 1 else None,
        "high": ordered[high - 1] if high <= n else None,
        "n": n,
    }


def _ranks(n: int, share: float) -> tuple[int, int]:
    """The largest l with P(B < l) <= 2.5 %, and the smallest u with P(B >= u) <= 2.5 %; beyond 2,000 values by the normal law."""
    if n > 2000:
        half = NormalDist().inv_cdf(0.975) * math.sqrt(n * share * (1 - share))
        return math.floor(n * share - half), math.ceil(n * share + half) + 1
    below, low, high = 0.0, 0, n + 1
    for k in range(n + 1):  # `below` is P(B < k)
        low = k if below <= 0.025 else low
        if below >= 0.975:
            high = k
            break
        choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        below += math.exp(choose + k * math.log(share) + (n - k) * math.log1p(-share))
    return low, high


def time_rounds(
    call: Callable[[int], Counted],
    make_cold: Callable[[], None],
    iterations: int,
    warmup: int,
    cold: int,
    tick: Callable[[], None] = lambda: None,
) -> Timing:
    """Call `call(i)` cold, then to warm up, then `iterations` times. `call` returns its counters; `tick` is called after each round."""
    timing = Timing()
    with watched(timing):
        for index in range(cold):
            make_cold()
            timing.cold.add(*_timed(call, index))
            tick()
        for index in range(warmup):
            call(index)
            tick()
        time_more(timing, call, range(iterations), tick)
    return timing


def time_more(
    timing: Timing, call: Callable[[int], Counted], rounds: Sequence[int], tick: Callable[[], None] = lambda: None
) -> list[float]:
    """Call `call(i)` for these i and count it as warm; returns their latencies."""
    for index in rounds:
        timing.warm.add(*_timed(call, index))
        tick()
    return timing.warm.latency_s[len(timing.warm.latency_s) - len(rounds) :]


@contextmanager
def watched(timing: Timing) -> Iterator[None]:
    """Have `timing` know whether the processor slows itself down meanwhile."""
    before = _throttle_events()
    yield
    after = _throttle_events()
    timing.throttled = None if before is None or after is None else bool(timing.throttled) or after > before


def _timed(call: Callable[[int], Counted], index: int) -> tuple[float, Counted]:
    started = time.perf_counter()
    counters = call(index)
    return time.perf_counter() - started, counters


def record(timing: Timing, settings: Mapping[str, Any], kind: str = "run", bundle: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """One record: the settings, the environment, and the figures of a timing. Unmeasured figures are null.

    `bundle`: the file whose disk the environment is to name.
    """
    warm, cold = timing.warm, timing.cold
    seconds = sum(warm.latency_s)
    return {
        "schema": SCHEMA,
        "kind": kind,
        **settings,
        "rounds": len(warm.latency_s),
        "latency_s": spread(warm.latency_s),
        "tokens_per_s": warm.tokens / seconds if seconds and warm.tokens else None,
        **_quality(warm, settings.get("masked_retention")),
        "stand_in_share": None,  # only requests with deadlines have one
        **_costs(warm),
        "cold": {"rounds": len(cold.latency_s), "latency_s": spread(cold.latency_s), **_costs(cold)} if cold.latency_s else None,
        "peak_rss_bytes": peak_rss_bytes(),
        "throttled": timing.throttled,
        "load_average": os.getloadavg()[0],
        "device": environment(bundle),
    }


def _quality(phase: Phase, masked_retention: float | None) -> dict[str, float | None]:
    """What share of the tokens ran with experts forbidden, and the retention that is expected of such answers with all the others."""
    share = phase.masked_tokens / phase.tokens if phase.tokens else None
    if not share or masked_retention is None:
        return {"masked_share": share, "expected_retention": 1.0 if share == 0 else None}
    return {"masked_share": share, "expected_retention": 1 - share * (1 - masked_retention)}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Percentiles and, under names that end in `_interval`, their 95 % intervals, as a record has them."""
    shares = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    known = {name: () if name == "p99" and len(values) < P99_AT_LEAST else values for name in shares}
    return {
        "min": min(values, default=None),
        **{name: percentile(known[name], share) for name, share in shares.items()},
        "max": max(values, default=None),
        **{f"{name}_interval": percentile_interval(known[name], share) for name, share in shares.items()},
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


def environment(bundle: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The machine, as far as it tells: nothing here is guessed. `disk` is the one that holds `bundle`."""
    models = [line.split(":", 1)[1].strip() for line in _text("/proc/cpuinfo").splitlines() if line.startswith(("model name", "Model"))]
    return {
        "cpu": models[0] if models else None,
        "board": _text("/proc/device-tree/model").strip("\0 \n") or None,
        "architecture": platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "disk": None if bundle is None else _disk(bundle),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "onnxruntime": _version("onnxruntime"),
    }


def _disk(file: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The disk that a file lies on: its device, file system, model, and whether it turns; None where the system does not say."""
    try:
        number = os.stat(file).st_dev
    except OSError:
        return None
    where = f"{os.major(number)}:{os.minor(number)}"
    mounts = [line.split(" - ", 1) for line in _text("/proc/self/mountinfo").splitlines()]
    kinds = [parts[1].split() for parts in mounts if len(parts) == 2 and parts[0].split()[2] == where]
    if not kinds:
        return None
    block = Path(f"/sys/dev/block/{where}").resolve()
    whole = block if (block / "queue").is_dir() else block.parent  # of a partition
    turns = _text(str(whole / "queue/rotational")).strip()
    return {
        "device": os.path.basename(kinds[0][1]),
        "filesystem": kinds[0][0],
        "model": _text(str(whole / "device/model")).strip() or None,
        "rotational": turns == "1" if turns else None,
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
