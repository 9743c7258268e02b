"""Made mixtures: seeded random text models as bundles, with nothing but NumPy. They know nothing, but they page like real ones.

    make_mixture(path, recipe=TOY, **changes) -> bundle id

    make_mixture("toy.edgeml")                            # about 230 kB, two layers of 8 experts, answers in milliseconds
    make_mixture("toy.edgeml", seed=7, experts=4, gated=True, expert_type=WeightType.INT8)    # any field of `Recipe`
    make_mixture("big.edgeml", LARGE)                     # 256.5 MiB of routed experts, written in seconds in little memory
    make_cnn("digits.edgeml")                             # networks for images: see `made_cnn`

Equal arguments give equal bytes. Tasks: those of `Recipe.tasks` (by default `weather`: sun, rain, snow, fog; `mood`: good, bad;
all of the domain `made`), and `vector`, a sentence embedding. Stages `embed`, `router_TASK`, `trunk` (with the outputs ids_0 ...
where `ids` is true), `head_TASK`. A layer is

    h = h + Linear(norm(h))                                                        (left out without `mixing`)
    n = norm(h); values, ids = top-k of (n router + bias); weights = sigmoid(values); h = h + PagedExperts(n, ids, weights)

where padding tokens and experts whose bias is minus infinity become id -1 with weight 0. Tokens meet only in the router's and the
head's mean. Experts are drawn as packed tiles directly, page by page as the writer asks for them: no float copy ever exists.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml import __version__
from edgeml.bundle_writer import PageSource, write_bundle
from edgeml.errors import UsageError
from edgeml.graph_bytes import Attribute, Node, TensorType, graph
from edgeml.kernels import pack_linear, pack_matrix, pack_rows
from edgeml.layout import TILE_COLS, TILE_ROWS, Activation, Matrix, PageKind, WeightType, expert_layout
from edgeml.made_cnn import make_cnn

__all__ = ["LARGE", "TOY", "Recipe", "make_cnn", "make_mixture", "tokenizer_json"]

Floats = NDArray[np.float32]
OPSETS = {"": 17, "edgeml": 1}
EPSILON = 1e-5
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_MARKS = "abcdefghijklmnopqrstuvwxyz0123456789"
_WORDS = (
    "the an and or not is was are be to of in on at for with from by it this that you we they my your our have has do does what when "
    "where who why how can will would should much many more most very good bad new old big small hot cold warm rain rainy sun sunny "
    "snow fog wind storm cloud day night morning evening today tomorrow week year time money bank card pay price cost buy sell loan "
    "doctor nurse pain heart blood head court law judge contract claim car train road city home house school book music film food "
    "water bread coffee tea dog cat bird tree river sea sky light dark open close go come take give make see know think say tell ask "
    "like love hate happy sad angry glad sorry please thank yes no"
)


@dataclass(frozen=True)
class Recipe:
    """Sizes of a made mixture: `layers` sites of `experts` routed (`top_k` a token) and `shared` experts, hidden -> width -> hidden.

    `hidden` and `width` are multiples of 32. `skew` is the spread of each task's own preference for experts against a spread of 1
    by token. `per_page` experts share a page. `gated` experts have three matrices.
    """

    tasks: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"weather": ("sun", "rain", "snow", "fog"), "mood": ("good", "bad")})
    layers: int = 2
    hidden: int = 64
    experts: int = 8
    width: int = 64
    top_k: int = 2
    shared: int = 1
    vocabulary: int = 256
    max_tokens: int = 64
    expert_type: WeightType = WeightType.INT4
    dense_type: WeightType = WeightType.INT8
    activation: Activation = Activation.GELU
    gated: bool = False
    expert_bias: bool = True
    mixing: bool = True
    ids: bool = True
    per_page: int = 1
    skew: float = 1.0
    seed: int = 0


TOY = Recipe()
LARGE = Recipe(layers=8, hidden=512, experts=57, width=1024, vocabulary=1024, expert_bias=False, ids=False, skew=0.6)


def make_mixture(path: str | os.PathLike[str], recipe: Recipe = TOY, **changes: Any) -> str:
    """Write the mixture that `recipe`, with fields replaced by `changes`, describes; returns the bundle's identity.

    Raises `UsageError` for sizes that do not fit each other, `DeviceError` when the disk is full or fails.
    """
    recipe = replace(recipe, **changes)
    _check(recipe)
    maker = _Maker(recipe)
    pages, manifest = maker.make()
    return write_bundle(path, pages, manifest)


def tokenizer_json(vocabulary: int) -> bytes:
    """A `tokenizer.json` of `vocabulary` entries: lower case, common words, `w0`, `w1` ... as fillers, else single letters."""
    pieces = [*SPECIAL, *_MARKS, *(f"##{mark}" for mark in _MARKS), *".,!?'-"]
    pieces += _WORDS.split()
    pieces += [f"w{number}" for number in range(max(vocabulary - len(pieces), 0))]
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {piece: number for number, piece in enumerate(pieces[:vocabulary])},
    }
    document: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": None,
        "model": model,
    }
    return json.dumps(document, separators=(",", ":")).encode("utf-8")


def _check(recipe: Recipe) -> None:
    for name in ("hidden", "width"):
        size = getattr(recipe, name)
        if size < TILE_COLS or size % TILE_COLS:
            raise UsageError(f"a made mixture's {name} must be a multiple of {TILE_COLS}, not {size}")
    if not 1 <= recipe.top_k <= recipe.experts:
        raise UsageError(f"top_k must be from 1 to the {recipe.experts} experts, not {recipe.top_k}")
    if recipe.vocabulary < len(SPECIAL) + 2 * len(_MARKS):
        raise UsageError(f"a vocabulary of {recipe.vocabulary} has no room for the letters; it needs {len(SPECIAL) + 2 * len(_MARKS)}")
    if min(recipe.layers, recipe.per_page) < 1 or recipe.shared < 0:
        raise UsageError("a made mixture needs at least one layer and one expert a page")


class _Drawing:
    """A graph while it is drawn: tensors are named by number, constants become initializers."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.initializers: dict[str, NDArray[np.generic]] = {}

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.initializers.setdefault(name, value)
        return name

    def integers(self, *values: int) -> str:
        return self.constant("i_" + "_".join(map(str, values)), np.array(values, np.int64))

    def add(self, op: str, *inputs: str, out: str = "", domain: str = "", **attributes: Attribute) -> str:
        name = out or f"t{len(self.nodes)}"
        self.nodes.append(Node(op, inputs, [name], attributes, domain))
        return name

    def norm(self, x: str, width: int) -> str:
        return self.add("LayerNormalization", x, self.constant("ones", np.ones(width, np.float32)), axis=-1, epsilon=EPSILON)

    def mean(self, x: str) -> str:
        """The mean over real tokens: x (B, T, d) -> (B, d)."""
        total = self.add("ReduceSum", self.add("Mul", x, self.add("Unsqueeze", "mask", self.integers(-1))), self.integers(1), keepdims=0)
        count = self.add("ReduceSum", "mask", self.integers(1), keepdims=1)
        return self.add("Div", total, self.add("Max", count, self.constant("one", np.array(1, np.float32))))

    def page(self, inputs: Mapping[str, TensorType], outputs: Mapping[str, TensorType]) -> PageSource:
        return PageSource(PageKind.ONNX, graph(self.nodes, inputs, outputs, self.initializers, OPSETS))


