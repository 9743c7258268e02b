"""Exports of a CNN that are broken off: by Ctrl-C, by a polite kill, by one that cannot be answered; nothing half-written is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgeml_export
import pytest
from edgeml_export.prune import Distillation
from edgeml_export.vision import VisionModel
from edgeml_export.vision.recipe import parse_recipe

from edgeml import native
from edgeml.bundle import Bundle

pytestmark = pytest.mark.skipif(not hasattr(native, "Context"), reason="the extension is not built")

#: The command line, with an export that stands still once its candidate is written.
STALLED = """
import signal
import time
import edgeml_export.vision.export as export
from edgeml import cli
real = export.write_bundle
def slow(*arguments):
    real(*arguments)
    print("written", flush=True)
    time.sleep(100)
export.write_bundle = slow
cli.COMMANDS["export"] = ("edgeml_export.command", "")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
raise SystemExit(cli.main())
"""


def broken_off(number: int, source: str, out: Path) -> tuple[int, str]:
    """Start an export, send the signal when the candidate lies in its hidden folder; exit code and what was said."""
    arguments = [sys.executable, "-P", "-c", STALLED, "export", source, "-o", str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        assert (out.parent / f".{out.name}.export" / "candidate.edgeml").exists()
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    return process.returncode, said.strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_the_old_file_alone(number: int, vision_source: str, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeml"
    out.write_bytes(b"earlier")
    assert broken_off(number, vision_source, out) == (130, "edgeml: interrupted")
    assert out.read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["m.edgeml"]


def test_what_a_killed_export_leaves_is_cleared_by_the_next(vision_source: str, vision: VisionModel, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeml"
    assert broken_off(signal.SIGKILL, vision_source, out) == (-signal.SIGKILL, "")
    assert not out.exists()
    edgeml_export.export(vision, out)
    assert [path.name for path in tmp_path.iterdir()] == ["m.edgeml"]


def test_an_export_broken_off_in_pruning_goes_on_in_its_work_folder(
    vision: VisionModel, vision_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second variant's fine-tuning: the first one's is not done again, and the bundle is the uninterrupted one's."""
    variants = [{"remove_macs": share, "store": ["f32"]} for share in (0.3, 0.5)]
    steps = parse_recipe({"pareto": False, "variant": variants, "prune": {"images": 64}, "tune": {"epochs": 1, "batch": 64}}, "r.toml")
    out, work, tuned = tmp_path / "m.edgeml", tmp_path / "work", list[float]()
    real = Distillation.__call__

    def breaking(self: Any, module: Any, round_: int) -> None:
        tuned.append(time.monotonic())
        if len(tuned) == 2:
            raise KeyboardInterrupt
        real(self, module, round_)

    monkeypatch.setattr(Distillation, "__call__", breaking)
    with pytest.raises(KeyboardInterrupt):
        edgeml_export.export(vision, out, steps, vision_data, work=work)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    edgeml_export.export(vision, out, steps, vision_data, work=work)
    assert len(tuned) == 3
    edgeml_export.export(vision, tmp_path / "whole.edgeml", steps, vision_data)
    assert len(tuned) == 5
    other = replace(steps, tune=replace(steps.tune, rate=0.01), variants=steps.variants[:1])
    edgeml_export.export(vision, tmp_path / "other.edgeml", other, vision_data, work=work)
    assert len(tuned) == 6  # what was trained at another rate is not taken for it
    with Bundle.open(out) as resumed, Bundle.open(tmp_path / "whole.edgeml") as whole:
        assert resumed.id == whole.id
