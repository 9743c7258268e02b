"""ONNX models as bytes, without the onnx package: the runtime can make a graph, yet depends on no graph library.

A protobuf message is a row of fields, each a key (field number and wire type) and a value: a varint, four bytes, or a length and
that many bytes. ONNX needs no more than that. Only what our graphs use is here; field numbers are those of onnx.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import UsageError

__all__ = ["Attribute", "Node", "TensorType", "graph", "integer", "message", "text", "untyped_value"]

#: An attribute's value; a list of integers or of floats must not be empty, or its type could not be told.
Attribute = int | float | str | Sequence[int] | Sequence[float] | NDArray[np.generic]
#: (dtype, shape); an axis without a fixed size has a name.
TensorType = tuple[str, Sequence[int | str]]

IR_VERSION = 8
_ELEMENTS = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10}
_VARINT, _BYTES, _FIXED32 = 0, 2, 5
_FLOAT, _INT, _STRING, _TENSOR, _FLOATS, _INTS = 1, 2, 3, 4, 6, 7


@dataclass(frozen=True)
class Node:
    """One operator. An empty input name is an input left out; `domain` "" is ONNX itself."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    domain: str = ""


def graph(
    nodes: Sequence[Node],
    inputs: Mapping[str, TensorType],
    outputs: Mapping[str, TensorType],
    initializers: Mapping[str, NDArray[np.generic]],
    opsets: Mapping[str, int],
) -> bytes:
    """A serialized ModelProto; nodes in execution order, `opsets` maps a domain to its version. Equal input gives equal bytes."""
    body = _many(1, (_node(node) for node in nodes)) + text(2, "graph")
    body += _many(5, (_tensor(value, name) for name, value in initializers.items()))
    body += _many(11, (_value_info(name, kind) for name, kind in inputs.items()))
    body += _many(12, (_value_info(name, kind) for name, kind in outputs.items()))
    versions = (text(1, domain) + integer(2, version) for domain, version in opsets.items())
    return integer(1, IR_VERSION) + text(2, "edgeml-runtime") + message(7, body) + _many(8, versions)


def _node(node: Node) -> bytes:
    names = b"".join(text(1, name) for name in node.inputs) + b"".join(text(2, name) for name in node.outputs)
    attributes = _many(5, (_attribute(name, value) for name, value in node.attributes.items()))
    domain = text(7, node.domain) if node.domain else b""
    return names + text(3, node.outputs[0]) + text(4, node.op) + attributes + domain


def _attribute(name: str, value: Attribute) -> bytes:
    kind, data = _attribute_value(name, value)
    return text(1, name) + data + integer(20, kind)


def _attribute_value(name: str, value: Attribute) -> tuple[int, bytes]:
    if isinstance(value, np.ndarray):
        return _TENSOR, message(5, _tensor(value, ""))
    if isinstance(value, str):
        return _STRING, text(4, value)
    if isinstance(value, float):
        return _FLOAT, _float(2, value)
    if isinstance(value, int):
        return _INT, integer(3, value)
    if value and all(isinstance(item, int) for item in value):
        return _INTS, b"".join(integer(8, int(item)) for item in value)
    if value and all(isinstance(item, float) for item in value):
        return _FLOATS, b"".join(_float(7, item) for item in value)
    raise UsageError(f"the attribute '{name}' has the value {value!r:.40}, which no kind of attribute can hold")


def _tensor(value: NDArray[np.generic], name: str) -> bytes:
    raw = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
    dims = b"".join(integer(1, size) for size in value.shape)
    return dims + integer(2, _element(value.dtype.name)) + (text(8, name) if name else b"") + message(9, raw)


def _value_info(name: str, kind: TensorType) -> bytes:
    dtype, shape = kind
    dims = _many(1, (text(2, size) if isinstance(size, str) else integer(1, size) for size in shape))
    return text(1, name) + message(2, message(1, integer(1, _element(dtype)) + message(2, dims)))


def untyped_value(name: str, dtype: str | None = None) -> bytes:
    """A ValueInfoProto of any shape; without a dtype the reader has to find it out."""
    return text(1, name) + (b"" if dtype is None else message(2, message(1, integer(1, _element(dtype)))))


def _element(dtype: str) -> int:
    if dtype not in _ELEMENTS:
        raise UsageError(f"a graph made here cannot hold {dtype}; it can hold {', '.join(_ELEMENTS)}")
    return _ELEMENTS[dtype]


def _many(number: int, messages: Iterable[bytes]) -> bytes:
    return b"".join(message(number, data) for data in messages)


def message(number: int, data: bytes) -> bytes:
    """A field that holds bytes, or another message."""
    return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def text(number: int, value: str) -> bytes:
    """A field that holds text."""
    return message(number, value.encode("utf-8"))


def integer(number: int, value: int) -> bytes:
    """A field that holds a whole number."""
    return _varint(number << 3 | _VARINT) + _varint(value & (1 << 64) - 1)  # negative numbers are sent as 64-bit two's complement


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | _FIXED32) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
