"""Pages and manifest of a text mixture.

One routed expert is one page, in the order of sites and experts, so that an expert is one contiguous read. The bias of a
site's output, what top-k leaves out on the mean included, must count once however many experts are chosen: it is the bias of
the shared expert's down matrix, whose weight is always 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

import edgeml
from edgeml.bundle import PageSource
from edgeml.kernels import pack_expert, pack_linear, pack_rows
from edgeml.layout import Activation, Matrix, PageKind, WeightType
from edgeml_export.encoder import Layer
from edgeml_export.graphs import embed_graph, head_graph, numpy_of, router_graph, scaled_qkv, trunk_graph, vector_graph
from edgeml_export.model import Model, TaskSpec
from edgeml_export.quantize import TYPES, QuantizePlan
from edgeml_export.upcycle import MixtureFeedForward

__all__ = ["Usage", "assemble"]

#: usage[task][site][expert]: mean combine weight per real token, 1 in sum per site.
Usage = Mapping[str, Sequence[Sequence[float]]]

Floats = NDArray[np.float32]


def assemble(
    model: Model, plan: QuantizePlan, usage: Usage, chances: Mapping[str, float], provenance: Mapping[str, Any]
) -> tuple[list[PageSource], dict[str, Any]]:
    """All pages and the manifest, without evidence. `chances` of tasks that are not known are null."""
    pages = _Pages()
    linears = [_linears(pages, layer, plan) for layer in model.module.layers()]
    sites = [_site(pages, number, part, plan) for number, part in enumerate(model.module.sites())]
    stages = _stages(pages, model, _words(pages, model, plan), linears)
    tokenizer = pages.add(PageSource(PageKind.TOKENIZER, model.tokenizer))
    tasks = [_task(model, task, tokenizer, chances.get(task.name)) for task in model.tasks]
    if model.embedding is not None:
        tasks.append(_embedding_task(model.embedding, model.max_tokens, tokenizer))
    manifest = {
        "format": 1,
        "producer": {"name": "edgeml-runtime", "version": edgeml.__version__},
        "model": _sizes(model),
        "stages": stages,
        "sites": sites,
        "tasks": tasks,
        "usage": {name: [list(row) for row in rows] for name, rows in usage.items()},
        "variants": [],
        "evidence": {},
        "provenance": dict(provenance),
    }
    return pages.sources, manifest


class _Pages:
    """The pages so far; a page's number is its place."""

    def __init__(self) -> None:
        self.sources: list[PageSource] = []

    def add(self, source: PageSource) -> int:
        self.sources.append(source)
        return len(self.sources) - 1


def _linears(pages: _Pages, layer: Layer, plan: QuantizePlan) -> tuple[int, int]:
    """A layer's joint projection and output projection."""
    parts = (scaled_qkv(layer), (numpy_of(layer.output.weight), numpy_of(layer.output.bias)))
    first, second = (pages.add(PageSource(PageKind.LINEAR, *pack_linear(*part, TYPES[plan.dense], plan.rule))) for part in parts)
    return first, second


def _site(pages: _Pages, number: int, part: MixtureFeedForward, plan: QuantizePlan) -> dict[str, Any]:
    config = part.config
    up, up_bias, down = numpy_of(part.up.weight), numpy_of(part.up.bias), numpy_of(part.down.weight)

    def expert(start: int, width: int, bias: Floats | None, stored: str) -> list[int]:
        rows = slice(start, start + width)
        data, matrices = pack_expert([(up[rows], up_bias[rows]), (down[:, rows], bias)], TYPES[stored], plan.rule)
        return [pages.add(PageSource(PageKind.EXPERT, data, matrices, Activation.GELU)), 0]

    shared = [expert(0, config.shared, numpy_of(part.down.bias), plan.shared)] if config.shared else []
    starts = range(config.shared, config.intermediate, config.width)
    return {
        "name": f"layer.{number}",
        "hidden": down.shape[0],
        "experts": [expert(start, config.width, None, plan.experts) for start in starts],
        "shared": shared,
        "top_k": config.top_k,
        "scoring": "sigmoid",
        "bias_mode": "logits",
        "renormalised": False,
    }


def _words(pages: _Pages, model: Model, plan: QuantizePlan) -> int:
    table, stored = numpy_of(model.module.encoder.words.weight), TYPES[plan.embeddings]
    return pages.add(PageSource(PageKind.ROWS, pack_rows(table, stored), (Matrix(WeightType(stored), *table.shape),)))


def _stages(pages: _Pages, model: Model, words: int, linears: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    module, stages = model.module, list[dict[str, Any]]()

    def stage(name: str, graph: bytes, inputs: list[str], outputs: list[str]) -> int:
        page = pages.add(PageSource(PageKind.ONNX, graph))
        stages.append({"name": name, "page": page, "inputs": inputs, "outputs": outputs})
        return page

    hidden, sites = module.encoder.config.hidden, len(module.sites())
    stage("embed", embed_graph(module.encoder, words, model.max_tokens), ["ids", "types"], ["hidden0"])
    inputs = ["hidden0", "mask", "bias"]
    trunk = stage("trunk", trunk_graph(module, linears), inputs, ["hidden"])
    # The same graph, asked for its choices as well: what measures routing runs this one.
    stages.append({"name": "trunk_ids", "page": trunk, "inputs": inputs, "outputs": ["hidden", *(f"ids_{site}" for site in range(sites))]})
    names = [task.name for task in model.tasks] + ([model.embedding] if model.embedding is not None else [])
    rows = numpy_of(module.task_bias)
    for number, name in enumerate(names):
        row = rows[-1] if name == model.embedding else rows[number]
        stage(f"router_{name}", router_graph(f"router_{name}", row, hidden), ["hidden0"], ["bias"])
        if name == model.embedding:
            graph, output = vector_graph(f"head_{name}", module.embed_head), "vector"
        else:
            graph, output = head_graph(f"head_{name}", cast(nn.Linear, module.heads[name])), "scores"
        stage(f"head_{name}", graph, ["hidden", "mask"], [output])
    return stages


def _task(model: Model, task: TaskSpec, tokenizer: int, chance: float | None) -> dict[str, Any]:
    return {
        "name": task.name,
        "domain": task.domain,
        "kind": "classification",
        "pair": task.pair,
        "labels": list(task.labels),
        "metric": task.metric,
        "chance": chance,
        **_ways(task.name, tokenizer, model.max_tokens),
    }


def _embedding_task(name: str, max_tokens: int, tokenizer: int) -> dict[str, Any]:
    kind = {"name": name, "domain": "general", "kind": "embedding", "pair": False, "labels": [], "metric": None, "chance": None}
    return {**kind, **_ways(name, tokenizer, max_tokens)}


def _ways(name: str, tokenizer: int, max_tokens: int) -> dict[str, Any]:
    return {
        "stages": {"embed": "embed", "router": f"router_{name}", "trunk": "trunk", "head": f"head_{name}"},
        "preprocess": {"kind": "text", "tokenizer": tokenizer, "max_tokens": max_tokens},
    }


def _sizes(model: Model) -> dict[str, Any]:
    encoder, mixture = model.module.encoder.config, model.module.config
    return {
        "family": "bert",
        "hidden": encoder.hidden,
        "layers": encoder.layers,
        "heads": encoder.heads,
        "vocabulary": encoder.vocabulary,
        "intermediate": mixture.intermediate,
        "shared": mixture.shared,
        "experts": mixture.experts,
        "width": mixture.width,
        "top_k": mixture.top_k,
    }
