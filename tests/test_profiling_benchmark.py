"""benchmarks/quality/profiling.py on a toy: that it measures and judges, not what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import edgeml
from edgeml.made import make_mixture

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quality" / "profiling.py"


def run(*options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True, timeout=120, check=False)


def test_the_cost_of_profiling_is_measured(tmp_path: Path) -> None:
    make_mixture(tmp_path / "toy.edgeml")
    before = Path(edgeml.__file__).parents[1]  # itself: what it differs by is noise
    options = ["--pairs", "8", "--tokens", "5", "--memory", "50%", "--before", before, "--records", tmp_path / "records"]
    done = run("--bundle", tmp_path / "toy.edgeml", *options)
    assert done.returncode in (0, 1), done.stderr
    (file,) = (tmp_path / "records").glob("*.json")
    record = json.loads(file.read_text("utf-8"))
    assert [one["bound"] for one in record["verdicts"]] == ["< 1.03", "1 within noise"]
    assert all(one["measured"] > 0 for one in record["verdicts"])
    assert {"on_over_off", "off_over_none", "same_program"} == set(record["figures"]["figures"]["50%"])


def test_bad_options_are_one_sentence(tmp_path: Path) -> None:
    for options, sentence in ((["--pairs", "1"], "--pairs must be"), (["--before", tmp_path], "no package edgeml")):
        done = run(*options, "--records", tmp_path)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
