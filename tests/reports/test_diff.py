"""`edgeml diff`: a part damaged on purpose is named first, errors are what plain code finds, a wrong question is one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("edgeml_report.diff", reason="edgeml-report is not installed")

import chromium
from damage import Run, noisy, parts_of, rewrite, spoiled, stage_page, weights
from edgeml_report import document, to_html, to_markdown
from edgeml_report.diff_graph import Graph, operators
from edgeml_report.diff_run import Errors, Machine, Opened, forward, write_mixture

import edgeml
from edgeml import cli
from edgeml.bundle import Bundle, PageSource
from edgeml.bundle_writer import write_bundle
from edgeml.layout import PageKind, WeightType
from edgeml.made import TOY, make_cnn, make_mixture
from edgeml.manifest import load_manifest
from edgeml.records import read

TEXTS = [f"{word} and rain {number}" for number in range(5) for word in ("sun", "snow", "fog", "wind")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in f32 and in 4 and 8 bits, and rows that are labelled as the f32 model answers."""
    place = tmp_path_factory.mktemp("diff")
    make_mixture(place / "full.edgeml", expert_type=WeightType.F32, dense_type=WeightType.F32)
    with Bundle.open(place / "full.edgeml") as bundle:  # everything a little off, as rounding leaves it
        rng = np.random.default_rng(0)
        rewrite(place / "full.edgeml", place / "small.edgeml", {page.id: noisy(bundle, page, rng, 0.01) for page in weights(bundle)})
    with edgeml.open(place / "full.edgeml") as session:
        for name, labels in TOY.tasks.items():
            answers = session.run(name, texts=TEXTS).labels
            folder = place / "data" / "made" / name
            folder.mkdir(parents=True)
            (folder / "task.json").write_text(json.dumps({"name": name, "domain": "made", "labels": list(labels), "metric": "accuracy"}))
            rows = [{"text": text, "label": list(labels).index(label)} for text, label in zip(TEXTS, answers, strict=True)]
            for split in ("train", "validation"):
                (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "test.jsonl").write_text("")
    return place


def test_parts_come_in_the_order_of_a_request(place: Path, run: Run) -> None:
    found = run(place / "full.edgeml", place / "small.edgeml", "--data", place / "data")
    names = [part["name"] for part in found["parts"]]
    layers = [name for site in ("layer.0", "layer.1") for name in (f"dense 1 of {site}", f"experts of {site}")]
    assert names == ["embeddings", "routers", *layers, "trunk", "heads"]
    assert [part["same"] for part in found["parts"]] == [True, True, False, False, False, False, True, True]
    assert found["rows"] == 2 * len(TEXTS)
    for part in found["parts"]:
        assert (part["restored_error"] is None) == (part["gain"] is None) == part["same"]
        assert (part["alone_error"] == 0) == part["same"]


@pytest.mark.parametrize("site", [0, 1])
def test_a_damaged_site_is_named_first(place: Path, tmp_path: Path, run: Run, site: int) -> None:
    with Bundle.open(place / "small.edgeml") as bundle:
        chosen = load_manifest(bundle).sites[site]
        rng = np.random.default_rng(1)
        pages = sorted({expert.page for expert in (*chosen.experts, *chosen.shared)})
        hurt = rewrite(
            place / "small.edgeml", tmp_path / "hurt.edgeml", {page: noisy(bundle, bundle.pages[page], rng, 0.7) for page in pages}
        )
    found = run(place / "full.edgeml", hurt, "--data", place / "data")
    parts, name = parts_of(found), f"experts of {chosen.name}"
    assert found["worst"] == name
    assert parts[name]["alone_error"] == max(part["alone_error"] for part in found["parts"])
    assert parts[name]["restored_error"] < 0.3 * found["error"]
    assert all(part["restored_error"] > 0.5 * found["error"] for part in found["parts"] if part["name"] != name and not part["same"])
    states = [part["state_error"] for part in found["parts"] if part["kind"] in ("embedding", "experts")]
    steps = np.diff(states)
    assert int(np.argmax(steps)) == site  # the error begins to grow there
    assert found["reference_score"] == 1


def test_a_damaged_head_is_named_first_and_moves_its_task_only(place: Path, tmp_path: Path, run: Run) -> None:
    page, model = stage_page(place / "small.edgeml", "head_mood")
    hurt = rewrite(place / "small.edgeml", tmp_path / "hurt.edgeml", {page: spoiled(model, 1.0)})
    found = run(place / "full.edgeml", hurt, "--data", place / "data")
    assert found["worst"] == "head of mood"
    assert {"head of mood", "other heads"} <= parts_of(found).keys()
    errors = {task["task"]: task["error"] for task in found["by_task"]}
    assert errors["mood"] > 10 * errors["weather"]


