"""The attention benchmark on a few tokens: it checks what it times and writes a record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scar" / "attention.py"


def test_it_checks_races_and_records(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(SCRIPT), "--tokens", "64,90", "--threads", "1,2", "--rounds", "3", "--records", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    (file,) = tmp_path.glob("scar-attention-*.json")
    record = json.loads(file.read_text("utf-8"))
    assert len(record["verdicts"]) == 6  # three masks at two token counts, one thread
    for result in record["figures"]["results"]:
        masks = result["masks"]
        assert all(mask["largest_difference"] <= 1e-5 for mask in masks.values())
        assert masks["published"]["density"] >= 0.5 > masks["both"]["density"]
    assert str(tmp_path) not in file.read_text("utf-8")
