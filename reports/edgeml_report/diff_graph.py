"""ONNX graphs opened up, so that one sees what is inside a stage: more outputs, one operator alone, one layer of another graph.

A *place* is a tensor whose error is worth knowing. In a text model's trunk it is what an operator of the domain `edgeml` makes: those
hold the weights. In a network for images it is what a layer makes: a convolution or a product with constant weights, and the
activations and rounding behind it that nobody else reads. So int8 keeps its own arithmetic, for onnxruntime joins a layer with the
rounding that follows, and the k-th layer of a rounded graph says the same as the k-th of the one it came from.

`exchanged` makes a graph of two: all of the first, and of the second one layer with what leads to it from the layers before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from edgeml.errors import BundleError
from edgeml.graph_bytes import integer, message, text, untyped_value
from edgeml.graph_cost import fields

__all__ = ["Graph", "Node", "Operator", "exchanged", "layers", "logits", "operators"]

DOMAIN = "edgeml"
LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
ROUNDED = {"QuantizeLinear", "DequantizeLinear"}
PASSED = ROUNDED | {"Clip", "Elu", "HardSwish", "LeakyRelu", "Relu"}
FINAL = {"Sigmoid", "Softmax"}
#: Inputs of our operators that are whole numbers; all others are float32.
WHOLE = {("PagedExperts", 1)}
_SUBGRAPHS = (6, 11)  # fields of an attribute


@dataclass(frozen=True)
class Node:
    """One operator; `rest` are the fields beside names of inputs and outputs, `numbers` its whole-number attributes."""

    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rest: bytes
    numbers: Mapping[str, int]
    nested: bool = False

    def encode(self) -> bytes:
        """A NodeProto."""
        return b"".join(text(1, name) for name in self.inputs) + b"".join(text(2, name) for name in self.outputs) + self.rest


@dataclass(frozen=True)
class Graph:
    """A model in parts. `head`: what stands beside the graph, `rest`: what stands in it beside nodes, weights and outputs."""

    head: bytes
    opsets: Mapping[str, int]
    nodes: tuple[Node, ...]
    weights: Mapping[str, bytes]
    inputs: tuple[str, ...]
    outputs: Mapping[str, bytes]
    rest: bytes

    @classmethod
    def parse(cls, data: bytes, where: str) -> Graph:
        """Raises `BundleError`, which begins with `where`, for bytes that are no model."""
        try:
            return _model(data)
        except (IndexError, UnicodeDecodeError):
            raise BundleError(f"{where}: this is no ONNX graph, or a damaged one") from None

    def encode(self, outputs: Iterable[str] = ()) -> bytes:
        """The model, these float or whole tensors among its outputs as well."""
        more = [name for name in dict.fromkeys(outputs) if name not in self.outputs]
        made = [*self.outputs.values(), *(untyped_value(name) for name in more)]
        body = [message(1, node.encode()) for node in self.nodes] + [message(5, value) for value in self.weights.values()]
        body += [self.rest, *(message(12, value) for value in made)]
        return self.head + message(7, b"".join(body))

    def readers(self, name: str) -> list[Node]:
        """The nodes that read a tensor."""
        return [node for node in self.nodes if name in node.inputs]

    def maker(self, name: str) -> Node | None:
        """The node that makes a tensor, None for inputs and weights."""
        return next((node for node in self.nodes if name in node.outputs), None)


@dataclass(frozen=True)
class Operator:
    """One of our operators in a trunk: `page` or `site` where its weights are, `output` the place, `state` the sum that takes it up."""

    op: str
    number: int
    inputs: tuple[str, ...]
    output: str
    state: str | None
    alone: bytes = field(repr=False)


def operators(graph: Graph) -> list[Operator]:
    """Those with weights of their own, in the order they run. `alone` is a model of the operator only: in_0, in_1 ... -> out."""
    found = []
    for node in graph.nodes:
        number = node.numbers.get("site", node.numbers.get("page"))
        if node.domain == DOMAIN and number is not None and node.inputs:
            readers = graph.readers(node.outputs[0])
            state = readers[0].outputs[0] if len(readers) == 1 and readers[0].op == "Add" else None
            names = tuple(f"in_{place}" if name else "" for place, name in enumerate(node.inputs))
            inputs = [untyped_value(name, "int64" if (node.op, at) in WHOLE else "float32") for at, name in enumerate(names) if name]
            only = message(1, replace(node, inputs=names, outputs=("out",)).encode()) + text(2, "alone")
            only += b"".join(message(11, value) for value in inputs) + message(12, untyped_value("out"))
            found.append(Operator(node.op, number, node.inputs, node.outputs[0], state, graph.head + message(7, only)))
    return found


def layers(graph: Graph) -> list[tuple[str, ...]]:
    """The place of each layer in the order they run, with other names of the same tensor behind it; none where graphs are nested."""
    if any(node.nested for node in graph.nodes):
        return []
    constant = set(graph.weights)
    for node in graph.nodes:
        if all(name in constant for name in node.inputs):
            constant |= set(node.outputs)
    return [
        _followed(graph, node.outputs[0])
        for node in graph.nodes
        if node.op in LAYERS and not node.domain and len(node.inputs) > 1 and node.inputs[1] in constant and node.inputs[0] not in constant
    ]


def _followed(graph: Graph, name: str) -> tuple[str, ...]:
    while name not in graph.outputs:
        readers = graph.readers(name)
        alike = len({node.op for node in readers}) == 1 and readers[0].op in PASSED
        if not alike or (len(readers) > 1 and readers[0].op not in ROUNDED):
            break
        if len(readers) > 1:  # rounded once, read back by several
            return tuple(node.outputs[0] for node in readers) if readers[0].op == "DequantizeLinear" else (name,)
        name = readers[0].outputs[0]
    return (name,)


def logits(graph: Graph, answer: str) -> str:
    """What a head's last sigmoid or softmax reads; the answer itself where it ends with another operator."""
    node = graph.maker(answer)
    return node.inputs[0] if node is not None and node.op in FINAL else answer


