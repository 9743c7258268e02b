"""Probes of energy, frequency and throttling on made machines: a folder in place of /sys, a function in place of vcgencmd."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edgeml import energy
from edgeml.energy import Monitor, Probe, find_probe, joules, throttle_state

PMIC = """   3V7_WL_SW_A current(0)=0.10000000A
   1V8_SYS_A current(1)=0.20000000A
   VDD_CORE_A current(7)=2.00000000A
   3V7_WL_SW_V volt(8)=3.70000000V
   1V8_SYS_V volt(9)=1.80000000V
   VDD_CORE_V volt(15)=0.75000000V
   EXT5V_V volt(24)=5.10000000V
"""


def put(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")


def silent(*_: str) -> str:
    return ""


def test_no_probe_is_null(tmp_path: Path) -> None:
    with Monitor(1.0, tmp_path, silent) as monitor:
        pass
    assert monitor.probe is None
    assert monitor.energy() is None
    assert monitor.frequency_hz() is None
    assert monitor.throttled() is None


def test_rapl_counts_packages_and_understands_a_wrap(tmp_path: Path) -> None:
    rapl = "class/powercap/intel-rapl:0"
    put(tmp_path, {f"{rapl}/energy_uj": "9000000", f"{rapl}/max_energy_range_uj": "10000000", f"{rapl}:0/energy_uj": "5"})
    probe = find_probe(tmp_path, silent)
    assert probe is not None
    assert probe.name == "rapl"
    assert probe.read() == 9.0
    assert probe.counts
    with Monitor(0.0, tmp_path, silent) as monitor:
        put(tmp_path, {f"{rapl}/energy_uj": "1000000"})
    told = monitor.energy()
    assert told is not None
    assert told["energy_j"] == pytest.approx(2.0)
    assert told["above_idle_j"] is None
    put(tmp_path, {"class/powercap/intel-rapl:1/energy_uj": "4000000"})
    two = find_probe(tmp_path, silent)
    assert two is not None
    assert two.read() == 5.0
    assert joules(two, [(0.0, 5.0), (1.0, 4.0)]) is None  # one of two wrapped, and nobody knows which


def test_the_power_controller_is_volts_times_amperes(tmp_path: Path) -> None:
    probe = find_probe(tmp_path, lambda *asked: PMIC if asked == ("pmic_read_adc",) else "")
    assert probe is not None
    assert probe.name == "pmic"
    assert not probe.counts
    assert probe.read() == pytest.approx(0.1 * 3.7 + 0.2 * 1.8 + 2 * 0.75)


@pytest.mark.parametrize(
    ("files", "watts"),
    [
        ({"power_now": "2500000"}, 2.5),
        ({"current_now": "-500000", "voltage_now": "4000000"}, 2.0),
        ({"current_now": "500000"}, None),
        ({"power_now": "2500000", "status": "Charging"}, None),
    ],
)
def test_a_battery(tmp_path: Path, files: dict[str, str], watts: float | None) -> None:
    put(tmp_path, {f"class/power_supply/bat/{name}": value for name, value in {"type": "Battery", **files}.items()})
    put(tmp_path, {"class/power_supply/ac/type": "Mains", "class/power_supply/ac/power_now": "99000000"})
    probe = find_probe(tmp_path, silent)
    assert (None if probe is None else probe.read()) == watts


def test_power_is_joined_by_straight_lines() -> None:
    probe = Probe("pmic", lambda: 0.0)
    assert joules(probe, [(0.0, 2.0), (1.0, 4.0), (3.0, 4.0)]) == pytest.approx(3.0 + 8.0)
    assert joules(probe, [(0.0, 2.0)]) is None


def test_idle_is_taken_off(tmp_path: Path) -> None:
    put(tmp_path, {"class/power_supply/bat/type": "Battery", "class/power_supply/bat/power_now": "2000000"})
    monitor = Monitor(0.02, tmp_path, silent)
    put(tmp_path, {"class/power_supply/bat/power_now": "5000000"})
    with monitor:
        time.sleep(0.02)
    told = monitor.energy()
    assert told is not None
    assert told["probe"] == "battery"
    assert told["idle_w"] == pytest.approx(2.0)
    assert told["mean_w"] == pytest.approx(5.0)
    assert told["above_idle_j"] == pytest.approx(told["energy_j"] * 3 / 5)


@pytest.mark.parametrize(("bits", "throttled"), [("0x0", False), ("0x50000", False), ("0x50005", True), ("0x4", True)])
def test_only_what_throttles_now_counts(tmp_path: Path, bits: str, throttled: bool) -> None:
    """The upper bits say what has ever been since boot: no fault of this run."""
    with Monitor(0.0, tmp_path, lambda *asked: f"throttled={bits}\n" if asked == ("get_throttled",) else "") as monitor:
        pass
    assert monitor.throttled() is throttled


def test_counts_that_rise_are_throttling_and_clocks_are_read(tmp_path: Path) -> None:
    counter = "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    put(tmp_path, {counter: "7", "devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1500000"})
    with Monitor(0.0, tmp_path, silent) as monitor:
        put(tmp_path, {"devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "600000"})
    assert monitor.throttled() is False
    assert monitor.frequency_hz() == {"min": 0.6e9, "mean": pytest.approx(1.05e9), "max": 1.5e9}
    with Monitor(0.0, tmp_path, silent) as monitor:
        put(tmp_path, {counter: "8"})
    assert monitor.throttled() is True
    assert throttle_state(tmp_path, silent) == (None, 8)


def test_it_reads_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy.EVERY_S >= 1
    monkeypatch.setattr(energy, "EVERY_S", 0.01)
    asked: list[str] = []
    with Monitor(0.0, tmp_path, lambda *what: asked.append(what[0]) or "") as monitor:  # type: ignore[func-returns-value]
        time.sleep(0.06)
    assert monitor.probe is None
    assert 3 <= asked.count("get_throttled") <= 8
