"""Records: one format for every command that measures, appended line by line, and refused with the line that is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from edgeml.cli import main
from edgeml.errors import DataError, DeviceError
from edgeml.records import KINDS, append, complete, read

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "record.schema.json").read_text("utf-8"))
GOOD = {"schema": 2, "kind": "bench"}


def check(record: dict[str, Any]) -> None:
    """Against the published schema."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.Draft202012Validator(SCHEMA).validate(record)


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    one = complete("eval", {"bundle": "m.edgeml", "bundle_id": "0" * 64, "schema": 1, "kind": "run"}, eval={"mean": None})
    append(file, one)
    append(file, one | {"bundle": "n.edgeml"})
    assert [record["bundle"] for record in read(file)] == ["m.edgeml", "n.edgeml"]
    assert read(file)[0] == one
    assert (one["schema"], one["kind"]) == (2, "eval")
    check(one)


def test_kinds_are_the_published_ones() -> None:
    assert list(KINDS) == SCHEMA["properties"]["kind"]["enum"]


BROKEN: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{", "line 2: not a record"),
    "cut off": (json.dumps(GOOD).encode()[:-3], "line 2: not a record"),
    "no object": (b"[1]", "not a JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "NaN": (b'{"schema": 2, "kind": "bench", "rounds": NaN}', "NaN is not a number"),
    "a key twice": (b'{"schema": 2, "schema": 2}', "occurs twice"),
    "an older schema": (b'{"schema": 1, "kind": "bench"}', "line 2: a record of schema 1, and this edgeml reads 2; measure again"),
    "a newer schema": (b'{"schema": 3, "kind": "bench"}', "schema 3"),
    "a schema that is no number": (b'{"schema": true, "kind": "bench"}', "schema True"),
    "no schema": (b'{"kind": "bench"}', "schema None"),
    "another kind": (b'{"schema": 2, "kind": "dance"}', "no kind that is known"),
    "a kind that is a list": (b'{"schema": 2, "kind": ["bench"]}', "no kind that is known"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_line_is_named(name: str, tmp_path: Path) -> None:
    line, said = BROKEN[name]
    file = tmp_path / "r.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as problem:
        read(file)
    assert said in str(problem.value)
    assert "\n" not in str(problem.value)
    assert len(str(problem.value)) < 400 + len(str(file))


def test_empty_lines_are_none_and_no_file_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(b"\n\n" + json.dumps(GOOD).encode() + b"\n\n")
    assert read(file) == [GOOD]
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "other.jsonl")


def test_what_json_cannot_say_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(tmp_path / "r.jsonl", GOOD | {"rounds": float("nan")})
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_a_sentence() -> None:
    with pytest.raises(DeviceError, match="cannot be written"):
        append("/dev/full", GOOD)


def test_commands_append_records_of_the_published_schema(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.jsonl"
    quick = ["--task", "mood", "--iterations", "3", "--warmup", "0", "--cold", "1"]
    assert main(["bench", str(toy), *quick, "--memory", "25%,100%", "--records", str(file)]) == 0
    folder = tmp_path / "data" / "made" / "mood"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"name": "mood", "domain": "made", "labels": ["good", "bad"], "metric": "accuracy"}))
    rows = "".join(json.dumps({"text": f"a {word} day", "label": number % 2}) + "\n" for number, word in enumerate(["warm", "bad"] * 20))
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(rows)
    for command in (["eval"], ["routing", "--limit", "8"]):
        assert main([command[0], str(toy), "--data", str(tmp_path / "data"), *command[1:], "--records", str(file)]) == 0, (
            capsys.readouterr().err
        )
    found = read(file)
    assert [record["kind"] for record in found] == ["bench", "bench", "eval", "routing"]
    for record in found:
        check(record)


def test_a_records_file_is_looked_at_before_anything_is_measured(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("milk, bread\n")
    for file, said in ((tmp_path / "notes.txt", "line 1: not a record"), (tmp_path / "none" / "r.jsonl", "there is no folder")):
        assert main(["bench", str(toy), "--task", "mood", "--records", str(file)]) == 3
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert (tmp_path / "notes.txt").read_text() == "milk, bread\n"
