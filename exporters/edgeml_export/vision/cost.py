"""Multiply-adds and parameters of a stage graph: counted on the graph, so that torch models and ONNX files are counted alike."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:
    from edgeml_export.vision.graphs import Stages

__all__ = ["count", "count_stages"]

Shapes = Mapping[str, tuple[int, ...]]


def count_stages(stages: Stages) -> tuple[int, int]:
    """Multiply-adds of one image through the backbone and every head, and parameters of all of them."""
    counted = [count(graph) for graph in (stages.backbone, *stages.heads.values())]
    return sum(macs for macs, _ in counted), sum(parameters for _, parameters in counted)


def count(graph: bytes) -> tuple[int, int]:
    """Multiply-adds for one image in convolutions and matrix products, and the number of float weights; of a float graph."""
    model = onnx.load_from_string(graph)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        shapes[value.name] = tuple(max(axis.dim_value, 1) for axis in value.type.tensor_type.shape.dim)
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    parameters = sum(prod(tensor.dims) for tensor in inferred.initializer if tensor.data_type in floats)
    return sum(_macs(node, shapes) for node in inferred.node), parameters


def _macs(node: onnx.NodeProto, shapes: Shapes) -> int:
    try:
        if node.op_type == "Conv":
            return prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])
        if node.op_type == "ConvTranspose":
            return prod(shapes[node.input[0]]) * prod(shapes[node.input[1]][1:])
        if node.op_type == "Gemm":
            flipped = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            return prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if flipped else 1]
        if node.op_type == "MatMul":
            return prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    except (KeyError, IndexError):  # a shape that inference does not find: nothing is claimed for it
        return 0
    return 0
