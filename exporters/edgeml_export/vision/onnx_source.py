"""A CNN that comes as one ONNX file: checked, simplified, and cut into a backbone and a head for each task.

Where the backbone ends is marked by tensor names: `--split-at NAME` (repeated for several), or the file's metadata entry
`edgeml.split` (names separated by commas). With one task and no mark, the whole network is the backbone and the head is the
softmax or sigmoid alone. The recipe says what the file cannot:

[image]                     # as ImageFormat; height, width and channels where the graph leaves them open
mean = [0.2]
std = [0.33]

[[task]]                    # as VisionTask
name = "digit"
domain = "multi_fashion_mnist"
labels = ["0", "1", ...]
output = "y_digit"          # the graph's output; the task's name where left out
logits = true               # false: it gives probabilities already

The file is untrusted: no external data, standard operators only, and a batch axis that is really free.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, helper

from edgeml.errors import EdgemlError, InputError, UsageError
from edgeml_export.vision.graphs import IR_VERSION, OPSET, Stages, feature_names, order, simplify
from edgeml_export.vision.recipe import VisionRecipe, parse_table
from edgeml_export.vision.runner import Runner, in_batches
from edgeml_export.vision.tasks import ImageFormat, VisionTask, check_tasks

__all__ = ["OnnxModel", "read_onnx"]

LIMIT, MOST_NODES = 1 << 30, 20_000
MARK = "edgeml.split"
Floats = NDArray[np.float32]


@dataclass
class OnnxModel:
    """What is exported of an ONNX file: the same as of a torch model, but that it cannot be pruned."""

    stages: Stages
    tasks: tuple[VisionTask, ...]
    image: ImageFormat
    reference_scores: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, images: Floats) -> dict[str, Floats]:
        """Probabilities of a batch (B, C, H, W)."""
        return in_batches(Runner(self.stages), images)


@dataclass(frozen=True)
class _Output:
    """A task's table in the recipe."""

    name: str
    domain: str
    labels: tuple[str, ...]
    metric: str = ""
    kind: str = "classification"
    void: int | None = None
    output: str = ""
    logits: bool = True

    def task(self) -> VisionTask:
        usual = {"classification": "accuracy", "segmentation": "miou", "edge": "edge_f1"}
        metric = self.metric or usual.get(self.kind, "accuracy")
        return VisionTask(self.name, self.domain, self.labels, metric, self.kind, self.void)


def read_onnx(path: Path, recipe: VisionRecipe, split_at: Sequence[str]) -> OnnxModel:
    """Read and cut the file. Raises `InputError` for a file that is no usable CNN, `UsageError` where something is not said."""
    if not recipe.tasks:
        raise UsageError(f"{path}: an ONNX file needs a recipe with a [[task]] for each of its tasks; name it with --recipe")
    tables = [parse_table(_Output, table, f"{recipe.where}: task {number + 1}") for number, table in enumerate(recipe.tasks)]
    tasks = tuple(table.task() for table in tables)
    check_tasks(tasks)
    model = _load(path)
    image = _image(model, recipe, path)
    outputs = {value.name for value in model.graph.output}
    for table in tables:
        wanted = table.output or table.name
        if wanted not in outputs:
            there = ", ".join(f"{name:.80}" for name in sorted(outputs)[:8])
            raise UsageError(f"{path}: task '{table.name}' is said to be output '{wanted:.80}', and there is {there}")
    marks = list(split_at) or _marked(model)
    try:
        order(model.graph)
        stages = _cut(model, tables, marks, path)
        _check_batches(stages, tasks, image, path)
    except EdgemlError:
        raise
    except Exception as error:  # onnx and onnxruntime have one class per fault and no common base
        raise InputError(f"{path}: this graph cannot be used: {' '.join(str(error).split())[:200]}") from error
    return OnnxModel(stages, tasks, image, provenance={"source": path.name})


def _load(path: Path) -> onnx.ModelProto:
    """The file as a model of our operator set, its batch axis free and its shapes inferred."""
    try:
        if path.stat().st_size > LIMIT:
            raise InputError(f"{path}: larger than {LIMIT >> 20} MiB, which is no model for a small device")
        model = onnx.load_from_string(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except InputError:
        raise
    except Exception as error:  # protobuf's own classes
        raise InputError(f"{path}: this is no ONNX model ({' '.join(str(error).split())[:120]})") from error
    _check_nodes(model.graph, path)
    _check_input(model, path)
    version = max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)
    try:
        if version < OPSET:
            model = onnx.version_converter.convert_version(model, OPSET)
        _input(model).type.tensor_type.shape.dim[0].dim_param = "batch"
        return onnx.shape_inference.infer_shapes(model)
    except Exception as error:  # the same
        said = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: it is of operator set {version} and cannot be brought to {OPSET} ({said}); export it anew") from error


