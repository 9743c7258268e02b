"""docs/metrics.md defines every key that a record has and every column that is printed."""

from __future__ import annotations

import importlib
import json
from contextlib import chdir, redirect_stdout, suppress
from importlib.metadata import entry_points
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metrics_page import KEYS, PRINTED, heads, undefined

from edgeml.cli import COMMANDS, GROUP, main
from edgeml.commands._records import ARM, COLUMNS, IMAGES, MIX
from edgeml.layout import WeightType
from edgeml.made import TOY, make_cnn, make_mixture
from edgeml.records import read

SCHEMA = Path(__file__).parents[1] / "docs" / "record.schema.json"
#: Every command that measures, so that all its keys and columns are seen; run in a folder with the bundles m.edgeml, full.edgeml (the same
#: in f32) and cnn.edgeml, data for two tasks, and w.toml. FILE is what the runs before have recorded.
RUNS = (
    "bench m.edgeml --task mood --iterations 100 --cold 1 --tokens 4",
    "bench m.edgeml --workload w.toml",
    "bench m.edgeml --task mood --compare m.edgeml,threads=1 --seconds 0 --max-slowdown 900%",
    "bench m.edgeml --task mood --iterations 100 --cold 1 --tokens 4 --compare FILE --max-slowdown 9000%",
    "bench cnn.edgeml --task digit,garment --iterations 3",
    "eval m.edgeml --data data --reference m.edgeml --also half,residency=masked,memory=50% --domains-seen sky --specialise 0.5",
    "routing m.edgeml --data data --limit 8",
    "diff full.edgeml m.edgeml --data data --split test --limit 8",
    "diff full.edgeml m.edgeml --task mood --text snow",
    "diff cnn.edgeml --reference-variant full --variant small --data images --split test",
    "profile m.edgeml --task mood --memory 50% --iterations 3 --cold 1 --tokens 4 --idle 0",
)
#: Heads that are names or numbers of what was measured.
NAMES = {"m", "half", "sky", "talk", "lru", "lfu", "lookahead-16", "belady", "pager", "4", "16", "64", "256"}
WORKLOAD = """
requests = 12
[arrival]
kind = "poisson"
rate_per_s = 500
[[mix]]
task = "mood"
tokens = {distribution = "uniform", least = 2, most = 9}
[[mix]]
task = "weather"
tokens = 4
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what RUNS name."""
    place = tmp_path_factory.mktemp("records")
    make_mixture(place / "m.edgeml")
    make_mixture(place / "full.edgeml", expert_type=WeightType.F32)
    make_cnn(place / "cnn.edgeml")
    (place / "w.toml").write_text(WORKLOAD)
    for domain, name in (("sky", "weather"), ("talk", "mood")):
        folder = place / "data" / domain / name
        folder.mkdir(parents=True)
        names = list(TOY.tasks[name])
        (folder / "task.json").write_text(json.dumps({"name": name, "domain": domain, "labels": names, "metric": "accuracy"}))
        rows = "".join(json.dumps({"text": f"wind and rain {row}", "label": row % len(names)}) + "\n" for row in range(36))
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text(rows)
    (place / "images").mkdir()
    (place / "images" / "image.json").write_text(json.dumps({"labels": {"y_digit": list(map(str, range(10)))}}))
    np.savez(place / "images" / "test.npz", x=np.zeros((10, 36, 36), np.uint8), y_digit=np.arange(10))
    return place


Seen = tuple[list[dict[str, Any]], str]


@pytest.fixture(scope="module")
def seen(place: Path) -> Seen:
    """The records of all runs, and all that was printed; the report of them too."""
    printed = StringIO()
    with chdir(place), redirect_stdout(printed):
        there = {*COMMANDS, *(point.name for point in entry_points(group=GROUP))}
        for run in (run for run in RUNS if run.split()[0] in there):  # diff is of another distribution
            assert main([*run.replace("FILE", "r.jsonl").split(), "--records", "r.jsonl"]) == 0
            print()
        with suppress(ModuleNotFoundError):  # the report is a distribution of its own
            importlib.import_module("edgeml_report.command").command.main(["r.jsonl", "-o", "report.md"], standalone_mode=False)
            printed.write(Path("report.md").read_text("utf-8"))
        return read("r.jsonl"), printed.getvalue()


def test_every_key_is_defined(seen: Seen) -> None:
    for record in seen[0]:
        assert undefined(record) == [], record["kind"]


def test_every_record_fits_the_published_schema(seen: Seen) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    check = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))
    for record in seen[0]:
        check.validate(record)


def test_every_printed_column_is_defined(seen: Seen) -> None:
    missing = sorted({head for head in heads(seen[1]) if head not in PRINTED | NAMES})
    assert not missing, f"not in docs/metrics.md: {missing}"


def test_every_command_that_measures_is_run_here() -> None:
    """A command with --records is one; a line in RUNS shows what it writes."""
    for name, (module, _) in COMMANDS.items():
        options = {option for one in importlib.import_module(module).command.params for option in one.opts}
        assert "--records" not in options or any(run.startswith(f"{name} ") for run in RUNS), f"add a line for edgeml {name} to RUNS"


def test_a_key_or_column_that_nobody_defined_is_noticed(seen: Seen) -> None:
    assert undefined(seen[0][0] | {"charm_bytes": 1}) == ["charm_bytes"]
    assert list(heads("| charm | p50 ms |\n|---|---|\n| 1 | 2 |\n\ntitle\n\ncharm   n\na       1\n")) == ["charm", "p50 ms", "charm", "n"]


def test_every_column_of_bench_is_defined() -> None:
    assert {name for name, _, _ in (*COLUMNS, *MIX, *IMAGES, ARM)} <= PRINTED


def test_no_key_is_defined_twice() -> None:
    assert sorted(KEYS) == sorted(set(KEYS))
