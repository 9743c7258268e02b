"""The commands of a report: each can be run, and a record that holds too little has none."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import reported
from edgeml_report import document, to_markdown
from edgeml_report.content import Code

from edgeml.cli import group, main
from edgeml.commands._bench_compare import parse_other
from edgeml.commands._eval_settings import parse_also
from edgeml.made import make_mixture
from edgeml.records import read


def lines_of(*records: dict[str, Any]) -> list[str]:
    sections = document(list(records)).sections
    return [line for section in sections for block in section.blocks if isinstance(block, Code) for line in block.lines]


def parsed(line: str) -> dict[str, Any]:
    """What click makes of a printed command; raises its error for one that it would refuse."""
    words = shlex.split(line)[1:]
    command = group.get_command(click.Context(group), words[0])
    if command is None:
        pytest.skip(f"the distribution with edgeml {words[0]} is not installed")
    return command.make_context(words[0], words[1:]).params


def compared(**other: Any) -> dict[str, Any]:
    than = {"bundle": "old.edgeml", "memory": "100%", "residency": "exact", "threads": 2, "variant": None} | other
    asked = {"iterations": 30, "seconds": 60.0, "max_slowdown": 0.05}
    return reported.bench() | {"arm": "A", "compare": {"how": "turns", "with": than, **asked}}


def mix() -> dict[str, Any]:
    return reported.loaded() | {"task": "a,b", "workload": {"kind": "mix", "file": "mixed.toml"}, "warmup": 3, "cold": None}


def profiled() -> dict[str, Any]:
    own = {"task": "mood", "workload": {"kind": "random", "tokens": 8}, "warm": {"rounds": 12}, "cold": {"rounds": 3}, "operators": None}
    return reported.settings("profile", share=50) | {"profile": own}


def routed() -> dict[str, Any]:
    return reported.settings("routing") | {"split": "test", "limit": 160, "routing": {"tasks": ["snips"], "advice": "page"}}


def scored(**changes: Any) -> dict[str, Any]:
    record = reported.evaluation() | {"split": "validation", "limit": 40, **changes}
    half = reported.variant("half", 0.02) | {"experts_kept": 0.5, "kept_by": "usage", "kept_for": ["law", "health"], "memory": "100%"}
    record["eval"]["variants"].append(half)
    record["eval"]["reference"] = {"bundle": "full.edgeml", "bundle_id": reported.FULL}
    return record


def emulated(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"kind": "device", "device_run": {"profile": "raspberry-pi-zero-2-w", "emulated": True}}


KINDS = {
    "bench": reported.bench(),
    "mix": mix(),
    "compare": compared(memory="50%"),
    "texts": reported.bench() | {"workload": {"kind": "texts", "rows": 9}, "input_files": ["rows.jsonl"]},
    "images": reported.bench() | {"workload": {"kind": "images", "rows": 2}, "input_files": ["a.png", "b.png"]},
    "profile": profiled(),
    "eval": scored(),
    "eval of a file": scored(task="mood", tasks=None, text_column="review", pair_column="text_pair", label_column="label"),
    "eval of kept answers": scored(from_predictions="answers.jsonl"),
    "routing": routed(),
    "diff": reported.settings("diff")
    | {"diff": {"reference_bundle": "full.edgeml", "split": "test", "limit": 8, "tasks": ["a", "b"], "parts": []}},
    "device": emulated(reported.bench()),
    "remote": reported.bench() | {"to": "pi@garden"},
    "an option for a name": reported.bench() | {"bundle": "--json"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_printed_command_is_one(kind: str) -> None:
    (line,) = lines_of(KINDS[kind])
    found = parsed(line)
    for also in found.get("also") or ():
        parse_also(also, "small.edgeml")


def test_the_commands_say_what_was_asked() -> None:
    said = {kind: lines_of(record)[0] for kind, record in KINDS.items()}
    assert "--workload mixed.toml" in said["mix"]
    assert "--task" not in said["mix"]
    assert "--iterations 400 --warmup 3" in said["mix"]
    assert "--iterations 30 --cold 5 --compare old.edgeml,memory=50% --max-slowdown 5% --seconds 60" in said["compare"]
    assert "--input rows.jsonl" in said["texts"]
    assert "--image a.png --image b.png" in said["images"]
    assert "profile small.edgeml --task mood --tokens 8 --memory 50% --threads 2 --iterations 12 --no-operators" in said["profile"]
    assert "--tasks clinic,tellers" not in said["eval"]
    assert "--also half,experts-kept=0.5,kept-for=law+health" in said["eval"]
    assert "--reference full.edgeml" in said["eval"]
    assert "--task mood --text-column review" in said["eval of a file"]
    assert said["eval of kept answers"].startswith("edgeml eval --from-predictions answers.jsonl")
    assert "--tasks snips --limit 160" in said["routing"]
    assert "--tasks a,b" in said["diff"]


def test_the_other_side_of_a_comparison_needs_no_command(tmp_path: Path) -> None:
    first = compared(bundle_id=reported.FULL, residency="masked")
    second = reported.bench() | {"arm": "B", "compare": None, "bundle": "old.edgeml", "bundle_id": reported.FULL}
    (line,) = lines_of(first, second)
    old = tmp_path / "old.edgeml"
    make_mixture(old)
    assert parse_other(parsed(line)["compare"].replace("old.edgeml", str(old))).settings == {"residency": "masked"}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (reported.bench() | {"workload": {"kind": "texts", "rows": 2}, "input_files": []}, "given on the command line"),
        (mix() | {"workload": {"kind": "mix"}}, "its workload's file"),
        (reported.profile(), "its task"),
        (reported.settings("diff") | {"diff": {"split": "test", "parts": []}}, "the name of its reference"),
        (compared() | {"compare": {"how": "turns", "with": {"bundle": "old.edgeml"}}}, "how many rounds"),
        (scored() | {"threads": None}, "the file of kept answers"),
        (reported.settings("run"), "no command writes"),
    ],
)
def test_what_a_record_does_not_hold_is_said_and_not_guessed(record: dict[str, Any], why: str) -> None:
    assert lines_of(record) == []
    told = next(line for line in to_markdown(document([record])).splitlines() if line.startswith("Not reproducible from the record"))
    assert f"{record['kind']} of small.edgeml (" in told
    assert why in told


def test_commands_of_real_records_make_the_same_settings_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bench, profile and eval record is enough to run them again: the second records have the settings of the first."""
    monkeypatch.chdir(tmp_path)
    make_mixture(Path("m.edgeml"))
    Path("rows.jsonl").write_text('{"text": "wind and rain"}\n{"text": "snow"}\n')
    Path("mine.csv").write_text("review,verdict\n" + "".join(f"wind {row},{row % 2}\n" for row in range(12)))
    for run in (
        "bench m.edgeml --task mood --input rows.jsonl --iterations 2 --cold 1 --warmup 1",
        "profile m.edgeml --task mood --tokens 4 --iterations 2 --cold 1 --idle 0 --no-operators",
        "eval m.edgeml --data mine.csv --task mood --text-column review --label-column verdict",
    ):
        assert main([*run.split(), "--records", "first.jsonl", "--quiet"]) == 0
    first = read("first.jsonl")
    for line in lines_of(*first):
        assert main([*shlex.split(line.replace("DATA", "mine.csv"))[1:], "--quiet"]) == 0
    again = read("records.jsonl")
    assert len(again) == len(first)
    keys = ("kind", "task", "tasks", "workload", "input_files", "rounds", "warmup", "memory", "threads", "text_column", "limit")
    for one, two in zip(first, again, strict=True):
        assert {key: one.get(key) for key in keys} == {key: two.get(key) for key in keys}
