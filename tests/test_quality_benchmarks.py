"""The benchmarks of evaluation on toys: coverage of intervals, the generalisation gap, rows a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeml.bundle import Bundle, PageSource, write_bundle
from edgeml.made import TOY, make_mixture

ROOT = Path(__file__).parents[1]


def record_of(script: str, folder: Path, *arguments: str | Path, codes: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments), "--records", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode in codes, done.stderr
    assert "Traceback" not in done.stderr
    (file,) = folder.glob("*.json")
    record: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return record


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy of six tasks, each of a domain of its own, and forty rows for each."""
    place = tmp_path_factory.mktemp("benchmarks")
    labels = TOY.tasks["mood"]
    tasks = {f"mood_{number}": labels for number in range(6)}
    make_mixture(place / "made.edgeml", tasks=tasks)
    with Bundle.open(place / "made.edgeml") as bundle:
        pages = [PageSource(p.kind, bundle.read(p.id), p.matrices, p.activation, max(p.count, 1)) for p in bundle.pages]
        manifest = dict(bundle.manifest)
    for task in manifest["tasks"]:
        task["domain"] = task["name"].replace("mood_", "domain")
    write_bundle(place / "toy.edgeml", pages, manifest)
    rng = np.random.default_rng(0)
    for number, name in enumerate(tasks):
        folder = place / "data" / f"domain{number}" / name
        folder.mkdir(parents=True)
        task = {"name": name, "domain": f"domain{number}", "labels": list(labels), "metric": "accuracy"}
        (folder / "task.json").write_text(json.dumps(task))
        words = ["sun", "rain", "good", "bad", "zanzibar"]
        rows = [{"text": " ".join(rng.choice(words, rng.integers(1, 9))), "label": int(rng.integers(2))} for _ in range(40)]
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_coverage_is_measured(tmp_path: Path) -> None:
    record = record_of("quality/coverage.py", tmp_path, "--trials", "4", "--examples", "40", "--draws", "40")
    names = [entry["name"] for entry in record["verdicts"]]
    assert "far, 40 examples a task: coverage of dsi" in names
    assert "at chance, 40 examples a task: intervals of dsi that are flagged" in names
    assert len(names) == 2 * 5 + 3
    drops = [(1 - kept) * (reference - 0.25) for kept, reference in zip((0.97, 0.25, 0.22), (0.92, 0.85, 0.95), strict=True)]
    truth = record["figures"]["figures"]["near, 40"]["gg"]["truth"]
    assert truth == pytest.approx((drops[1] + drops[2]) / 2 - drops[0])


def test_the_gap_is_measured_on_the_other_domains(place: Path, tmp_path: Path) -> None:
    asked = [
        "--bundle",
        place / "toy.edgeml",
        "--data",
        place / "data",
        "--mixture",
        "none",
        "--cache",
        tmp_path / "cache",
        "--threads",
        "1",
    ]
    record = record_of("text/gap.py", tmp_path / "records", *asked, "--calibrated", "domain0+domain1+domain2")
    assert [entry["name"] for entry in record["verdicts"]] == [f"GG of {size} for domain0+domain1+domain2" for size in ("half", "quarter")]
    figures = record["figures"]
    assert figures["reference"] == "the bundle with all its experts"
    assert "reads no data" in figures["quantisation"]
    gap = figures["variants"]["half for domain0+domain1+domain2"]["gaps"]["domain0+domain1+domain2"]
    # random labels: a domain that is at chance is left out, so all that is sure is that none of the three is among the others
    assert set(gap["unseen"]) <= {"domain3", "domain4", "domain5"}
    assert gap["gg"] is not None or gap["why"]
    assert "zanzibar" not in json.dumps(record)
    again = record_of("text/gap.py", tmp_path / "again", *asked, "--calibrated", "domain0+domain1+domain2")
    assert again["figures"]["variants"] == figures["variants"]


def test_too_few_domains_to_measure_a_gap_on(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/text/gap.py"), "--bundle", place / "toy.edgeml", "--data", place / "data"]
    command += ["--mixture", "none", "--cache", tmp_path, "--records", tmp_path, "--calibrated", "+".join(f"domain{n}" for n in range(4))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "fewer than 3 domains remain" in done.stderr


def test_both_ways_answer_alike(place: Path, tmp_path: Path) -> None:
    asked = ["--bundle", place / "toy.edgeml", "--data", place / "data", "--rows", "12", "--rounds", "2", "--threads", "2"]
    record = record_of("text/evaluate.py", tmp_path, *asked)
    faster, differ = record["verdicts"]
    assert differ["measured"] == 0
    assert differ["holds"] is True
    assert faster["measured"] > 0
    figures = record["figures"]
    assert (figures["test_rows"], figures["extrapolated"], figures["streams"]) == (240, True, 2)