def _check_nodes(graph: onnx.GraphProto, path: Path) -> None:
    if len(graph.node) > MOST_NODES:
        raise InputError(f"{path}: it has {len(graph.node)} nodes, and a CNN for a small device has at most {MOST_NODES}")
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in graph.initializer):
        raise InputError(f"{path}: its weights lie in another file; save the model with its weights inside")
    odd = sorted({node.domain for node in graph.node} - {"", "ai.onnx"})
    if odd:
        raise InputError(f"{path}: it has operators of the domain '{odd[0]:.60}'; only standard ONNX operators run on a device")
    if any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for node in graph.node for attribute in node.attribute):
        raise InputError(f"{path}: it has branches or loops (If, Loop, Scan), which are not supported; export it without")
    if any(node.op_type in ("QuantizeLinear", "QLinearConv", "DequantizeLinear") for node in graph.node):
        raise InputError(f"{path}: it is quantised already; give the float model")


def _check_input(model: onnx.ModelProto, path: Path) -> None:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.type.tensor_type for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(inputs[0].shape.dim) != 4 or inputs[0].elem_type != TensorProto.FLOAT:
        raise InputError(f"{path}: a CNN here has one float32 input of four axes (batch, channels, height, width)")


def _input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    weights = {tensor.name for tensor in model.graph.initializer}
    return next(value for value in model.graph.input if value.name not in weights)


def _image(model: onnx.ModelProto, recipe: VisionRecipe, path: Path) -> ImageFormat:
    axes = [axis.dim_value for axis in _input(model).type.tensor_type.shape.dim][1:]
    table = dict(recipe.image)
    for key, size in zip(("channels", "height", "width"), axes, strict=True):
        if size and table.setdefault(key, size) != size:
            raise UsageError(f"{path}: the recipe says {key} is {table[key]!r:.20}, and the graph's input has {size}")
        if key not in table:
            raise UsageError(f"{path}: the graph leaves its input's {key} open; say it in the recipe's table [image]")
    return parse_table(ImageFormat, table, f"{recipe.where}: [image]")


def _marked(model: onnx.ModelProto) -> list[str]:
    entries = {entry.key: entry.value for entry in model.metadata_props}
    return [name.strip() for name in entries.get(MARK, "").split(",") if name.strip()]


def _cut(model: onnx.ModelProto, tables: Sequence[_Output], marks: list[str], path: Path) -> Stages:
    """The stages between input, marked tensors and outputs."""
    graph, image = model.graph, _input(model).name
    outputs = {table.name: table.output or table.name for table in tables}
    made = {name for node in graph.node for name in node.output}
    if not marks and len(tables) > 1:
        advice = _last_shared(graph, list(outputs.values()), image)
        hint = f" (all outputs follow from '{advice}')" if advice else ""
        raise UsageError(f"{path}: say where the backbone ends and the heads begin: --split-at TENSOR{hint}")
    marks = marks or list(outputs.values())
    odd = [name for name in marks if name not in made]
    if odd:
        raise UsageError(f"{path}: there is no tensor '{odd[0]:.80}' in the graph to split at")
    names = dict(zip(marks, feature_names(marks), strict=True))
    backbone = _Part(model, {image: "image"}, path).until(names, "backbone")
    heads = {}
    for table in tables:
        part, output = _Part(model, names, path), outputs[table.name]
        kind = "Identity" if not table.logits else "Sigmoid" if table.kind == "edge" else "Softmax"
        heads[table.name] = part.until({output: table.task().output}, f"head_{table.name}", kind)
    return Stages(backbone, heads)


def _last_shared(graph: onnx.GraphProto, outputs: Sequence[str], image: str) -> str | None:
    """The last tensor that every output depends on alone, where there is one."""
    for node in reversed(graph.node):
        for name in node.output:
            if name not in outputs and not any(image in _reached(graph, [output], {name}) for output in outputs):
                return str(name)
    return None


