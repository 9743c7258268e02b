"""Stage graphs of a text mixture, written node by node: what is exported is what stands here, and it reads in Netron.

Every graph imports opset 17 and, where it needs them, the three operators of the domain `edgeml`: `EmbedRows`, `Linear` and
`PagedExperts`. They name a page or a site by an integer attribute and hold no weights; routers, norms, positions and heads are
small f32 initialisers. Shapes: B batch, T tokens, d hidden, H heads, S sites, E experts, k experts a token.

    embed            ids, types (B, T) -> hidden0 (B, T, d)
    router_<task>    hidden0 -> bias (B, S, E)
    trunk            hidden0, mask (B, T), bias -> hidden (B, T, d), ids_0 .. ids_{S-1} (B, T, k)
    head_<task>      hidden, mask -> scores (B, labels), or vector (B, d)

Rewrites against the torch module, all exact up to rounding: the attention's scale is folded into the query rows of `qkv` (see
`scaled_qkv`), the bias of a mixture's output belongs to the shared expert's page (see `assemble`), and a padded key gets a large
negative number instead of minus infinity. Padding chooses no expert, so it brings no page in.

Nothing tells onnxruntime the shapes that our operators give, on purpose: where it knows them it fuses an addition and the norm
after it into `SkipLayerNormalization`, which on its CPU provider takes 154 us for 64 x 384 values where the two take 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edgeml_export.encoder import Encoder, FeedForward, Layer, MultiTaskModel
from edgeml_export.upcycle import MultiTaskMixture

__all__ = ["dense_graph", "embed_graph", "head_graph", "numpy_of", "router_graph", "scaled_qkv", "trunk_graph", "vector_graph"]

OPSET, IR_VERSION, DOMAIN = 17, 8, "edgeml"
PADDED = 1e30  # exp(-1e30) is 0, and unlike infinity it times 0 is 0
ABSENT, NEVER = -3e38, 3.4e38  # a logit below the first was masked with minus infinity; every logit is below the second

_FLOAT, _INT64 = TensorProto.FLOAT, TensorProto.INT64


def numpy_of(tensor: Tensor) -> NDArray[np.float32]:
    """A parameter as a contiguous float32 array."""
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())


class Graph:
    """Collects nodes and initialisers; `scope` prefixes the names of what is added."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.scope = ""
        self._nodes: list[onnx.NodeProto] = []
        self._initialisers: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: NDArray[Any], shared: bool = False) -> str:
        """Add an initialiser; a `shared` one exists once for all scopes."""
        full = name if shared else self.scope + name
        self._initialisers.setdefault(full, numpy_helper.from_array(value, full))
        return full

    def integers(self, *values: int) -> str:
        return self.constant("int." + "_".join(map(str, values)), np.array(values, np.int64), shared=True)

    def scalar(self, value: float) -> str:
        return self.constant(f"float.{value:g}", np.array(value, np.float32), shared=True)

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, whose name is returned: `name` as it is, or a fresh one in this scope."""
        return self.split(kind, *inputs, names=[name or f"{self.scope}{kind}_{len(self._nodes)}"], **attributes)[0]

    def split(self, kind: str, *inputs: str, names: Sequence[str], domain: str = "", **attributes: Any) -> Sequence[str]:
        """Add a node with several outputs."""
        self._nodes.append(helper.make_node(kind, inputs, names, f"{self.scope}{kind}.{len(self._nodes)}", domain=domain, **attributes))
        return names

    def ours(self, kind: str, *inputs: str, **attributes: int | float) -> str:
        """Add one of our operators."""
        return self.split(kind, *inputs, names=[f"{self.scope}{kind}_{len(self._nodes)}"], domain=DOMAIN, **attributes)[0]

    def norm(self, x: str, norm: nn.LayerNorm, name: str, out: str | None = None) -> str:
        scale, shift = self.constant(f"{name}.weight", numpy_of(norm.weight)), self.constant(f"{name}.bias", numpy_of(norm.bias))
        return self.op("LayerNormalization", x, scale, shift, name=out, axis=-1, epsilon=norm.eps)

    def finish(self, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> bytes:
        """The model's bytes, equal for equal content."""
        graph = helper.make_graph(self._nodes, self.name, inputs, outputs, list(self._initialisers.values()))
        domains = {node.domain for node in self._nodes}
        opsets = [helper.make_opsetid(domain, OPSET if domain == "" else 1) for domain in sorted(domains | {""})]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgeml")
        return cast(bytes, model.SerializeToString(deterministic=True))


def _floats(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _FLOAT, shape)


def _integers(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _INT64, shape)


def embed_graph(encoder: Encoder, page: int, max_tokens: int) -> bytes:
    """Stage `embed`: word rows from a page, plus positions (the first `max_tokens`) and token types, normalised."""
    g = Graph("embed")
    rows = g.ours("EmbedRows", "ids", page=page)
    _embedded(g, encoder, rows, max_tokens)
    hidden = encoder.config.hidden
    return g.finish(_token_inputs(), [_floats("hidden0", "batch", "tokens", hidden)])


