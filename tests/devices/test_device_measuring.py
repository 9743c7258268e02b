"""`edgeml device profile`, and `bench` with a workload, a comparison or a prediction, as a user gives them: what comes back, what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("edgeml_devices", reason="the distribution edgeml-devices is not installed")

from edgeml_devices.delivery import unpack
from edgeml_devices.expected import expected, sentence
from edgeml_devices.library import profiles
from edgeml_devices.remote import Remote
from far import Far
from metrics_page import undefined

from edgeml.bundle import Bundle
from edgeml.cli import main
from edgeml.errors import DataError, UsageError
from edgeml.made import make_cnn
from edgeml.records import read

PROFILE = ["--task", "mood", "--iterations", "2", "--cold", "1", "--idle", "0", "--quiet"]
BENCH = ["--task", "mood", "--iterations", "2", "--warmup", "0", "--cold", "0", "--quiet"]
WORKLOAD = """
requests = 6
[[mix]]
task = "mood"
input = "texts/mine.jsonl"
[[mix]]
task = "weather"
tokens = 4
"""


def test_a_profile_brings_its_trace_and_its_record_back(far: Far, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace, records = tmp_path / "t.json", tmp_path / "r.jsonl"
    asked = [*far.arguments, *PROFILE, "--trace", str(trace), "--records", str(records)]
    assert main(["device", "profile", str(toy), *asked]) == 0
    assert capfd.readouterr().out.startswith("task mood")
    assert json.loads(trace.read_text())["traceEvents"]
    (record,) = read(records)
    assert (record["kind"], record["to"], record["profile"]["warm"]["rounds"]) == ("profile", far.to, 2)
    assert not undefined(record)
    assert far.left() == []


def test_a_connection_that_breaks_before_the_trace_is_here(
    wire: Far, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The record, which came while it ran, is kept; the trace is not there at all."""
    trace, records, fetch = tmp_path / "t.json", tmp_path / "r.jsonl", Remote.fetch

    def cut(remote: Remote, path: str, target: Path) -> None:
        wire.cut()
        fetch(remote, path, target)

    monkeypatch.setattr(Remote, "fetch", cut)
    asked = [*wire.arguments, *PROFILE, "--trace", str(trace), "--records", str(records)]
    assert main(["device", "profile", str(toy), *asked]) == 4
    assert f"{wire.to}: the connection broke while fetching t.json" in capfd.readouterr().err
    assert len(read(records)) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["far-python", "r.jsonl"]
    assert wire.left() == []


def test_profiles_of_several_machines_are_one_table(local_far: Far, ssh_far: Far, toy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = [*local_far.arguments, "--to", ssh_far.to]
    assert main(["device", "profile", str(toy), *where, *PROFILE]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:]] for line in capfd.readouterr().out.splitlines()]
    assert lines[0][:4] == ["on", "when", "rounds", "ms each"]
    assert [line[:3] for line in lines[2:]] == [[to, *rest] for to in ("local", ssh_far.to) for rest in (["cold", "1"], ["warm", "2"])]
    assert main(["device", "profile", str(toy), *where, *PROFILE, "--trace", "t.json"]) == 2
    assert "t.json would be written by several devices" in capfd.readouterr().err


