"""benchmarks/quality/gate.py on a toy: that it measures and judges, not what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from edgeml.made import make_mixture

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quality" / "gate.py"


def test_the_gate_is_measured(tmp_path: Path) -> None:
    make_mixture(tmp_path / "toy.edgeml")
    asked = ["--bundle", tmp_path / "toy.edgeml", "--runs", "3", "--simulations", "2", "--seconds", "0", "--records", tmp_path / "records"]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, asked)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 1), done.stderr
    (file,) = (tmp_path / "records").glob("*.json")
    record = json.loads(file.read_text("utf-8"))
    assert len(record["verdicts"]) == 2 + 2 * 4
    assert len(record["figures"]["ratios"]) == 3
    assert record["figures"]["process"]["measured"] >= 0
    assert 0 <= record["figures"]["real"]["false_alarms"] <= 1


def test_one_run_tells_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--runs", "1", "--records", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--runs must be at least 2" in done.stderr
