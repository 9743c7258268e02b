"""`edgeml bench`: one row for each combination, measured in a process of its own; and the arithmetic of the figures."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import edgeml
from edgeml.cli import main
from edgeml.commands import bench
from edgeml.commands._records import flatten, head, row
from edgeml.errors import DeviceError
from edgeml.measure import Timing, environment, peak_rss_bytes, percentile, percentile_interval, record, rss_bytes, spread, time_rounds

Capture = pytest.CaptureFixture[str]
QUICK = ["--iterations", "4", "--warmup", "1", "--cold", "2"]


def records(toy: Path, capsys: Capture, *arguments: str) -> list[dict[str, Any]]:
    assert main(["bench", str(toy), "--task", "mood", *QUICK, *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    found: list[dict[str, Any]] = json.loads(captured.out)["records"]
    return found


def test_every_combination_is_a_row(toy: Path, capsys: Capture) -> None:
    found = records(toy, capsys, "--threads", "1,2", "--memory", "25%,100%", "--residency", "exact,masked")
    keys = [(one["memory"], one["threads"], one["residency"]) for one in found]
    assert len(set(keys)) == len(keys) == 8
    assert all(one["rounds"] == 4 and one["cold"]["rounds"] == 2 for one in found)


def test_a_record_has_everything_that_is_promised(toy: Path, capsys: Capture) -> None:
    (one,) = records(toy, capsys, "--memory", "25%")
    for key in ("schema", "tool_version", "bundle_id", "device", "backend", "threads", "memory_budget_bytes", "residency", "direct_reads"):
        assert key in one
    assert one["latency_s"]["min"] <= one["latency_s"]["p50"] <= one["latency_s"]["p95"] <= one["latency_s"]["max"]
    assert one["latency_s"]["p99"] is None
    assert one["workload"] == {"kind": "random", "tokens": 32}
    assert one["tokens"] == 4 * 32
    assert one["cold"]["misses"] > 0
    assert one["cold"]["page_in_bytes"] > 0
    assert 10 << 20 < one["rss_after_open_bytes"] <= one["peak_rss_bytes"] < one["memory_budget_bytes"] + (120 << 20)
    assert one["open_s"] > 0


def test_a_hundred_rounds_have_a_99th_percentile(toy: Path, capsys: Capture) -> None:
    assert main(["bench", str(toy), "--task", "mood", "--iterations", "100", "--tokens", "4", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["records"]
    assert one["latency_s"]["p99"] >= one["latency_s"]["p95"]


def test_texts_from_options_files_and_standard_input(toy: Path, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert records(toy, capsys, "--text", "rain", "--text", "sun and fog")[0]["workload"] == {"kind": "texts", "rows": 2}
    content = b'{"text": "rain"}\n' * 3
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert records(toy, capsys, "--input", str(tmp_path / "rows.jsonl"))[0]["workload"]["rows"] == 3
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content * 100)))
    assert records(toy, capsys, "--input", "-")[0]["workload"]["rows"] == 4


def test_no_cold_rounds_is_null(toy: Path, capsys: Capture) -> None:
    assert main(["bench", str(toy), "--task", "mood", "--iterations", "1", "--cold", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"][0]["cold"] is None


def test_a_table_for_people(toy: Path, capsys: Capture) -> None:
    assert main(["bench", str(toy), "--task", "mood", *QUICK, "--memory", "0%,100%", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("`toy.edgeml`, task mood, 4 warm rounds")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    assert len({len(line) for line in table}) == 1
    assert "p50 ms" in table[0]
    assert "peak MiB" in table[0]
    assert "note: 0%: the budget holds 1 of the 4 pages" in captured.err


def test_csv_and_json_lines(toy: Path, capsys: Capture) -> None:
    assert main(["bench", str(toy), "--task", "mood", *QUICK, "--threads", "1,2", "-o", "csv"]) == 0
    parsed = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [one["threads"] for one in parsed] == ["1", "2"]
    assert float(parsed[0]["latency_s.p50"]) > 0
    assert parsed[0]["latency_s.p99"] == ""
    assert main(["bench", str(toy), "--task", "mood", *QUICK, "--threads", "1,2", "-o", "jsonl"]) == 0
    assert [json.loads(line)["threads"] for line in capsys.readouterr().out.splitlines()] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--task", "moood"], 2, "no task"),
        ([], 2, "3 tasks"),
        (["--task", "mood", "--threads", "1,,2"], 2, "not a list"),
        (["--task", "mood", "--threads", "1,x"], 2, "--threads takes"),
        (["--task", "mood", "--threads", "0"], 2, "from 1 to 256"),
        (["--task", "mood", "--memory", "100%,1000"], 2, "below the floor"),
        (["--task", "mood", "--memory", "100%,big"], 2, "not a size"),
        (["--task", "mood", "--residency", "exact,odd"], 2, "'odd'"),
        (["--task", "mood", "--tokens", "65"], 2, "at most 64 tokens"),
        (["--task", "mood", "--tokens", "0"], 2, "tokens"),
        (["--task", "mood", "--tokens", "5", "--text", "a"], 2, "not both"),
        (["--task", "mood", "--iterations", "0"], 2, "iterations"),
        (["--task", "mood", "--text-pair", "a"], 2, "--text"),
        (["--task", "mood", "--text", "a", "--text-pair", "b"], 2, "takes single texts"),
        (["--task", "mood", "--text", ""], 3, "empty"),
        (["--task", "mood", "--input", "absent"], 3, "absent"),
        (["--task", "mood", "-o", "xml"], 2, "xml"),
    ],
)
def test_wrong_questions_are_answered_before_anything_is_measured(
    toy: Path, arguments: list[str], code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(bench, "_run_worker", lambda *_: pytest.fail("it measured"))
    assert main(["bench", str(toy), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_an_error_in_the_child_is_the_error(toy: Path, flipped: Callable[[int], Path], capsys: Capture) -> None:
    with edgeml.open(toy) as session:
        session.run("mood", text="rain")
        bad = session.stats()["resident"][0]
    assert main(["bench", str(flipped(bad)), "--task", "mood", "--text", "rain"]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"page {bad} at offset" in captured.err


@pytest.mark.parametrize("kind", ["md", "json", "csv"])
def test_what_was_measured_before_a_failure_is_printed(toy: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    measure = bench._run_worker

    def fail_later(job: dict[str, Any], step: Any) -> dict[str, Any]:
        if job["memory"] == "25%":
            raise DeviceError("the disk fails")
        return measure(job, step)

    monkeypatch.setattr(bench, "_run_worker", fail_later)
    assert main(["bench", str(toy), "--task", "mood", *QUICK, "--memory", "50%,25%", "-o", kind]) == 4
    captured = capsys.readouterr()
    assert captured.err == "edgeml: the disk fails\n"
    assert "50%" in captured.out
    assert kind != "json" or [one["memory"] for one in json.loads(captured.out)["records"]] == ["50%"]


def test_a_record_that_cannot_be_kept_is_printed(toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    def full(*_: Any) -> None:
        raise DeviceError("the disk is full")

    monkeypatch.setattr(bench, "append", full)
    assert main(["bench", str(toy), "--task", "mood", *QUICK, "--memory", "50%", "--records", str(tmp_path / "r")]) == 4
    assert "50%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("os.kill(os.getpid(), 9)", "was killed, most likely because the machine ran out of memory"),
        ("os.abort()", "crashed (SIGABRT)"),
        ("os.write(2, b'first\\nout of luck\\n'); os._exit(5)", "failed: out of luck"),
    ],
)
def test_a_child_that_dies_is_reported(
    toy: Path, tmp_path: Path, code: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\nif 'edgeml.commands.bench_worker' in sys.orig_argv: {code}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    assert main(["bench", str(toy), "--task", "mood"]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_interrupting_leaves_no_child(toy: Path) -> None:
    command = [sys.executable, "-P", "-m", "edgeml.cli", "bench", str(toy), "--task", "mood", "--iterations", "1000000", "-o", "jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while not (found := children.read_text().split()):
            assert parent.poll() is None
        os.killpg(parent.pid, signal.SIGINT)
        out, err = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert out == b""
    assert err.decode().split() == ["edgeml:", "interrupted"]
    deadline = time.monotonic() + 60
    while any(_lives(child) for child in found):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lives(child: str) -> bool:
    try:
        return Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ---- figures ----


@dataclass
class Cost:
    hits: int = 2
    misses: int = 1
    page_in_bytes: int = 100
    page_wait_s: float = 0.5
    tokens: int = 10
    masked_tokens: int = 0


def test_rounds_are_counted_by_kind() -> None:
    events: list[str] = []

    def call(index: int) -> Cost:
        events.append(f"call {index}")
        return Cost()

    timing = time_rounds(call, lambda: events.append("cold"), iterations=3, warmup=2, cold=2, tick=lambda: events.append("tick"))
    assert [event for event in events if event != "tick"] == [
        *("cold", "call 0", "cold", "call 1"),
        *("call 0", "call 1"),
        *("call 0", "call 1", "call 2"),
    ]
    assert events.count("tick") == 7
    assert (len(timing.cold.latency_s), timing.cold.misses) == (2, 2)
    assert (len(timing.warm.latency_s), timing.warm.hits, timing.warm.page_in_bytes, timing.warm.page_wait_s) == (3, 6, 300, 1.5)


def test_percentiles_are_measured_values() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.95, 0.99, 1)] == [50, 90, 95, 99, 100]
    assert percentile([3.0], 0.5) == percentile([3.0], 0.99) == 3
    assert percentile([], 0.5) is None


@pytest.mark.parametrize(("n", "share"), [(5, 0.5), (6, 0.5), (30, 0.5), (30, 0.9), (100, 0.95), (300, 0.99), (500, 0.99), (2500, 0.5)])
def test_an_interval_of_a_percentile_misses_it_in_5_of_100_at_most(n: int, share: float) -> None:
    """Against the binomial law in plain sums: how many of n values lie below the true percentile."""
    chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) if n < 1000 else 0.0 for k in range(n + 1)]
    found = percentile_interval([float(value) for value in range(1, n + 1)], share)
    assert found is not None
    assert (found["value"], found["n"]) == (percentile(range(1, n + 1), share), n)
    low, high = found["low"], found["high"]
    if n >= 1000:
        assert high == pytest.approx(n / 2 + 0.98 * math.sqrt(n), abs=2)
        assert low == pytest.approx(n / 2 - 0.98 * math.sqrt(n), abs=2)
        return
    if low is not None:
        assert sum(chances[: int(low)]) <= 0.025 < sum(chances[: int(low) + 1])
    else:
        assert chances[0] > 0.025
    if high is not None:
        assert sum(chances[int(high) :]) <= 0.025 + 1e-12 < sum(chances[int(high) - 1 :])
    else:
        assert chances[n] > 0.025


def test_too_few_rounds_have_no_99th_percentile() -> None:
    few, many = spread([1.0] * 99), spread([1.0] * 100)
    assert few["p99"] is few["p99_interval"] is None
    assert many["p99"] == 1
    assert many["p99_interval"] == {"value": 1.0, "low": 1.0, "high": None, "n": 100}
    assert set(spread([]).values()) == {None}


def test_the_environment_names_the_disk(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"")
    disk = environment(tmp_path / "m")["disk"]
    assert disk is None or (set(disk) == {"device", "filesystem", "model", "rotational"} and "/" not in disk["device"])
    assert environment()["disk"] is environment(tmp_path / "none")["disk"] is None
    assert {"governor", "numpy", "onnxruntime", "kernel"} <= set(environment())


def test_what_was_not_measured_is_null() -> None:
    empty = record(Timing(), {"memory": "auto"})
    assert empty["rounds"] == 0
    assert set(empty["latency_s"].values()) == {None}
    assert empty["cold"] is empty["tokens_per_s"] is empty["throttled"] is None
    json.dumps(empty, allow_nan=False)


def test_memory_is_that_of_this_process() -> None:
    now, peak = rss_bytes(), peak_rss_bytes()
    assert now is not None
    assert 1 << 20 < now <= peak
    assert environment()["memory_bytes"] > now


def test_cells_have_units_and_nested_keys_dots() -> None:
    one = record(Timing(), {"memory": "1,5", "bundle": "m", "task": "t", "notes": ["a"]})
    flat = flatten(one)
    assert flat["latency_s.p50"] is None
    assert flat["notes"] == '["a"]'
    for kind in ("md", "csv"):
        assert head(kind, one)
        assert row(kind, one)
    assert head("jsonl", one) is None
    assert row("json", one) is None
