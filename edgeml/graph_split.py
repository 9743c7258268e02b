"""A graph cut at the operators of the domain `edgeml`, so that it runs where onnxruntime does not have them.

A node's depth is how many of those operators lie one behind another before it. Everything of one depth is one segment, a graph of
its own for onnxruntime; then the operators of that depth run, and then the next segment. What a segment takes in has no type in
the file: segments are made when they first run, from the arrays that are then there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from edgeml.errors import BundleError
from edgeml.graph_bytes import integer, message, text, untyped_value
from edgeml.graph_cost import fields

__all__ = ["Operator", "SplitGraph"]

DOMAIN = "edgeml"
Tensors = dict[str, NDArray[Any]]
#: An operator by name, attributes and inputs; an input left out is None.
Operator = Callable[[str, Mapping[str, Any], Sequence[NDArray[Any] | None]], list[NDArray[Any]]]
#: From a serialized model to a session of onnxruntime.
MakeSession = Callable[[bytes], Any]


@dataclass(frozen=True)
class Value:
    """What a session says of an input or output."""

    name: str


@dataclass
class _Node:
    raw: bytes
    op: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Segment:
    """The nodes of one depth, and what crosses its border; then the operators."""

    nodes: list[_Node] = field(default_factory=list)
    operators: list[_Node] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    session: Any = None


class SplitGraph:
    """Runs like a session of onnxruntime. Raises `BundleError` where the bytes are no graph, or one that cannot be cut."""

    def __init__(self, data: bytes, make_session: MakeSession, operator: Operator) -> None:
        self._make, self._operator = make_session, operator
        self._head = b""  # the fields before the graph: versions
        self._weights: dict[str, bytes] = {}
        self._inputs: list[str] = []
        self._outputs: list[str] = []
        try:
            nodes = self._read(data)
        except (IndexError, UnicodeDecodeError, struct.error):
            raise BundleError("this is no ONNX graph, or a damaged one") from None
        self._segments = self._cut(nodes)

    def get_inputs(self) -> list[Value]:
        """Named as onnxruntime names it."""
        return [Value(name) for name in self._inputs if name not in self._weights]

    def get_outputs(self) -> list[Value]:
        """Named as onnxruntime names it."""
        return [Value(name) for name in self._outputs]

    def run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]], options: Any) -> list[NDArray[Any]]:
        """The outputs of these names. Raises what operators and onnxruntime raise."""
        tensors: Tensors = dict(feeds)
        for segment in self._segments:
            if segment.nodes:
                if segment.session is None:
                    segment.session = self._make(self._model(segment, tensors))
                made = segment.session.run(segment.outputs, {name: tensors[name] for name in segment.inputs}, options)
                tensors.update(zip(segment.outputs, made, strict=True))
            for node in segment.operators:
                made = self._operator(node.op, node.attributes, [tensors[name] if name else None for name in node.inputs])
                tensors.update(zip(node.outputs, made, strict=False))
        return [tensors[name] for name in names]

    def _read(self, data: bytes) -> list[_Node]:
        nodes: list[_Node] = []
        for number, value in fields(memoryview(data)):
            if number == 1 and isinstance(value, int):
                self._head += integer(1, value)
            elif number == 8 and isinstance(value, memoryview) and _first_text(value, 1) != DOMAIN:
                self._head += message(8, bytes(value))
            elif number == 7 and isinstance(value, memoryview):
                nodes += self._read_body(value)
        return nodes

    def _read_body(self, body: memoryview) -> list[_Node]:
        nodes: list[_Node] = []
        for number, value in fields(body):
            if not isinstance(value, memoryview):
                continue
            if number == 1:
                nodes.append(_node(value))
            elif number == 5:
                self._weights[_first_text(value, 8)] = bytes(value)
            elif number in (11, 12):
                (self._inputs if number == 11 else self._outputs).append(_first_text(value, 1))
        return nodes

    def _cut(self, nodes: Sequence[_Node]) -> list[_Segment]:
        depth = dict.fromkeys([*self._inputs, *self._weights, ""], 0)
        segments = [_Segment()]
        for node in nodes:
            missing = [name for name in node.inputs if name not in depth]
            if missing:
                raise BundleError(f"a node reads '{missing[0]}' before it is made")
            own = max((depth[name] for name in node.inputs), default=0)
            custom = node.domain == DOMAIN
            if custom and any(name in self._weights for name in node.inputs):
                raise BundleError(f"edgeml.{node.op} reads a constant of the graph, which the NumPy path does not do")
            while len(segments) <= own + custom:
                segments.append(_Segment())
            (segments[own].operators if custom else segments[own].nodes).append(node)
            depth.update(dict.fromkeys(node.outputs, own + custom))
        wanted = set(self._outputs)
        for segment in reversed(segments):
            wanted |= {name for node in segment.operators for name in node.inputs if name}
            made = {name for node in segment.nodes for name in node.outputs if name}
            segment.outputs = sorted(made & wanted)
            segment.inputs = sorted({name for node in segment.nodes for name in node.inputs if name} - made - self._weights.keys())
            wanted |= set(segment.inputs)
        return segments

    def _model(self, segment: _Segment, tensors: Tensors) -> bytes:
        used = sorted({name for node in segment.nodes for name in node.inputs} & self._weights.keys())
        body = b"".join(message(1, node.raw) for node in segment.nodes) + text(2, "segment")
        body += b"".join(message(5, self._weights[name]) for name in used)
        body += b"".join(message(11, untyped_value(name, tensors[name].dtype.name)) for name in segment.inputs)
        body += b"".join(message(12, untyped_value(name)) for name in segment.outputs)
        return self._head + message(7, body)


def _node(data: memoryview) -> _Node:
    node = _Node(bytes(data))
    for number, value in fields(data):
        if isinstance(value, memoryview):
            if number in (1, 2):
                (node.inputs if number == 1 else node.outputs).append(bytes(value).decode("utf-8"))
            elif number == 4:
                node.op = bytes(value).decode("utf-8")
            elif number == 7:
                node.domain = bytes(value).decode("utf-8")
            elif number == 5:
                name = _first_text(value, 1)
                node.attributes[name] = next((_number(n, v) for n, v in fields(value) if n in (2, 3)), None)
    return node


def _number(number: int, value: int | memoryview) -> int | float:
    """An attribute's integer (two's complement), or float."""
    if isinstance(value, memoryview):
        return float(struct.unpack("<f", value)[0])
    return value - (1 << 64) if value >> 63 else value


def _first_text(data: memoryview, wanted: int) -> str:
    return next((bytes(value).decode("utf-8") for number, value in fields(data) if number == wanted and isinstance(value, memoryview)), "")