def exchanged(base: Graph, donor: Graph, places: Sequence[tuple[str, ...]], others: Sequence[tuple[str, ...]], layer: int) -> Graph:
    """`base` with that layer, and what leads to it from the layers before it, of `donor`.

    `places` and `others` are the `layers` of both, as many. Raises `BundleError` where the two are of other versions of ONNX.
    """
    for domain, version in donor.opsets.items():
        if base.opsets.get(domain, version) != version:
            raise BundleError(f"graphs of ONNX version {base.opsets[domain]} and {version} of '{domain or 'ai.onnx'}' cannot be joined")
    taken, alias = places[layer][0], dict.fromkeys(places[layer], places[layer][0])
    known = {name: place[0] for place, other in zip(places[:layer], others[:layer], strict=True) for name in other}
    known |= {name: name for name in donor.inputs if name not in donor.weights} | {"": ""}
    kept = [
        replace(
            node,
            inputs=tuple(alias.get(name, name) for name in node.inputs),
            outputs=tuple(f"left/{name}" if name in alias else name for name in node.outputs),
        )
        for node in base.nodes
    ]
    brought = [
        replace(
            node,
            inputs=tuple(known.get(name, f"other/{name}") for name in node.inputs),
            outputs=tuple(taken if name == others[layer][0] else f"other/{name}" if name else "" for name in node.outputs),
        )
        for node in donor.nodes
    ]
    nodes = _needed((*kept, *brought), base.outputs)
    used = {name for node in nodes for name in node.inputs}
    # Of a field that is given twice, the last counts: so a tensor gets another name.
    weights = dict(base.weights) | {f"other/{name}": value + text(8, f"other/{name}") for name, value in donor.weights.items()}
    head = base.head + b"".join(message(8, text(1, d) + integer(2, v)) for d, v in donor.opsets.items() if d not in base.opsets)
    kept_weights = {name: value for name, value in weights.items() if name in used or name in base.inputs}
    return replace(base, head=head, opsets={**donor.opsets, **base.opsets}, nodes=tuple(nodes), weights=kept_weights)


def _needed(nodes: Sequence[Node], outputs: Iterable[str]) -> list[Node]:
    """The nodes that outputs depend on, each after those that it reads from."""
    makers = {name: node for node in nodes for name in node.outputs if name}
    ordered: dict[int, Node] = {}
    waiting = [makers[name] for name in outputs if name in makers]
    while waiting:
        node = waiting[-1]
        before = [makers[name] for name in node.inputs if name in makers and id(makers[name]) not in ordered]
        waiting += before
        if not before:
            ordered[id(waiting.pop())] = node
    return list(ordered.values())


def _model(data: bytes) -> Graph:
    head, body, opsets = b"", memoryview(b""), {}
    for number, value in fields(memoryview(data)):
        if number == 7 and isinstance(value, memoryview):
            body = value
            continue
        head += _field(number, value)
        if number == 8 and isinstance(value, memoryview):
            opsets[_text(value, 1)] = next((found for place, found in fields(value) if place == 2 and isinstance(found, int)), 0)
    nodes: list[Node] = []
    weights: dict[str, bytes] = {}
    inputs: list[str] = []
    outputs: dict[str, bytes] = {}
    rest = b""
    for number, value in fields(body):
        if number == 1 and isinstance(value, memoryview):
            nodes.append(_node(value))
        elif number == 5 and isinstance(value, memoryview):
            weights[_text(value, 8)] = bytes(value)
        elif number == 12 and isinstance(value, memoryview):
            outputs[_text(value, 1)] = bytes(value)
        elif number != 13:  # types of inner values would no longer hold
            rest += _field(number, value)
            if number == 11 and isinstance(value, memoryview):
                inputs.append(_text(value, 1))
    return Graph(head, opsets, tuple(nodes), weights, tuple(inputs), outputs, rest)


def _node(data: memoryview) -> Node:
    names: dict[int, list[str]] = {1: [], 2: [], 4: [""], 7: [""]}
    rest, numbers, nested = b"", dict[str, int](), False
    for number, value in fields(data):
        if number in names and isinstance(value, memoryview):
            names[number].append(bytes(value).decode("utf-8"))
        if number not in (1, 2, 3):  # names of nodes would no longer be unique
            rest += _field(number, value)
        if number == 5 and isinstance(value, memoryview):
            own = list(fields(value))
            nested = nested or any(place in _SUBGRAPHS for place, _ in own)
            numbers |= {_text(value, 1): found for place, found in own if place == 3 and isinstance(found, int)}
    return Node(names[4][-1], names[7][-1], tuple(names[1]), tuple(names[2]), rest, numbers, nested)


def _field(number: int, value: int | memoryview) -> bytes:
    return integer(number, value) if isinstance(value, int) else message(number, bytes(value))


def _text(data: memoryview, wanted: int) -> str:
    """A field of text; of one that is given twice, the last counts."""
    found = [value for number, value in fields(data) if number == wanted and isinstance(value, memoryview)]
    return bytes(found[-1]).decode("utf-8") if found else ""
