"""`edgeml bench --compare`: in turns with another bundle or other settings, or with records of an earlier day; and its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgeml
from edgeml.cli import main
from edgeml.commands import _bench_child, bench
from edgeml.commands._bench_compare import Other, against_records, fast_processors, parse_other
from edgeml.compare import FEWEST_PAIRS, Comparison
from edgeml.errors import DataError
from edgeml.made import make_cnn
from edgeml.records import Record, read

Capture = pytest.CaptureFixture[str]
QUICK = ["--task", "mood", "--warmup", "0", "--cold", "0", "--seconds", "0"]
LENIENT = ["--max-slowdown", "9900%"]  # whatever else this machine does meanwhile


def test_in_turns_with_other_settings(toy: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "r.jsonl"
    assert main(["bench", str(toy), *QUICK, *LENIENT, "--compare", f"{toy},memory=25%,threads=1", "--records", str(file), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["records"]
    assert [first, second] == read(file)
    assert (first["arm"], second["arm"], second["compare"]) == ("A", "B", None)
    assert (second["memory"], second["threads"]) == ("25%", 1)
    assert second["memory_budget_bytes"] < first["memory_budget_bytes"]
    found = first["compare"]
    assert (found["how"], found["with"]["bundle_id"], found["with"]["memory"]) == ("turns", second["bundle_id"], "25%")
    assert found["ratio"]["low"] <= found["ratio"]["value"] <= found["ratio"]["high"]
    assert found["ratio"]["n"] >= FEWEST_PAIRS
    assert (found["max_slowdown"], found["refused"]) == (99, False)
    assert first["rounds"] == second["rounds"] >= 30
    assert first["tokens"] == second["tokens"] == 32 * first["rounds"], "both sides had the same inputs"


def test_several_settings_are_told_apart(toy: Path, capsys: Capture) -> None:
    assert main(["bench", str(toy), *QUICK, *LENIENT, "--compare", str(toy), "--threads", "1", "--memory", "25%,100%"]) == 0
    said = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(": ")[0] for line in said] == ["memory 25%", "memory 100%"]


def test_a_table_says_what_was_found(toy: Path, capsys: Capture) -> None:
    assert main(["bench", str(toy), *QUICK, *LENIENT, "--compare", str(toy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")] == ["arm", "------:", "A", "B"]
    assert re.fullmatch(r"toy\.edgeml takes [\d.]+ times as long as itself \(98 %: [\d.]+ to [\d.]+, \d+ pairs of turns\): .+", lines[-1])


def test_csv_has_one_set_of_columns(toy: Path, capsys: Capture) -> None:
    assert main(["bench", str(toy), *QUICK, *LENIENT, "--compare", str(toy), "-o", "csv"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.count(",") == first.count(",") == second.count(",")
    assert head.endswith(",arm,compare.ratio.value,compare.ratio.low,compare.ratio.high,compare.ratio.n")
    assert second.endswith(",B,,,,")


def test_what_is_slower_ends_with_1(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The worker's clock is made to run: our latencies are three times what they were."""
    file = tmp_path / "r.jsonl"
    turn, begun = _bench_child.Worker.turn, list[object]()

    def slowed(worker: Any, *order: Any) -> list[float]:
        begun.extend([] if worker in begun else [worker])
        numbers = turn(worker, *order)
        return [(3e-3 if int(worker._job["threads"]) == 2 else 1e-3) for _ in numbers]

    monkeypatch.setattr(_bench_child.Worker, "turn", slowed)
    asked = ["bench", str(toy), *QUICK, "--threads", "2", "--compare", f"{toy},threads=1", "--records", str(file)]
    assert main(asked) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].endswith("16 pairs of turns): slower")
    assert captured.err.splitlines()[-1].startswith("edgeml: toy.edgeml takes 3.000 times as long as itself with threads 1")
    assert [record["arm"] for record in read(file)] == ["A", "B"], "what was measured is kept"
    assert main([*asked, "--max-slowdown", "250%"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("slower, within the 250 % that are allowed")
    assert len(begun) == 4


def test_an_earlier_record_is_a_gate(toy: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "r.jsonl"
    asked = ["bench", str(toy), "--task", "mood", "--cold", "0", "--threads", "1"]
    assert main([*asked, "--records", str(file)]) == 0
    record = read(file)[0]

    def earlier(factor: float, **changes: Any) -> Path:
        p50 = record["latency_s"]["p50"] * factor
        latency = {"p50": p50, "p50_interval": {"value": p50, "low": p50 * 0.98, "high": p50 * 1.02, "n": 30}}
        made = tmp_path / "old.jsonl"
        made.write_text(json.dumps(record | {"latency_s": record["latency_s"] | latency} | changes) + "\n")
        return made

    capsys.readouterr()
    assert main([*asked, "--compare", str(earlier(0.01))]) == 1
    captured = capsys.readouterr()
    assert "as long as in old.jsonl" in captured.out
    assert captured.err.splitlines()[-1].startswith("edgeml: toy.edgeml takes ")
    assert main([*asked, "--compare", str(earlier(100)), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["records"]
    assert one["compare"]["difference"] == "faster"
    assert one["compare"]["with"] == {"records": "old.jsonl"}
    other = record["device"] | {"kernel": "1.0"}
    assert main([*asked, "--compare", str(earlier(100, device=other))]) == 0
    assert "another state of this machine: kernel 1.0, now" in capsys.readouterr().err
    for changes, said in (
        ({"threads": 7}, "no record of task mood, memory auto, residency exact, threads 1 and this workload"),
        ({"device": record["device"] | {"cpu": "Other"}}, "no record on this machine"),
        ({"kind": "run"}, "it has no record of edgeml bench"),
    ):
        assert main([*asked, "--compare", str(earlier(1, **changes))]) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert captured.err.count("\n") == 1


@pytest.fixture(scope="module")
def new(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A record of bench."""
    file = tmp_path_factory.mktemp("new") / "r.jsonl"
    assert main(["bench", str(toy), "--task", "mood", "--cold", "0", "--iterations", "8", "--threads", "1", "--records", str(file)]) == 0
    return read(file)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"device": None},
        {"device": [1]},
        {"load_average": "much"},
        {"latency_s": "quick"},
        {"latency_s": {"p50_interval": {"value": 1, "low": "a", "high": 2, "n": 9}}},
        {"latency_s": {"p50_interval": {"value": -1, "low": -1, "high": -1, "n": 9}}},
    ],
)
def test_a_record_that_bench_did_not_write_is_a_sentence(tmp_path: Path, change: dict[str, Any], new: Record) -> None:
    (tmp_path / "old.jsonl").write_text(json.dumps(new | change) + "\n")
    other = parse_other(str(tmp_path / "old.jsonl"))
    with pytest.raises(DataError, match=r"old\.jsonl: a record of it has not the figures that edgeml bench writes"):
        against_records(new, other, 0.0)


def test_a_bundle_whose_name_has_a_comma_is_compared_with(toy: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a,b=c.edgeml"
    odd.write_bytes(toy.read_bytes())
    assert parse_other(str(odd)) == Other(str(odd), {})


def test_records_of_several_bundles_are_told_apart(toy: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "r.jsonl"
    asked = ["--task", "mood", "--cold", "0", "--threads", "1"]
    assert main(["bench", str(toy), *asked, "--records", str(file)]) == 0
    record = read(file)[0]
    others = [record | {"bundle": name, "bundle_id": name[0] * 64} for name in ("a.edgeml", "b.edgeml")]
    file.write_text("".join(json.dumps(one) + "\n" for one in [record, *others]))
    assert main(["bench", str(toy), *asked, "--compare", str(file), *LENIENT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"][0]["compare"]["ratio"]["n"] == 1
    file.write_text("".join(json.dumps(one) + "\n" for one in others))
    assert main(["bench", str(toy), *asked, "--compare", str(file)]) == 2
    assert "its records are of several bundles, and none is called toy.edgeml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--compare", "absent.edgeml"], 3, "absent.edgeml: cannot be read"),
        (["--compare", "TOY,memory"], 2, "with the keys memory, residency, threads, variant"),
        (["--compare", "TOY,speed=9"], 2, "with the keys"),
        (["--compare", "TOY,threads=x"], 2, "--threads takes a number"),
        (["--compare", "TOY,residency=odd"], 2, "'odd'"),
        (["--compare", "TOY,memory=1000"], 2, "below the floor"),
        (["--compare", "TOY,variant=small"], 2, "variant"),
        (["--compare", "CNN"], 2, "no task 'mood'"),
        (["--compare", "OLD"], 3, "line 1: a record of schema 1"),
        (["--compare", "BROKEN"], 3, "line 2: not a record"),
        (["--compare", "EMPTY"], 2, "no record of edgeml bench"),
        (["--compare", "TOY", "--max-slowdown", "fast"], 2, "--max-slowdown is a percentage such as 5%"),
        (["--compare", "TOY", "--max-slowdown", "0.05"], 2, "such as 5%"),
        (["--compare", "TOY", "--seconds", "-1"], 2, "seconds"),
        (["--compare", "TOY", "--seconds", "nan"], 2, "nan is no finite number"),
        (["--compare", "TOY,memory=25%,memory=50%"], 2, "with the keys"),
        (["--max-slowdown", "5%"], 2, "--max-slowdown goes with --compare"),
    ],
)
def test_wrong_questions_are_answered_before_anything_is_measured(
    toy: Path, arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(bench, "Worker", lambda *_: pytest.fail("it measured"))
    monkeypatch.setattr(bench, "take_turns", lambda *_: pytest.fail("it measured"))
    make_cnn(tmp_path / "cnn.edgeml")
    for name, content in {"old": '{"schema": 1}\n', "broken": '{"schema": 2, "kind": "bench"}\n{"sche', "empty": ""}.items():
        (tmp_path / name).write_text(content)
    places = {"TOY": toy, "CNN": tmp_path / "cnn.edgeml"} | {name.upper(): tmp_path / name for name in ("old", "broken", "empty")}
    words_given = [re.sub("^[A-Z]{3,}", lambda match: str(places[match[0]]), argument) for argument in arguments]
    assert main(["bench", str(toy), "--task", "mood", *words_given]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_an_error_of_either_side_is_the_error(toy: Path, flipped: Callable[[int], Path], capsys: Capture) -> None:
    with edgeml.open(toy) as session:
        session.run("mood", text="rain")
        bad = session.stats()["resident"][0]
    spoilt = flipped(bad)
    for ours, theirs in ((spoilt, toy), (toy, spoilt)):
        assert main(["bench", str(ours), "--task", "mood", "--text", "rain", "--compare", str(theirs)]) == 4
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert f"page {bad} at offset" in captured.err


def test_interrupting_leaves_no_child(toy: Path) -> None:
    command = [sys.executable, "-P", "-m", "edgeml.cli", "bench", str(toy), *QUICK, "--compare", str(toy), "--iterations", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while len(found := children.read_text().split()) < 2:
            assert parent.poll() is None
            time.sleep(0.01)
        os.killpg(parent.pid, signal.SIGINT)
        out, err = parent.communicate(timeout=60)
    assert (parent.returncode, out) == (130, b"")
    assert err.decode().split() == ["edgeml:", "interrupted"]
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in found):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_files_of_one_name(toy: Path, tmp_path: Path) -> None:
    other = shutil.copy(toy, tmp_path / toy.name)
    ours, theirs = {"bundle": str(toy)}, {"bundle": str(other)}
    assert bench.names_of(ours, theirs, {}) == ("toy.edgeml", "the other toy.edgeml")
    assert bench.names_of(ours, ours, {"memory": "5%", "threads": "2"}) == ("toy.edgeml", "itself with memory 5%, threads 2")
    assert parse_other(f"{toy}, memory = 5% ").settings == {"memory": "5%"}


def test_a_noisy_machine_is_said_to_be_one() -> None:
    found = Comparison(1.02, 0.8, 1.3, 16)
    said = bench.sentence(found, "a", "b", "pairs of turns")
    assert said == (
        "a takes 1.020 times as long as b (98 %: 0.800 to 1.300, 16 pairs of turns): no difference found; "
        "a slow-down by 51.3 % would be found 95 times in 100, so this was too noisy"
    )


def test_turns_run_on_processors_this_process_may_use() -> None:
    assert set(fast_processors()) <= os.sched_getaffinity(0)
    assert fast_processors()