_HIDDEN: TensorType = ("float32", ("B", "T", "d"))
_MASK: TensorType = ("float32", ("B", "T"))


class _Maker:
    """Draws weights, pages and the manifest of one recipe. Every tensor has a random stream of its own, named by its place."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.pages: list[PageSource] = []
        self.stages: list[dict[str, Any]] = []
        d, layers, experts = recipe.hidden, recipe.layers, recipe.experts
        self.table = self._normal(0, (recipe.vocabulary, d), 1.0)
        self.routers = self._normal(1, (layers, d, experts), d**-0.5)
        self.preferences = {task: self._normal(2, (layers, experts), recipe.skew, number) for number, task in enumerate(recipe.tasks)}

    def make(self) -> tuple[list[PageSource], dict[str, Any]]:
        recipe = self.recipe
        rows = self._add(PageSource(PageKind.ROWS, pack_rows(self.table, WeightType.INT8), self._one(WeightType.INT8, *self.table.shape)))
        tokenizer = self._add(PageSource(PageKind.TOKENIZER, tokenizer_json(recipe.vocabulary)))
        linears = [self._linear(layer) for layer in range(recipe.layers)] if recipe.mixing else []
        shared = [self._experts(layer, 1, recipe.shared) for layer in range(recipe.layers)]
        routed = [self._experts(layer, 0, recipe.experts) for layer in range(recipe.layers)]
        self._embed(rows)
        self._trunk(linears)
        self._head("vector", None)
        tasks = [self._task("vector", (), tokenizer)]
        for number, (task, labels) in enumerate(recipe.tasks.items()):
            self._router(task, number)
            self._head(task, len(labels))
            tasks.append(self._task(task, labels, tokenizer))
        sites = [self._site(layer, routed[layer], shared[layer]) for layer in range(recipe.layers)]
        return self.pages, self._manifest(sites, tasks)

    def _normal(self, kind: int, shape: tuple[int, ...], spread: float, *place: int) -> Floats:
        rng = np.random.default_rng([self.recipe.seed, kind, *place])
        return (rng.standard_normal(shape) * spread).astype(np.float32)

    def _add(self, page: PageSource) -> int:
        self.pages.append(page)
        return len(self.pages) - 1

    @staticmethod
    def _one(type: WeightType, rows: int, cols: int) -> tuple[Matrix, ...]:
        return (Matrix(type, rows, cols),)

    def _linear(self, layer: int) -> int:
        d = self.recipe.hidden
        weights, bias = self._normal(3, (d, d), 0.5 * d**-0.5, layer), self._normal(4, (d,), 0.1, layer)
        data, matrices = pack_linear(weights, bias, self.recipe.dense_type)
        return self._add(PageSource(PageKind.LINEAR, data, matrices))

    def _experts(self, layer: int, shared: int, count: int) -> list[list[int]]:
        """Add the pages of a layer's routed or shared experts; returns `[page, sub]` of each."""
        recipe = self.recipe
        up, down = (recipe.width, recipe.hidden), (recipe.hidden, recipe.width)
        shapes = [up, up, down] if recipe.gated else [up, down]
        matrices = tuple(Matrix(recipe.expert_type, *shape, recipe.expert_bias) for shape in shapes)
        references = []
        for first in range(0, count, recipe.per_page):
            numbers = range(first, min(first + recipe.per_page, count))
            seeds = [[recipe.seed, 5, layer, shared, number] for number in numbers]
            page = self._add(PageSource(PageKind.EXPERT, _drawn_later(matrices, seeds), matrices, recipe.activation, len(numbers)))
            references += [[page, sub] for sub in range(len(numbers))]
        return references

    def _stage(self, name: str, drawing: _Drawing, inputs: dict[str, TensorType], outputs: dict[str, TensorType]) -> None:
        page = self._add(drawing.page(inputs, outputs))
        self.stages.append({"name": name, "page": page, "inputs": list(inputs), "outputs": list(outputs)})

    def _embed(self, rows: int) -> None:
        g = _Drawing()
        g.add("EmbedRows", "ids", out="hidden0", domain="edgeml", page=rows)
        self._stage("embed", g, {"ids": ("int64", ("B", "T"))}, {"hidden0": _HIDDEN})

    def _router(self, task: str, number: int) -> None:
        recipe, g = self.recipe, _Drawing()
        layers, experts, d = recipe.layers, recipe.experts, recipe.hidden
        by_text = self._normal(6, (d, layers * experts), 0.5 * d**-0.5, number)
        shift = g.add("MatMul", g.norm(g.mean("hidden0"), d), g.constant("by_text", by_text))
        preference = g.constant("by_task", self.preferences[task])
        g.add("Add", g.add("Reshape", shift, g.integers(-1, layers, experts)), preference, out="bias")
        self._stage(f"router_{task}", g, {"hidden0": _HIDDEN, "mask": _MASK}, {"bias": ("float32", ("B", layers, experts))})

    def _trunk(self, linears: Sequence[int]) -> None:
        recipe, g = self.recipe, _Drawing()
        padding = g.add("Unsqueeze", g.add("Equal", "mask", g.constant("zero", np.array(0, np.float32))), g.integers(-1))
        h = "hidden0"
        for layer in range(recipe.layers):
            if linears:
                h = g.add("Add", h, g.add("Linear", g.norm(h, recipe.hidden), domain="edgeml", page=linears[layer]))
            h = self._layer(g, h, layer, padding)
        outputs: dict[str, TensorType] = {"hidden": _HIDDEN}
        if recipe.ids:
            outputs |= {f"ids_{layer}": ("int64", ("B", "T", recipe.top_k)) for layer in range(recipe.layers)}
        bias: TensorType = ("float32", ("B", recipe.layers, recipe.experts))
        self._stage("trunk", g, {"hidden0": _HIDDEN, "mask": _MASK, "bias": bias}, outputs)

    def _layer(self, g: _Drawing, h: str, layer: int, padding: str) -> str:
        """One site: choose, forbid what is padding or masked, run the experts, add."""
        recipe = self.recipe
        n = g.norm(h, recipe.hidden)
        bias = g.add("Gather", "bias", g.integers(layer), axis=1)  # (B, 1, E)
        logits = g.add("Add", g.add("MatMul", n, g.constant(f"router_{layer}", self.routers[layer])), bias)
        values, chosen = f"values_{layer}", f"chosen_{layer}"
        g.nodes.append(Node("TopK", [logits, g.integers(recipe.top_k)], [values, chosen], {"axis": -1, "largest": 1, "sorted": 1}))
        off = g.add("Or", g.add("IsInf", values, detect_negative=1, detect_positive=0), padding)
        ids = g.add("Where", off, g.constant("nobody", np.array(-1, np.int64)), chosen, out=f"ids_{layer}")
        weights = g.add("Where", off, g.constant("zero", np.array(0, np.float32)), g.add("Sigmoid", values))
        y = g.add("PagedExperts", n, ids, weights, domain="edgeml", site=layer)
        return g.add("Add", h, y, out="hidden" if layer == recipe.layers - 1 else "")

    def _head(self, task: str, labels: int | None) -> None:
        d, g = self.recipe.hidden, _Drawing()
        pooled = g.norm(g.mean("hidden"), d)
        if labels is None:
            g.add("LpNormalization", pooled, out="vector", axis=-1, p=2)
            answer: dict[str, TensorType] = {"vector": ("float32", ("B", d))}
        else:
            place = list(self.recipe.tasks).index(task)
            weights = g.constant("weights", self._normal(7, (d, labels), 2 * d**-0.5, place))
            g.add("Softmax", g.add("MatMul", pooled, weights), out="scores", axis=-1)
            answer = {"scores": ("float32", ("B", labels))}
        self._stage(f"head_{task}", g, {"hidden": _HIDDEN, "mask": _MASK}, answer)

    def _task(self, name: str, labels: Sequence[str], tokenizer: int) -> dict[str, Any]:
        router = f"router_{name}" if labels else None
        return {
            "name": name,
            "domain": "made",
            "kind": "classification" if labels else "embedding",
            "pair": False,
            "labels": list(labels),
            "metric": "accuracy" if labels else None,
            "chance": None,
            "stages": {"embed": "embed", "router": router, "trunk": "trunk", "head": f"head_{name}"},
            "preprocess": {"kind": "text", "tokenizer": tokenizer, "max_tokens": self.recipe.max_tokens},
        }

    def _site(self, layer: int, routed: list[list[int]], shared: list[list[int]]) -> dict[str, Any]:
        return {
            "name": f"layer.{layer}",
            "hidden": self.recipe.hidden,
            "experts": routed,
            "shared": shared,
            "top_k": self.recipe.top_k,
            "scoring": "sigmoid",
            "bias_mode": "logits",
            "renormalised": False,
        }

    def _manifest(self, sites: list[dict[str, Any]], tasks: list[dict[str, Any]]) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "format": 1,
            "producer": {"name": "edgeml-runtime", "version": __version__},
            "model": {"family": "made", "hidden": recipe.hidden, "layers": recipe.layers, "width": recipe.width},
            "stages": self.stages,
            "sites": sites,
            "tasks": tasks,
            "usage": {task["name"]: self._usage(task["name"]) for task in tasks},
            "variants": [],
            "evidence": {},
            "provenance": {"source": "random weights", "seed": recipe.seed},
        }

    def _usage(self, task: str) -> list[list[float]]:
        """Mean combine weight of each expert over the vocabulary, as the routers see it before any expert has added to it."""
        recipe = self.recipe
        centred = self.table - self.table.mean(-1, keepdims=True)
        n = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
        nobody = np.zeros((recipe.layers, recipe.experts), np.float32)
        usage = []
        for layer, preference in enumerate(self.preferences.get(task, nobody)):
            logits = n @ self.routers[layer] + preference
            kept = np.partition(logits, -recipe.top_k, axis=-1)[:, -recipe.top_k, None]
            total = np.where(logits >= kept, 1 / (1 + np.exp(-logits)), 0).sum(0)
            usage.append([round(float(value), 6) for value in total / total.sum()])
        return usage


