"""The manifest: a good one becomes typed records, and each way to break one is refused by the place that broke it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeml.bundle import Activation, Bundle, Matrix, Page, PageKind, PageSource, WeightType, expert_layout, write_bundle
from edgeml.errors import BundleError
from edgeml.manifest import ExpertRef, load_manifest, parse_manifest
from edgeml.strict_json import MAX_DEPTH, StrictJsonError, decode_object, encode_object

HIDDEN = 32
MATRICES = (Matrix(WeightType.INT4, 64, HIDDEN), Matrix(WeightType.INT4, HIDDEN, 64))


def raw(number: int, kind: PageKind) -> Page:
    return Page(number, kind, 0, 1, 0, b"")


def expert(number: int, count: int) -> Page:
    stride = expert_layout(MATRICES)[1]
    return Page(number, PageKind.EXPERT, 0, stride * count, 0, b"", Activation.GELU, count, stride, MATRICES)


PAGES = (
    raw(0, PageKind.ONNX),
    raw(1, PageKind.ONNX),
    raw(2, PageKind.ONNX),
    raw(3, PageKind.ONNX),
    raw(4, PageKind.TOKENIZER),
    expert(5, 2),
    expert(6, 1),
    expert(7, 3),
)

GOOD: dict[str, Any] = {
    "format": 1,
    "producer": {"name": "edgeml-runtime", "version": "0.1.0"},
    "model": {"family": "bert"},
    "stages": [
        {"name": "embed", "page": 0, "inputs": ["ids", "types"], "outputs": ["hidden0"]},
        {"name": "router_a", "page": 1, "inputs": ["hidden0"], "outputs": ["bias"]},
        {"name": "trunk", "page": 2, "inputs": ["hidden0", "mask", "bias"], "outputs": ["hidden", "ids_0"]},
        {"name": "head_a", "page": 3, "inputs": ["hidden", "mask"], "outputs": ["scores"]},
    ],
    "sites": [
        {
            "name": "layer.0",
            "hidden": HIDDEN,
            "experts": [[5, 0], [5, 1], [6, 0]],
            "shared": [[7, 2]],
            "top_k": 2,
            "scoring": "softmax",
            "bias_mode": "logits",
            "renormalised": False,
        }
    ],
    "tasks": [
        {
            "name": "a",
            "domain": "finance",
            "kind": "classification",
            "pair": False,
            "labels": ["yes", "no"],
            "metric": "accuracy",
            "chance": 0.5,
            "stages": {"embed": "embed", "router": "router_a", "trunk": "trunk", "head": "head_a"},
            "preprocess": {"kind": "text", "tokenizer": 4, "max_tokens": 96},
        }
    ],
    "usage": {"a": [[0.5, 0.25, 0.25]]},
    "variants": [],
    "evidence": {},
    "provenance": {},
}

Edit = Callable[[dict[str, Any]], Any]


def edited(edit: Edit) -> dict[str, Any]:
    document = copy.deepcopy(GOOD)
    edit(document)
    return document


def test_good_manifest_becomes_records() -> None:
    manifest = parse_manifest(GOOD, PAGES)
    assert [stage.name for stage in manifest.stages] == ["embed", "router_a", "trunk", "head_a"]
    assert manifest.sites[0].experts == (ExpertRef(5, 0), ExpertRef(5, 1), ExpertRef(6, 0))
    assert manifest.tasks[0].stages.router == "router_a"
    assert manifest.usage["a"] == ((0.5, 0.25, 0.25),)


def test_optional_parts_may_be_absent() -> None:
    manifest = parse_manifest({key: GOOD[key] for key in ("format", "producer", "stages", "sites", "tasks")}, PAGES)
    assert manifest.usage == {}
    assert manifest.variants == ()


def test_a_task_may_have_no_router() -> None:
    manifest = parse_manifest(edited(lambda m: m["tasks"][0]["stages"].update(router=None)), PAGES)
    assert manifest.tasks[0].stages.router is None


ABUSES: dict[str, tuple[Edit, str]] = {
    "unknown top-level key": (lambda m: m.update(extra=1), "unknown key 'extra'"),
    "missing key": (lambda m: m.pop("sites"), "'sites' is missing"),
    "newer format": (lambda m: m.update(format=2), "newer edgeml-runtime"),
    "format is a boolean": (lambda m: m.update(format=True), "'format'"),
    "stages is an object": (lambda m: m.update(stages={}), "'stages' must be a list"),
    "stage is a string": (lambda m: m["stages"].append("embed"), r"stages\[4\]: expected an object"),
    "stage name with a slash": (lambda m: m["stages"][0].update(name="../embed"), r"stages\[0\]"),
    "stage name with a newline": (lambda m: m["stages"][0].update(name="embed\n"), r"stages\[0\]"),
    "stage name too long": (lambda m: m["stages"][0].update(name="n" * 65), r"stages\[0\]"),
    "two stages of one name": (lambda m: m["stages"][1].update(name="embed"), "occurs twice"),
    "page out of range": (lambda m: m["stages"][0].update(page=8), "no onnx page"),
    "page negative": (lambda m: m["stages"][0].update(page=-1), "'page'"),
    "page is a float": (lambda m: m["stages"][0].update(page=0.0), "'page'"),
    "stage on an expert page": (lambda m: m["stages"][0].update(page=5), "no onnx page"),
    "unknown stage input": (lambda m: m["stages"][0].update(inputs=["pixels"]), "unknown input"),
    "unknown stage output": (lambda m: m["stages"][0].update(outputs=["other"]), "unknown output"),
    "stage without outputs": (lambda m: m["stages"][0].update(outputs=[]), "at least one"),
    "input named twice": (lambda m: m["stages"][0].update(inputs=["ids", "ids"]), "occurs twice"),
    "ids of a site that is not there": (lambda m: m["stages"][2].update(outputs=["hidden", "ids_1"]), "ids_1"),
    "expert page out of range": (lambda m: m["sites"][0].update(experts=[[9, 0], [5, 0]]), "no expert page"),
    "expert on an onnx page": (lambda m: m["sites"][0].update(experts=[[0, 0], [5, 0]]), "no expert page"),
    "expert past the page's count": (lambda m: m["sites"][0].update(experts=[[5, 2], [5, 0]]), "which holds 2"),
    "expert negative": (lambda m: m["sites"][0].update(experts=[[5, -1], [5, 0]]), "which holds 2"),
    "expert named twice": (lambda m: m["sites"][0].update(experts=[[5, 0], [5, 0]]), "twice"),
    "expert of three numbers": (lambda m: m["sites"][0].update(experts=[[5, 0, 0], [5, 1]]), r"experts\[0\]"),
    "other hidden width": (lambda m: m["sites"][0].update(hidden=64), "the site has 64"),
    "top-k above the experts": (lambda m: m["sites"][0].update(top_k=4), "top_k is 4"),
    "top-k zero": (lambda m: m["sites"][0].update(top_k=0), "'top_k'"),
    "unknown scoring": (lambda m: m["sites"][0].update(scoring="argmax"), "'scoring'"),
    "scoring is a list": (lambda m: m["sites"][0].update(scoring=["softmax"]), "'scoring'"),
    "unknown bias mode": (lambda m: m["sites"][0].update(bias_mode="both"), "'bias_mode'"),
    "renormalised is a number": (lambda m: m["sites"][0].update(renormalised=0), "true or false"),
    "unknown kind of task": (lambda m: m["tasks"][0].update(kind="regression"), "'kind'"),
    "classification without labels": (lambda m: m["tasks"][0].update(labels=[]), "labels"),
    "label named twice": (lambda m: m["tasks"][0].update(labels=["yes", "yes"]), "occurs twice"),
    "unknown metric": (lambda m: m["tasks"][0].update(metric="bleu"), "'metric'"),
    "chance above one": (lambda m: m["tasks"][0].update(chance=1.5), "'chance'"),
    "chance is a huge integer": (lambda m: m["tasks"][0].update(chance=10**400), "'chance'"),
    "chance is a boolean": (lambda m: m["tasks"][0].update(chance=True), "'chance'"),
    "task with a stage that is not there": (lambda m: m["tasks"][0]["stages"].update(head="head_b"), "does not exist"),
    "task with a stage of another role": (lambda m: m["tasks"][0]["stages"].update(head="embed"), "no output 'scores'"),
    "tokenizer on another page": (lambda m: m["tasks"][0]["preprocess"].update(tokenizer=0), "no tokenizer page"),
    "no tokens at all": (lambda m: m["tasks"][0]["preprocess"].update(max_tokens=0), "'max_tokens'"),
    "usage of an unknown task": (lambda m: m["usage"].update(b=[[1, 0, 0]]), "no such task"),
    "usage with a site too many": (lambda m: m["usage"].update(a=[[1, 0, 0], [1]]), "1 sites"),
    "usage with an expert too few": (lambda m: m["usage"].update(a=[[0.5, 0.5]]), "needs 3 numbers"),
    "usage below zero": (lambda m: m["usage"].update(a=[[1.5, -0.5, 0]]), "from 0 upwards"),
    "usage that sums to two": (lambda m: m["usage"].update(a=[[1, 1, 0]]), "sums to 2"),
    "usage is text": (lambda m: m["usage"].update(a=[["1", "0", "0"]]), "from 0 upwards"),
}


@pytest.mark.parametrize("name", ABUSES)
def test_abused_manifest_is_refused(name: str) -> None:
    edit, match = ABUSES[name]
    with pytest.raises(BundleError, match=match) as caught:
        parse_manifest(edited(edit), PAGES)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("manifest")


def test_one_routed_page_at_two_sites_is_refused() -> None:
    """Eviction orders pages by the distance to their next use: a page at two sites would have two distances."""

    def edit(document: dict[str, Any]) -> None:
        document["sites"].append(dict(document["sites"][0], name="layer.1", experts=[[7, 0], [6, 0]], shared=[]))
        document["usage"] = {}

    with pytest.raises(BundleError, match="two sites"):
        parse_manifest(edited(edit), PAGES)


def test_error_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.edgeml"
    write_bundle(path, [PageSource(PageKind.JSON, b"{}")], {"format": 1})
    with Bundle.open(path) as bundle, pytest.raises(BundleError, match=r"m\.edgeml: manifest"):
        load_manifest(bundle)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": {"b": 1, "b": 1}}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[]", "not a JSON object"),
        (b"", "not JSON"),
        (b'{"a": 1} {}', "not JSON"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "levels"),
        (b"[" * 1_000_000, "levels"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_json_loophole_is_closed(text: bytes, match: str) -> None:
    with pytest.raises(StrictJsonError, match=match):
        decode_object(text)


def test_brackets_in_strings_are_not_depth() -> None:
    text = "[" * 100 + '\\"' + "{" * 100
    assert decode_object(encode_object({"a": text})) == {"a": text}


@pytest.mark.parametrize("document", [{"a": float("nan")}, {"a": {1, 2}}, {"a": "\ud800"}, {"1": 0, 1: 0}], ids=repr)
def test_what_json_cannot_say_is_not_written(document: dict[Any, Any]) -> None:
    with pytest.raises(StrictJsonError):
        encode_object(document)


def test_order_of_keys_does_not_change_the_bytes() -> None:
    assert encode_object({"b": 1, "a": 2}) == encode_object({"a": 2, "b": 1}) == b'{"a":2,"b":1}'
