"""`edgeml doctor`: what it says of a machine, a bundle and a model's folder; nothing is measured here but a moment of reading."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from edgeml_devices import hardware
from edgeml_devices.commands import doctor
from edgeml_devices.fit import fit_folder, read_folder

from edgeml.cli import main
from edgeml.device import Figure, Profile, write_profile
from edgeml.errors import DataError, DeviceError
from edgeml.made import make_mixture

FIGURES = {
    "cpu.cores": 1, "memory.usable_bytes": 1 << 30, "memory.read_bytes_per_s": 1e9, "kernels.int4_macs_per_s": 1e9,
    "kernels.int8_macs_per_s": 1e9, "kernels.int4_stream_bytes_per_s": 1e9, "kernels.int8_stream_bytes_per_s": 1e9,
    "kernels.values_per_s": 1e9, "kernels.activations_per_s": 1e8, "graphs.matmul_macs_per_s": 1e9, "graphs.values_per_s": 1e9,
    "graphs.node_s": 1e-6, "process.request_s": 1e-3, "process.bytes": 50 << 20, "process.bytes_per_tokenizer_byte": 10,
    "process.bytes_per_graph_byte": 2, "storage.1m_qd1_bytes_per_s": 1e8,
}  # fmt: skip
PROFILE = Profile("made", "A made device", "aarch64", {key: Figure(float(value), "for a test") for key, value in FIGURES.items()})


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "READ_FILE_BYTES", 1 << 20)
    monkeypatch.setattr(doctor, "QUICK_S", 0.006)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    file = tmp_path / "made.toml"
    file.write_bytes(write_profile(PROFILE))
    return file


def safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, (dtype, shape) in tensors.items()}
    data = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data)


def moe(folder: Path) -> None:
    safetensors(folder / "a.safetensors", {"embed.weight": ("BF16", [1000, 64])})
    experts = {f"layers.0.mlp.experts.{number}.up_proj.weight": ("BF16", [256, 64]) for number in range(8)}
    safetensors(folder / "b.safetensors", experts)
    (folder / "config.json").write_text(json.dumps({"model_type": "made", "num_local_experts": 8, "num_experts_per_tok": 2}))


def test_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for word in ("kernels:", "onnxruntime:", "memory:", "disk:", "direct reads:", "throttling:", "energy:"):
        assert word in said
    assert list(tmp_path.iterdir()) == []
    assert main(["doctor", "--folder", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {check["name"] for check in document["checks"]} >= {"kernels", "load", "governor"}
    assert document["machine"]["available_bytes"] > 0


def test_a_bundle(tmp_path: Path, profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "toy.edgeml"
    make_mixture(bundle)
    assert main(["doctor", str(bundle), "--profile", str(profile), "--memory", "25%"]) == 0
    said = capsys.readouterr().out
    for word in ("latency", "peak memory", "fits", "waiting for pages", "experts in slots", "every figure that went in was measured"):
        assert word in said
    assert main(["doctor", str(bundle), "--profile", str(profile), "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert model["fits"] is True
    assert model["latency_s"]["low"] < model["latency_s"]["value"] < model["latency_s"]["high"]
    assert model["latency_s"]["value"] == pytest.approx(sum(term["seconds"] for term in model["terms"]))


def test_a_models_folder(tmp_path: Path, profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe(tmp_path)
    model = read_folder(tmp_path)
    assert (model.files, model.parameters, model.routed) == (2, 64_000 + 8 * 256 * 64, 8 * 256 * 64)
    assert model.bytes == 2 * model.parameters
    assert model.active == 64_000 + 2 * 256 * 64
    assert main(["doctor", str(tmp_path), "--profile", str(profile)]) == 0
    said = capsys.readouterr().out
    assert "fits whole in float32" in said
    assert "in experts" in said


@pytest.mark.parametrize(
    ("usable", "free", "said"),
    [
        (1 << 30, None, "fits whole in float32"),
        (1 << 30, 150_000, "fits whole in int4"),
        (1 << 30, 1000, "does not fit on the disk even in int4"),
        ((160 << 20) + 100_000, None, "have to be paged or masked"),
        ((160 << 20) + 1000, None, "does not fit in memory even in int4"),
    ],
)
def test_advice_for_a_folder(usable: int, free: int | None, said: str, tmp_path: Path) -> None:
    moe(tmp_path)
    figures = {**PROFILE.figures, "memory.usable_bytes": Figure(float(usable), "x")}
    found = fit_folder(read_folder(tmp_path), Profile("made", "Made", "x", figures), free)
    assert said in found["advice"]


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 1 << 60), struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]"])
def test_a_damaged_header_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.safetensors: .*safetensors file"):
        read_folder(tmp_path)


def test_an_unknown_dtype_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.safetensors"):
        read_folder(tmp_path)
    safetensors(tmp_path / "a.safetensors", {"w": ("Q7", [3])})
    with pytest.raises(DataError, match="'w'"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing.edgeml"], 3, "no such file or folder"),
        ([], 4, "nothing can be written there (No such file or directory); name another folder"),
        (["--tokens", "0"], 2, "tokens"),
    ],
)
def test_bad_input(arguments: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments, "--folder", str(tmp_path / "none")]) == code
    assert said in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_no_place_for_a_probe(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="name another folder"):
        hardware.measure_profile(tmp_path / "none")


def test_throttling_is_read_from_the_system(tmp_path: Path) -> None:
    cpu = tmp_path / "devices/system/cpu/cpu0"
    (cpu / "cpufreq").mkdir(parents=True)
    (cpu / "thermal_throttle").mkdir()
    (tmp_path / "class/thermal/thermal_zone0").mkdir(parents=True)
    (tmp_path / "class/thermal/thermal_zone0/temp").write_text("85500\n")
    (cpu / "cpufreq/scaling_governor").write_text("powersave\n")
    (cpu / "cpufreq/scaling_cur_freq").write_text("600000\n")
    (cpu / "thermal_throttle/core_throttle_count").write_text("3\n")
    found = hardware.throttling(tmp_path)
    assert found == {"celsius": 85.5, "governor": "powersave", "clock_hz": 600_000_000, "most_clock_hz": None, "throttle_events": 3}
    assert all(value is None for value in hardware.throttling(tmp_path / "none").values())
    machine: dict[str, Any] = hardware.describe(tmp_path) | {"throttling": found}
    bad = {check["name"] for check in doctor.checks(machine) if check["good"] is False}
    assert {"throttling", "governor"} <= bad
