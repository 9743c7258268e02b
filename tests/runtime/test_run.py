"""`edgeml run`: answers for people and for programs, and one sentence for everything that is wrong with a question."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgeml
from edgeml.cli import main

Capture = pytest.CaptureFixture[str]


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def rows(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def one_sentence(captured: Any, *words: str) -> None:
    """Nothing on standard output, and one line that says all of `words` on standard error."""
    assert captured.out == ""
    assert captured.err.startswith("edgeml: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert "fault in edgeml itself" not in captured.err
    for word in words:
        assert word in captured.err


def test_a_line_an_answer(toy: Path, capsys: Capture) -> None:
    assert main(["run", str(toy), "--task", "weather", "--text", "will it rain", "--text", "sun"]) == 0
    captured = capsys.readouterr()
    lines = [line.split("\t") for line in captured.out.splitlines()]
    assert [len(line) for line in lines] == [4, 4]
    for task, label, score, spent in lines:
        assert task == "weather"
        assert label in ("sun", "rain", "snow", "fog")
        assert 0.25 <= float(score) <= 1
        assert spent.endswith(" ms")
    assert captured.err == ""


def test_vectors_are_shortened_for_people(toy: Path, capsys: Capture) -> None:
    assert main(["run", str(toy), "--task", "vector", "--text", "rain"]) == 0
    assert "64 numbers: " in capsys.readouterr().out


def test_json_is_one_document(toy: Path, capsys: Capture) -> None:
    assert main(["run", str(toy), "--task", "weather", "--text", "rain", "--text", "fog", "--memory", "50%", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    with edgeml.open(toy) as session:
        expected = session.run("weather", texts=["rain", "fog"])
    assert [answer["label"] for answer in document["results"]] == expected.labels
    for answer in document["results"]:
        assert set(answer) == {"task", "label", "score", "scores", "latency_s"}
        assert answer["score"] == answer["scores"][answer["label"]] == max(answer["scores"].values())
        assert list(answer["scores"]) == ["sun", "rain", "snow", "fog"]
    record = document["record"]
    assert record["schema"] == 2
    assert (record["memory"], record["residency"], record["rounds"]) == ("50%", "exact", 2)
    assert record["latency_s"]["p99"] is None
    assert record["hits"] + record["misses"] > 0
    assert record["device"]["processors"] >= 1
    for key in ("tool_version", "bundle_id", "backend", "threads", "memory_budget_bytes", "direct_reads", "peak_rss_bytes", "throttled"):
        assert key in record


def test_json_of_vectors(toy: Path, capsys: Capture) -> None:
    assert main(["run", str(toy), "--task", "vector", "--text", "rain", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["results"]
    assert len(answer["vector"]) == 64
    assert "label" not in answer


def test_many_rows_from_a_file_and_from_standard_input(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    content = rows(*(f"rain {number} sun" * (1 + number % 7) for number in range(300)))
    (tmp_path / "rows.jsonl").write_bytes(content + b"\n")
    assert main(["run", str(toy), "--task", "weather", "--input", str(tmp_path / "rows.jsonl")]) == 0
    from_file = [line.split("\t")[:3] for line in capsys.readouterr().out.splitlines()]
    stdin(monkeypatch, content)
    assert main(["run", str(toy), "--task", "weather", "--input", "-"]) == 0
    assert [line.split("\t")[:3] for line in capsys.readouterr().out.splitlines()] == from_file
    assert len(from_file) == 300


def test_the_only_task_need_not_be_named(tmp_path: Path, capsys: Capture, rebuild: Any) -> None:
    def only_mood(manifest: dict[str, Any]) -> None:
        manifest["tasks"] = [task for task in manifest["tasks"] if task["name"] == "mood"]
        manifest["usage"] = {"mood": manifest["usage"]["mood"]}

    assert main(["run", str(rebuild(change=only_mood)), "--text", "rain"]) == 0
    assert capsys.readouterr().out.startswith("mood\t")


def test_pairs(rebuild: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def pair(manifest: dict[str, Any]) -> None:
        next(task for task in manifest["tasks"] if task["name"] == "mood")["pair"] = True

    path = str(rebuild(change=pair))
    assert main(["run", path, "--task", "mood", "--text", "rain", "--text-pair", "sun", "--text", "a", "--text-pair", "b"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    stdin(monkeypatch, b'{"text": "rain", "text_pair": "sun"}\n')
    assert main(["run", path, "--task", "mood", "--input", "-"]) == 0
    capsys.readouterr()
    stdin(monkeypatch, b'{"text": "rain"}\n')
    assert main(["run", path, "--task", "mood", "--input", "-"]) == 3
    one_sentence(capsys.readouterr(), "-:1", "text_pair")
    assert main(["run", path, "--task", "mood", "--text", "rain"]) == 2
    one_sentence(capsys.readouterr(), "judges pairs")
    assert main(["run", path, "--task", "mood", "--text", "rain", "--text-pair", " "]) == 3
    one_sentence(capsys.readouterr(), "second text", "empty")


def test_notes_go_to_standard_error_and_can_be_silenced(toy: Path, capsys: Capture) -> None:
    arguments = ["run", str(toy), "--task", "mood", "--text", "rain " * 500, "--memory", "0%"]
    assert main(arguments) == 0
    error = capsys.readouterr().err
    assert "note: the budget holds 1 of the 4 pages" in error
    assert "note: 1 inputs were longer than 64 tokens and were cut" in error
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_labels_cannot_drive_the_terminal(rebuild: Any, capsys: Capture) -> None:
    def colour(manifest: dict[str, Any]) -> None:
        next(task for task in manifest["tasks"] if task["name"] == "mood")["labels"] = ["\x1b[31mgood\n", "\x1b]0;bad\x07"]

    assert main(["run", str(rebuild(change=colour)), "--task", "mood", "--text", "rain"]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--task", "moood", "--text", "a"], 2, ["no task 'moood'", "mood, "]),
        (["--text", "a"], 2, ["3 tasks", "mood, vector, weather"]),
        (["--task", "mood"], 2, ["--text", "--input"]),
        (["--task", "mood", "--text", "a", "--input", "-"], 2, ["either"]),
        (["--task", "mood", "--text", "a", "--text-pair", "b"], 2, ["single texts"]),
        (["--task", "mood", "--input", "-", "--text-pair", "b"], 2, ["text_pair"]),
        (["--task", "mood", "--text", ""], 3, ["--text: ", "empty"]),
        (["--task", "mood", "--text", "a", "--text", " "], 3, ["--text number 2", "empty"]),
        (["--task", "mood", "--text", "x" * 200_001], 3, ["200001 characters"]),
        (["--task", "mood", "--text", "a\udcff"], 3, ["not valid Unicode"]),
        (["--task", "mood", "--input", "absent.jsonl"], 3, ["absent.jsonl", "No such file"]),
        (["--task", "mood", "--input", "/"], 3, ["cannot be read"]),
        (["--task", "mood", "--text", "a", "--memory", "1000"], 2, ["below the floor", "give at least"]),
        (["--task", "mood", "--text", "a", "--memory", "plenty"], 2, ["not a size"]),
        (["--task", "mood", "--text", "a", "--memory", "-5%"], 2, ["not a size"]),
        (["--task", "mood", "--text", "a", "--threads", "0"], 2, ["threads must be"]),
        (["--task", "mood", "--text", "a", "--threads", "many"], 2, ["many"]),
        (["--task", "mood", "--text", "a", "--residency", "half"], 2, ["half"]),
    ],
)
def test_wrong_questions(
    toy: Path, arguments: list[str], code: int, words: list[str], capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(toy), *arguments]) == code
    one_sentence(capsys.readouterr(), *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["-: ", "empty"]),
        (b"not json\n", ["-:1", "JSON row"]),
        (rows("a") + b'{"text": 5}\n', ["-:2", '"text"']),
        (rows("a") + b'["text"]\n', ["-:2"]),
        (rows("a") + b'\n{"text": "\xff"}\n', ["-:3", "not UTF-8"]),
        (b'{"text": "\\ud800"}\n', ["-:1", "Unicode"]),
        (b'{"text": ""}\n', ["-:1", "empty"]),
        (b'{"text": "a", "text_pair": "b"}\n', ["-:1", "single texts"]),
        (b'{"text": "' + b"x" * (1 << 20) + b'"}\n', ["-:1", "longer than"]),
        (b"[" * 100_000 + b"\n", ["-:1", "JSON row"]),
        (bytes(4000), ["-:1"]),
    ],
)
def test_wrong_rows(toy: Path, content: bytes, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    stdin(monkeypatch, content)
    assert main(["run", str(toy), "--task", "mood", "--input", "-"]) == 3
    one_sentence(capsys.readouterr(), *words)


def test_answers_before_a_bad_row_are_given(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    stdin(monkeypatch, rows(*["rain"] * 130) + b"oops\n")
    assert main(["run", str(toy), "--task", "mood", "--input", "-"]) == 3
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 128
    assert "-:131" in captured.err
    stdin(monkeypatch, rows(*["rain"] * 130) + b"oops\n")
    assert main(["run", str(toy), "--task", "mood", "--input", "-", "--json"]) == 3
    one_sentence(capsys.readouterr(), "-:131")


def spoil(path: Path, to: Path, how: str) -> Path:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "foreign":
        content = bytearray(b"\x7fELF" + bytes(9000))
    elif how == "newer":
        from edgeml.native import crc32c

        content[8] = 2
        content[120:124] = crc32c(bytes(content[:120])).to_bytes(4, "little")
    elif how == "manifest":
        content[-10] ^= 1
    to.write_bytes(content)
    return to


@pytest.mark.parametrize("command", [["run", "--task", "mood", "--text", "a"], ["bench", "--task", "mood"], ["verify"], ["inspect"]])
@pytest.mark.parametrize(
    ("how", "word"),
    [("truncated", "truncated"), ("empty", "empty"), ("foreign", "not"), ("newer", "version"), ("manifest", "manifest is damaged")],
)
def test_bad_bundles(toy: Path, tmp_path: Path, command: list[str], how: str, word: str, capsys: Capture) -> None:
    path = spoil(toy, tmp_path / f"{how}.edgeml", how)
    assert main([command[0], str(path), *command[1:]]) == 3
    one_sentence(capsys.readouterr(), f"{how}.edgeml", word)


def test_an_unreadable_bundle(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def denied(path: Any, *_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", denied)  # a mode of 0 does not stop root
    assert main(["run", str(toy), "--task", "mood", "--text", "a"]) == 3
    monkeypatch.undo()
    one_sentence(capsys.readouterr(), "toy.edgeml", "no permission")


def test_a_flipped_page_is_met_in_mid_run(toy: Path, flipped: Callable[[int], Path], capsys: Capture) -> None:
    with edgeml.open(toy) as session:
        session.run("mood", text="rain")
        bad = session.stats()["resident"][0]
    path = flipped(bad)
    assert main(["run", str(path), "--task", "mood", "--text", "rain"]) == 4
    one_sentence(capsys.readouterr(), f"flipped.edgeml: page {bad} at offset", "checksum")
    assert main(["verify", str(path)]) == 3
    one_sentence(capsys.readouterr(), f"page {bad} ")


def test_arguments_that_are_not_utf8(toy: Path) -> None:
    command = [sys.executable.encode(), b"-P", b"-m", b"edgeml.cli", b"run", os.fsencode(toy), b"--task", b"mood", b"--text", b"caf\xe9"]
    for locale in ("C", "C.UTF-8"):
        done = subprocess.run(command, capture_output=True, env=os.environ | {"LC_ALL": locale})
        assert done.returncode == 3
        assert done.stdout == b""
        assert done.stderr.count(b"\n") == 1
        assert b"not valid Unicode" in done.stderr
