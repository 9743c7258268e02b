"""`edgeml routing`: traces of a session, the document and its advice, the picture, and one sentence for what cannot be followed."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.bundle import Bundle
from edgeml.cli import main
from edgeml.commands._routing_plot import plot
from edgeml.disk import read_rate
from edgeml.errors import BundleError, DeviceError, UsageError
from edgeml.made import TOY
from edgeml.manifest import load_manifest
from edgeml.replay import POLICIES
from edgeml.routing import Storage, advise, document
from edgeml.trace import choices

TEXTS = ("Will it rain tomorrow?", "a warm and sunny day by the sea", "fog", "no, that was a very bad film: zzz 42")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for task in ("mood", "weather"):
        place = tmp_path / "data" / "made" / task
        place.mkdir(parents=True)
        about = {"name": task, "domain": "made", "labels": list(TOY.tasks[task]), "metric": "accuracy"}
        (place / "task.json").write_text(json.dumps(about))
        rows = [json.dumps({"text": f"{text} number {number}", "label": 0}) for number in range(5) for text in TEXTS]
        (place / "test.jsonl").write_text("\n".join(rows))
    return tmp_path / "data"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["routing", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_trace_is_what_the_trunk_chose(toy: Path) -> None:
    with edgeml.open(toy, memory="100%") as session:
        traces = session.trace("mood", texts=TEXTS)
        alone = [session.trace("mood", texts=[text])[0] for text in TEXTS]
        encoded = session.preprocessor(session.task("mood")).encode(list(TEXTS))
    sites = session.manifest.sites
    for trace, one, mask in zip(traces, alone, encoded.mask, strict=True):
        assert trace.dtype == np.int64
        assert trace.shape == (int(mask.sum()), len(sites), sites[0].top_k)
        assert np.array_equal(trace, one)  # whatever else was in the batch
        assert all(len(set(ids)) == len(ids) for token in trace.tolist() for ids in token)
    assert traces[0].min() >= 0
    assert traces[0].max() < len(sites[0].experts)


def test_a_trace_under_masked_residency_keeps_to_the_set(toy: Path) -> None:
    with edgeml.open(toy, memory="50%", residency="masked") as session:
        allowed = session.resident_set("mood").mask == 0
        for trace in session.trace("mood", texts=TEXTS):
            for site in range(trace.shape[1]):
                chosen = trace[:, site][trace[:, site] >= 0]
                assert allowed[site][chosen].all()


def test_a_trunk_that_does_not_tell(toy: Path, rebuild: Any, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def silence(manifest: dict[str, Any]) -> None:
        for stage in manifest["stages"]:
            stage["outputs"] = [name for name in stage["outputs"] if not name.startswith("ids_")]

    path = rebuild(change=silence)
    code, out, err = run(capsys, path, "--data", data)
    assert (code, out) == (2, "")
    assert "does not tell which experts it chooses" in err
    assert err.count("\n") == 1


def test_what_a_graph_claims_is_checked(toy: Path) -> None:
    with Bundle.open(toy) as bundle:
        manifest = load_manifest(bundle)
    k, mask = manifest.sites[0].top_k, np.ones((1, 3), np.float32)
    good = {f"ids_{site}": np.zeros((1, 3, k), np.int64) for site in range(len(manifest.sites))}
    for wrong in (np.zeros((1, 3, k), np.int32), np.zeros((1, 2, k), np.int64), np.full((1, 3, k), 99), np.full((1, 3, k), -2)):
        with pytest.raises(BundleError, match="ids_0"):
            list(choices(manifest, good | {"ids_0": wrong}, mask, "m"))


def test_the_document(toy: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "routing.svg"
    code, out, err = run(capsys, toy, "--data", data, "--json", "--threads", "1", "--plot", picture)
    assert code == 0, err
    found = json.loads(out)
    for part in (found, *found["sites"]):
        assert set(part["srp"]) == set(part["srp_null"]) == {"4", "16", "64", "256"}
        assert set(part["hit_rate"]) == set(part["hit_rate_cold"]) == set(POLICIES)
        for name, curve in part["hit_rate"].items():
            assert all(
                0 <= rate <= best + 1e-12 <= 1 + 1e-12 for (_, rate), (_, best) in zip(curve, part["hit_rate"]["belady"], strict=True)
            )
            assert curve[-1][1] == 1, name
            assert all(cold <= 1 for _, cold in part["hit_rate_cold"][name])
    assert found["srp"]["4"]["low"] <= found["srp"]["4"]["value"]
    assert found["srp"]["256"] is None  # no text is that long
    assert [site["name"] for site in found["sites"]] == ["layer.0", "layer.1"]
    assert found["texts"] == 40
    assert "a token" in found["advice"]
    assert found["disk"]["bytes_per_s"] > 0
    assert found["disk"]["duration_s"] < 2
    assert found["record"]["bundle"] == "toy.edgeml"
    root = ElementTree.fromstring(picture.read_text("utf-8"))
    assert len(root.findall("{*}polyline")) == len(POLICIES)
    code, out, err = run(capsys, toy, "--data", data, "--threads", "1", "--limit", "3", "--tasks", "mood")
    assert code == 0, err
    assert out.splitlines()[-1].count("a token") == 1


def curves(pager: list[float], belady: list[float], low: float | None) -> dict[str, Any]:
    ratios = [1.0, 2.0, 4.0]
    return {
        "hit_rate": {
            name: [list(pair) for pair in zip(ratios, rates, strict=True)] for name, rates in (("pager", pager), ("belady", belady))
        },
        "srp": {"16": {"value": 0.5, "low": low, "high": 0.6, "n": 40}},
        "srp_null": {"16": 0.4},
    }


def test_advice_rests_on_the_disk() -> None:
    sites = {"experts": [16, 16], "top_k": [3, 3]}
    slow = Storage(bytes_per_s=10e6, expert_bytes=1e6, compute_s=0.01)
    found = advise(curves([0.1, 0.5, 1.0], [0.3, 0.8, 1.0], 0.45), **sites, storage=slow)
    assert found["advised"]["capacity_ratio"] == 2
    assert found["advised"]["paging_s"] == pytest.approx(0.3)
    assert "would cost 0.3 s a token on this disk" in found["advice"]
    assert found["advice"].endswith("use masked residency with 6 of 16 experts a site")
    fast = Storage(bytes_per_s=10e9, expert_bytes=1e6, compute_s=0.01)
    found = advise(curves([0.26, 0.5, 1.0], [0.3, 0.8, 1.0], 0.45), **sites, storage=fast)
    assert found["advised"]["capacity_ratio"] == 1
    assert found["advice"].endswith("page, with --memory 19%")
    found = advise(curves([0.1, 0.5, 1.0], [0.3, 0.8, 1.0], 0.39), **sites, storage=fast)
    assert found["advised"]["local"] is False
    assert "as if at random" in found["advice"]
    assert advise(curves([0.1, 0.5, 1.0], [0.3, 0.8, 1.0], None), **sites, storage=fast)["advised"]["local"] is None


def test_sites_of_different_sizes() -> None:
    rng = np.random.default_rng(0)
    trace = np.stack([[np.r_[rng.permutation(6)[:2]], np.r_[rng.integers(3), -1]] for _ in range(20)])
    found = document([trace], ["wide", "narrow"], [6, 3], [2, 1], lambda _: None)
    assert [curve[-1] for curve in found["hit_rate"].values()] == [[3.0, 1.0]] * len(POLICIES)
    assert [site["hit_rate"]["lru"][-1][0] for site in found["sites"]] == [3.0, 3.0]


def test_reading_is_measured_shortly(toy: Path, tmp_path: Path) -> None:
    with Bundle.open(toy) as bundle:
        found = read_rate(bundle.fd, [(page.offset, page.length) for page in bundle.pages], str(toy), seconds=0.05)
        assert found.reads > 0
        assert found.duration_s < 1
        assert read_rate(bundle.fd, [], str(toy), seconds=0.05).read_bytes == 0
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(DeviceError, match="cannot be read"):
            read_rate(folder, [(0, 4096)], str(tmp_path), seconds=0.05)
    finally:
        os.close(folder)


def test_a_name_cannot_break_the_picture() -> None:
    text = plot({"lru": [[1.0, 0.5]]}, "<script>&", "a & b")
    assert "<script>" not in text
    ElementTree.fromstring(text)


def test_a_trace_of_no_task(toy: Path) -> None:
    with edgeml.open(toy) as session, pytest.raises(UsageError, match="has no task"):
        session.trace("nothing", texts=["a"])
