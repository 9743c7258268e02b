"""`edgeml bench --workload`: requests that overlap, and what becomes of them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.cli import main
from edgeml.commands import bench
from edgeml.commands._bench_mix import Mix
from edgeml.made import make_cnn
from edgeml.measure import Timing
from edgeml.workload import parse_workload

Capture = pytest.CaptureFixture[str]
MIX = """
seed = 3
requests = 24
warmup = 2
[arrival]
ARRIVAL
[[mix]]
task = "mood"
weight = 2
input = "rows.jsonl"
[[mix]]
task = "weather"
rows = 3
tokens = {distribution = "uniform", least = 2, most = 9}
"""


def measured(toy: Path, tmp_path: Path, capsys: Capture, arrival: str, *arguments: str) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_text('{"text": "rain"}\n{"text": "a fine day"}\n')
    (tmp_path / "w.toml").write_text(MIX.replace("ARRIVAL", arrival))
    assert main(["bench", str(toy), "--workload", str(tmp_path / "w.toml"), *arguments, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["records"]
    assert isinstance(found, dict)
    return found


def test_requests_by_the_clock(toy: Path, tmp_path: Path, capsys: Capture) -> None:
    one = measured(toy, tmp_path, capsys, 'kind = "bursts"\nrate_per_s = 400\nburst = 4')
    mix = one["mix"]
    assert (one["kind"], one["task"], one["warmup"], one["cold"]) == ("bench", "mood,weather", 2, None)
    assert (mix["requests"], mix["answered"], mix["refused"], mix["late"], one["rounds"]) == (24, 24, 0, 0, 24)
    assert sum(task["answered"] for task in mix["by_task"].values()) == 24
    assert mix["by_task"]["mood"]["answered"] > mix["by_task"]["weather"]["answered"] > 0
    assert mix["seconds"] >= (24 - 4) / mix["offered_per_s"] * 0.5
    assert mix["submitted_late_s"] >= 0
    assert one["latency_s"]["max"] == max(task["latency_s"]["max"] for task in mix["by_task"].values())
    assert one["tokens_per_s"] == pytest.approx(one["tokens"] / mix["seconds"])
    assert one["hits"] + one["misses"] > 0
    assert one["workload"]["arrival"] == {"kind": "bursts", "rate_per_s": 400, "burst": 4}
    assert one["workload"]["sha256"] != ""
    assert str(tmp_path) not in json.dumps(one), "no folder of this machine"


def test_a_closed_loop_and_options_that_go_first(toy: Path, tmp_path: Path, capsys: Capture) -> None:
    one = measured(toy, tmp_path, capsys, 'kind = "closed"\nconcurrency = 3', "--iterations", "7", "--warmup", "0", "--memory", "25%")
    assert (one["mix"]["requests"], one["warmup"], one["memory"]) == (7, 0, "25%")
    assert one["mix"]["offered_per_s"] is one["mix"]["submitted_late_s"] is None


def test_equal_seeds_are_equal_work(toy: Path, tmp_path: Path, capsys: Capture) -> None:
    tokens = [measured(toy, tmp_path, capsys, 'kind = "closed"')["tokens"] for _ in range(2)]
    assert tokens[0] == tokens[1]


def test_tables(toy: Path, tmp_path: Path, capsys: Capture) -> None:
    measured(toy, tmp_path, capsys, 'kind = "poisson"\nrate_per_s = 300')
    asked = ["bench", str(toy), "--workload", str(tmp_path / "w.toml"), "--threads", "1,2"]
    assert main(asked) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("`toy.edgeml`, workload w.toml, 24 requests, poisson, rate_per_s 300.0 on ")
    assert lines[2].endswith("| answers/s | refused |    late | stand-in % |")
    assert "cold p50 ms" not in lines[2]
    assert "p99 is left out: it takes 100 rounds, and there were 24" in captured.err
    assert main([*asked, "-o", "csv"]) == 0
    parsed = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [one["mix.answered"] for one in parsed] == ["24", "24"]
    assert all(None not in one and None not in one.values() for one in parsed)


def test_in_turns(toy: Path, tmp_path: Path, capsys: Capture) -> None:
    measured(toy, tmp_path, capsys, 'kind = "closed"\nconcurrency = 2')
    asked = ["bench", str(toy), "--workload", str(tmp_path / "w.toml"), "--compare", f"{toy},memory=25%", "--seconds", "0"]
    assert main([*asked, "--max-slowdown", "9900%", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["records"]
    assert first["mix"]["requests"] == second["mix"]["requests"] == 4 * first["compare"]["ratio"]["n"]
    assert first["tokens"] == second["tokens"], "both sides had the same requests"


def test_images(tmp_path: Path, capsys: Capture) -> None:
    make_cnn(tmp_path / "cnn.edgeml")
    (tmp_path / "w.toml").write_text('requests = 6\n[[mix]]\ntask = "digit"\nrows = 2\n[[mix]]\ntask = "garment"\n')
    assert main(["bench", str(tmp_path / "cnn.edgeml"), "--workload", str(tmp_path / "w.toml"), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["records"]
    assert one["mix"]["answered"] == 6
    assert one["tokens_per_s"] is None


def test_deadlines_that_pass_are_counted_and_said(toy: Path) -> None:
    workload = parse_workload(
        '[[mix]]\ntask = "mood"\ntokens = 9\n[[mix]]\ntask = "weather"\ntokens = 9\ndeadline_s = 1e-6\n', Path("w.toml")
    )
    with edgeml.open(toy) as session:
        mix, timing = Mix(session, workload, {}), Timing()
        answered = mix.play(1, 40, timing)
        figures, said = mix.figures(timing.warm.tokens), mix.notes()
    counts = figures["mix"]
    assert counts["answered"] == len(answered) == len(timing.warm.latency_s)
    assert counts["late"] == 40 - len(answered) > 0
    assert counts["by_task"]["weather"] == {"answered": 0, "latency_s": None, "stand_in_share": None}
    assert said == [f"{counts['late']} of 40 requests were refused or too late; the latencies are of the others"]


def test_a_full_queue_refuses(toy: Path) -> None:
    workload = parse_workload('[arrival]\nkind = "bursts"\nrate_per_s = 1000\nburst = 50\n[[mix]]\ntask = "mood"\ntokens = 9\n', Path("w"))
    with edgeml.open(toy) as session:
        session.serve(queue=2)
        mix = Mix(session, workload, {})
        mix.play(1, 50, Timing())
        counts = mix.figures(0)["mix"]
    assert counts["refused"] > 0
    assert counts["answered"] + counts["refused"] == 50


def test_the_inputs_are_those_of_the_mix(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[[mix]]\ntask = "mood"\nrows = 2\ntokens = {distribution = "uniform", least = 2, most = 9}\npriority = 5'
    workload = parse_workload(text, Path("w.toml"))
    seen: list[dict[str, Any]] = []
    with edgeml.open(toy) as session:
        submit = session.submit
        monkeypatch.setattr(session, "submit", lambda task, **given: (seen.append(given), submit(task, **given))[1])
        Mix(session, workload, {}).play(1, 5, Timing())
        vocabulary = session.preprocessor(session.task("mood")).vocabulary
    for given, request in zip(seen, workload.part(1, 5), strict=True):
        assert given["arrays"]["mask"].sum(1).tolist() == list(request.tokens)
        assert given["arrays"]["ids"].shape == (2, max(request.tokens))
        assert np.all(given["arrays"]["ids"] < vocabulary)
        assert given["priority"] == 5


@pytest.mark.parametrize(
    ("text", "arguments", "code", "words"),
    [
        (None, [], 3, "cannot be read"),
        ('[[mix]]\ntask = "mood"\ntokens = 4', ["--task", "mood"], 2, "leave out --task"),
        ('[[mix]]\ntask = "mood"\ntokens = 4', ["--tokens", "4"], 2, "leave out --task and the options for inputs"),
        ('[[mix]]\ntask = "moood"\ntokens = 4', [], 2, "no task 'moood'"),
        ('[[mix]]\ntask = "mood"', [], 3, "[[mix]] number 1: task 'mood' takes texts: give input or tokens"),
        ('[[mix]]\ntask = "mood"\nimages = ["a.png"]', [], 3, "takes texts"),
        ('[[mix]]\ntask = "mood"\ntokens = 65', [], 3, "reads at most 64 tokens, not 65"),
        ('[[mix]]\ntask = "mood"\ninput = "none.jsonl"', [], 3, "none.jsonl: cannot be read"),
        ('[[mix]]\ntask = "mood"\ninput = "bad.jsonl"', [], 3, "bad.jsonl:2: "),
        ('[[mix]]\ntask = "mood"\ntokens = 4\nspeed = 3', [], 3, "unknown key 'speed'"),
        ("[[mix", [], 3, "not TOML"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_measured(
    toy: Path,
    tmp_path: Path,
    text: str | None,
    arguments: list[str],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setattr(bench, "_run_worker", lambda *_: pytest.fail("it measured"))
    (tmp_path / "bad.jsonl").write_text('{"text": "rain"}\n{"text": 4}\n')
    if text is not None:
        (tmp_path / "w.toml").write_text(text)
    assert main(["bench", str(toy), "--workload", str(tmp_path / "w.toml"), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_tasks_on_images_take_no_texts(tmp_path: Path, capsys: Capture) -> None:
    make_cnn(tmp_path / "cnn.edgeml")
    for line in ("tokens = 4", 'input = "a.jsonl"', 'images = ["none.png"]'):
        (tmp_path / "w.toml").write_text(f'[[mix]]\ntask = "digit"\n{line}\n')
        assert main(["bench", str(tmp_path / "cnn.edgeml"), "--workload", str(tmp_path / "w.toml")]) in (2, 3)
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert "takes images" in captured.err or "none.png" in captured.err


def test_when_nobody_is_answered_that_is_a_sentence(toy: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "w.toml").write_text('[[mix]]\ntask = "mood"\ntokens = 9\ndeadline_s = 1e-6\n')
    assert main(["bench", str(toy), "--workload", str(tmp_path / "w.toml"), "--warmup", "0"]) == 2
    assert "none of 30 requests was answered; give them a later deadline" in capsys.readouterr().err
