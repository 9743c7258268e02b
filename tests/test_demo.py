"""The demo's own parts that have something to get wrong: what it says of quality is what `edgeml eval` measured on the made texts."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    return module


def test_quality_of_variants_is_scored(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.show_quality(tmp_path, demo.MODEL)
    (record,) = map(json.loads, (tmp_path / "quality.jsonl").read_text().splitlines())
    found, out = record["eval"], capsys.readouterr().out
    by_name = {one["name"]: one for one in found["variants"]}
    assert by_name["exact 10%"]["retention"]["value"] == 1
    assert by_name["three domains"]["gg"]["low"] > 0
    assert None not in (found["dsi"], found["cdtr"], found["dsi_route"])
    assert all(domain["n"] >= 30 for one in found["variants"] for domain in one["domains"].values())
    for shown in ("A made data set", *(shown for _, _, shown in demo.VARIANTS), demo.between(by_name["half"]["retention"], 100, 1)):
        assert shown in out


def test_a_toy_has_no_quality(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.show_quality(tmp_path, tmp_path / "toy.edgeml")
    assert "Left out" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