def _token_inputs() -> list[onnx.ValueInfoProto]:
    return [_integers("ids", "batch", "tokens"), _integers("types", "batch", "tokens")]


def _embedded(g: Graph, encoder: Encoder, rows: str, max_tokens: int) -> str:
    places = g.constant("positions", numpy_of(encoder.positions.weight[:max_tokens]))
    tokens = g.op("Shape", "ids", start=1, end=2)
    here = g.op("Slice", places, g.integers(0), tokens)
    kind = g.op("Gather", g.constant("types.weight", numpy_of(encoder.types.weight)), "types", axis=0)
    return g.norm(g.op("Add", g.op("Add", rows, here), kind), encoder.norm, "norm", out="hidden0")


def router_graph(name: str, bias: NDArray[np.float32], hidden: int) -> bytes:
    """Stage `router_<task>`: the task's learned bias (S, E), once for every sample."""
    g = Graph(name)
    batch = g.op("Shape", "hidden0", start=0, end=1)
    shape = g.op("Concat", batch, g.integers(*bias.shape), axis=0)
    g.op("Expand", g.constant("task_bias", bias[None]), shape, name="bias")
    return g.finish([_floats("hidden0", "batch", "tokens", hidden)], [_floats("bias", "batch", *bias.shape)])


def scaled_qkv(layer: Layer) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight (3d, d) and bias (3d,) of the joint projection, its query rows divided by the square root of a head's width."""
    weight, bias = numpy_of(layer.qkv.weight).copy(), numpy_of(layer.qkv.bias).copy()
    hidden = weight.shape[1]
    scale = np.float32((hidden // layer.heads) ** -0.5)
    weight[:hidden] *= scale
    bias[:hidden] *= scale
    return weight, bias


def trunk_graph(model: MultiTaskMixture, linear_pages: Sequence[tuple[int, int]]) -> bytes:
    """Stage `trunk`. `linear_pages` are the pages of each layer's qkv and output projection; site number = layer number."""
    g, config, hidden = Graph("trunk"), model.config, model.encoder.config.hidden
    sites = model.sites()
    padding = _padding(g)
    real = g.op("Greater", "mask", g.scalar(0.0))
    least = g.op("Unsqueeze", g.op("Where", real, g.scalar(ABSENT), g.scalar(NEVER)), g.integers(2))
    routers = np.stack([numpy_of(site.router.bias) for site in sites])[None]
    offset = g.op("Add", "bias", g.constant("router.bias", routers))
    offsets = g.split("Split", offset, names=[f"offset_{site}" for site in range(len(sites))], axis=1)
    x = "hidden0"
    for number, (layer, site, pages) in enumerate(zip(model.layers(), sites, linear_pages, strict=True)):
        g.scope = f"layer.{number}/"
        qkv = g.ours("Linear", x, page=pages[0])
        mixed = _attention(g, layer, qkv, padding, hidden)
        attended = g.ours("Linear", mixed, page=pages[1])
        x = g.norm(g.op("Add", x, attended), layer.norm1, "norm1")
        logits = g.op("Add", g.op("MatMul", x, g.constant("router.weight", numpy_of(site.router.weight.T))), offsets[number])
        ids, weights = _choose(g, logits, least, config.top_k, f"ids_{number}")
        out = g.ours("PagedExperts", x, ids, weights, site=number)
        if not config.shared:  # no shared expert that could carry it
            out = g.op("Add", out, g.constant("down.bias", numpy_of(site.down.bias)))
        x = g.norm(g.op("Add", x, out), layer.norm2, "norm2", out="hidden" if number == len(sites) - 1 else None)
    inputs = [
        _floats("hidden0", "batch", "tokens", hidden),
        _floats("mask", "batch", "tokens"),
        _floats("bias", "batch", len(sites), config.experts),
    ]
    chosen = [_integers(f"ids_{site}", "batch", "tokens", config.top_k) for site in range(len(sites))]
    return g.finish(inputs, [_floats("hidden", "batch", "tokens", hidden), *chosen])


def _padding(g: Graph) -> str:
    """(B, 1, 1, T): 0 for a real token, a large negative number for padding."""
    return g.op("Unsqueeze", g.op("Mul", g.op("Sub", "mask", g.scalar(1.0)), g.scalar(PADDED)), g.integers(1, 2))


def _attention(g: Graph, layer: Layer, qkv: str, padding: str, hidden: int) -> str:
    """qkv (B, T, 3d), queries already scaled -> the heads' mixtures of values (B, T, d)."""
    heads, width = layer.heads, hidden // layer.heads
    by_head = g.op("Transpose", g.op("Reshape", qkv, g.integers(0, 0, 3 * heads, width)), perm=[0, 2, 1, 3])
    q, k, v = g.split("Split", by_head, names=[g.scope + part for part in ("query", "key", "value")], axis=1)
    scores = g.op("Add", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), padding)
    mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), v)
    return g.op("Reshape", g.op("Transpose", mixed, perm=[0, 2, 1, 3]), g.integers(0, 0, hidden))


