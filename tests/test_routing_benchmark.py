"""The policy benchmark on small traces: a verdict a trace, and an honest record without the model or the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeml.made import TOY, make_mixture

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


def test_what_naming_no_task_costs_on_a_toy(tmp_path: Path) -> None:
    """An untrained router of two groups, one of them of two tasks: figures of every kind, none of them good."""
    torch = pytest.importorskip("torch", reason="the exporters are not installed")
    routers = pytest.importorskip("edgeml_export.routers", reason="the exporters are not installed")
    recipe = {"weather": TOY.tasks["weather"], "mood": TOY.tasks["mood"], "season": ("spring", "winter")}
    make_mixture(tmp_path / "plain.edgeml", tasks=recipe)
    groups = {"sky": ["weather", "season"], "feeling": ["mood"]}
    torch.manual_seed(0)
    table = torch.randn(2, TOY.layers, TOY.experts).numpy()
    graph = routers.group_graph(routers.LinearRouter(TOY.hidden, 2), table)
    routers.attach_group_router(tmp_path / "plain.edgeml", tmp_path / "m.edgeml", graph, groups, biased=True)
    for name, labels in recipe.items():
        folder = tmp_path / "data" / "made" / name
        folder.mkdir(parents=True)
        (folder / "task.json").write_text(json.dumps({"name": name, "domain": "made", "labels": list(labels), "metric": "accuracy"}))
        rows = [{"text": f"zanzibar rain {'sun ' * (number % 5)}{number}", "label": number % len(labels)} for number in range(40)]
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-P", str(SCRIPT.with_name("router.py")), "--bundle", str(tmp_path / "m.edgeml")]
    command += ["--data", str(tmp_path / "data"), "--lengths", "8,300", "--rounds", "2", "--cache", str(tmp_path / "cache")]
    done = subprocess.run([*command, "--records", str(tmp_path / "records")], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode in (0, 1), done.stderr
    (file,) = (tmp_path / "records").glob("*.json")
    assert "zanzibar" not in file.read_text("utf-8")
    record = json.loads(file.read_text("utf-8"))
    right, lost = record["verdicts"]
    assert right["n"] == 120
    assert right["interval"][0] <= right["measured"] <= right["interval"][1]
    assert lost["holds"] == (lost["measured"] <= 1)
    tasks = record["figures"]["tasks"]
    assert tasks["mood"]["told"] == tasks["mood"]["given_the_group"]  # alone in its group
    assert all(task["told_nothing"] <= task["right_group"] for task in tasks.values())
    assert set(record["figures"]["router_ms"]) == {"8", "300"}
