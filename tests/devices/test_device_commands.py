"""`edgeml device list, probe, predict, run`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

pytest.importorskip("edgeml_devices", reason="the distribution edgeml-devices is not installed")

from edgeml_devices.command import command
from edgeml_devices.commands import probe as probe_module
from edgeml_devices.commands import run as run_module
from edgeml_devices.emulate import Emulation, Limits
from edgeml_devices.library import profiles

from edgeml.cli import main
from edgeml.device import Figure, parse_profile, write_profile
from edgeml.errors import DeviceError, UsageError
from edgeml.made import make_cnn, make_mixture


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    make_mixture(folder / "toy.edgeml")
    make_cnn(folder / "cnn.edgeml", variants=("full", "small"))
    (folder / "here.toml").write_bytes(write_profile(profiles()["box-4gb"]))
    return folder


def call(*arguments: str | Path) -> str:
    """Standard output of a subcommand. Raises what it raises."""
    done = CliRunner().invoke(command, [str(part) for part in arguments], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.mark.parametrize("name", ["list", "predict", "probe", "run"])
def test_each_explains_itself(name: str) -> None:
    assert "Example: edgeml device" in call(name, "--help")
    assert name in call("--help")


def test_list() -> None:
    said = call("list")
    assert all(name in said for name in profiles())
    one = call("list", "raspberry-pi-zero-2-w")
    assert "kernels.int8_macs_per_s = " in one
    assert "unknown (" in one
    document = json.loads(call("list", "--json"))
    assert len(document["devices"]) == len(profiles())
    assert document["devices"][0]["figures"]["storage.64k_qd2_bytes_per_s"] is None
    with pytest.raises(UsageError, match="did you mean"):
        call("list", "raspberry-pi-44")


def test_predict(place: Path) -> None:
    said = call("predict", place / "toy.edgeml", "--device", "raspberry-pi-4", "--tokens", "32", "--memory", "25%")
    assert "on Raspberry Pi 4 Model B, 4 GB" in said
    assert "assumed, not measured" in said
    assert "waiting for pages" in said
    document = json.loads(call("predict", place / "toy.edgeml", "--device", "raspberry-pi-4", "--json"))
    assert document["device"] == "raspberry-pi-4-4gb"
    assert document["threads"] == 4
    assert document["assumed"]
    assert {"value", "low", "high", "n"} == set(document["latency_s"])
    image = json.loads(call("predict", place / "cnn.edgeml", "--device", "phone-entry", "--json"))
    assert image["tokens"] is None


def test_probe_writes_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = profiles()["box-2gb"]
    monkeypatch.setattr(probe_module, "measure_profile", lambda *_: made)
    assert main(["device", "probe", "-o", str(tmp_path / "x.toml")]) == 0
    assert capsys.readouterr() == ("", f"note: the profile is in {tmp_path / 'x.toml'}\n")
    assert call("probe", "-o", tmp_path / "x.toml", "--quiet") == ""
    assert parse_profile((tmp_path / "x.toml").read_bytes(), "x") == made
    assert json.loads(call("probe", "--json"))["name"] == "box-2gb"
    assert call("probe").startswith("schema = 1\n")
    with pytest.raises(UsageError, match="lower-case"):
        call("probe", "--name", "My Board")
    with pytest.raises(UsageError, match="no such folder"):
        call("probe", "-o", tmp_path / "none" / "x.toml")


BENCH = ("--device", "raspberry-pi-4", "--emulate", "--quiet")
SHORT = ("--task", "weather", "--iterations", "2", "--warmup", "0", "--cold", "0", "--threads", "1")


def test_bench_under_limits(place: Path) -> None:
    said = json.loads(call("run", place / "toy.edgeml", *BENCH, "--here", place / "here.toml", "--json", "--", *SHORT, "--memory", "50%"))
    (record,), (scaled,) = said["measured"]["records"], said["scaled"]
    assert record["memory"] == "50%"
    assert record["device"]["processors"] <= 4
    assert said["scale"]["low"] <= said["scale"]["value"] <= said["scale"]["high"]
    assert scaled["value"] > 0
    assert len(said["held"]) + len(said["not_held"]) == 3


def test_quiet_is_quiet(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "run", str(place / "toy.edgeml"), *BENCH, "--here", str(place / "here.toml"), "--", *SHORT]) == 0
    assert capfd.readouterr().err == ""


def test_run_under_limits(place: Path) -> None:
    asked = ("--command", "run", "--", "--task", "weather", "--text", "rain", "--threads", "1")
    assert call("run", place / "toy.edgeml", *BENCH, *asked).startswith("weather")


def test_a_failing_child_hands_its_code_on_and_speaks_for_itself(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["device", "run", str(place / "toy.edgeml"), *BENCH, "--quiet", "--command", "run", "--", "--task", "none", "--text", "x"]
    assert main(asked) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert "has no task 'none'" in said[0]
    assert main([*asked[:3], *BENCH, "--", "--tsak", "none"]) == 2
    assert capfd.readouterr().err.startswith("edgeml: No such option"), "before anything is measured"
    with pytest.raises(UsageError, match="--emulate"):
        call("run", place / "toy.edgeml", "--device", "raspberry-pi-4")


def test_a_killed_child_says_why() -> None:
    capped, free = (Limits(cap, None, None, Path()) for cap in (1, None))
    assert run_module._ended("bench", 3, capped) == 3
    with pytest.raises(DeviceError, match=r"killed by signal 9 .*more memory than the device has"):
        run_module._ended("bench", -9, capped)
    with pytest.raises(DeviceError, match=r"killed by signal 9 under these limits$"):
        run_module._ended("bench", 137, free)


def test_scaling_leaves_the_waiting_alone() -> None:
    record: dict[str, Any] = {"latency_s": {"p50": 0.010}, "page_wait_s": 0.04, "rounds": 10}
    assert run_module._scaled(record, {"value": 3.0, "low": 2.0, "high": 4.0}) == pytest.approx(
        {"value": 0.022, "low": 0.016, "high": 0.028, "n": None}
    )
    own, board = profiles()["box-4gb"], profiles()["raspberry-pi-4-4gb"]
    found = run_module.scale(own, board)
    assert found is not None
    assert found["value"] == pytest.approx(0.5, abs=0.3)
    assert run_module.scale(own, type(own)("x", "X", "x", {"cpu.cores": Figure(1.0, "x")})) is None
    assert isinstance(command, click.Group)
    assert Emulation().held == []
