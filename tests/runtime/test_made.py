"""Graphs and mixtures made with NumPy alone: the onnx package agrees with our bytes, and equal recipes give equal files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from edgeml.bundle import Bundle
from edgeml.errors import UsageError
from edgeml.graph_bytes import Node, graph
from edgeml.kernels import unpack_matrix
from edgeml.layout import Activation, PageKind, WeightType, expert_layout
from edgeml.made import LARGE, TOY, Recipe, make_mixture, tokenizer_json
from edgeml.manifest import load_manifest


def test_a_graph_equals_the_one_that_onnx_makes() -> None:
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    cast_to = np.array([1.5], np.float16)
    nodes = [
        Node("Constant", [], ["c"], {"value": np.array([7], np.int64)}),
        Node("Constant", [], ["d"], {"value_ints": [1, -2, 1 << 40]}),
        Node("Constant", [], ["e"], {"value_floats": [0.5, -1.0]}),
        Node("LeakyRelu", ["x"], ["y"], {"alpha": 0.25}),
        Node("DepthToSpace", ["img", ""], ["z"], {"blocksize": 2, "mode": "CRD"}),
        Node("PagedExperts", ["y", "c", "d"], ["out"], {"site": -1}, "edgeml"),
    ]
    ours = onnx.load_from_string(
        graph(
            nodes,
            {"x": ("float32", ("B", 3)), "img": ("float32", (1, 4, 2, 2))},
            {"out": ("int64", ("B", "long name")), "z": ("bool", ())},
            {"table": table, "scalar": np.array(-1, np.int64), "half": cast_to},
            {"": 17, "edgeml": 1},
        )
    )
    theirs = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Constant", [], ["c"], "c", value=numpy_helper.from_array(np.array([7], np.int64))),
                helper.make_node("Constant", [], ["d"], "d", value_ints=[1, -2, 1 << 40]),
                helper.make_node("Constant", [], ["e"], "e", value_floats=[0.5, -1.0]),
                helper.make_node("LeakyRelu", ["x"], ["y"], "y", alpha=0.25),
                helper.make_node("DepthToSpace", ["img", ""], ["z"], "z", blocksize=2, mode="CRD"),
                helper.make_node("PagedExperts", ["y", "c", "d"], ["out"], "out", domain="edgeml", site=-1),
            ],
            "graph",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3]),
                helper.make_tensor_value_info("img", TensorProto.FLOAT, [1, 4, 2, 2]),
            ],
            [
                helper.make_tensor_value_info("out", TensorProto.INT64, ["B", "long name"]),
                helper.make_tensor_value_info("z", TensorProto.BOOL, []),
            ],
            [
                numpy_helper.from_array(table, "table"),
                numpy_helper.from_array(np.array(-1, np.int64), "scalar"),
                numpy_helper.from_array(cast_to, "half"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("edgeml", 1)],
        ir_version=8,
        producer_name="edgeml-runtime",
    )
    for model in (ours, theirs):  # the order of attributes carries no meaning
        for node in model.graph.node:
            node.attribute.sort(key=lambda attribute: attribute.name)
    assert ours == theirs


def test_what_a_graph_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="float64"):
        graph([], {"x": ("float64", ())}, {}, {}, {"": 17})
    with pytest.raises(UsageError, match="'axes'"):
        graph([Node("Squeeze", ["x"], ["y"], {"axes": []})], {}, {}, {}, {"": 17})


def graphs(path: Path) -> dict[str, onnx.ModelProto]:
    with Bundle.open(path) as bundle:
        return {stage.name: onnx.load_from_string(bundle.read(stage.page)) for stage in load_manifest(bundle).stages}


def test_the_toy_is_small_valid_and_the_same_twice(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("a.edgeml", "b.edgeml", "c.edgeml"))
    assert make_mixture(first) == make_mixture(second) != make_mixture(other, seed=1)
    assert first.read_bytes() == second.read_bytes()
    assert 150_000 < first.stat().st_size < 250_000
    with Bundle.open(first) as bundle:
        assert sum(1 for _ in bundle.verify()) > 0
        manifest = load_manifest(bundle)
    assert set(manifest.usage) == {task.name for task in manifest.tasks} == {"vector", *TOY.tasks}
    assert {task.name: task.labels for task in manifest.tasks if task.labels} == {k: tuple(v) for k, v in TOY.tasks.items()}
    for model in graphs(first).values():
        onnx.checker.check_model(model)


@pytest.mark.parametrize("type", list(WeightType))
@pytest.mark.parametrize("gated", [False, True])
def test_every_kind_of_expert_is_well_formed(tmp_path: Path, type: WeightType, gated: bool) -> None:
    path = tmp_path / "m.edgeml"
    make_mixture(path, expert_type=type, gated=gated, activation=Activation.SILU, experts=5, per_page=2, shared=0, mixing=False, ids=False)
    with Bundle.open(path) as bundle:
        assert sum(1 for _ in bundle.verify()) > 0
        manifest = load_manifest(bundle)
        pages = [page for page in bundle.pages if page.kind == PageKind.EXPERT]
        assert [page.count for page in pages] == [2, 2, 1] * 2
        assert [[ref.sub for ref in site.experts] for site in manifest.sites] == [[0, 1, 0, 1, 0]] * 2
        data = bundle.read(pages[0].id)
    for matrix, (tiles, _) in zip(pages[0].matrices, expert_layout(pages[0].matrices)[0], strict=True):
        size = matrix.rows * matrix.cols * {WeightType.F32: 2048, WeightType.INT8: 544, WeightType.INT4: 288}[type] // 512
        weights = unpack_matrix(data[tiles : tiles + size], type, matrix.rows, matrix.cols)
        assert abs(weights.std() * matrix.cols**0.5 - 1) < 0.1
        assert abs(weights.mean()) < 0.05 * weights.std() * 3
    assert not [name for model in graphs(path).values() for name in (v.name for v in model.graph.output) if name.startswith("ids_")]


def test_routing_is_skewed_but_not_degenerate(tmp_path: Path) -> None:
    path = tmp_path / "m.edgeml"
    make_mixture(path, experts=16)
    with Bundle.open(path) as bundle:
        usage = load_manifest(bundle).usage
    for task in TOY.tasks:
        for site in usage[task]:
            assert 1.5 / 16 < max(site) < 0.75
    assert usage["weather"] != usage["mood"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden": 40}, "hidden must be a multiple of 32"),
        ({"width": 0}, "width"),
        ({"top_k": 9}, "top_k"),
        ({"vocabulary": 50}, "no room for the letters"),
        ({"layers": 0}, "at least one layer"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, int], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        make_mixture(tmp_path / "m.edgeml", **changes)
    assert list(tmp_path.iterdir()) == []


def test_text_of_any_kind_has_tokens() -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json(TOY.vocabulary).decode())
    assert tokenizer.get_vocab_size() == TOY.vocabulary
    assert tokenizer.encode("Rain, zebra!").tokens == ["[CLS]", "rain", ",", "z", "##e", "##b", "##r", "##a", "!", "[SEP]"]
    assert tokenizer.encode("\u4e2d", "sun").ids[1] == 1  # unknown, and a pair is one sequence
    assert Tokenizer.from_str(tokenizer_json(1024).decode()).encode("w5").tokens == ["[CLS]", "w5", "[SEP]"]


def test_a_large_mixture_needs_little_memory(tmp_path: Path) -> None:
    """48 MiB of experts, written by a process that may not use 48 MiB for them; the demo's 256 MiB are the same code."""
    code = f"""
import resource
from edgeml.made import LARGE, make_mixture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
make_mixture({str(tmp_path / "m.edgeml")!r}, LARGE, layers=3, experts=28)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert (tmp_path / "m.edgeml").stat().st_size > 48 << 20
    assert int(done.stdout) < 36 << 10


def test_the_large_recipe_has_its_size() -> None:
    matrices = 2 * LARGE.hidden * LARGE.width * 288 // 512
    assert 256 << 20 <= LARGE.layers * LARGE.experts * matrices < 257 << 20
    assert isinstance(LARGE, Recipe)
