"""Stage graphs of a CNN: one backbone, one head for each task, each an ONNX model of its own.

    backbone       image (B, C, H, W)  -> features, or features_0, features_1, ... of any shape
    head_<task>    features ...        -> scores (B, labels), or map (B, channels, h, w); probabilities

Batch norms are folded into the convolutions before them, the head's softmax or sigmoid is part of its graph, the batch axis is
free, and equal modules give equal bytes: what torch and onnxruntime write about themselves, and names that depend on where a
module stood, are taken out. Every graph is compared with the module, on one image and on three, so that a trace that froze
a size or a branch is refused here and not found on a device.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from edgeml.errors import UsageError
from edgeml_export.vision.model import Features, VisionModel, answers, probabilities
from edgeml_export.vision.runner import open_session
from edgeml_export.vision.tasks import VisionTask

__all__ = ["IR_VERSION", "OPSET", "Stages", "canonical", "feature_names", "order", "simplify", "stage_graphs"]

OPSET, IR_VERSION, MAX_FEATURES = 17, 8, 8
PARITY = 1e-4  # of the largest value: what torch and onnxruntime may differ by in float32


@dataclass(frozen=True)
class Stages:
    """The graphs of one version of a model, as bytes; `heads` in the order of the tasks."""

    backbone: bytes
    heads: Mapping[str, bytes]

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return len(self.backbone) + sum(map(len, self.heads.values()))


def stage_graphs(model: VisionModel, module: nn.Module | None = None) -> Stages:
    """The graphs of a model, or of another `module` of the same form (a pruned copy).

    Raises `UsageError` naming the stage that cannot be traced, or whose graph does not compute what the module does.
    """
    parts = cast(Any, model.module if module is None else module)
    parts.eval()
    example = model.example()
    with torch.inference_mode():
        features = parts.backbone(example)
    names = feature_names(features if isinstance(features, tuple) else (features,))
    backbone = _trace("backbone", _Backbone(parts.backbone), (example,), ["image"], names)
    inputs = features if isinstance(features, tuple) else (features,)
    heads = {}
    for task in model.tasks:
        wrapper = _Head(parts.heads[task.name], task, isinstance(features, tuple))
        heads[task.name] = _trace(f"head_{task.name}", wrapper, inputs, names, [task.output])
    stages = Stages(backbone, heads)
    _check_parity(model, cast(nn.Module, parts), stages)
    return stages


def feature_names(features: Sequence[Any]) -> list[str]:
    """`features`, or `features_0` and so on. Raises `UsageError` above eight."""
    if len(features) > MAX_FEATURES:
        raise UsageError(f"the backbone gives {len(features)} tensors, and a bundle passes at most {MAX_FEATURES} on to the heads")
    return ["features"] if len(features) == 1 else [f"features_{number}" for number in range(len(features))]


class _Backbone(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, image: Tensor) -> Features:
        return cast(Features, self.part(image))


class _Head(nn.Module):
    def __init__(self, part: nn.Module, task: VisionTask, several: bool) -> None:
        super().__init__()
        self.part, self.task, self.several = part, task, several

    def forward(self, *features: Tensor) -> Tensor:
        return probabilities(self.task, self.part(features if self.several else features[0]))


def _trace(stage: str, module: nn.Module, inputs: tuple[Tensor, ...], names: list[str], outputs: list[str]) -> bytes:
    """Export one stage. The wrapper is put into evaluation mode itself: torch gives a module the mode of what wraps it."""
    module.eval()
    free = {name: {0: "batch"} for name in [*names, *outputs]}
    try:
        with tempfile.TemporaryDirectory(prefix="edgeml-") as folder, warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # about the exporter's age, and about constants that the comparison below judges
            path = Path(folder, "traced.onnx")
            torch.onnx.export(
                module,
                tuple(tensor.clone() for tensor in inputs),
                path,
                input_names=names,
                output_names=outputs,
                dynamic_axes=free,
                opset_version=OPSET,
                dynamo=False,
            )
            return simplify(path.read_bytes(), stage)
    except Exception as error:  # torch's tracer raises whatever it meets
        said = " ".join(str(error).split())[:200]
        raise UsageError(f"stage '{stage}' cannot be traced into a graph ({type(error).__name__}: {said})") from error


def _check_parity(model: VisionModel, module: nn.Module, stages: Stages) -> None:
    for count in (1, 3):
        images = model.example(count)
        backbone = open_session(stages.backbone)
        names = [value.name for value in backbone.get_outputs()]
        try:
            features = dict(zip(names, backbone.run(None, {"image": images.numpy()}), strict=True))
        except Exception as error:  # onnxruntime has one class per status and no common base
            raise UsageError(f"stage 'backbone' does not run on {count} images: {_short(error)}") from error
        wanted = answers(module, images)
        for task in model.tasks:
            head = open_session(stages.heads[task.name])
            given = {value.name: features[value.name] for value in head.get_inputs()}
            try:
                (found,) = head.run(None, given)
            except Exception as error:  # as above
                raise UsageError(f"stage 'head_{task.name}' does not run on {count} images: {_short(error)}") from error
            truth = probabilities(task, wanted[task.name]).numpy()
            apart = float(np.abs(found - truth).max()) if found.shape == truth.shape else float("inf")
            if not apart <= PARITY:
                raise UsageError(
                    f"the graphs of task '{task.name}' and the module differ by {apart:.2g} on {count} images; "
                    "does the module's path depend on its input's values or on the batch size?"
                )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def simplify(graph: bytes, name: str) -> bytes:
    """Let onnxruntime fold constants and batch norms and drop what is idle; standard operators only, canonical bytes.

    Raises what onnxruntime raises for a graph that is none.
    """
    with tempfile.TemporaryDirectory(prefix="edgeml-") as folder:
        path = Path(folder, "simple.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return canonical(onnx.load(path), name)


def canonical(model: onnx.ModelProto, name: str) -> bytes:
    """The same graph with nothing in it about its making: nodes and tensors numbered in order, used operator sets only."""
    graph = model.graph
    _drop_unused_inputs(graph)
    order(graph)
    rename = _numbered(graph)
    for node in graph.node:
        node.ClearField("doc_string")
        node.domain = _domain(node.domain)
        for part in (node.input, node.output):
            part[:] = [rename(value) for value in part]
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{number}"
    for tensor in graph.initializer:
        tensor.name = rename(tensor.name)
        tensor.ClearField("doc_string")
    for field in ("value_info", "quantization_annotation", "metadata_props", "doc_string"):
        graph.ClearField(field)
    graph.name = name
    domains = {node.domain for node in graph.node} | {""}
    versions = {_domain(item.domain): item.version for item in model.opset_import}
    opsets = [onnx.helper.make_opsetid(domain, versions.get(domain, OPSET)) for domain in sorted(domains)]
    made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgeml")
    return cast(bytes, made.SerializeToString(deterministic=True))


def _domain(name: str) -> str:
    """ONNX's own operators have two names for their domain."""
    return "" if name == "ai.onnx" else name


