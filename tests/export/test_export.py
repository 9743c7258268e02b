"""A whole export of the toy model: evidence from the written bundle, refusals and interruptions that leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import edgeml_export
import pytest
from edgeml_export import evidence as evidence_module
from edgeml_export import output
from edgeml_export.model import Model
from edgeml_export.recipe import Recipe, parse_recipe

from edgeml import native
from edgeml.bundle import Bundle
from edgeml.errors import DataError, DeviceError, InputError, QualityRefused, UsageError
from edgeml.manifest import load_manifest

pytestmark = pytest.mark.skipif(not hasattr(native, "Context"), reason="the extension is not built")

ROOT = Path(__file__).parents[2]
ENVIRONMENT = dict(os.environ)
#: The command line with `export`, whether or not the installed package announces it.
MAIN = "from edgeml import cli; cli.COMMANDS['export'] = ('edgeml_export.command', ''); raise SystemExit(cli.main())"
STEPS: list[dict[str, Any]] = [
    {"kind": "quantize"},
    {"kind": "usage", "rows": 40},
    {"kind": "agree", "rows": 4, "min_router_agreement": 0.9},
    {"kind": "sets", "share": 0.5},
    {"kind": "verify", "max_mean_drop": 5.0, "max_task_drop": 10.0, "min_rows": 50},
]


def recipe(**changes: Any) -> Recipe:
    """STEPS with other parameters for the last pass."""
    return parse_recipe({"name": "toy", "pass": [*STEPS[:-1], STEPS[-1] | changes]}, "recipe")


@pytest.fixture(scope="module")
def exported(model: Model, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "toy.edgeml"
    return out, edgeml_export.export(model, out, recipe(), data)


def test_evidence_is_what_the_written_bundle_scored(exported: tuple[Path, dict[str, Any]], model: Model) -> None:
    out, evidence = exported
    with Bundle.open(out) as bundle:
        assert list(bundle.verify())
        manifest = load_manifest(bundle)
        assert manifest.evidence == evidence
        assert evidence["bytes"]["bundle"] == bundle.header.manifest_offset
    for task in model.tasks:
        found = evidence["tasks"][task.name]
        assert (found["metric"], found["n"]) == (task.metric, 60)
        assert abs(found["score"] - found["reference_score"]) < 0.1
    assert evidence["router_agreement"] > 0.9
    assert evidence["macs"]["bundle"] < evidence["macs"]["reference"]
    assert evidence["kept"]["share"] == 0.5
    assert evidence["tasks"]["colour"]["score"] == 1.0
    assert [path.name for path in out.parent.iterdir()] == ["toy.edgeml"]


def test_usage_is_recorded_for_every_task_and_site(exported: tuple[Path, dict[str, Any]]) -> None:
    with Bundle.open(exported[0]) as bundle:
        manifest = load_manifest(bundle)
    assert set(manifest.usage) == {"colour", "same", "embed"}
    for rows in manifest.usage.values():
        assert [len(row) for row in rows] == [6, 6]
        assert [sum(row) for row in rows] == pytest.approx([1, 1], abs=1e-4)
    assert [task.chance is None for task in manifest.tasks] == [False, False, True]


def test_provenance_names_data_by_hash_and_recipe(exported: tuple[Path, dict[str, Any]]) -> None:
    with Bundle.open(exported[0]) as bundle:
        provenance = load_manifest(bundle).provenance
    assert provenance["recipe"]["name"] == "toy"
    assert provenance["data"]["colour"]["licence"] == "CC0-1.0"
    assert len(provenance["data"]["same"]["test"]) == 64


def test_two_exports_are_byte_equal(exported: tuple[Path, dict[str, Any]], model: Model, data: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.edgeml"
    edgeml_export.export(model, again, recipe(), data)
    assert again.read_bytes() == exported[0].read_bytes()


@pytest.mark.parametrize(
    ("changes", "figures"),
    [
        ({"max_mean_drop": 0.0}, r"mean score falls by \d+\.\d\d points \(limit 0\)"),
        ({"max_task_drop": 0.0, "max_mean_drop": 90.0}, r"task 'same' falls by \d+\.\d\d points \(limit 0\)"),
    ],
)
def test_a_broken_limit_leaves_the_old_file(
    model: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, float], figures: str
) -> None:
    out = tmp_path / "m.edgeml"
    out.write_bytes(b"earlier")
    monkeypatch.setattr("edgeml_export.passes.evaluate", _worse)
    with pytest.raises(QualityRefused, match=figures) as refusal:
        edgeml_export.export(model, out, parse_recipe({"pass": [STEPS[-1] | changes]}, "r"), data)
    assert refusal.value.exit_code == 1
    assert out.read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["m.edgeml"]


def _worse(bundle: Path, view: Any, limit: int | None, show: bool, **rest: Any) -> dict[str, dict[str, Any]]:
    found = evidence_module.evaluate(bundle, view, limit, show, **rest)
    return {name: task | {"score": task["score"] - 0.1} for name, task in found.items()}


def test_router_agreement_has_a_limit(model: Model, data: Path, tmp_path: Path) -> None:
    steps = parse_recipe({"pass": [{"kind": "quantize"}, {"kind": "agree", "rows": 2, "min_router_agreement": 1.1}]}, "r")
    with pytest.raises(QualityRefused, match="routers agree on"):
        edgeml_export.export(model, tmp_path / "m.edgeml", steps, data)
    assert not list(tmp_path.iterdir())


def test_without_data_the_bundle_is_written_unmeasured(model: Model, tmp_path: Path) -> None:
    found = edgeml_export.export(model, tmp_path / "m.edgeml", experts="f32", dense="f32")
    assert "tasks" not in found
    with Bundle.open(tmp_path / "m.edgeml") as bundle:
        manifest = load_manifest(bundle)
        assert not manifest.usage
        assert {matrix.type.name for page in bundle.pages for matrix in page.matrices} == {"F32"}


def test_a_full_disk_leaves_nothing(model: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "m.edgeml").write_bytes(b"earlier")
    monkeypatch.setattr(evidence_module.np, "savez", full)
    with pytest.raises(DeviceError, match="No space left on device"):
        edgeml_export.export(model, tmp_path / "m.edgeml", recipe(), data)
    assert [path.name for path in tmp_path.iterdir()] == ["m.edgeml"]
    assert (tmp_path / "m.edgeml").read_bytes() == b"earlier"


def test_what_a_killed_export_left_is_cleared_but_nothing_else(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / ".m.edgeml.export"
    folder.mkdir()
    (folder / ".candidate.edgeml.part").write_bytes(b"half")
    edgeml_export.export(model, tmp_path / "m.edgeml")
    assert [path.name for path in tmp_path.iterdir()] == ["m.edgeml"]
    folder.mkdir()
    (folder / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"diary\.txt: this is in the way"):
        edgeml_export.export(model, tmp_path / "m.edgeml")
    assert (folder / "diary.txt").read_text() == "mine"


def test_two_exports_to_one_file_do_not_mix(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeml"
    with output.folder(out), pytest.raises(UsageError, match="another process is exporting"):
        edgeml_export.export(model, out)


@pytest.mark.parametrize("out", ["missing/m.edgeml", "."])
def test_a_place_that_cannot_be_written_is_named_before_the_work(out: str, source: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"choose a folder that exists|this is a directory"):
        edgeml_export.export(source, tmp_path / out)


def test_data_with_other_labels_is_refused(model: Model, data: Path, tmp_path: Path) -> None:
    for task in model.tasks:
        place = tmp_path / task.domain / task.name
        place.mkdir(parents=True)
        document = json.loads((data / task.domain / task.name / "task.json").read_text())
        (place / "task.json").write_text(json.dumps(document | {"labels": document["labels"][::-1]}))
    with pytest.raises(DataError, match="are not those the model was trained with"):
        edgeml_export.export(model, tmp_path / "m.edgeml", data=tmp_path)


def test_the_measuring_process_cannot_import_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wants_torch.py").write_text("import torch")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(DeviceError, match="torch is not for the device"):
        evidence_module.run_apart("wants_torch", [])


def test_what_the_measuring_process_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"measuring the written bundle failed: .*no such file"):
        evidence_module.run_apart("edgeml.cli", ["verify", str(tmp_path / "none.edgeml")])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", MAIN, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False)


def test_the_command_prints_one_document(source: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeml"
    done = run("export", source, "-o", str(out), "--data", str(data), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    with Bundle.open(out) as bundle:
        assert document["evidence"] == bundle.manifest["evidence"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["nowhere.py:f"], 2, "nowhere.py: no such file"),
        (["model.onnx"], 2, "an ONNX file needs a recipe"),
        (["model.bin"], 2, "give the model as file.py:function"),
        (["toy_source.py:nothing"], 2, "there is no function 'nothing'"),
        (["toy_source.py:tokenizer"], 2, "returned bytes, not an edgeml_export.Model"),
        (["toy_source.py:mixture", "--recipe", "none.toml"], 3, "none.toml: the recipe cannot be read"),
        (["toy_source.py:mixture", "--data", "none"], 3, "no such directory"),
        (["broken.py:f"], 2, "ZeroDivisionError"),
    ],
)
def test_each_error_is_one_sentence(arguments: list[str], code: int, sentence: str, source: str, tmp_path: Path) -> None:
    (tmp_path / "toy_source.py").write_text(Path(source.rpartition(":")[0]).read_text())
    (tmp_path / "broken.py").write_text("def f():\n    return 1 / 0\n")
    arguments = [str(tmp_path / part) if ".py" in part else part for part in arguments]
    done = run("export", *arguments, "-o", str(tmp_path / "m.edgeml"))
    assert done.returncode == code
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.edgeml*"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_the_old_file_alone(number: int, source: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeml"
    out.write_bytes(b"earlier")
    arguments = [sys.executable, "-P", "-c", MAIN, "export", source, "-o", str(out), "--data", str(data)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    candidate = tmp_path / ".m.edgeml.export" / "candidate.edgeml"
    deadline = time.monotonic() + 60
    while not candidate.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said.strip()) == (130, "edgeml: interrupted")
    assert out.read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["m.edgeml"]