def _drawn_later(matrices: tuple[Matrix, ...], seeds: Sequence[Sequence[int]]) -> Callable[[], Iterator[bytes]]:
    """A page's bytes, one expert at a time, made only when the writer asks."""
    return lambda: (_expert(matrices, seed) for seed in seeds)


def _expert(matrices: tuple[Matrix, ...], seed: Sequence[int]) -> bytes:
    """One random expert, packed."""
    bits = np.random.SFC64(list(seed))
    offsets, stride = expert_layout(matrices)
    out = bytearray(stride)
    for matrix, (tiles, place) in zip(matrices, offsets, strict=True):
        drawn = _tiles(bits, matrix)
        out[tiles : tiles + len(drawn)] = drawn
        if place is not None:
            bias = np.random.Generator(bits).standard_normal(matrix.rows) * 0.1
            out[place : place + 4 * matrix.rows] = bias.astype("<f4").tobytes()
    return bytes(out)


#: Random bytes to stored values, the lowest code left out as packing does: it becomes zero (8 of 0..15, 128 of 0..255).
_CODES = {
    WeightType.INT4: bytes((low or 8) | (high or 8) << 4 for high in range(16) for low in range(16)),
    WeightType.INT8: bytes(code or 128 for code in range(256)),
}
_SPREAD = {WeightType.INT4: 17.5**0.5, WeightType.INT8: (2 * sum(q * q for q in range(128)) / 256) ** 0.5}


def _tiles(bits: np.random.SFC64, matrix: Matrix) -> bytes:
    """A random matrix whose outputs have a spread near 1 for inputs of spread 1; sides are whole tiles in columns."""
    spread = matrix.cols**-0.5
    if matrix.type == WeightType.F32:
        return pack_matrix((np.random.Generator(bits).standard_normal((matrix.rows, matrix.cols)) * spread).astype(np.float32), matrix.type)
    count = (matrix.rows // TILE_ROWS) * (matrix.cols // TILE_COLS)
    payload = TILE_ROWS * TILE_COLS // (2 if matrix.type == WeightType.INT4 else 1)
    raw = np.asarray(bits.random_raw(count * payload // 8), "<u8").tobytes().translate(_CODES[matrix.type])
    varied = np.random.Generator(bits).uniform(0.75, 1.25, (count, TILE_ROWS)) * (spread / _SPREAD[matrix.type])
    scales = np.ascontiguousarray(varied.astype("<f2")).view(np.uint8)
    return np.concatenate([np.frombuffer(raw, np.uint8).reshape(count, payload), scales], axis=1).tobytes()