@pytest.mark.parametrize(("stage", "name"), [("router_mood", "routers"), ("trunk", "trunk")])
def test_a_damaged_graph_of_the_trunk_or_a_router_is_found(place: Path, tmp_path: Path, run: Run, stage: str, name: str) -> None:
    page, model = stage_page(place / "small.edgeml", stage)
    hurt = rewrite(place / "small.edgeml", tmp_path / "hurt.edgeml", {page: spoiled(model, 2.0)})
    found = run(place / "full.edgeml", hurt, "--data", place / "data")
    assert found["worst"] == name
    part = parts_of(found)[name]
    assert part["alone_error"] > 0.01
    assert any(one["same_choices"] < 1 for one in found["parts"] if one["kind"] == "experts")


def test_figures_are_those_of_plain_code(place: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose answer is its vector, so that sessions on mixtures of both bundles know every figure."""
    texts = ("a warm wind", "no, that was a very bad film about the sea")
    found = run(place / "full.edgeml", place / "small.edgeml", "--task", "vector", *(word for text in texts for word in ("--text", text)))
    part = parts_of(found)["experts of layer.1"]

    def off(ours: Any, theirs: Any) -> float:
        pairs = [(float(a), float(r)) for a, r in zip(np.ravel(ours), np.ravel(theirs), strict=True)]
        return (sum((a - r) ** 2 for a, r in pairs) / sum(r**2 for _, r in pairs)) ** 0.5

    def answers(path: Path) -> Any:
        with edgeml.open(path) as session:
            return session.run("vector", texts=texts).vectors

    assert found["error"] == pytest.approx(off(answers(place / "small.edgeml"), answers(place / "full.edgeml")), rel=1e-5)
    with Bundle.open(place / "full.edgeml") as full, Bundle.open(place / "small.edgeml") as small:
        site = load_manifest(full).sites[1]
        pages = {expert.page for expert in (*site.experts, *site.shared)}
        back = write_mixture(tmp_path / "back.edgeml", small, full, pages)
        taken = write_mixture(tmp_path / "taken.edgeml", full, small, pages)
    assert part["restored_error"] == pytest.approx(off(answers(back), answers(place / "full.edgeml")), rel=1e-5)

    def made(path: Path) -> dict[str, Any]:
        """What the last site's experts make of the real tokens, and the state behind them, as a graph that tells them says."""
        with Opened.open(path, None, 1) as opened:
            (*_, last) = operators(Graph.parse(opened.graph("trunk"), "trunk"))
            assert last.op == "PagedExperts"
            with edgeml.open(path) as session:
                batch = session.preprocessor(session.task("vector")).encode(texts)
            with Machine(opened, told={"trunk": [last.output]}) as machine:
                tensors = forward(machine, ["vector"], {"ids": batch.ids, "types": batch.types, "mask": batch.mask})["vector"]
            return {name: tensors[key][batch.mask != 0] for name, key in (("own", f"trunk/{last.output}"), ("state", "hidden"))}

    whole, lossy, alone = made(place / "full.edgeml"), made(place / "small.edgeml"), made(taken)
    assert part["error"] == pytest.approx(off(lossy["own"], whole["own"]), rel=1e-5)
    assert part["state_error"] == pytest.approx(off(lossy["state"], whole["state"]), rel=1e-5)
    assert part["alone_error"] == pytest.approx(off(alone["own"], whole["own"]), rel=1e-5)
    assert part["bytes"] == part["reference_bytes"] > 0


def test_stages_run_here_answer_as_a_session_does(place: Path) -> None:
    with edgeml.open(place / "small.edgeml", threads=1) as session:
        batch = session.preprocessor(session.task("mood")).encode(TEXTS)
        inputs = {"ids": batch.ids, "types": batch.types, "mask": batch.mask}
        expected = session.run("mood", arrays=inputs).scores
    with Opened.open(place / "small.edgeml", None, 1) as opened, Machine(opened) as machine:
        assert np.array_equal(forward(machine, ["mood"], inputs)["mood"]["scores"], expected)


def test_a_mixture_of_everything_is_the_other_bundle(place: Path, tmp_path: Path) -> None:
    with Bundle.open(place / "full.edgeml") as first, Bundle.open(place / "small.edgeml") as second:
        everything = {page.id for page in second.pages}
        for taken, other in ((everything, second), (set[int](), first)):
            with Bundle.open(write_mixture(tmp_path / "m.edgeml", first, second, taken)) as mixture:
                assert mixture.id == other.id


def test_without_the_c_extension_the_figures_are_the_same(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    question = (place / "full.edgeml", place / "small.edgeml", "--task", "mood", "--text", TEXTS[0])
    expected = run(*question)
    monkeypatch.setattr("edgeml.native.PRESENT", False)
    for one, two in zip(run(*question)["parts"], expected["parts"], strict=True):
        for key in ("alone_error", "error", "restored_error"):
            assert one[key] == (None if two[key] is None else pytest.approx(two[key], rel=1e-2, abs=1e-4)), one["name"]


def test_other_bits_are_compared_and_a_later_bundle_may_have_more_pages(place: Path, tmp_path: Path, run: Run) -> None:
    make_mixture(tmp_path / "bits.edgeml", expert_type=WeightType.INT4, dense_type=WeightType.INT8)
    with Bundle.open(tmp_path / "bits.edgeml") as bundle:
        sources = [PageSource(p.kind, bundle.read(p.id), p.matrices, p.activation, max(p.count, 1)) for p in bundle.pages]
        write_bundle(tmp_path / "more.edgeml", [*sources, PageSource(PageKind.TOKENIZER, b"{}")], dict(bundle.manifest))
    found = run(place / "full.edgeml", tmp_path / "more.edgeml", "--data", place / "data", "--tasks", "mood")
    assert found["tasks"] == ["mood"]
    experts = parts_of(found)["experts of layer.0"]
    assert experts["bytes"] < experts["reference_bytes"]


def test_texts_of_ones_own_have_errors_and_moves_and_no_scores(place: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    bundles = (place / "full.edgeml", place / "small.edgeml")
    found = run(*bundles, "--task", "weather", "--text", "fog", "--text", "a warm day")
    assert (found["score"], found["reference_score"], found["split"]) == (None, None, None)
    assert all(part["gain"] is None for part in found["parts"])
    assert [answer["input"] for answer in found["answers"]] == [0, 1]
    with edgeml.open(bundles[1]) as session:
        scores = session.run("weather", texts=["fog", "a warm day"]).scores
    assert scores is not None
    for row, answer in enumerate(found["answers"]):
        assert 3 <= len(answer["bundle"]) <= 4
        for label, probability in answer["bundle"].items():
            assert probability == pytest.approx(float(scores[row][TOY.tasks["weather"].index(label)]), abs=1e-6)
    assert cli.main(["diff", *map(str, bundles), "--task", "weather", "--text", "fog"]) == 0
    printed = capsys.readouterr().out
    assert "input 1, weather: logits " in printed
    assert "%" in printed
    assert "gain, points" not in printed


def test_equal_bundles_have_no_parts_and_people_get_a_table(place: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place / "small.edgeml", place / "small.edgeml", "--data", place / "data")["parts"] == []
    for pair, said in ((("small", "small"), "nothing differs"), (("full", "small"), "experts of ")):
        paths = [str(place / f"{name}.edgeml") for name in pair]
        assert cli.main(["diff", *paths, "--data", str(place / "data")]) == 0
        assert said in capsys.readouterr().out


def test_the_record_has_the_same_document(place: Path, tmp_path: Path, run: Run) -> None:
    found = run(place / "full.edgeml", place / "small.edgeml", "--data", place / "data", "--records", tmp_path / "r.jsonl")
    (record,) = read(tmp_path / "r.jsonl")
    assert record["kind"] == "diff"
    assert record["diff"] == found
    with Bundle.open(place / "small.edgeml") as small, Bundle.open(place / "full.edgeml") as full:
        assert (record["bundle_id"], found["reference_bundle_id"]) == (small.id, full.id)
    report = to_markdown(document([record]))
    assert "Which part lost it" in report
    assert "edgeml diff full.edgeml small.edgeml --data DATA --split validation --tasks " in report
    assert f" --limit 64 --threads {record['threads']} --records" in report


@pytest.mark.skipif(chromium.BROWSER is None, reason=f"needs one of {', '.join(chromium.NAMES)}")
def test_its_section_fits_a_phone_and_a_desk(place: Path, tmp_path: Path, run: Run) -> None:
    for options in (("--data", place / "data"), ("--task", "mood", "--text", "fog")):
        run(place / "full.edgeml", place / "small.edgeml", *options, "--records", tmp_path / "r.jsonl")
    page = tmp_path / "r.html"
    page.write_text(to_html(document(read(tmp_path / "r.jsonl"))), "utf-8")
    sizes = [chromium.PHONE, chromium.DESKTOP]
    for size, found in zip(sizes, chromium.measure(page, sizes), strict=True):
        assert found["overflow"] <= size[0]
        assert found["sticking"] == found["faint"] == found["clipped"] == []
    assert chromium.screenshot(page, tmp_path / "r.png", chromium.PHONE) == []


def test_an_error_of_nothing_and_of_other_shapes() -> None:
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    for name, value, reference, expected in (("a", one, one, 0), ("b", one, zero, 1), ("c", zero, one, 1), ("d", zero[:2], one, None)):
        errors = Errors()
        errors.add(name, value, reference)
        assert errors.of(name) == expected
        assert errors.of("nothing") is None
    errors = Errors()
    errors.add("e", np.array([[-np.inf, 1]], np.float32), np.array([[-np.inf, 2]], np.float32))
    errors.add("ids", np.array([[[3, 1]]]), np.array([[[1, 2]]]))
    assert errors.of("e") == 0.5
    assert errors.same("ids") == 0.5


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ("full small", 2, "give one of --data DIRECTORY, --text and --image"),
        ("full small --data data --text x", 2, "not --data and --text"),
        ("full small --text x", 2, "choose one with --task"),
        ("full small --task mood --data data", 2, "--task and --text-pair go with --text"),
        ("full small --tasks mood --text x", 2, "--tasks goes with --data"),
        ("full small --task moods --text x", 2, "moods"),
        ("full small --task mood --text x --text-pair y", 2, "leave out --text-pair"),
        ("full small --task mood --image none.png", 2, "takes texts"),
        ("full small --variant x --text x --task mood", 2, "no variants"),
        ("full --text x", 2, "name the BUNDLE"),
        ("full small --data data --split test", 3, "has no rows"),
        ("full small --data nothing", 3, "no such directory"),
        ("full small --data data --tasks moods", 3, "moods"),
        ("full small --task mood --text \udcff", 3, "not valid Unicode"),
        ("full deep --data data", 3, "other sites of experts"),
        ("full wide --data data", 3, "is of another kind or shape"),
        ("full tasks --data data", 3, "differs in its labels"),
        ("full cnn --data data", 3, "no task in common"),
        ("full none --data data", 3, "no such file"),
        ("full small --data images", 3, "answers texts; give a directory of texts"),
        ("cnn cnn --image x.png --text-pair y", 2, "not with --image"),
        ("cnn cnn --data images --tasks digit,letter", 3, "no task 'letter'"),
        ("cnn cnn --text x", 2, "give --image FILE in place of --text"),
        ("cnn cnn --data data", 3, "answers images; give a directory of images"),
        ("cnn --variant=full --data images", 2, "compared with itself"),
        ("cnn --variant=fast --data images", 2, "no variant"),
        ("cnn cnn --data images --split test", 3, "test.npz"),
        ("cnn cnn --image none.png", 3, "none.png"),
    ],
)
def test_a_question_that_is_wrong_is_one_sentence(
    place: Path, wrong: Path, capsys: pytest.CaptureFixture[str], options: str, code: int, says: str
) -> None:
    words = [str(wrong / f"{word}.edgeml") if (wrong / f"{word}.edgeml").exists() or word == "none" else word for word in options.split()]
    words = [str(wrong / word) if word in ("data", "images", "nothing") else word for word in words]
    assert cli.main(["diff", *words]) == code
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


@pytest.fixture(scope="module")
def wrong(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wrong questions name."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("full.edgeml", "small.edgeml", "data"):
        (shutil.copytree if name == "data" else shutil.copy)(place / name, folder / name)
    make_mixture(folder / "deep.edgeml", layers=3)
    make_mixture(folder / "wide.edgeml", width=96)
    make_mixture(folder / "tasks.edgeml", tasks={"weather": ("sun", "rain", "snow", "mist")})
    make_cnn(folder / "cnn.edgeml")
    (folder / "images").mkdir()
    (folder / "images" / "image.json").write_text(json.dumps({"labels": {"y_digit": list("0123456789")}}))
    np.savez(folder / "images" / "train.npz", x=np.zeros((20, 36, 36), np.uint8), y_digit=np.arange(20) % 10)
    return folder


def test_the_help_shows_it_and_says_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", "--help"]) == 0
    assert "edgeml diff full.edgeml small.edgeml --data data/text --limit 200" in capsys.readouterr().out
    monkeypatch.setattr(cli, "_others", dict)
    assert cli.main(["diff", "a.edgeml", "b.edgeml"]) == 2
    assert "pip install 'edgeml-runtime[report]'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_polite_kill_leaves_no_mixture_behind(number: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Path] = []

    def killed(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        left.append(path)
        os.kill(os.getpid(), number)

    monkeypatch.setattr("edgeml_report.diff.write_mixture", killed)
    before = signal.getsignal(number)
    question = ["--data", str(place / "data"), "--quiet"]
    assert cli.main(["diff", str(place / "full.edgeml"), str(place / "small.edgeml"), *question]) == 130
    assert left
    assert not left[0].exists()
    assert signal.getsignal(number) == before
