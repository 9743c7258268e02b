"""docs/metrics.md defines every key that a record has and every column that is printed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeml.cli import main
from edgeml.commands._records import COLUMNS
from edgeml.made import TOY, make_mixture
from edgeml.records import read

TEXT = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TEXT.splitlines() if line.startswith("| `")]
KEYS = [key for row in ROWS for key in re.findall(r"`([^`]+)`", row[0])]
PRINTED = {name.strip() for row in ROWS for name in row[1].split(",")}
INTERVAL = {"value", "low", "high", "n", "near_clip"}


def pattern(key: str) -> re.Pattern[str]:
    """`a.*` is everything within a, and a itself where it is empty."""
    inner = r"(\..+)?" if key.endswith(".*") else ""
    return re.compile(re.escape(key.removesuffix(".*")).replace(r"\*", ".+") + inner + r"(\[\])*")


PATTERNS = [pattern(key) for key in KEYS]


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Every key of a record, dotted; an interval is one figure."""
    if isinstance(value, dict) and value and not (path and set(value) <= INTERVAL and "value" in value):
        for name, inner in value.items():
            yield from keys(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for entry in value:
            yield from keys(entry, f"{path}[]")
    else:
        yield path


def undefined(record: dict[str, Any]) -> list[str]:
    return sorted({key for key in keys(record) if not any(known.fullmatch(key) for known in PATTERNS)})


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the commands write about a made mixture of two domains."""
    place = tmp_path_factory.mktemp("records")
    make_mixture(place / "m.edgeml")
    for domain, name in (("sky", "weather"), ("talk", "mood")):
        folder = place / "data" / domain / name
        folder.mkdir(parents=True)
        names = list(TOY.tasks[name])
        (folder / "task.json").write_text(json.dumps({"name": name, "domain": domain, "labels": names, "metric": "accuracy"}))
        rows = "".join(json.dumps({"text": f"wind and rain {row}", "label": row % len(names)}) + "\n" for row in range(36))
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text(rows)
    file, bundle, data = str(place / "r.jsonl"), str(place / "m.edgeml"), str(place / "data")
    also = ["--reference", bundle, "--also", "half,residency=masked,memory=50%", "--domains-seen", "sky", "--specialise", "0.5"]
    for command in (
        ["bench", bundle, "--task", "mood", "--iterations", "3", "--cold", "1"],
        ["eval", bundle, "--data", data, *also],
        ["routing", bundle, "--data", data, "--limit", "8"],
    ):
        assert main([*command, "--records", file]) == 0
    return read(file)


def test_every_key_is_defined(records: list[dict[str, Any]]) -> None:
    assert {record["kind"] for record in records} >= {"bench", "eval", "routing"}
    for record in records:
        assert undefined(record) == [], record["kind"]


def test_a_key_that_nobody_defined_is_noticed(records: list[dict[str, Any]]) -> None:
    assert undefined(records[0] | {"charm_bytes": 1}) == ["charm_bytes"]


def test_every_column_of_bench_is_defined() -> None:
    assert {name for name, _, _ in COLUMNS} <= PRINTED


def test_no_key_is_defined_twice() -> None:
    assert sorted(KEYS) == sorted(set(KEYS))