def _reached(graph: onnx.GraphProto, ends: Sequence[str], stops: Collection[str]) -> set[str]:
    """Everything that `ends` are computed from, `stops` included but nothing behind them."""
    reached = set(ends)
    for node in reversed(graph.node):
        if any(name in reached and name not in stops for name in node.output):
            reached.update(name for name in node.input if name)
    return reached


class _Part:
    """The nodes behind some tensors, which become the inputs of a model of their own, under new names."""

    def __init__(self, model: onnx.ModelProto, inputs: Mapping[str, str], path: Path) -> None:
        self.model, self.inputs, self.path = model, inputs, path

    def until(self, outputs: Mapping[str, str], name: str, end: str | None = None) -> bytes:
        """The model up to `outputs`, also renamed; with `end`, an operator that comes after the only one."""
        graph = self.model.graph
        reached = _reached(graph, list(outputs), self.inputs)
        nodes = [node for node in graph.node if any(made in reached and made not in self.inputs for made in node.output)]
        weights = [tensor for tensor in graph.initializer if tensor.name in reached]
        made = {value for node in nodes for value in node.output if value}
        loose = sorted(reached - made - set(self.inputs) - {tensor.name for tensor in weights})
        if loose:
            raise UsageError(f"{self.path}: '{name}' needs '{loose[0]:.80}' too, so the graph does not part at the tensors given")
        names = {value: f"{value}.inner" for value in reached | made} | ({} if end else dict(outputs)) | dict(self.inputs)
        copies = [_renamed(node, names) for node in nodes]
        ends = list(outputs.values())
        if end is not None:
            axis: dict[str, Any] = {"axis": 1} if end == "Softmax" else {}
            copies.append(helper.make_node(end, [names[next(iter(outputs))]], ends, **axis))
        tensors = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in weights]
        for tensor in tensors:
            tensor.name = names[tensor.name]
        values = [self._value(old, new) for old, new in self.inputs.items()]
        results = [helper.make_tensor_value_info(value, TensorProto.FLOAT, None) for value in ends]
        opsets = [item for item in self.model.opset_import if item.domain in ("", "ai.onnx")]
        whole = helper.make_model(helper.make_graph(copies, name, values, results, tensors), opset_imports=opsets, ir_version=IR_VERSION)
        return simplify(whole.SerializeToString(), name)

    def _value(self, old: str, new: str) -> onnx.ValueInfoProto:
        """An input as shape inference knows it, its batch axis free."""
        graph = self.model.graph
        known = next((value for value in (*graph.value_info, *graph.input, *graph.output) if value.name == old), None)
        if known is None or not known.type.tensor_type.shape.dim:
            raise InputError(f"{self.path}: the shape of '{old:.80}' cannot be worked out; split at another tensor")
        value = onnx.ValueInfoProto.FromString(known.SerializeToString())
        value.name = new
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
        return value


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    copied = onnx.NodeProto.FromString(node.SerializeToString())
    for part in (copied.input, copied.output):
        part[:] = [names.get(value, value) for value in part]
    return copied


def _check_batches(stages: Stages, tasks: Sequence[VisionTask], image: ImageFormat, path: Path) -> None:
    """Three images together must be answered as one by one, by outputs of the right shape."""
    images = np.random.default_rng(0).standard_normal((3, *image.shape)).astype(np.float32)
    runner = Runner(stages)
    alone = [runner(images[number : number + 1]) for number in range(3)]
    try:
        together = runner(images)
    except Exception as error:  # onnxruntime has one class per status
        raise InputError(f"{path}: it is made for one image at a time; export it with a free batch axis") from error
    for task in tasks:
        found, axes = together[task.name], 2 if task.output == "scores" else 4
        if found.ndim != axes or found.shape[0] != 3 or found.shape[1] not in task.channels:
            wanted = f"(3, {task.channels[-1]}{', h, w' if axes == 4 else ''})"
            raise InputError(f"{path}: for three images task '{task.name}' must answer {wanted}, it answers {found.shape}")
        if not np.isfinite(found).all():
            raise InputError(f"{path}: task '{task.name}' answers with numbers that are not finite; its weights are faulty")
        if not np.allclose(found, np.concatenate([one[task.name] for one in alone]), atol=1e-4):
            raise InputError(f"{path}: the answer of task '{task.name}' depends on what else is in the batch")
