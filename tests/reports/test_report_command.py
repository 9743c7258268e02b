"""`edgeml report` on the command line: what it writes where, and one sentence for each thing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reported
from edgeml_report import plots

from edgeml.cli import main
from edgeml.records import append


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    for record in reported.everything():
        append(path, record)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["report", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize(
    ("name", "begins"), [("r.html", "<!doctype html>"), ("r.md", "# small.edgeml"), ("r.csv", "record,kind"), ("report", "<!doctype")]
)
def test_the_name_of_the_file_says_the_format(capsys: pytest.CaptureFixture[str], records: Path, name: str, begins: str) -> None:
    output = records.with_name(name)
    code, out, _ = run(capsys, records, "-o", output)
    assert code == 0
    assert output.read_text("utf-8").startswith(begins)
    assert "8 records" in out
    assert sorted(path.name for path in records.parent.iterdir()) == sorted(["records.jsonl", name])


def test_several_files_are_one_report_and_json_says_what_was_written(capsys: pytest.CaptureFixture[str], records: Path) -> None:
    more, output = records.with_name("more.jsonl"), records.with_name("r.html")
    append(more, reported.bench(bundle="other.edgeml", bundle_id=reported.FULL))
    code, out, _ = run(capsys, records, more, "-o", output, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["records"] == 9
    assert (found["output"], found["format"], found["bytes"]) == (str(output), "html", output.stat().st_size)
    assert found["missing"] == []
    assert found["plots"] == plots.available()
    assert "other.edgeml" in output.read_text("utf-8")


def test_without_a_file_it_goes_to_standard_output(capsys: pytest.CaptureFixture[str], records: Path) -> None:
    code, out, err = run(capsys, records, "--format", "md")
    assert (code, err) == (0, "")
    assert out.startswith("# small.edgeml\n")


def test_without_matplotlib_a_note_says_how_to_get_plots(
    capsys: pytest.CaptureFixture[str], records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    code, _, err = run(capsys, records, "-o", records.with_name("r.html"))
    assert code == 0
    assert "pip install matplotlib" in err
    assert run(capsys, records, "-o", records.with_name("r.html"), "--quiet")[1:] == ("", "")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"schema": 1, "kind": "bench"}', "line 9"),
        (b'{"schema": 3, "kind": "bench"}', "line 9"),
        (b'{"schema": 2, "kind": "bench", "half', "line 9"),
        (b'{"schema": 2, "kind": "bench", "a": NaN}', "line 9"),
        (b'{"schema": 2, "kind": "opera"}', "line 9"),
        (b"\xff\xfe", "line 9"),
    ],
    ids=["older", "newer", "cut", "nan", "kind", "bytes"],
)
def test_a_line_that_is_no_record_is_named(capsys: pytest.CaptureFixture[str], records: Path, line: bytes, says: str) -> None:
    with records.open("ab") as file:
        file.write(line + b"\n")
    output = records.with_name("r.html")
    code, out, err = run(capsys, records, "-o", output)
    assert (code, out) == (3, "")
    assert says in err
    assert "records.jsonl" in err
    assert err.count("\n") == 1
    assert not output.exists()


def test_a_file_that_is_not_there_or_empty_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, tmp_path / "none.jsonl")
    assert code == 3
    assert "none.jsonl" in err
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    code, _, err = run(capsys, empty)
    assert code == 3
    assert "holds no records" in err
    code, _, err = run(capsys, tmp_path)
    assert code == 3
    assert err.count("\n") == 1


def test_usage_is_checked_and_a_place_that_cannot_be_written_keeps_what_was_there(
    capsys: pytest.CaptureFixture[str], records: Path
) -> None:
    assert run(capsys)[0] == 2
    assert run(capsys, records, "--json")[0] == 2
    assert run(capsys, records, "--format", "pdf")[0] == 2
    code, _, err = run(capsys, records, "-o", records / "in" / "r.html")
    assert code == 2
    assert err.count("\n") == 1
    code, _, err = run(capsys, records, "-o", records.parent)
    assert code == 2
    assert err.count("\n") == 1


def test_it_does_not_overwrite_its_own_records(capsys: pytest.CaptureFixture[str], records: Path) -> None:
    before = records.read_bytes()
    code, _, err = run(capsys, records, "-o", records)
    assert code == 2
    assert "records.jsonl" in err
    assert records.read_bytes() == before
