"""`edgeml eval` over several variants: what it says of domains, its gates, and answers that are kept, gone on with and scored again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.cli import main
from edgeml.commands._eval_settings import Kept, Setting, parse_also, parse_kept
from edgeml.errors import DataError, PageError, UsageError
from edgeml.evaluate import kept_set
from edgeml.made import TOY, make_cnn, make_mixture
from edgeml.made_cnn import STREET
from edgeml.predictions import Predictions
from edgeml.records import read

WORDS = ["sun", "rain", "snow", "fog", "car", "train", "good", "bad", "day", "night", "river", "sea", "the", "a", "is", "was"]
ROWS = {"mood": 80, "weather": 60}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy, and data whose labels are mostly what it answers, half of one label and half of another: the domain sky with weather,
    mind with mood."""
    place = tmp_path_factory.mktemp("variants")
    make_mixture(place / "toy.edgeml")
    rng = np.random.default_rng(0)
    with edgeml.open(place / "toy.edgeml") as session:
        for task, domain in (("mood", "mind"), ("weather", "sky")):
            texts = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(1000)]
            labels = list(TOY.tasks[task])
            answers = [labels.index(label) for label in session.run(task, texts=texts).labels]
            common = sorted(set(answers), key=answers.count)[-2:]
            chosen = [[n for n, answer in enumerate(answers) if answer == one][: ROWS[task] // 2] for one in common]
            order = rng.permutation(np.concatenate(chosen))
            texts, answers = [texts[n] for n in order], [answers[n] for n in order]
            found = [answer if rng.random() < 0.9 else int(rng.integers(len(labels))) for answer in answers]
            folder = place / "data" / domain / task
            folder.mkdir(parents=True)
            (folder / "task.json").write_text(json.dumps({"name": task, "domain": domain, "labels": labels, "metric": "accuracy"}))
            rows = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in zip(texts, found, strict=True))
            for split in ("train", "test"):
                (folder / f"{split}.jsonl").write_text(rows)
    return place


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


Capture = pytest.CaptureFixture[str]
BASE = ("toy.edgeml", "--data", "data", "--threads", "1")


def said(capsys: Capture, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    assert main(["eval", *map(str, arguments), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def sentence(capsys: Capture, code: int, *arguments: str | Path) -> str:
    assert main(["eval", *map(str, arguments)]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [line for line in shown.err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1
    assert lines[0].startswith("edgeml: ")
    return lines[0]


# ---- several variants ----


def test_each_variant_is_what_it_would_be_alone(here: Path, capsys: Capture) -> None:
    also = ["--also", "half,experts-kept=0.5", "--also", "small,residency=masked,memory=60%", "--also", "other=toy.edgeml,memory=100%"]
    found = said(capsys, *BASE, "--reference", "toy.edgeml", *also)
    assert [one["name"] for one in found["variants"]] == ["toy", "half", "small", "other"]
    for one, alone in (("half", ["--experts-kept", "0.5"]), ("small", ["--residency", "masked", "--memory", "60%"])):
        single = said(capsys, *BASE, "--reference", "toy.edgeml", *alone)
        entry = next(entry for entry in found["variants"] if entry["name"] == one)
        for key in ("tasks", "domains", "retention", "memory_budget_bytes", "residency"):
            assert entry[key] == single["variants"][0][key], key
    same = found["variants"][3]
    assert same["retention"]["low"] == same["retention"]["value"] == 1
    assert found["tasks"] == found["variants"][0]["tasks"]
    assert found["reference"]["bundle_id"] == found["record"]["bundle_id"]
    assert "edgeml's own formulas" in found["formulas"]
    assert (found["seed"], found["resamples"]) == (0, 1000)


def test_a_variant_of_kept_experts_saw_the_domains_that_chose_them(here: Path, capsys: Capture) -> None:
    found = said(capsys, *BASE, "--reference", "toy.edgeml", "--experts-kept", "0.25", "--kept-for", "sky")
    entry = found["variants"][0]
    assert (entry["domains_seen"], entry["unseen"], entry["kept_for"]) == (["sky"], ["mind"], ["sky"])
    scores = {name: domain["reference_score"] - domain["score"] for name, domain in entry["domains"].items()}
    assert found["gg"]["value"] == pytest.approx(scores["mind"] - scores["sky"])
    assert found["gg"]["low"] < found["gg"]["value"] < found["gg"]["high"]
    assert found["gg"]["n"] == 140
    whole = said(capsys, *BASE, "--reference", "toy.edgeml")
    assert whole["gg"] is None
    assert "does not say which data its exporter saw" in whole["variants"][0]["why"]
    told = said(capsys, *BASE, "--reference", "toy.edgeml", "--domains-seen", "mind")
    assert told["gg"]["value"] == 0
    assert told["domains_seen"] == ["mind"]


def test_what_the_exporter_saw_is_in_the_provenance(here: Path, capsys: Capture, rebuild: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["provenance"] = {"data": {"weather": {"train": "ab"}, "forgotten": {}}}

    bundle = rebuild(change=change)
    found = said(capsys, bundle, "--data", "data", "--reference", "toy.edgeml")
    assert found["domains_seen"] == ["sky"]
    assert found["gg"]["value"] == 0


def test_sets_of_each_domain_are_specialised(here: Path, capsys: Capture) -> None:
    found = said(capsys, *BASE, "--specialise", "0.25")
    moved = found["transfer"]
    assert moved["domains"] == ["mind", "sky"]
    texts = {task: [json.loads(line) for line in next(here.glob(f"data/*/{task}/test.jsonl")).read_text().splitlines()] for task in ROWS}
    with edgeml.open("toy.edgeml") as session:
        for i, chooser in enumerate(("mood", "weather")):
            for j, task in enumerate(("mood", "weather")):
                resident = kept_set(session.manifest, task, 0.25, None, [chooser])
                answers = session.run(task, texts=[row["text"] for row in texts[task]], resident=resident).labels
                right = [TOY.tasks[task].index(a) == row["label"] for a, row in zip(answers, texts[task], strict=True)]
                assert moved["scores"][i][j] == pytest.approx(np.mean(right))
    assert len(moved["baseline"]) == 2
    assert moved["forgetting"] == pytest.approx([1 - moved["retention"][0][1], 1 - moved["retention"][1][0]])
    assert -1 <= found["dsi"]["low"] <= found["dsi"]["value"] <= found["dsi"]["high"] <= 1
    assert found["dsi_max"]["value"] >= found["dsi"]["value"]
    assert set(found["dsi_by_domain"]) == {"mind", "sky"}
    assert found["cdtr"] is None or found["cdtr"]["n"] == 140
    assert 0 <= found["dsi_route"] <= 1
    assert found["routed_choices"] > 0
    assert found["reference"]["name"] == "all experts"
    assert found["retention"]["value"] == 1  # the bundle itself, against all its experts


def test_without_shared_experts_there_is_no_baseline(here: Path, tmp_path: Path, capsys: Capture) -> None:
    make_mixture(tmp_path / "m.edgeml", shared=0)
    found = said(capsys, tmp_path / "m.edgeml", "--data", "data", "--specialise", "0.25", "--limit", "40")
    assert (found["cdtr"], found["transfer"]["baseline"]) == (None, None)
    assert main(["eval", str(tmp_path / "m.edgeml"), "--data", "data", "--specialise", "0.25", "--limit", "40"]) == 0
    assert "CDTR: none, some site has no shared expert" in capsys.readouterr().out


def test_tables_are_for_people(here: Path, capsys: Capture) -> None:
    arguments = ["--reference", "toy.edgeml", "--specialise", "0.25", "--also", "sky,experts-kept=0.25,kept-for=sky"]
    assert main(["eval", *BASE, *arguments]) == 0
    shown = capsys.readouterr().out
    for words in ("GG of sky:", "GG of toy: none", "forgetting of sky", "DSI: ", "DSI_route: ", "own formulas", "25% for sky", "none  "):
        assert words in shown
    assert max(map(len, shown.splitlines())) < 200


def test_too_few_rows_say_nothing(here: Path, capsys: Capture) -> None:
    few = said(capsys, *BASE, "--specialise", "0.25", "--limit", "29", "--also", "sky,experts-kept=0.25,kept-for=sky")
    assert (few["dsi"], few["cdtr"], few["variants"][1]["gg"]) == (None, None, None)
    assert "29 examples" in few["why"]
    assert "29 examples" in few["variants"][1]["why"]
    assert main(["eval", *BASE, "--specialise", "0.25", "--limit", "29"]) == 0
    assert "DSI: none, domain 'mind' has 29 examples" in capsys.readouterr().out


# ---- gates ----


def test_gates_refuse_with_the_figure_and_its_interval(here: Path, capsys: Capture) -> None:
    lost = [*BASE, "--reference", "toy.edgeml", "--experts-kept", "0.25", "--kept-for", "sky"]
    found = said(capsys, *lost)
    bound = found["gg"]["low"]
    assert main(["eval", *lost, "--max-gap", str(bound + 0.001)]) == 0
    capsys.readouterr()
    assert main(["eval", *lost, "--max-gap", str(bound - 0.001), "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["gg"] == found["gg"]  # the figures are printed all the same
    assert f"GG is {100 * found['gg']['value']:.1f} (95 %: {100 * bound:.1f} to" in shown.err
    value = found["retention"]["value"]
    assert main(["eval", *lost, "--min-retention", str(value - 0.001)]) == 0
    capsys.readouterr()
    assert main(["eval", *lost, "--min-retention", str(value + 0.001)]) == 1
    assert f"retention is {100 * value:.1f} % (95 %:" in capsys.readouterr().err


def test_a_gate_that_cannot_be_judged_is_refused_before_anything_runs(here: Path, tmp_path: Path, capsys: Capture) -> None:
    unjudged = tmp_path / "nothing.jsonl"
    gate = [*BASE, "--max-gap", "0.02", "--predictions", unjudged]
    assert "name it with --reference" in sentence(capsys, 2, *gate)
    assert "does not say which data" in sentence(capsys, 2, *gate, "--reference", "toy.edgeml")
    assert "all were" in sentence(capsys, 2, *gate, "--reference", "toy.edgeml", "--domains-seen", "sky,mind")
    assert "none were" in sentence(capsys, 2, *gate, "--reference", "toy.edgeml", "--domains-seen", "law")
    assert not unjudged.exists()
    assert main(["eval", *map(str, gate), "--reference", "toy.edgeml", "--domains-seen", "sky", "--limit", "20"]) == 1
    assert "GG is not known (domain 'mind' has 20 examples" in capsys.readouterr().err
    assert main(["eval", *BASE, "--reference", "toy.edgeml", "--min-retention", "0.5", "--limit", "20"]) == 1
    assert "not known well enough" in capsys.readouterr().err


# ---- answers that are kept ----


def test_answers_are_scored_again_without_running(here: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "answers.jsonl"
    arguments = [*BASE, "--specialise", "0.25", "--also", "sky,experts-kept=0.25,kept-for=sky", "--predictions", file]
    first = said(capsys, *arguments)
    content = file.read_bytes()
    monkeypatch.setattr(edgeml.session.Session, "run", lambda *_, **__: pytest.fail("it was asked again"))
    again = said(capsys, *arguments)
    assert file.read_bytes() == content
    assert main(["eval", "--from-predictions", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    scored = json.loads(out)
    assert err == "note: DSI_route is not told: routing is followed only where a model answers\n"
    for other in (again, scored):
        for key in set(first) - {"record", "skipped", "dsi_route", "routed_choices"}:
            assert other[key] == first[key], key
    assert scored["record"] is None
    assert scored["dsi_route"] is None
    reseeded = said(capsys, "--from-predictions", file, "--seed", "1")
    assert reseeded["dsi"]["value"] == first["dsi"]["value"]
    assert reseeded["dsi"]["low"] != first["dsi"]["low"]
    told = said(capsys, "--from-predictions", file, "--domains-seen", "mind")
    assert told["gg"]["value"] == 0


def test_an_interrupted_run_goes_on(here: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, file = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    first = said(capsys, *BASE, "--predictions", whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    monkeypatch.setattr("edgeml.evaluate.CHUNK_ROWS", 16)
    asked: list[int] = []
    real = edgeml.session.Session.run

    def failing(self: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(len(named["texts"]))
        if len(asked) == 3:
            raise PageError("page 3: reading failed (Input/output error)")
        return real(self, *arguments, **named)

    monkeypatch.setattr(edgeml.session.Session, "run", failing)
    assert "reading failed" in sentence(capsys, 4, *BASE, "--predictions", file)
    assert "has answered 32 of 80 rows of task 'mood'" in sentence(capsys, 3, "--from-predictions", file)
    assert file.read_bytes().splitlines(keepends=True) == lines[:33]  # what was measured is kept
    file.write_bytes(file.read_bytes() + b'{"variant":"toy","ta')  # a line that was being written
    asked[:] = [0, 0, 0]
    again = said(capsys, *BASE, "--predictions", file)
    assert sum(asked) == 80 + 60 - 32
    assert again["tasks"] == first["tasks"]
    assert file.read_bytes().splitlines(keepends=True) == lines
    assert again["record"]["rounds"] == 108


def test_other_settings_are_answered_anew(here: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "answers.jsonl"
    said(capsys, *BASE, "--predictions", file)
    for change in (["--experts-kept", "0.25"], ["--limit", "40"], ["--residency", "masked", "--memory", "60%"]):
        assert said(capsys, *BASE, "--predictions", file, *change)["tasks"] == said(capsys, *BASE, *change)["tasks"]
    with Predictions(file, writing=False) as kept:
        assert len(kept.parts) == 2  # of one variant and task the later counts


HEAD: dict[str, Any] = {"predictions": 1, "key": "k", "variant": "v", "role": "variant", "task": "t", "domain": "d", "metric": "accuracy"}
HEAD |= {"classes": 2, "commonest": 0, "rows": 2, "data": "x", "settings": {}, "domains_seen": None}


def row(number: int, **change: Any) -> dict[str, Any]:
    return {"variant": "v", "task": "t", "row": number, "label": 0, "predicted": 1} | change


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "no predictions in it"),
        ([{"text": "a"}], ":1: this is no file of predictions"),
        (["hello"], ":1: not JSON"),
        ([HEAD, '{"task": "t", "row": NaN}'], ":2: .*NaN"),
        ([HEAD | {"predictions": 2}], ":1: predictions of version 2, and this edgeml reads 1"),
        ([HEAD | {"classes": "2"}], ":1: .*no fitting 'classes'"),
        ([HEAD | {"settings": {"experts_kept": "half"}}], ":1: the settings of a part have no fitting 'experts_kept'"),
        ([HEAD | {"role": "judge"}], ":1: .*role"),
        ([HEAD, row(1)], ":2: row 1 is not the next of task 't', which has 0"),
        ([HEAD, row(0, task="u")], ":2: row 0 is not the next"),
        ([HEAD, row(0, label=2)], ":2: 'label' is 2, outside 0 to 1"),
        ([HEAD, row(0, predicted=-1)], ":2: 'predicted' is -1"),
        ([HEAD, row(0, predicted=0.5)], ":2: 'predicted' is not what an answer looks like"),
        ([HEAD, row(0)], "has answered 1 of 2 rows of task 't'"),
        ([HEAD, row(0), row(1), HEAD | {"role": "reference", "key": "l"}, row(0), row(1, label=1)], "answered other rows of task 't'"),
        (
            [HEAD, row(0), row(1), HEAD | {"role": "reference", "task": "u", "key": "l"}, row(0, task="u"), row(1, task="u")],
            "no task in common",
        ),
        ([HEAD | {"metric": "bleu"}, row(0), row(1)], "no metric 'bleu'"),
    ],
)
def test_a_broken_file_of_predictions_is_one_sentence(lines: list[Any], words: str, tmp_path: Path, capsys: Capture) -> None:
    import re

    file = tmp_path / "p.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    assert main(["eval", "--from-predictions", str(file)]) in (2, 3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(words, shown.err)
    assert shown.err.count("\n") == 1


def test_nobody_else_writes_it_and_nothing_else_is_overwritten(here: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "p.jsonl"
    with Predictions(file):
        assert "another process is writing it" in sentence(capsys, 2, *BASE, "--predictions", file)
    other = tmp_path / "mine.jsonl"
    other.write_text('{"text": "precious"}\n')
    assert "no file of predictions" in sentence(capsys, 3, *BASE, "--predictions", other)
    assert other.read_text() == '{"text": "precious"}\n'
    assert "cannot be read" in sentence(capsys, 2, "--from-predictions", tmp_path / "absent.jsonl")
    assert "folder that exists" in sentence(capsys, 2, *BASE, "--predictions", tmp_path / "no" / "p.jsonl")


# ---- streams ----


def test_two_streams_answer_like_one_row_at_a_time(here: Path, tmp_path: Path, capsys: Capture) -> None:
    alone, both = (said(capsys, "toy.edgeml", "--data", "data", "--threads", n, "--predictions", tmp_path / n) for n in ("1", "2"))
    assert both["tasks"] == alone["tasks"]
    assert (alone["record"]["streams"], both["record"]["streams"], both["record"]["threads"]) == (1, 2, 2)
    assert both["record"]["rounds"] == 140
    rows = [[row["predicted"] for row in map(json.loads, (tmp_path / n).read_text().splitlines()) if "row" in row] for n in ("1", "2")]
    assert rows[0] == rows[1]
    with edgeml.open("toy.edgeml", threads=1) as session:
        texts = [json.loads(line)["text"] for line in (here / "data/mind/mood/test.jsonl").read_text().splitlines()]
        assert [TOY.tasks["mood"].index(session.run("mood", text=text).labels[0]) for text in texts] == rows[0][:80]


def test_a_paged_bundle_is_answered_in_one_stream(here: Path, capsys: Capture) -> None:
    found = said(capsys, "toy.edgeml", "--data", "data", "--threads", "2", "--memory", "40%")
    assert (found["record"]["streams"], found["record"]["threads"]) == (1, 2)


def test_a_text_that_cannot_be_answered_is_named_in_either_way(place: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = [{"text": "sun", "label": 0}] * 9 + [{"text": "", "label": 0}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for threads in ("1", "2"):
        asked = [place / "toy.edgeml", "--data", tmp_path / "mine.jsonl", "--task", "mood", "--threads", threads]
        assert "mine.jsonl:10: the text is empty" in sentence(capsys, 3, *asked)


# ---- one file of rows ----


def test_a_table_is_scored_like_a_directory(here: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = [json.loads(line) for line in (here / "data/mind/mood/test.jsonl").read_text().splitlines()]
    labels = list(TOY.tasks["mood"])
    csv = tmp_path / "mine.csv"
    csv.write_text("review,verdict\n" + "".join(f'"{row["text"]}",{labels[row["label"]]}\n' for row in rows))
    columns = ["--task", "mood", "--text-column", "review", "--label-column", "verdict"]
    found = said(capsys, "toy.edgeml", "--data", csv, *columns)
    wanted = said(capsys, *BASE, "--tasks", "mood")
    assert found["tasks"]["mood"] == wanted["tasks"]["mood"] | {"domain": "made"}
    lines = tmp_path / "mine.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert said(capsys, "toy.edgeml", "--data", lines, "--task", "mood")["tasks"] == found["tasks"]


# ---- wrong questions ----


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "give a bundle and --data"),
        (["toy.edgeml"], 2, "give a bundle and --data"),
        ([*BASE, "--from-predictions", "p"], 2, "leave out the bundle"),
        ([*BASE, "--also", "half,share=0.5"], 2, "with the keys memory, residency"),
        ([*BASE, "--also", "half,memory="], 2, "KEY=VALUE"),
        ([*BASE, "--also", "memory=5"], 2, "begin with a name"),
        ([*BASE, "--also", "half,experts-kept=1.5"], 2, "a share from 0 to 1"),
        ([*BASE, "--also", "half,residency=lazy"], 2, "residency is one of exact, masked, hybrid"),
        ([*BASE, "--also", "half,experts-kept=0.5,memory=50%"], 2, "leave out --memory"),
        ([*BASE, "--also", "toy,memory=50%"], 2, "two variants are called 'toy'"),
        ([*BASE, "--also", "x=absent.edgeml"], 3, "no such file"),
        ([*BASE, "--experts-kept", "0.5", "--kept-for", "law"], 2, "no usage of a domain 'law'"),
        ([*BASE, "--kept-for", "sky"], 2, "say how many with --experts-kept"),
        ([*BASE, "--experts-kept", "0.5", "--kept-for", "sky", "--kept-by", "random:1"], 2, "--kept-for is about usage"),
        ([*BASE, "--task", "mood"], 2, "with a data directory it is --tasks"),
        ([*BASE, "--also", "half,memory=50%,memory=25%"], 2, "KEY=VALUE"),
        ([*BASE, "--specialise", "nan"], 2, "nan is"),
        ([*BASE, "--reference", "toy.edgeml", "--max-gap", "nan"], 2, "nan is no finite number"),
        ([*BASE, "--reference", "toy.edgeml", "--min-retention", "nan"], 2, "nan is no finite number"),
        ([*BASE, "--reference", "toy.edgeml", "--min-retention", "inf"], 2, "inf is no finite number"),
        (
            ["toy.edgeml", "--data", "data/mind/mood/test.jsonl", "--task", "mood", "--tasks", "mood"],
            2,
            "with one file of rows it is --task",
        ),
        (["--from-predictions", "p.jsonl", "--learn"], 2, "leave out the bundle, --data and what else is for running it"),
        (["--from-predictions", "p.jsonl", "--also", "half"], 2, "leave out the bundle"),
        (["--from-predictions", "p.jsonl", "--reference", "toy.edgeml"], 2, "leave out the bundle"),
        (["toy.edgeml", "--data", "data/mind/mood/test.jsonl"], 2, "say with --task"),
        (["toy.edgeml", "--data", "data/mind/mood/test.jsonl", "--task", "vector"], 2, "no labels"),
        (["toy.edgeml", "--data", "data/mind/mood/test.jsonl", "--task", "tune"], 2, "no task 'tune'"),
    ],
)
def test_wrong_questions_get_one_sentence(arguments: list[str], code: int, words: str, here: Path, capsys: Capture) -> None:
    assert words in sentence(capsys, code, *arguments)


def test_a_reference_that_means_something_else_is_refused(here: Path, tmp_path: Path, capsys: Capture) -> None:
    make_mixture(tmp_path / "other.edgeml", tasks=dict(TOY.tasks) | {"mood": tuple(TOY.tasks["mood"])[::-1]})
    assert "with other labels" in sentence(capsys, 3, *BASE, "--reference", tmp_path / "other.edgeml")


def test_also_is_read() -> None:
    assert parse_also("half, experts-kept=0.5, kept-for=a+b", "m") == Setting("half", "m", kept=Kept(0.5, None, ("a", "b")))
    assert parse_also("small=n.edgeml,memory=25%,residency=masked", "m") == Setting("small", "n.edgeml", "25%", "masked")
    assert parse_also("v,variant=tiny", "m").wish == {"variant": "tiny"}
    assert parse_kept("none", "usage", None) == Kept(0.0)
    with pytest.raises(UsageError, match="random:SEED"):
        parse_also("half,experts-kept=0.5,kept-by=luck", "m")


def test_a_bad_row_is_found_before_anything_runs(here: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.csv").write_text("text,label\nfine,good\nworse,ugly\n")
    file = tmp_path / "p.jsonl"
    said_ = sentence(capsys, 3, "toy.edgeml", "--data", tmp_path / "mine.csv", "--task", "mood", "--predictions", file)
    assert "mine.csv:3: the label 'ugly' is none of task 'mood'" in said_
    assert not file.exists()
    with pytest.raises(DataError):
        raise DataError(said_)


# ---- records ----


def test_an_evaluation_is_recorded(here: Path, tmp_path: Path, capsys: Capture) -> None:
    file, answers = tmp_path / "records.jsonl", tmp_path / "answers.jsonl"
    found = said(capsys, *BASE, "--specialise", "0.25", "--records", file, "--predictions", answers)
    said(capsys, "--from-predictions", answers, "--records", file)
    measured, scored = read(file)
    assert measured["kind"] == scored["kind"] == "eval"
    assert measured["eval"] == {key: value for key, value in found.items() if key != "record"}
    assert measured["bundle_id"] == scored["bundle_id"] == found["record"]["bundle_id"]
    assert scored["eval"]["dsi"] == found["dsi"]
    assert measured["latency_s"]["p50"] > 0
    (tmp_path / "other.jsonl").write_text('{"schema": 1, "kind": "eval"}\n')
    assert "schema 1" in sentence(capsys, 3, *BASE, "--records", tmp_path / "other.jsonl")


# ---- images ----


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with variants that answers a class and an edge a pixel, and images for it."""
    place = tmp_path_factory.mktemp("street")
    make_cnn(place / "street.edgeml", "dense", filters=4)
    rng = np.random.default_rng(0)
    arrays = {"x": rng.integers(0, 256, (35, 24, 32, 3), np.uint8), "edge": rng.integers(0, 2, (35, 24, 32), np.uint8)}
    arrays["segmentation"] = rng.integers(0, 5, (35, 24, 32), np.uint8)
    (place / "data" / "street").mkdir(parents=True)
    (place / "data" / "street" / "image.json").write_text(json.dumps({"name": "street", "labels": STREET}))
    for split in ("train", "test"):
        np.savez(place / "data" / "street" / f"{split}.npz", **arrays)  # type: ignore[arg-type]
    return place


def test_maps_are_kept_and_scored_again(street: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeml.commands._eval_run.CHUNK_IMAGES", 10)
    file = tmp_path / "answers.jsonl"
    asked = [street / "street.edgeml", "--data", street / "data", "--threads", "1", "--reference", street / "street.edgeml"]
    asked += ["--also", "small,variant=small", "--predictions", file]
    first = said(capsys, *asked)
    assert [one["variant"] for one in first["variants"]] == ["full", "small"]
    assert first["variants"][1]["tasks"] == said(capsys, *asked[:7], "--variant", "small")["tasks"]
    assert said(capsys, "--from-predictions", file)["variants"] == first["variants"]
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:37]))  # the second chunk of one task, and a part of the other's
    again = said(capsys, *asked)
    assert again["variants"] == first["variants"]
    file.write_text(file.read_text().replace('"always":[', '"always":["x",', 1))
    assert "'always' is not what an answer looks like" in sentence(capsys, 3, "--from-predictions", file)


def test_images_have_no_experts(street: Path, capsys: Capture) -> None:
    asked = [street / "street.edgeml", "--data", street / "data"]
    assert "for mixtures of experts" in sentence(capsys, 2, *asked, "--specialise", "0.5")
    assert "for mixtures of experts" in sentence(capsys, 2, *asked, "--learn")
    assert "for mixtures of experts" in sentence(capsys, 2, *asked, "--also", "half,experts-kept=0.5")
