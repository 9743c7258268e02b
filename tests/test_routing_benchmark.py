"""The policy benchmark on small traces: a verdict a trace, and an honest record without the model or the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "routing" / "policy.py"


def test_made_traces_without_model_or_data(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(SCRIPT), "--bundle", str(tmp_path / "none.edgeml"), "--data", str(tmp_path / "none")]
    command += ["--tokens", "256", "--shape", "16:2", "--srp", "0.5,0.6", "--records", str(tmp_path / "records")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=dict(os.environ))
    assert done.returncode in (0, 1), done.stderr
    (file,) = (tmp_path / "records").glob("*.json")
    record = json.loads(file.read_text("utf-8"))
    text, made = record["verdicts"][:2], record["verdicts"][2:]
    assert [entry["holds"] for entry in text] == [None, None]
    assert all("not here" in entry["why"] for entry in text)
    for entry, wanted in zip(made, ("0.5", "0.6"), strict=True):
        found = record["figures"]["made"]["traces"][wanted]
        assert abs(found["srp_16"] - float(wanted)) < 0.02
        assert 0 < entry["measured"] <= 1
        assert entry["holds"] == (entry["measured"] >= 0.9)
        assert max(found["hit_rate"].values()) == found["hit_rate"]["belady"]


def test_a_locality_that_cannot_be_made(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-P",
        str(SCRIPT),
        "--bundle",
        "none",
        "--data",
        "none",
        "--tokens",
        "64",
        "--shape",
        "16:2",
        "--srp",
        "0.99",
    ]
    done = subprocess.run([*command, "--records", str(tmp_path)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2
    assert "no trace of SRP(16) 0.99 can be made" in done.stderr
