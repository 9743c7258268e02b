"""What an ONNX graph will cost, counted from its bytes: operators, and multiply-adds against weights. No graph library is needed.

Shapes inside a graph are not worked out: counts are per token (or per row of whatever comes in), and convolutions, whose cost
depends on the size of the picture, are counted by the exporter. Fields that are not looked at are skipped, whatever they hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from edgeml.errors import BundleError

__all__ = ["GraphCost", "fields", "graph_cost"]

#: Operators that visit every value of a token once or a few times; the others look at shapes, at choices or at single numbers.
WIDE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Concat", "Split", "Transpose", "LayerNormalization", "SkipLayerNormalization", "Softmax"}
    | {"Erf", "Gelu", "BiasGelu", "Relu", "Sigmoid", "Tanh"}
)
#: onnxruntime joins these with their neighbours.
JOINED = frozenset({"QuantizeLinear", "DequantizeLinear", "Constant", "Identity"})
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class GraphCost:
    """`nodes` operators that run, `wide` of them over every value of a token; `weight_macs` a row against constant matrices;
    `products` of two computed tensors, as attention has; `bytes` of the graph; `convolutions`."""

    nodes: int
    wide: int
    weight_macs: int
    products: int
    convolutions: int
    bytes: int


def graph_cost(data: bytes) -> GraphCost:
    """Count a serialized ModelProto. Raises `BundleError` where the bytes are no such message."""
    try:
        body = next((value for number, value in fields(memoryview(data)) if number == 7), None)
        if not isinstance(body, memoryview):
            raise BundleError("this is no ONNX graph")
        nodes, weights = [], {}
        for number, value in fields(body):
            if isinstance(value, memoryview) and number == 1:
                nodes.append(_node(value))
            elif isinstance(value, memoryview) and number == 5:
                name, shape = _tensor(value)
                weights[name] = shape
    except (IndexError, UnicodeDecodeError):
        raise BundleError("this is no ONNX graph, or a damaged one") from None
    kinds = [op for op, _ in nodes if op not in JOINED]
    products, macs = 0, 0
    for op, inputs in nodes:
        if op in ("MatMul", "Gemm"):
            sizes = [math.prod(weights[name]) for name in inputs[:2] if name in weights]
            products, macs = products + (not sizes), macs + sum(sizes)
    wide = sum(kind in WIDE for kind in kinds)
    return GraphCost(len(kinds), wide, macs, products, sum("Conv" in kind for kind in kinds), len(data))


def _node(data: memoryview) -> tuple[str, list[str]]:
    op, inputs = "", []
    for number, value in fields(data):
        if isinstance(value, memoryview) and number in (1, 4):
            text = bytes(value).decode("utf-8")
            if number == 4:
                op = text
            else:
                inputs.append(text)
    return op, inputs


def _tensor(data: memoryview) -> tuple[str, list[int]]:
    name, shape = "", []
    for number, value in fields(data):
        if number == 1:
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 8 and isinstance(value, memoryview):
            name = bytes(value).decode("utf-8")
    return name, shape


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message in order. Raises `IndexError` where it ends too early."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind, size = key & 7, {_FIXED64: 8, _FIXED32: 4}.get(key & 7)
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise IndexError("a field ends beyond its message")
        yield key >> 3, data[at : at + size]
        at += size


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise IndexError("a number of more than ten bytes")
