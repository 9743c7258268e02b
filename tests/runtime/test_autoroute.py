"""Requests that name no task: the router's group answers as if it had been named, and a faulty router spoils nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgeml
from edgeml.autoroute import choose_groups
from edgeml.bundle import Bundle, PageSource, write_bundle
from edgeml.cli import main
from edgeml.errors import BundleError, EdgemlError, UsageError
from edgeml.graph_bytes import Node, graph
from edgeml.layout import PageKind
from edgeml.made import make_mixture
from edgeml.manifest import load_manifest, parse_manifest
from edgeml.router import checked_bias

TASKS = {"weather": ("sun", "rain"), "season": ("spring", "winter"), "mood": ("good", "bad")}
GROUPS = [{"name": "sky", "tasks": ["weather", "season"]}, {"name": "feeling", "tasks": ["mood"]}]
TEXTS = [f"{' '.join(words)} {number}" for number in range(4) for words in (["rain"], ["a", "good", "film"], ["snow", "fog"] * 9, ["hate"])]
LAYERS, EXPERTS, HIDDEN = 2, 8, 64
INPUTS: dict[str, Any] = {"hidden0": ("float32", ("B", "T", "d")), "mask": ("float32", ("B", "T"))}
Edit = Callable[[dict[str, Any]], Any]


def router_page(weights: NDArray[Any], bias: NDArray[Any] | None = None) -> PageSource:
    """groups = softmax(sum of the real tokens' hidden0, times weights (d, G)); bias (G, S, E) of the likeliest."""
    nodes = [
        Node("Unsqueeze", ["mask", "one"], ["row"]),
        Node("MatMul", ["row", "hidden0"], ["sum"]),
        Node("MatMul", ["sum", "weights"], ["by_row"]),
        Node("Squeeze", ["by_row", "one"], ["logits"]),
        Node("Softmax", ["logits"], ["groups"], {"axis": -1}),
        Node("ArgMax", ["groups"], ["best"], {"axis": -1, "keepdims": 0}),
    ]
    outputs: dict[str, Any] = {"groups": ("float32", ("B", weights.shape[1]))}
    constants: dict[str, Any] = {"weights": weights, "one": np.array([1])}
    if bias is not None:
        nodes.append(Node("Gather", ["table", "best"], ["bias"], {"axis": 0}))
        constants["table"] = bias
        outputs["bias"] = ("float32", ("B", *bias.shape[1:]))
    return PageSource(PageKind.ONNX, graph(nodes, INPUTS, outputs, constants, {"": 17}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "m.edgeml"
    make_mixture(path, tasks=TASKS)
    return path


@pytest.fixture(scope="module")
def weights() -> NDArray[np.float32]:
    return 0.1 * np.random.default_rng(4).standard_normal((HIDDEN, 2)).astype(np.float32)


def routed(source: Path, out: Path, page: PageSource, biased: bool = False, edit: Edit = lambda _: None) -> Path:
    """A copy of the mixture with this router."""
    with Bundle.open(source) as bundle:
        pages = [PageSource(p.kind, bundle.read(p.id), p.matrices, p.activation, max(p.count, 1)) for p in bundle.pages]
        manifest = json.loads(json.dumps(bundle.manifest))
    outputs = ["groups", "bias"] if biased else ["groups"]
    manifest["stages"].append({"name": "router", "page": len(pages), "inputs": ["hidden0", "mask"], "outputs": outputs})
    manifest["router"] = {"stage": "router", "groups": GROUPS}
    edit(manifest)
    write_bundle(out, [*pages, page], manifest)
    return out


@pytest.fixture
def bundle(plain: Path, weights: NDArray[np.float32], tmp_path: Path) -> Path:
    return routed(plain, tmp_path / "routed.edgeml", router_page(weights))


@pytest.mark.parametrize("residency", ["exact", "masked"])
def test_a_group_answers_as_its_tasks_do_when_named(bundle: Path, residency: str) -> None:
    memory = "50%" if residency == "masked" else None
    with edgeml.open(bundle, memory=memory, residency=residency) as session:
        answer = session.run_auto(texts=TEXTS)
        assert set(answer.groups) == {"sky", "feeling"}, "the test's weights send every text to one group"
        assert set(answer.results) == set(TASKS)
        for task, result in answer.results.items():
            group = "sky" if task in GROUPS[0]["tasks"] else "feeling"
            assert answer.rows[task] == [row for row in range(len(TEXTS)) if answer.groups[row] == group]
            told = session.run(task, texts=[TEXTS[row] for row in answer.rows[task]])
            assert result.labels == told.labels
            np.testing.assert_allclose(result.scores, told.scores, atol=1e-6)
            assert len(result.row_s) == len(result.truncated) == len(result.labels)
    assert answer.scores.shape == (len(TEXTS), 2)
    assert len(answer.row_s) == len(answer.truncated) == len(TEXTS)
    assert answer.counters.tokens > 0


def test_with_a_bias_the_tasks_of_a_group_share_a_pass(plain: Path, weights: NDArray[np.float32], tmp_path: Path) -> None:
    """The bias forbids half of the experts: told so by hand, the tasks answer the same."""
    table = np.zeros((2, LAYERS, EXPERTS), np.float32)
    table[0, :, :4] = -np.inf
    path = routed(plain, tmp_path / "b.edgeml", router_page(weights, table), biased=True)
    by_hand = routed(plain, tmp_path / "h.edgeml", router_page(np.stack([weights[:, 0]] * 2, 1), table), biased=True, edit=use_as_router)
    with edgeml.open(path) as session, edgeml.open(by_hand) as told:
        answer = session.run_auto(texts=TEXTS)
        for task in GROUPS[0]["tasks"]:
            expected = told.run(task, texts=[TEXTS[row] for row in answer.rows[task]])
            np.testing.assert_allclose(answer.results[task].scores, expected.scores, atol=1e-6)
        session.evict_all()
        before = session.stats()["hits"] + session.stats()["misses"]
        session.run_auto(texts=[TEXTS[answer.rows["weather"][0]]])
        one = session.stats()["hits"] + session.stats()["misses"] - before
        session.run("weather", text=TEXTS[answer.rows["weather"][0]])
        assert one <= session.stats()["hits"] + session.stats()["misses"] - before - one + LAYERS * EXPERTS // 2


@pytest.fixture
def biased(plain: Path, weights: NDArray[np.float32], tmp_path: Path) -> tuple[Path, Path]:
    """A bundle whose router forbids some experts, and one whose sky tasks do so themselves."""
    table = np.zeros((2, LAYERS, EXPERTS), np.float32)
    table[0, :, ::3] = -np.inf
    path = routed(plain, tmp_path / "b.edgeml", router_page(weights, table), biased=True)
    both_sky = np.stack([weights[:, 0]] * 2, 1)
    return path, routed(plain, tmp_path / "h.edgeml", router_page(both_sky, table), biased=True, edit=use_as_router)


def test_the_biases_of_a_group_and_of_a_resident_set_add(biased: tuple[Path, Path]) -> None:
    with edgeml.open(biased[0], memory="50%", residency="masked") as session, edgeml.open(biased[1]) as told:
        answer = session.run_auto(texts=TEXTS)
        for task in GROUPS[0]["tasks"]:
            texts = [TEXTS[row] for row in answer.rows[task]]
            expected = told.run(task, texts=texts, resident=session.resident_set(task))
            np.testing.assert_allclose(answer.results[task].scores, expected.scores, atol=1e-6)
            assert not np.allclose(expected.scores, session.run(task, texts=texts).scores, atol=1e-3), "this bias says nothing"
        assert answer.counters.masked_tokens > 0


@pytest.mark.parametrize("residency", ["exact", "masked"])
def test_submitted_requests_are_run_with_the_bias_of_their_route(biased: tuple[Path, Path], residency: str) -> None:
    """Beside requests that name the task, whose batch they must not share."""
    with edgeml.open(biased[0], memory="50%", residency=residency, threads=1) as session:
        expected, choices = session.run_auto(texts=TEXTS), session.route(texts=TEXTS)
        rows = expected.rows["weather"]
        session.submit("weather", texts=TEXTS * 50)
        named = [session.submit("weather", TEXTS[row]) for row in rows]
        given = [session.submit("weather", TEXTS[row], bias=choices[row].bias[None]) for row in rows if choices[row].bias is not None]
        assert len(given) == len(rows)
        for place, (ticket, other) in enumerate(zip(given, named, strict=True)):
            np.testing.assert_allclose(ticket.result(60).scores, expected.results["weather"].scores[place : place + 1], atol=1e-5)
            np.testing.assert_allclose(other.result(60).scores, session.run("weather", TEXTS[rows[place]]).scores, atol=1e-5)


def test_a_bias_that_fits_no_request_is_refused_at_once(plain: Path) -> None:
    nothing = np.zeros((1, LAYERS, EXPERTS), np.float32)
    with edgeml.open(plain, threads=1) as session:
        for bias in (nothing[0], np.repeat(nothing, 2, 0), nothing.astype(np.float64), nothing * np.nan, nothing + np.inf):
            with pytest.raises(BundleError, match="the router before task 'weather' answers a bias"):
                session.submit("weather", "fog", bias=bias)
        assert session.submit("weather", "fog", bias=nothing).result(60).labels


def test_a_bias_and_a_set_that_leave_nothing_are_one_sentence(weights: NDArray[np.float32], tmp_path: Path) -> None:
    """The router allows one half of the experts, the resident set another."""
    make_mixture(tmp_path / "plain.edgeml", tasks=TASKS, shared=0)
    with edgeml.open(tmp_path / "plain.edgeml", memory="50%", residency="masked") as session:
        held = session.resident_set("weather").mask
    table = np.zeros((2, LAYERS, EXPERTS), np.float32)
    table[0, 1] = np.where(held[1] == 0, -np.inf, 0)
    path = routed(tmp_path / "plain.edgeml", tmp_path / "m.edgeml", router_page(weights, table), True)
    with edgeml.open(path, memory="50%", residency="masked", threads=1) as session:
        choices = session.route(texts=TEXTS)
        (row, *_) = [row for row, choice in enumerate(choices) if choice.group == "sky"]
        sentence = r"the router of task 'weather', under its resident set, leaves no expert of site 'layer.1' to choose"
        with pytest.raises(BundleError, match=sentence):
            session.run_auto(texts=TEXTS)
        faulty = session.submit("weather", TEXTS[row], bias=np.stack([choices[row].bias]))
        assert session.submit("weather", TEXTS[row]).result(60).labels
        with pytest.raises(BundleError, match=sentence):
            faulty.result(60)


def use_as_router(manifest: dict[str, Any]) -> None:
    """Each sky task's own router becomes the router's bias."""
    manifest["stages"].append({**manifest["stages"][-1], "name": "bias_only", "outputs": ["bias"]})
    for task in manifest["tasks"]:
        if task["name"] in GROUPS[0]["tasks"]:
            task["stages"]["router"] = "bias_only"


def test_a_group_without_a_task_of_this_form_is_passed_over(plain: Path, weights: NDArray[np.float32], tmp_path: Path) -> None:
    def pair(manifest: dict[str, Any]) -> None:
        next(task for task in manifest["tasks"] if task["name"] == "mood")["pair"] = True

    path = routed(plain, tmp_path / "p.edgeml", router_page(weights, np.zeros((2, LAYERS, EXPERTS), np.float32)), True, pair)
    with edgeml.open(path) as session:
        assert set(session.run_auto(texts=TEXTS).groups) == {"sky"}
        answer = session.run_auto(pairs=[(text, "a second text") for text in TEXTS])
        assert set(answer.groups) == {"feeling"}
        assert list(answer.results) == ["mood"]
        told = session.run("mood", pairs=[(text, "a second text") for text in TEXTS])
        likeliest = answer.scores.argmax(-1) == 1
        passed = [row for row in range(len(TEXTS)) if not likeliest[row]]
        assert passed
        np.testing.assert_allclose(answer.results["mood"].scores[passed], told.scores[passed], atol=1e-6)


def test_no_group_takes_pairs(bundle: Path) -> None:
    with edgeml.open(bundle) as session, pytest.raises(UsageError, match="no task group takes pairs of texts"):
        session.run_auto(pairs=[("a", "b")])


def test_no_router(plain: Path) -> None:
    with edgeml.open(plain) as session, pytest.raises(UsageError, match=r"has no router .* weather, season, mood"):
        session.run_auto(text="rain")


def test_no_inputs(bundle: Path) -> None:
    with edgeml.open(bundle) as session:
        answer = session.run_auto(texts=[])
        assert (answer.groups, answer.results, answer.scores.shape) == ([], {}, (0, 2))
        with pytest.raises(UsageError, match="exactly one of text"):
            session.run_auto()


def test_the_first_of_equal_groups_that_fit() -> None:
    scores = np.array([[0.25, 0.5, 0.5], [1, 0, 0]], np.float32)
    assert choose_groups(scores, [True, True, True]).tolist() == [1, 0]
    assert choose_groups(scores, [False, False, True]).tolist() == [2, 2]


NAN = np.full((HIDDEN, 2), np.nan, np.float32)
FAULTY: dict[str, tuple[Callable[[NDArray[np.float32]], PageSource], bool, str]] = {
    "weights that are not numbers": (lambda w: router_page(NAN), False, "groups that are not finite"),
    "a group too many": (lambda w: router_page(np.zeros((HIDDEN, 3), np.float32)), False, r"answers groups float32 \(16, 3\)"),
    "another width": (lambda w: router_page(np.zeros((32, 2), np.float32)), False, "stage 'router' failed"),
    "a graph that does not parse": (lambda w: PageSource(PageKind.ONNX, b"no graph"), False, "is not a graph that runs"),
    "a bias of another shape": (
        lambda w: router_page(w, np.zeros((2, LAYERS, 7), np.float32)),
        True,
        r"answers a bias float32 \(16, 2, 7\)",
    ),
    "a bias that is not a number": (lambda w: router_page(w, np.full((2, LAYERS, EXPERTS), np.nan, np.float32)), True, "not a number"),
    "an infinite bias": (lambda w: router_page(w, np.full((2, LAYERS, EXPERTS), np.inf, np.float32)), True, "infinite"),
    "ids as a bias": (lambda w: router_page(w, np.zeros((2, LAYERS, EXPERTS), np.int64)), True, "int64"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_router_is_one_sentence(plain: Path, weights: NDArray[np.float32], tmp_path: Path, name: str) -> None:
    make, biased, sentence = FAULTY[name]
    path = routed(plain, tmp_path / "faulty.edgeml", make(weights), biased)
    with edgeml.open(path) as session:
        expected = session.run("mood", texts=TEXTS).labels
        with pytest.raises(EdgemlError, match=sentence) as caught:
            session.run_auto(texts=TEXTS)
        assert "\n" not in str(caught.value)
        assert session.run("mood", texts=TEXTS).labels == expected


def test_a_bias_that_leaves_a_site_bare(weights: NDArray[np.float32], tmp_path: Path) -> None:
    make_mixture(tmp_path / "plain.edgeml", tasks=TASKS, shared=0)
    bare = np.zeros((2, LAYERS, EXPERTS), np.float32)
    bare[:, 1] = -np.inf
    path = routed(tmp_path / "plain.edgeml", tmp_path / "bare.edgeml", router_page(weights, bare), True, use_as_router)
    with edgeml.open(path) as session:
        for ask in (lambda: session.run_auto(texts=TEXTS), lambda: session.run("weather", texts=TEXTS)):
            with pytest.raises(BundleError, match=r"leaves no expert of site 'layer.1' to choose, and it has no shared one"):
                ask()
        assert session.run("mood", texts=TEXTS).labels


def test_with_shared_experts_a_site_may_be_bare(plain: Path) -> None:
    with Bundle.open(plain) as bundle:
        manifest = load_manifest(bundle)
    bare = np.full((3, LAYERS, EXPERTS), -np.inf, np.float32)
    assert checked_bias(manifest, bare, 3, "here") is bare


def test_run_without_a_task(bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with edgeml.open(bundle) as session:
        groups = session.run_auto(texts=TEXTS).groups
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    assert main(["run", str(bundle), "--input", str(rows), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    told = [(answer["input"], answer["group"], answer["task"]) for answer in results]
    tasks = {"sky": ["weather", "season"], "feeling": ["mood"]}
    assert told == [(number, group, task) for number, group in enumerate(groups) for task in tasks[group]]
    assert all(0 < answer["group_score"] <= 1 and answer["label"] in TASKS[answer["task"]] for answer in results)
    assert main(["run", str(bundle), "--text", TEXTS[0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[:2] for line in lines] == [[groups[0], task] for task in tasks[groups[0]]]


def test_inspect_and_verify_know_the_router(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    assert "router: a request may name no task; 2 groups: sky, feeling" in capsys.readouterr().out
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["router"]["groups"] == GROUPS
    assert main(["verify", str(bundle)]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--text", "a", "--text-pair", "b"], 2, "no task group takes pairs"),
        (["--text", "a", "--text", "b", "--text-pair", "c"], 2, "a --text-pair for each --text"),
        ([], 2, "give either --text"),
        (["--text", " "], 3, "the text is empty"),
        (["--text", "a", "-o", "map.png"], 2, "-o writes the map"),
    ],
)
def test_run_refuses(bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, sentence: str) -> None:
    assert main(["run", str(bundle), *arguments]) == code
    assert sentence in capsys.readouterr().err


def groups_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = manifest["router"]["groups"]
    return groups


def stage_of(manifest: dict[str, Any]) -> dict[str, Any]:
    stage: dict[str, Any] = manifest["stages"][-1]
    return stage


ABUSES: dict[str, tuple[Edit, str]] = {
    "not an object": (lambda m: m.update(router="router"), "manifest.router: expected an object"),
    "an unknown key": (lambda m: m["router"].update(other=1), "unknown key 'other'"),
    "no stage": (lambda m: m["router"].pop("stage"), "'stage' is missing"),
    "a stage that is not there": (lambda m: m["router"].update(stage="other"), "'other' does not exist"),
    "a stage without groups": (lambda m: m["router"].update(stage="trunk"), "answer 'groups'"),
    "a stage that reads ids": (lambda m: stage_of(m).update(inputs=["ids"]), "no more than hidden0 and mask"),
    "groups is an object": (lambda m: m["router"].update(groups={}), "'groups' must be a list"),
    "no groups": (lambda m: m["router"].update(groups=[]), "from 1 to 4096 groups, not 0"),
    "too many groups": (lambda m: m["router"].update(groups=[{"name": f"g{n}", "tasks": []} for n in range(4097)]), "not 4097"),
    "a group's name with a slash": (lambda m: groups_of(m)[0].update(name="a/b"), r"groups\[0\]"),
    "two groups of one name": (lambda m: groups_of(m)[1].update(name="sky"), "'sky' occurs twice"),
    "a group without tasks": (lambda m: groups_of(m)[1].update(tasks=[]), "'feeling' has no tasks"),
    "a task in two groups": (lambda m: groups_of(m)[1].update(tasks=["weather"]), "'weather' occurs twice"),
    "a task named twice": (lambda m: groups_of(m)[0].update(tasks=["weather", "weather"]), "occurs twice"),
    "a task that is not there": (lambda m: groups_of(m)[1].update(tasks=["other"]), "'other', which is no task on texts"),
    "tasks are numbers": (lambda m: groups_of(m)[1].update(tasks=[2]), "list of strings"),
    "another length": (lambda m: m["tasks"][-1]["preprocess"].update(max_tokens=8), "must share embed stage and preprocess"),
}


def test_a_router_becomes_a_record(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        router = load_manifest(opened).router
    assert router is not None
    assert [(group.name, list(group.tasks)) for group in router.groups] == [(group["name"], group["tasks"]) for group in GROUPS]
    assert not router.biased


@pytest.mark.parametrize("name", ABUSES)
def test_a_bad_router_is_refused(bundle: Path, name: str) -> None:
    edit, sentence = ABUSES[name]
    with Bundle.open(bundle) as opened:
        document, pages = json.loads(json.dumps(opened.manifest)), opened.pages
    edit(document)
    with pytest.raises(BundleError, match=sentence):
        parse_manifest(document, pages)


def test_tasks_of_a_group_share_a_trunk(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        document, pages = json.loads(json.dumps(opened.manifest)), opened.pages
    trunk = next(stage for stage in document["stages"] if stage["name"] == "trunk")
    document["stages"].append({**trunk, "name": "other"})
    next(task for task in document["tasks"] if task["name"] == "season")["stages"]["trunk"] = "other"
    with pytest.raises(BundleError, match="group 'sky' must share one trunk"):
        parse_manifest(document, pages)


# ---- submitted requests ----


def served(bundle: Path, lines: list[dict[str, Any]], *options: str) -> dict[Any, dict[str, Any]]:
    """What `edgeml serve-stdin` answers to these lines, by id."""
    command = [sys.executable, "-P", "-m", "edgeml.cli", "serve-stdin", str(bundle), "--threads", "1", "--quiet", *options]
    given = "".join(json.dumps(line) + "\n" for line in lines)
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return {said["id"]: said for said in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("residency", ["exact", "masked", "biased"])
def test_a_parent_process_may_leave_the_task_to_the_router(bundle: Path, biased: tuple[Path, Path], residency: str) -> None:
    if residency == "biased":
        bundle, residency = biased[0], "exact"
    options = ["--residency", residency, "--memory", "50%"]
    lines = [{"id": "all", "texts": TEXTS}, {"id": 1, "text": TEXTS[0], "priority": 3}, {"id": 2, "task": "mood", "text": "fog"}]
    said = served(bundle, [*lines, {"id": "none", "texts": []}], *options)
    with edgeml.open(bundle, threads=1, memory="50%", residency=residency) as session:
        expected = session.run_auto(texts=TEXTS)
        assert [choice.group for choice in session.route(texts=TEXTS)] == expected.groups
    assert said["all"]["task"] is None
    answers = said["all"]["results"]
    assert [answer["input"] for answer in answers] == sorted(answer["input"] for answer in answers)
    assert {answer["input"]: answer["group"] for answer in answers} == dict(enumerate(expected.groups))
    for task, result in expected.results.items():
        own = [answer for answer in answers if answer["task"] == task]
        assert [answer["input"] for answer in own] == expected.rows[task]
        assert [answer["label"] for answer in own] == result.labels
    assert {answer["task"] for answer in said[1]["results"]} == set(GROUPS[["sky", "feeling"].index(expected.groups[0])]["tasks"])
    assert said[2]["task"] == "mood"
    assert said["none"]["results"] == []
    assert all(answer["state"] == "done" for answer in said.values())


def test_a_parent_process_without_a_router_must_name_a_task(plain: Path) -> None:
    said = served(plain, [{"id": 1, "text": "fog"}, {"id": 2, "task": "mood", "text": "fog"}])
    assert said[1]["state"] == "refused"
    assert "there are several tasks, name one of them: mood, season, vector, weather" in said[1]["error"]
    assert said[2]["state"] == "done"


def test_a_faulty_router_refuses_the_request_that_needs_it(plain: Path, weights: NDArray[np.float32], tmp_path: Path) -> None:
    path = routed(plain, tmp_path / "nan.edgeml", router_page(weights * np.float32("nan")))
    said = served(path, [{"id": 1, "text": "fog"}, {"id": 2, "task": "mood", "text": "fog"}])
    assert said[1]["state"] == "refused"
    assert "groups that are not finite" in said[1]["error"]
    assert said[2]["state"] == "done"
