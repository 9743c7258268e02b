"""What a run drew and how the processor fared meanwhile, as far as this machine tells: energy, frequency, throttling.

Probes, the first that answers: RAPL's energy counters (powercap; a counter that wraps is understood), the Raspberry Pi 5's power
controller (`vcgencmd pmic_read_adc`: the sum of volts times amperes over its rails, which is the board without what hangs on USB),
a battery (power_now, or current_now times voltage_now). Where only power is told, it is read once a second and joined by straight lines.
No probe: null, never 0.

A `Monitor` reads at the beginning, at the end, and between them at most once a second. `throttled` is whether the processor slowed
itself down meanwhile: by vcgencmd's bits, or by the counts of thermal_throttle; None where neither is there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Monitor", "Probe", "find_probe", "joules", "throttle_state"]

EVERY_S = 1.0
#: Bits of `vcgencmd get_throttled` that say what is so now: under-voltage, frequency capped, throttled, soft temperature limit.
NOW_BITS = 0xF
SYS = Path("/sys")
Reading = tuple[float, float]  # seconds of time.monotonic, joules or watts


class Probe:
    """Where power is told. `read` gives joules so far where `counts` is true (which wrap at `wrap_j`), otherwise watts; None: not now."""

    def __init__(self, name: str, read: Callable[[], float | None], counts: bool = False, wrap_j: float = 0.0) -> None:
        self.name, self.read, self.counts, self.wrap_j = name, read, counts, wrap_j


def vcgencmd(*arguments: str) -> str:
    """What the Pi's firmware answers; nothing where there is none."""
    tool = shutil.which("vcgencmd")
    if tool is None:
        return ""
    try:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=2, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def find_probe(root: Path = SYS, ask: Callable[..., str] = vcgencmd) -> Probe | None:
    """The first probe that answers on this machine, None where none does."""
    packages = sorted(root.glob("class/powercap/intel-rapl:[0-9]*/energy_uj"))
    packages = [file for file in packages if file.parent.name.count(":") == 1]  # others are parts of these

    def rapl() -> float | None:
        found = [_number(file) for file in packages]
        return None if not found or None in found else sum(value or 0.0 for value in found) / 1e6

    def pmic() -> float | None:
        told = {(name, kind): float(value) for name, kind, value in re.findall(r"(\w+)_([AV])\s+\w+\(\d+\)=([\d.]+)", ask("pmic_read_adc"))}
        rails = [amperes * told[name, "V"] for (name, kind), amperes in told.items() if kind == "A" and (name, "V") in told]
        return sum(rails) if rails else None

    def battery() -> float | None:
        for place in sorted(root.glob("class/power_supply/*")):
            if _text(place / "type") != "Battery" or _text(place / "status") == "Charging":
                continue
            power, current, voltage = (_number(place / name) for name in ("power_now", "current_now", "voltage_now"))
            if power is not None:
                return abs(power) / 1e6
            if current is not None and voltage is not None:
                return abs(current) * voltage / 1e12
        return None

    wraps = [_number(file.with_name("max_energy_range_uj")) or 0.0 for file in packages]
    probes = (Probe("rapl", rapl, True, wraps[0] / 1e6 if len(wraps) == 1 else 0.0), Probe("pmic", pmic), Probe("battery", battery))
    return next((probe for probe in probes if probe.read() is not None), None)


def joules(probe: Probe, readings: list[Reading]) -> float | None:
    """Energy between the first reading and the last; None where that cannot be told."""
    if len(readings) < 2:
        return None
    total = 0.0
    for (before, low), (after, high) in pairwise(readings):
        step = high - low if probe.counts else (after - before) * (low + high) / 2
        if step < 0:  # a counter that began anew
            if not probe.wrap_j:
                return None
            step += probe.wrap_j
        total += step
    return total


def throttle_state(root: Path = SYS, ask: Callable[..., str] = vcgencmd) -> tuple[int | None, int | None]:
    """Bits that are set now (None without vcgencmd), and how often the processors slowed down since boot (None if uncounted)."""
    bits = re.search(r"throttled=0x([0-9a-fA-F]+)", ask("get_throttled"))
    counts = [_number(file) for file in root.glob("devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")]
    known = [int(count) for count in counts if count is not None]
    return int(bits.group(1), 16) & NOW_BITS if bits else None, sum(known) if known else None


class Monitor:
    """Reads the machine while a `with` block runs; `idle_s` seconds before it are the baseline of its energy."""

    def __init__(self, idle_s: float = 0.0, root: Path = SYS, ask: Callable[..., str] = vcgencmd) -> None:
        self._root, self._ask = root, ask
        self.probe = find_probe(root, ask)
        self._readings: list[Reading] = []
        self._hertz: list[float] = []
        self._throttle: list[tuple[int | None, int | None]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="edgeml-monitor", daemon=True)
        self.idle_w: float | None = None
        if self.probe is not None and idle_s > 0:
            self._sample()
            time.sleep(idle_s)
            self._sample()
            drawn = joules(self.probe, self._readings)
            self.idle_w = None if drawn is None else drawn / (self._readings[-1][0] - self._readings[0][0])
        self._readings, self._hertz, self._throttle = [], [], []

    def __enter__(self) -> Monitor:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def energy(self) -> dict[str, Any] | None:
        """What was drawn: the probe, joules in all and above idle, watts when idle and on average. None without a probe."""
        drawn = None if self.probe is None else joules(self.probe, self._readings)
        if self.probe is None or drawn is None:
            return None
        seconds = self._readings[-1][0] - self._readings[0][0]
        above = None if self.idle_w is None else drawn - self.idle_w * seconds
        return {"probe": self.probe.name, "energy_j": drawn, "above_idle_j": above, "idle_w": self.idle_w, "mean_w": drawn / seconds}

    def frequency_hz(self) -> dict[str, float] | None:
        """Lowest, mean and highest clock that was seen, None where none is told."""
        seen = self._hertz
        return {"min": min(seen), "mean": sum(seen) / len(seen), "max": max(seen)} if seen else None

    def throttled(self) -> bool | None:
        """Whether the processor slowed itself down meanwhile, None if unknown."""
        bits = [state for state, _ in self._throttle if state is not None]
        counts = [count for _, count in self._throttle if count is not None]
        return None if not bits and not counts else any(bits) or (bool(counts) and counts[-1] > counts[0])

    def _watch(self) -> None:
        while not self._done.wait(EVERY_S):
            self._sample()

    def _sample(self) -> None:
        value = None if self.probe is None else self.probe.read()
        if value is not None:
            self._readings.append((time.monotonic(), value))
        clocks = [_number(file) for file in self._root.glob("devices/system/cpu/cpufreq/policy*/scaling_cur_freq")]
        self._hertz += [1e3 * clock for clock in clocks if clock is not None]
        self._throttle.append(throttle_state(self._root, self._ask))


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(file: Path) -> float | None:
    text = _text(file)
    return float(text) if re.fullmatch(r"-?\d+", text) else None