def test_a_workload_travels_with_its_inputs(local_far: Far, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    (mine / "texts").mkdir(parents=True)
    (mine / "w.toml").write_text(WORKLOAD)
    with pytest.raises(DataError, match=r"mine\.jsonl: no such file"):
        unpack("bench", [str(toy), "--workload", str(mine / "w.toml")], False)
    (mine / "texts" / "mine.jsonl").write_text('{"text": "fog"}\n')
    assert main(["device", "bench", str(toy), *local_far.arguments, "--workload", str(mine / "w.toml"), "--quiet"]) == 0
    assert "6 requests" in capfd.readouterr().out
    (mine / "w.toml").write_text(WORKLOAD.replace("texts/mine", "../mine"))
    with pytest.raises(DataError, match="does not lie in its folder"):
        unpack("bench", [str(toy), "--workload", str(mine / "w.toml")], False)


def test_a_comparison_travels_and_is_told_for_each_machine(
    local_far: Far, ssh_far: Far, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other, records = tmp_path / "toy.edgeml", tmp_path / "r.jsonl"
    other.write_bytes(toy.read_bytes())
    packed = unpack("bench", [str(toy), "--compare", f"{other},memory=50%"], False)
    assert packed.bundles[1] == (other, "bundle2/toy.edgeml")
    assert packed.arguments[-1] == "--compare=bundle2/toy.edgeml,memory=50%"
    where, lenient = [*local_far.arguments, "--to", ssh_far.to], ["--max-slowdown", "9900%", "--seconds", "0"]
    assert main(["device", "bench", str(toy), *where, *BENCH, *lenient, "--compare", f"{toy},memory=50%"]) == 0
    told = [line for line in capfd.readouterr().out.splitlines() if "times as long as toy.edgeml (98 %: " in line]
    assert [line.split(":")[0] for line in told] == ["local", "127.0.0.1"]
    assert main(["device", "bench", str(toy), *local_far.arguments, *BENCH, "--iterations", "30", "--records", str(records)]) == 0
    capfd.readouterr()
    asked = [*local_far.arguments, *BENCH, "--iterations", "30", "--max-slowdown", "9900%", "--compare", str(records)]
    assert main(["device", "bench", str(toy), *asked]) == 0
    assert "times as long as in r.jsonl" in capfd.readouterr().out


@pytest.mark.parametrize(("verb", "option"), [("run", ["--state", "x"]), ("eval", ["--learn"])])
def test_what_would_be_kept_there_is_refused(verb: str, option: list[str]) -> None:
    with pytest.raises(UsageError, match=f"{option[0]} keeps what is learned"):
        unpack(verb, ["m.edgeml", *option], False)


def test_each_row_has_its_prediction_beside_it(local_far: Far, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    records = tmp_path / "r.jsonl"
    asked = [*local_far.arguments, *BENCH, "--memory", "50%,100%", "--threads", "1", "--predict", "raspberry-pi-4"]
    assert main(["device", "bench", str(toy), *asked, "--records", str(records)]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "predicted for raspberry-pi-4-4gb: " in line]
    assert [line.split(":")[0] for line in lines] == ["local, 50%", "local, 100%"]
    assert "figures are assumed" in lines[0]
    for record in read(records):
        assert not undefined(record)
        said = record["device_run"]["predicted"]
        assert said["latency_s"]["low"] < said["latency_s"]["value"] < said["latency_s"]["high"]
    assert main(["device", "bench", str(toy), *asked, "--json"]) == 0
    (device,) = json.loads(capfd.readouterr().out)["devices"]
    assert len(device["predicted"]) == 2
    assert main(["device", "bench", str(toy), *local_far.arguments, *BENCH, "--predict", "pi-44"]) == 2
    assert "did you mean" in capfd.readouterr().err


def test_what_cannot_be_predicted_says_why(toy: Path) -> None:
    record: dict[str, Any] = {"task": "mood", "tokens": 12, "rounds": 3, "threads": 1, "memory": "auto", "memory_budget_bytes": 1 << 20}
    with Bundle.open(toy) as bundle:
        found = expected(bundle, profiles()["raspberry-pi-4-4gb"], record | {"residency": "exact", "variant": None})
        assert found["latency_s"]["value"] > 0
        for changes, why in (
            ({"residency": "hybrid"}, "depends on the deadline"),
            ({"task": "a,b"}, "several tasks"),
            ({"mix": {}}, "overlap"),
        ):
            found = expected(bundle, profiles()["raspberry-pi-4-4gb"], {"residency": "exact", **record, **changes})
            assert found["latency_s"] is None
            assert why in found["why"]
            assert why in sentence(found)


def test_an_emulated_run_is_recorded_with_its_limits(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    here = Path(__file__).parents[2] / "devices" / "edgeml_devices" / "profiles" / "raspberry-pi-5-8gb.toml"
    records, cnn = tmp_path / "r.jsonl", tmp_path / "cnn.edgeml"
    make_cnn(cnn)
    asked = ["--device", "raspberry-pi-4", "--emulate", "--here", str(here), "--quiet", "--records", str(records)]
    assert main(["device", "run", str(toy), *asked, "--", *BENCH[:-1], "--memory", "50%", "--threads", "1"]) == 0
    assert main(["device", "run", str(cnn), *asked, "--json", "--", "--task", "digit", "--iterations", "2"]) == 0
    text, image = read(records)
    for record in (text, image):
        assert (record["kind"], record["device_run"]["profile"], record["device_run"]["emulated"]) == ("device", "raspberry-pi-4-4gb", True)
        assert len(record["device_run"]["held"] + record["device_run"]["not_held"]) == 3
        assert not undefined(record)
    assert text["device_run"]["scaled_latency_s"]["low"] <= text["device_run"]["scaled_latency_s"]["value"]
    assert text["device_run"]["predicted"]["latency_s"]["value"] > 0
    assert image["device_run"]["scale"]["value"] > 1
    capfd.readouterr()
    assert main(["device", "run", str(toy), *asked, "--command", "run", "--", "--task", "mood", "--text", "fog"]) == 2
    assert "edgeml run writes no records" in capfd.readouterr().err
