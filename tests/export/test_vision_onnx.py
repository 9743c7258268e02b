"""CNNs that come as ONNX files: split where they are marked, and every unusable file is refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgeml_export.vision import ImageFormat
from edgeml_export.vision.int8 import Int8, quantize
from edgeml_export.vision.onnx_source import read_onnx
from edgeml_export.vision.recipe import parse_recipe
from edgeml_export.vision.runner import Runner
from onnx import TensorProto, helper

from edgeml.errors import EdgemlError, InputError, UsageError

TASKS = [
    {"name": "place", "domain": "squares", "labels": ["a", "b", "c"], "output": "out_place"},
    {"name": "edge", "domain": "squares", "labels": ["no edge", "edge"], "kind": "edge", "logits": False},
]


def network(batch: int | str = "n", size: int | str = 8, opset: int = 17) -> onnx.ModelProto:
    """image -> conv, relu (shared) -> mean, linear -> out_place; and -> conv, sigmoid -> edge."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 3, name)

    nodes = [
        helper.make_node("Conv", ["pixels", "w1", "b1"], ["raw"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["raw"], ["shared"]),
        helper.make_node("GlobalAveragePool", ["shared"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w2", "b2"], ["out_place"]),
        helper.make_node("Conv", ["shared", "w3"], ["edge_raw"]),
        helper.make_node("Sigmoid", ["edge_raw"], ["edge"]),
    ]
    weights = [weight("w1", 4, 3, 3, 3), weight("b1", 4), weight("w2", 4, 3), weight("b2", 3), weight("w3", 1, 4, 1, 1)]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, 3, size, size])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("out_place", "edge")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def recipe(tasks: list[dict[str, Any]] = TASKS, **image: Any) -> Any:
    return parse_recipe({"task": tasks, "image": image, "variant": [{"store": ["f32"]}]}, "r.toml")


def write(tmp_path: Path, model: onnx.ModelProto) -> Path:
    path = tmp_path / "cnn.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def whole(model: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    found: list[np.ndarray] = onnxruntime.InferenceSession(model.SerializeToString()).run(["out_place", "edge"], {"pixels": images})
    return found


@pytest.mark.parametrize("marked", ["option", "metadata"])
@pytest.mark.parametrize("opset", [17, 12])
def test_a_graph_is_cut_where_it_is_marked(tmp_path: Path, marked: str, opset: int) -> None:
    model = network(opset=opset)
    if marked == "metadata":
        helper.set_model_props(model, {"edgeml.split": " shared "})
    found = read_onnx(write(tmp_path, model), recipe(), ["shared"] if marked == "option" else [])
    assert found.image == ImageFormat(8, 8, 3)
    images = np.random.default_rng(1).standard_normal((5, 3, 8, 8)).astype(np.float32)
    logits, edge = whole(network(), images)
    answers = Runner(found.stages)(images)
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(answers["place"], exponents / exponents.sum(1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(answers["edge"], edge, atol=1e-5)
    assert [value.name for value in onnx.load_from_string(found.stages.backbone).graph.output] == ["features"]


def test_several_tensors_may_be_marked(tmp_path: Path) -> None:
    found = read_onnx(write(tmp_path, network()), recipe(), ["pooled", "edge_raw"])
    backbone = onnx.load_from_string(found.stages.backbone).graph
    assert [value.name for value in backbone.output] == ["features_0", "features_1"]
    assert [value.name for value in onnx.load_from_string(found.stages.heads["edge"]).graph.input] == ["features_1"]


def test_with_one_task_the_head_is_the_softmax(tmp_path: Path) -> None:
    found = read_onnx(write(tmp_path, network()), recipe(TASKS[:1]), [])
    assert [node.op_type for node in onnx.load_from_string(found.stages.heads["place"]).graph.node] == ["Softmax"]
    assert found.predict(np.zeros((2, 3, 8, 8), np.float32))["place"].shape == (2, 3)


def test_what_the_graph_leaves_open_is_in_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, network(size="s"))
    with pytest.raises(UsageError, match="the graph leaves its input's height open"):
        read_onnx(path, recipe(), ["shared"])
    assert read_onnx(path, recipe(height=12, width=8, mean=[0.5, 0.5, 0.5]), ["shared"]).image == ImageFormat(12, 8, 3, (0.5,) * 3)


def with_gaps(model: onnx.ModelProto) -> None:
    """An output and inputs that are left out, and tensors that are called as the stages' own and each other's derived names."""
    nodes = model.graph.node
    nodes[1].CopyFrom(helper.make_node("Dropout", ["raw"], ["features", ""]))
    nodes.insert(2, helper.make_node("Clip", ["features", "", "top"], ["features.inner"]))
    nodes.insert(3, helper.make_node("Relu", ["features.inner"], ["shared"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.7, np.float32), "top"))


@pytest.mark.parametrize("name", ["image", "a b/ü", "scores"])
def test_names_and_gaps_do_no_harm(tmp_path: Path, name: str) -> None:
    model = changed(with_gaps)
    for node in model.graph.node:
        for part in (node.input, node.output):
            part[:] = [name if value == "shared" else value for value in part]
    found = read_onnx(write(tmp_path, model), recipe(), [name])
    images = np.random.default_rng(1).standard_normal((5, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(Runner(found.stages)(images)["edge"], whole(model, images)[1], atol=1e-5)


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_graphs_of_other_operator_sets_can_be_quantised(tmp_path: Path, opset: int) -> None:
    found = read_onnx(write(tmp_path, network(opset=opset)), recipe(), ["shared"])
    images = np.random.default_rng(1).standard_normal((8, 3, 8, 8)).astype(np.float32)
    how = Int8("always", ("minmax",), 8, 100, 100, "yes")
    made, evidence = quantize(found.stages, found.tasks, how, images, lambda _stages: {"place": 1.0, "edge": 1.0}, lambda _more: None)
    assert made is not None
    assert evidence["kept"]
    answers, truth = Runner(made)(images), Runner(found.stages)(images)
    for task in ("place", "edge"):
        np.testing.assert_allclose(answers[task], truth[task], atol=0.1)


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = network()
    change(model)
    return model


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights")


def foreign(model: onnx.ModelProto) -> None:
    model.graph.node[1].domain = "com.example"


def branching(model: onnx.ModelProto) -> None:
    body = helper.make_graph([], "b", [], [])
    model.graph.node.append(helper.make_node("If", ["edge"], ["x"], then_branch=body, else_branch=body))


def cyclic(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "shared"


def not_finite(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.full(4, np.nan, np.float32), "b1"))


def bytes_in(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def backwards(model: onnx.ModelProto) -> None:
    """A long chain, the last node first: deep, and not to be walked in quadratic time."""
    count = 19_900
    chain = [helper.make_node("Relu", [f"c{number}" if number else "edge"], [f"c{number + 1}"]) for number in range(count)]
    model.graph.node.extend(chain[::-1])


def one_by_one(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 4], np.int64), "shape"))
    model.graph.node[3].CopyFrom(helper.make_node("Reshape", ["pooled", "shape"], ["flat"]))


@pytest.mark.parametrize(
    ("model", "split", "tasks", "kind", "sentence"),
    [
        (network(), [], TASKS, UsageError, r"say where the backbone ends .*: --split-at TENSOR \(all outputs follow from 'shared'\)"),
        (network(), ["nowhere"], TASKS, UsageError, "there is no tensor 'nowhere' in the graph to split at"),
        (network(), ["pixels"], TASKS, UsageError, "there is no tensor 'pixels'"),
        (network(), ["pooled"], TASKS, UsageError, r"'head_edge' needs 'pixels' too, so the graph does not part"),
        (network(), ["shared"], [TASKS[0] | {"output": "logits"}], UsageError, "output 'logits', and there is edge, out_place"),
        (network(), ["shared"], [TASKS[0] | {"labels": ["a", "b"]}], InputError, r"task 'place' must answer \(3, 2\), it answers \(3, 3\)"),
        (network(), ["shared"], [], UsageError, r"needs a recipe with a \[\[task\]\]"),
        (network(), ["shared"], [{"name": "place"}], InputError, "task 1: 'domain' is missing"),
        (changed(external), ["shared"], TASKS, InputError, "its weights lie in another file"),
        (changed(foreign), ["shared"], TASKS, InputError, "operators of the domain 'com.example'"),
        (changed(branching), ["shared"], TASKS, InputError, "branches or loops"),
        (changed(cyclic), ["shared"], TASKS, InputError, "cycle|cannot be used"),
        (changed(not_finite), ["shared"], TASKS, InputError, "answers with numbers that are not finite"),
        (changed(bytes_in), ["shared"], TASKS, InputError, "one float32 input of four axes"),
        (network(batch=4), ["shared"], [TASKS[0] | {"output": "x" * 500}], UsageError, "is said to be output 'x{80}', and there is"),
        (changed(one_by_one), ["shared"], TASKS, InputError, "made for one image at a time"),
        (network(opset=5), ["shared"], TASKS, InputError, "operator set 5|cannot be used"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, model: onnx.ModelProto, split: list[str], tasks: Any, kind: type[EdgemlError], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence) as refusal:
        read_onnx(write(tmp_path, model), recipe(tasks), split)
    assert "\n" not in str(refusal.value)


def test_a_deep_graph_is_read_in_seconds(tmp_path: Path) -> None:
    model = changed(backwards)
    assert len(read_onnx(write(tmp_path, model), recipe(), ["shared"]).stages.heads) == 2
    model.graph.node.extend([helper.make_node("Relu", ["edge"], [f"d{number}"]) for number in range(200)])
    with pytest.raises(InputError, match="it has 20107 nodes, and a CNN for a small device has at most 20000"):
        read_onnx(write(tmp_path, model), recipe(), ["shared"])


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.onnx: cannot be read"):
        read_onnx(tmp_path / "none.onnx", recipe(), [])
    for content in (b"hello", b"", b"\x08\x08"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.onnx: "):
            read_onnx(tmp_path / "bad.onnx", recipe(), [])


def test_a_size_that_is_not_the_graphs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the recipe says height is 9, and the graph's input has 8"):
        read_onnx(write(tmp_path, network()), recipe(height=9), ["shared"])
