"""The benchmark of remote runs, on a toy with few requests: it runs through, and its record is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("edgeml_devices", reason="the distribution edgeml-devices is not installed")

import sshd

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sshd.missing() is not None, reason=sshd.missing() or "")
def test_it_measures_requests_and_starts(toy: Path, tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "devices" / "remote.py"
    few = ["--model", str(toy), "--task", "mood", "--requests", "3", "--starts", "1", "--records", str(tmp_path)]
    done = subprocess.run([sys.executable, str(script), *few], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 1), done.stderr
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text("utf-8"))
    assert [verdict["name"] for verdict in record["verdicts"]] == ["a remote request adds, ms", "a remote bench adds, s"]
    assert set(record["figures"]["p50_as_recorded"]) == {"bench_local", "bench_remote"}
    assert str(tmp_path) not in file.read_text("utf-8")
