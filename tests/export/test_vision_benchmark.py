"""The benchmark of variants, on the toy: a verdict for every pair, bound and task, and a record; bundles of another kind are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import edgeml_export
import pytest
from edgeml_export.vision import VisionModel
from edgeml_export.vision.recipe import parse_recipe

from edgeml import native
from edgeml.made import make_mixture

pytestmark = pytest.mark.skipif(not hasattr(native, "Context"), reason="the extension is not built")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vision" / "variants.py"


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False, timeout=600, env=environment
    )


def test_pairs_bounds_and_tasks_are_judged(vision: VisionModel, vision_data: Path, tmp_path: Path) -> None:
    document = {
        "pareto": False,
        "variant": [{}, {"bound": 1.5, "store": ["f32"], "tune": False}],
        "prune": {"images": 64},
        "int8": {"when": "always", "images": 16, "methods": ["minmax"], "max_drop": 20, "max_map_drop": 20},
    }
    edgeml_export.export(vision, tmp_path / "toy.edgeml", parse_recipe(document, "r.toml"), vision_data)
    options = ("--data", vision_data, "--rounds", "2", "--resamples", "20", "--records", tmp_path / "records")
    done = call(tmp_path / "toy.edgeml", *options)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    (file,) = (tmp_path / "records").glob("vision-variants-*.json")
    record = json.loads(file.read_text("utf-8"))
    assert str(tmp_path) not in file.read_text("utf-8")
    names = [verdict["name"] for verdict in record["verdicts"]]
    assert {f"toy dense-int8 {task.name}: points below float" for task in vision.tasks} <= set(names)
    assert "toy bound-1.5-f32: largest loss ratio of a task" in names
    assert sum("share of time saved" in name for name in names) == 3 * len(vision.tasks)
    assert set(record["figures"]["toy"]["scores"]) == {"dense-f32", "dense-int8", "bound-1.5-f32"}
    bound = next(verdict for verdict in record["verdicts"] if "loss ratio" in verdict["name"])
    assert (bound["holds"], bound["bound"]) == (True, "<= 1.5")


def test_other_bundles_are_refused_in_a_sentence(vision_data: Path, tmp_path: Path) -> None:
    make_mixture(tmp_path / "texts.edgeml")
    done = call(tmp_path / "texts.edgeml", "--data", vision_data)
    assert done.returncode == 2
    assert "this is no bundle of variants for images" in done.stderr
    assert done.stderr.count("\n") == 1