def _choose(g: Graph, logits: str, least: str, top_k: int, name: str) -> tuple[str, str]:
    """Logits (B, T, E) -> ids (B, T, k) and weights 2 sigmoid(logit); -1 and 0 where the logit is below `least` (B, T, 1)."""
    values, indices = g.split("TopK", logits, g.integers(top_k), names=[g.scope + "chosen", g.scope + "indices"], axis=-1)
    absent = g.op("Less", values, least)
    ids = g.op("Where", absent, g.constant("int.none", np.array(-1, np.int64), shared=True), indices, name=name)
    double = g.op("Where", absent, g.scalar(0.0), g.scalar(2.0))
    return ids, g.op("Mul", g.op("Sigmoid", values), double)


def head_graph(name: str, head: nn.Linear) -> bytes:
    """Stage `head_<task>`: mean of the real tokens, a linear layer, softmax."""
    g = Graph(name)
    logits = _classified(g, head)
    g.op("Softmax", logits, name="scores", axis=-1)
    return g.finish(_head_inputs(head.in_features), [_floats("scores", "batch", head.out_features)])


def vector_graph(name: str, head: nn.Linear) -> bytes:
    """Stage `head_embed`: mean of the real tokens, a linear layer, length 1."""
    g = Graph(name)
    g.op("LpNormalization", _classified(g, head), name="vector", axis=-1, p=2)
    return g.finish(_head_inputs(head.in_features), [_floats("vector", "batch", head.out_features)])


def _head_inputs(hidden: int) -> list[onnx.ValueInfoProto]:
    return [_floats("hidden", "batch", "tokens", hidden), _floats("mask", "batch", "tokens")]


def _classified(g: Graph, head: nn.Linear) -> str:
    total = g.op("Squeeze", g.op("MatMul", g.op("Unsqueeze", "mask", g.integers(1)), "hidden"), g.integers(1))
    count = g.op("Max", g.op("ReduceSum", "mask", g.integers(1), keepdims=1), g.scalar(1.0))
    out = g.op("MatMul", g.op("Div", total, count), g.constant("head.weight", numpy_of(head.weight.T)))
    return out if head.bias is None else g.op("Add", out, g.constant("head.bias", numpy_of(head.bias)))


def dense_graph(model: MultiTaskModel, max_tokens: int, task: str | None = None) -> bytes:
    """A dense model as one plain f32 graph, for comparisons: ids, types, mask -> hidden, or a task's scores."""
    g, encoder = Graph("dense"), model.encoder
    hidden = encoder.config.hidden
    rows = g.op("Gather", g.constant("words", numpy_of(encoder.words.weight)), "ids", axis=0)
    x = _embedded(g, encoder, rows, max_tokens)
    padding = _padding(g)
    for number, layer in enumerate(cast(Sequence[Layer], encoder.layers)):
        g.scope = f"layer.{number}/"
        qkv, feed = scaled_qkv(layer), cast(FeedForward, layer.feed_forward)
        mixed = _attention(g, layer, _plain(g, x, "qkv", *qkv), padding, hidden)
        attended = _plain(g, mixed, "output", numpy_of(layer.output.weight), numpy_of(layer.output.bias))
        x = g.norm(g.op("Add", x, attended), layer.norm1, "norm1")
        up = _plain(g, x, "up", numpy_of(feed.up.weight), numpy_of(feed.up.bias))
        erf = g.op("Erf", g.op("Div", up, g.scalar(2**0.5)))
        active = g.op("Mul", g.op("Mul", up, g.op("Add", erf, g.scalar(1.0))), g.scalar(0.5))
        down = _plain(g, active, "down", numpy_of(feed.down.weight), numpy_of(feed.down.bias))
        x = g.norm(g.op("Add", x, down), layer.norm2, "norm2", out="hidden" if number == len(encoder.layers) - 1 else None)
    inputs = [*_token_inputs(), _floats("mask", "batch", "tokens")]
    if task is None:
        return g.finish(inputs, [_floats("hidden", "batch", "tokens", hidden)])
    g.scope = ""
    head = cast(nn.Linear, model.heads[task])
    g.op("Softmax", _classified(g, head), name="scores", axis=-1)
    return g.finish(inputs, [_floats("scores", "batch", head.out_features)])


def _plain(g: Graph, x: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> str:
    product = g.op("MatMul", x, g.constant(f"{name}.weight", np.ascontiguousarray(weight.T)))
    return g.op("Add", product, g.constant(f"{name}.bias", bias))