def _drop_unused_inputs(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input}
    for value in [value for value in graph.input if value.name not in read]:
        graph.input.remove(value)


def order(graph: onnx.GraphProto) -> None:
    """Every node after those whose outputs it reads, otherwise as they stood; the quantiser puts its nodes last.

    Raises `ValueError` for a graph with a cycle.
    """
    maker = {name: number for number, node in enumerate(graph.node) for name in node.output if name}  # "" is an output left out
    placed: dict[int, None] = {}
    for number in range(len(graph.node)):
        stack, begun = [number], {number}
        while stack:
            needed = (maker[name] for name in graph.node[stack[-1]].input if name in maker)
            waiting = next((one for one in needed if one not in placed), None)
            if waiting is None:
                placed.setdefault(stack.pop())
            elif waiting in begun:
                raise ValueError("the graph has a cycle")
            else:
                stack.append(waiting)
                begun.add(waiting)
    nodes = [onnx.NodeProto.FromString(graph.node[number].SerializeToString()) for number in placed]
    del graph.node[:]
    graph.node.extend(nodes)


def _numbered(graph: onnx.GraphProto) -> Callable[[str], str]:
    """Inputs and outputs keep their names; weights become w0, w1, ... and other tensors t0, t1, ... in the order they are met."""
    kept = {value.name for part in (graph.input, graph.output) for value in part} | {""}
    weights, counts, names = {tensor.name for tensor in graph.initializer}, {"w": 0, "t": 0}, dict[str, str]()
    for node in graph.node:
        if any(attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute):
            return lambda name: name  # a branch refers to outer tensors by their names
        for name in (*node.input, *node.output):
            if name not in kept and name not in names:
                letter = "w" if name in weights else "t"
                names[name] = f"{letter}{counts[letter]}"
                counts[letter] += 1
    order = {old: place for place, old in enumerate(names)}
    used = [tensor for tensor in graph.initializer if tensor.name in names or tensor.name in kept]
    used.sort(key=lambda tensor: order.get(tensor.name, -1))
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in used]
    del graph.initializer[:]
    graph.initializer.extend(copies)
    return lambda name: names.get(name, name)
