"""The benchmarks on toys: each explains itself, runs in seconds with tiny settings, and writes a record of one shape without any text."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeml.made import TOY, make_mixture

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if path.read_text("utf-8").startswith("#!"))
TORCH = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "onnx")), reason="the extra 'export' is not installed"
)
SECRET = "zanzibar"  # a word of every made text: no record may have it

#: A dense model beside the toy mixture of the export tests, and that mixture's encoder as the probe's.
SOURCE = """
import sys
sys.path.insert(0, {place!r})
import torch
from edgeml_export import Model
from edgeml_export.encoder import Encoder, EncoderConfig, MultiTaskModel
from toy_source import CONFIG, MAX_TOKENS, TASKS, WORDS, mixture, tokenizer

def dense():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(len(WORDS), 64, 2, 2, CONFIG.intermediate, 32))
    return Model(MultiTaskModel(encoder, {{task.name: len(task.labels) for task in TASKS}}), TASKS, tokenizer(), MAX_TOKENS)
"""


def call(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # torch's threads only wait for each other on models this small
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)


def record_of(script: str, folder: Path, *arguments: str | Path) -> dict[str, Any]:
    """Run a benchmark, check the shape of what it wrote, and return it."""
    done = call(script, *arguments, "--records", folder)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    (file,) = folder.glob("*.json")
    record: dict[str, Any] = json.loads(file.read_text("utf-8"))
    assert file.name.endswith(f"-{record['date']}.json")
    assert set(record) == {
        "schema", "benchmark", "date", "command", "tool_version", "environment", "load_average", "verdicts", "figures",
    }  # fmt: skip
    assert record["verdicts"]
    for verdict in record["verdicts"]:
        assert {"name", "bound", "measured", "holds"} <= set(verdict)
        assert verdict["holds"] in (True, False, None)
    assert done.returncode == any(verdict["holds"] is False for verdict in record["verdicts"])
    text = file.read_text("utf-8")
    assert SECRET not in text
    assert str(folder.parent) not in text
    return record


def holds(record: dict[str, Any]) -> dict[str, bool | None]:
    return {verdict["name"]: verdict["holds"] for verdict in record["verdicts"]}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a made bundle and made data for its tasks."""
    place = tmp_path_factory.mktemp("benchmarks")
    make_mixture(place / "toy.edgeml")
    for name, labels in TOY.tasks.items():
        task = place / "data" / "made" / name
        task.mkdir(parents=True)
        (task / "task.json").write_text(json.dumps({"name": name, "domain": "made", "labels": list(labels), "metric": "accuracy"}))
        rows = [{"text": f"{SECRET} rain and sun {number * 7919}", "label": number % len(labels)} for number in range(40)]
        for split in ("train", "test"):
            (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `source.py`, the bundle of its mixture and the data of both."""
    from edgeml_export.model import load_source
    from edgeml_export.pipeline import export

    place = tmp_path_factory.mktemp("exported")
    (place / "source.py").write_text(SOURCE.format(place=str(ROOT / "tests" / "export")))
    model = load_source(f"{place / 'source.py'}:mixture")
    sys.modules["toy_source"].write_data(place / "data")
    export(model, place / "toy.edgeml", data=place / "data")
    return place


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_explains_itself(script: Path) -> None:
    if script.stem == "quality":
        pytest.importorskip("torch", reason="the extra 'export' is not installed")
    done = call(str(script.relative_to(ROOT / "benchmarks")), "--help")
    assert done.returncode == 0, done.stderr
    assert "--records" in done.stdout


def test_resident(toy: Path, tmp_path: Path) -> None:
    common = ("--bundle", toy / "toy.edgeml", "--data", toy / "data", "--seeds", "0", "--cache", tmp_path / "cache", "--mixture", "none")
    record = record_of("text/resident.py", tmp_path / "records", *common, "--watched", "8")
    assert set(record["figures"]["quarter"]["mean"]) == {
        "task", "domain made", "watched", "nearest", "general", "random 0", "all", "chance",
    }  # fmt: skip
    verdicts = holds(record)
    assert len(verdicts) == 10
    assert all(value is None for name, value in verdicts.items() if "forgetting" in name), "there is no other domain"


def test_masks(toy: Path, tmp_path: Path) -> None:
    common = ("--bundle", toy / "toy.edgeml", "--data", toy / "data", "--seeds", "0,1", "--cache", tmp_path / "cache", "--mixture", "none")
    record = record_of("text/masks.py", tmp_path / "records", *common)
    assert set(record["figures"]["mean"]) == {
        "all", "none", "half by usage", "half at random", "quarter by usage", "quarter at random",
    }  # fmt: skip
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}
    assert len(kept) == 2 * 8
    again = record_of("text/masks.py", tmp_path / "records", *common)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")} == kept
    assert again["figures"] == record["figures"]


def test_stability(toy: Path, tmp_path: Path) -> None:
    record = record_of("text/stability.py", tmp_path / "records", "--bundle", toy / "toy.edgeml", "--data", toy / "data", "--inputs", "64")
    assert all(holds(record).values())
    assert record["figures"]["whole_model"]["inputs"] == 64
    assert record["figures"]["whole_model"]["slots"]["0%"] == 1


def test_paging_bound(toy: Path, tmp_path: Path) -> None:
    options = ("--bundle", toy / "toy.edgeml", "--rounds", "3", "--tokens", "8")
    record = record_of("paging/bound.py", tmp_path / "records", *options)
    assert record["figures"]["time"]["answers"]["100%"]["misses"] == 0
    assert record["figures"]["time"]["answers"]["25%"]["misses"] > 0
    assert record["figures"]["time"]["read_bytes_per_s"] > 0


def test_startup(tmp_path: Path) -> None:
    wheel = tmp_path / "edgeml.whl"
    wheel.write_bytes(bytes(400_000))
    record = record_of("startup.py", tmp_path / "records", "--repeats", "1", "--wheel", wheel)
    found = holds(record)
    assert found["heavy modules that `edgeml --help` loads"] is True
    assert found["bytes of the wheel"] is False


@TORCH
def test_quality(exported: Path, tmp_path: Path) -> None:
    source = exported / "source.py"
    table = tmp_path / "table.md"
    table.write_text("| vision/colour | 0.500 | 0.400 | 0.350 |\n")
    options = (
        "--dense", f"{source}:dense", "--mixture", f"{source}:mixture", "--probe-encoder", f"{source}:dense", "--probe-table", table,
        "--bundle", exported / "toy.edgeml", "--data", exported / "data", "--cache", tmp_path / "cache",
    )  # fmt: skip
    record = record_of("text/quality.py", tmp_path / "records", *options)
    assert len(record["verdicts"]) == 5
    assert record["figures"]["probe_against_table"]["colour"]["printed"] == 0.5
    assert set(record["figures"]["bundle_against_mixture"]) == {"colour", "same"}
    assert holds(record)["points of mean score from the fp32 mixture to the bundle"] is not None
    without = record_of("text/quality.py", tmp_path / "more", *options[2:])
    assert [verdict["holds"] for verdict in without["verdicts"][2:]] == [None, None]


@TORCH
def test_masks_against_the_mixture_in_torch(exported: Path, tmp_path: Path) -> None:
    options = ("--bundle", exported / "toy.edgeml", "--data", exported / "data", "--seeds", "0", "--cache", tmp_path / "cache")
    record = record_of("text/masks.py", tmp_path / "records", *options, "--mixture", f"{exported / 'source.py'}:mixture")
    (retention,) = (verdict for verdict in record["verdicts"] if verdict["name"].startswith("retention"))
    assert retention["holds"] is not None
    assert retention["interval"][0] <= retention["measured"] <= retention["interval"][1]
    assert record["figures"]["fp32_mixture_mean"] is not None


@TORCH
def test_a_model_of_other_tasks_is_refused(toy: Path, exported: Path, tmp_path: Path) -> None:
    options = ("--bundle", toy / "toy.edgeml", "--data", toy / "data", "--cache", tmp_path / "cache", "--records", tmp_path)
    done = call("text/masks.py", *options, "--mixture", f"{exported / 'source.py'}:mixture")
    assert done.returncode == 2
    assert "has no task 'weather'" in done.stderr
    assert "Traceback" not in done.stderr


@TORCH
def test_the_probe_is_logistic_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the minimum the gradient of the stated problem vanishes, for two classes and for more."""
    import torch

    for folder in ("benchmarks", "benchmarks/text"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import torch_models

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 5, generator=generator, dtype=torch.float64)
    for classes in (2, 4):
        y = 3 * torch.randint(0, classes, (80,), generator=generator) + 1  # labels need not be 0, 1, 2
        weight, bias, names = torch_models._fit(x, y)
        weight.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, torch.searchsorted(names, y), reduction="sum")
        (gradient,) = torch.autograd.grad(torch_models.PROBE_C * loss, weight)
        regular = gradient + weight.detach()
        assert regular[1 if classes == 2 else 0 :].abs().max() < 1e-3 * gradient.abs().max()


@TORCH
def test_speed(exported: Path, tmp_path: Path) -> None:
    options = (
        "--dense", f"{exported / 'source.py'}:dense", "--bundle", exported / "toy.edgeml", "--data", exported / "data", "--task", "colour",
        "--tokens", "8,64", "--threads", "1", "--rounds", "4",
    )  # fmt: skip
    record = record_of("text/speed.py", tmp_path / "records", *options)
    assert [(row["tokens"], row["threads"]) for row in record["figures"]["results"]] == [(8, 1), (16, 1)]  # 64 is more than it reads
    assert [verdict["holds"] for verdict in record["verdicts"]] == [None]


def test_faults_are_sentences(tmp_path: Path) -> None:
    done = call("text/masks.py", "--bundle", tmp_path / "none.edgeml", "--records", tmp_path)
    assert done.returncode == 3
    assert re.fullmatch(r"masks\.py: .*no such file; check the path of the bundle\n", done.stderr)


def test_committed_records_name_no_machine_folder() -> None:
    for file in sorted((ROOT / "benchmarks" / "records").glob("*.json")):
        record = json.loads(file.read_text("utf-8"))
        assert not any(part.startswith(os.sep) for part in record["command"]), file.name
