"""What travels with a command: arguments as they read on the device, files in both directions."""

from __future__ import annotations

import io
import json
from pathlib import Path

import click
import pytest

pytest.importorskip("edgeml_devices", reason="the distribution edgeml-devices is not installed")

from edgeml_devices.delivery import unpack
from far import Far

from edgeml.cli import main
from edgeml.errors import DataError, UsageError


def test_files_are_replaced_by_their_places(tmp_path: Path) -> None:
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "a.png"
    for path in (rows, picture):
        path.write_text("")
    packed = unpack("run", ["some/m.edgeml", "--input", str(rows), "--task=mood", "--threads", "2", "--image", str(picture)], False)
    assert packed.arguments == ["run", "m.edgeml", "--task=mood", "--input=in1/rows.jsonl", "--image=in2/a.png", "--threads=2"]
    assert packed.bundles == [(Path("some/m.edgeml"), "m.edgeml")]
    assert packed.sent == [(rows, "in1/rows.jsonl"), (picture, "in2/a.png")]


def test_what_a_command_writes_comes_back(tmp_path: Path) -> None:
    packed = unpack("run", ["m.edgeml", "-o", str(tmp_path / "map.png")], False)
    assert packed.arguments == ["run", "m.edgeml", "--output=out1-map.png"]
    assert packed.fetched == [("out1-map.png", tmp_path / "map.png")]
    assert unpack("bench", ["m.edgeml", "-o", "csv"], True).arguments == ["bench", "m.edgeml", "--output=csv"]  # a format, no file


def test_values_stay_what_they_were() -> None:
    packed = unpack("run", ["m.edgeml", "--text", "--task", "--text", "two words; $(id)", "--text=-"], False)
    assert packed.arguments == ["run", "m.edgeml", "--text=--task", "--text=two words; $(id)", "--text=-"]


def test_bundles_of_one_name_and_of_variants(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text("{}")
    packed = unpack(
        "eval",
        ["a/m.edgeml", "--data", str(tmp_path), "--reference", "b/m.edgeml", "--also", "c=a/m.edgeml,memory=5%", "--also", "d,memory=9%"],
        False,
    )
    assert packed.bundles == [(Path("a/m.edgeml"), "m.edgeml"), (Path("b/m.edgeml"), "bundle2/m.edgeml")]
    assert "--reference=bundle2/m.edgeml" in packed.arguments
    assert "--also=c=m.edgeml,memory=5%" in packed.arguments
    assert "--also=d,memory=9%" in packed.arguments


def test_what_a_command_does_not_know_is_told_before_anything_is_connected(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(click.UsageError, match="--tsak"):
        unpack("run", ["m.edgeml", "--tsak", "mood"], False)
    assert main(["device", "run", "m.edgeml", "--to", "pi.invalid", "--tsak", "mood"]) == 2
    assert "--tsak" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run", "none.edgeml", "--to", "local"], 3, "none.edgeml: no such file"),
        (["run", "m.edgeml", "--to", "local", "--input", "none.jsonl"], 3, "none.jsonl: no such file or folder"),
        (["run", "m.edgeml", "--to", "local", "--to", "local"], 2, "a machine is named twice"),
        (["run", "m.edgeml", "--to", "local", "--records", "r.jsonl"], 2, "edgeml run writes no records"),
        (["run", "m.edgeml", "--to", "local", "-o", "no/such/map.png"], 3, "there is no folder to write it into"),
        (["run", "m.edgeml", "--to", "local", "--to", "pi", "-o", "map.png"], 2, "would be written by several devices"),
        (["serve-stdin", "m.edgeml", "--to", "local", "--to", "pi"], 2, "serve-stdin answers from one device"),
        (["run", "m.edgeml"], 2, "say where"),
        (["run", "m.edgeml", "--to", "local", "--device", "raspberry-pi-4", "--emulate"], 2, "give one of them"),
        (["bench", "m.edgeml"], 2, "--to"),
        (["push", "--to", "local", "--verify"], 2, "--verify is about a bundle"),
    ],
)
def test_wrong_questions(
    arguments: list[str], code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["device", *arguments]) == code
    shown = capfd.readouterr()
    assert sentence in shown.err
    assert shown.out == ""


def test_rows_of_a_file_and_of_standard_input(
    local_far: Far, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fog"}\n{"text": "a warm and sunny day"}\n')
    asked = ["device", "run", str(toy), *local_far.arguments, "--task", "mood", "--input"]
    assert main([*asked, str(rows)]) == 0
    first = [line.split("\t")[:3] for line in capfd.readouterr().out.splitlines()]
    assert len(first) == 2
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(rows.read_bytes())))
    assert main([*asked, "-"]) == 0
    assert [line.split("\t")[:3] for line in capfd.readouterr().out.splitlines()] == first


def test_a_map_comes_back(local_far: Far, tmp_path: Path) -> None:
    with local_far.remote() as remote:
        remote.open()
        content = bytes(range(256)) * 5000
        remote.send_data(content, "out")
        target = tmp_path / "map.png"
        remote.fetch("out", target)
        assert target.read_bytes() == content
        with pytest.raises(Exception, match="No such file"):
            remote.fetch("nothing", target)
        assert target.read_bytes() == content
        for path in ("../x", "/etc/passwd", ""):
            with pytest.raises(Exception, match="is no file of a run"):
                remote.fetch(path, target)
    assert [path.name for path in tmp_path.glob(".map*")] == []


def test_a_folder_of_data_is_evaluated_there(local_far: Far, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from edgeml.bundle import Bundle
    from edgeml.manifest import load_manifest

    with Bundle.open(toy) as bundle:
        labels = next(task for task in load_manifest(bundle).tasks if task.name == "mood").labels
    file = tmp_path / "mine.csv"
    file.write_text("text,label\n" + "".join(f"text number {row},{labels[row % len(labels)]}\n" for row in range(12)))
    asked = ["eval", str(toy), "--data", str(file), "--task", "mood", "--json", "--quiet"]
    assert main(asked) == 0
    here = json.loads(capfd.readouterr().out)
    assert main(["device", *asked, *local_far.arguments]) == 0
    (device,) = json.loads(capfd.readouterr().out)["devices"]
    assert device["document"]["tasks"] == here["tasks"]
    answers = tmp_path / "answers.jsonl"
    for _ in range(2):  # the second time it goes along and nothing is asked again
        assert main(["device", *asked, *local_far.arguments, "--predictions", str(answers)]) == 0
        assert answers.read_text().count("\n") > 12
    with pytest.raises(DataError):
        unpack("eval", ["m.edgeml", "--data", str(tmp_path / "none")], False)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="there is no file in it"):
        unpack("eval", ["m.edgeml", "--data", str(tmp_path / "folder")], False)
    (tmp_path / "folder" / "notes.txt").write_text("nothing to learn from")
    assert main(["device", "eval", str(toy), *local_far.arguments, "--data", str(tmp_path / "folder")]) == 3
    assert f"edgeml: {tmp_path}/folder: no task.json" in capfd.readouterr().err, "by its name here"


def test_requests_on_standard_input(local_far: Far, toy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    lines = "".join(json.dumps({"id": number, "task": "mood", "text": "fog"}) + "\n" for number in range(3))
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["device", "serve-stdin", str(toy), *local_far.arguments, "--json"]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert sorted(answer["id"] for answer in found) == [0, 1, 2]
    assert {answer["state"] for answer in found} == {"done"}


def test_a_command_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no command nothing"):
        unpack("nothing", [], False)
