"""The pruning benchmark on a toy: it goes on where it was, and its table and record hold what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch_pruning", reason="the extra `export` is not installed")

FOLDER = Path(__file__).parents[2] / "benchmarks" / "pruning"


def call(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # torch's threads only wait for each other on data this small
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)


def test_rows_are_measured_once_and_told(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "multi_fashion_mnist"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, count in (("train", 150), ("test", 30)):
        labels = {task: random.integers(0, 10, count) for task in ("y_digit", "y_fashion")}
        np.savez(folder / f"{name}.npz", x=random.integers(0, 255, (count, 36, 36), np.uint8), **labels)
    common = ("--work", tmp_path / "work", "--data", tmp_path / "images", "--epochs", "1", "--tune-epochs", "1", "--threads", "1")
    settings = (*common, "--seeds", "1", "--cuts", "0.6", "--losses", "soft")
    first = call("compare.py", "run", *settings, "--methods", "none,l1-uniform")
    assert first.returncode == 0, first.stderr
    before = (tmp_path / "work" / "results.jsonl").read_text()
    assert [json.loads(line)["method"] for line in before.splitlines()] == ["none", "l1-uniform"]
    again = call("compare.py", "run", *settings, "--methods", "none,l1-uniform")
    assert again.stdout == ""
    assert (tmp_path / "work" / "results.jsonl").read_text() == before
    told = call("report.py", *common[:2], "--records", tmp_path / "records")
    assert told.returncode == 0, told.stderr
    assert "| soft | 60% | l1-uniform | 1 |" in told.stdout
    (record,) = (tmp_path / "records").glob("pruning-*.json")
    assert len(json.loads(record.read_text())["figures"]["rows"]) == 2


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    assert "no rows yet" in call("report.py", "--work", tmp_path).stderr
    wrong = call("compare.py", "run", "--work", tmp_path, "--methods", "magic")
    assert wrong.returncode == 2
    assert "no method or loss 'magic'" in wrong.stderr
