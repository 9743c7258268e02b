"""A small bundle for tests of the native side: sites of experts with every weight type, a linear page, an embedding table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeml import kernels, native
from edgeml.bundle import Bundle, PageSource, write_bundle
from edgeml.layout import Activation, Matrix, PageKind, WeightType

HIDDEN, WIDTH, EXPERTS, SITES, TOP_K = 48, 32, 8, 3, 3
MANIFEST = {"format": 1, "producer": {"name": "test", "version": "0"}, "stages": [], "sites": [], "tasks": []}


@dataclass
class Case:
    path: Path
    sites: list[native.Site]
    linear: int
    rows: int
    sources: list[PageSource]
    table: np.ndarray

    @contextmanager
    def open(self, **options: Any) -> Iterator[native.Context]:
        with Bundle.open(self.path) as bundle:
            context = native.Context(bundle.fd, bundle.index_bytes, self.sites, **{"slots": SITES * EXPERTS, **options})
            try:
                yield context
            finally:
                context.close()

    def oracle(self, site: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """`PagedExperts` by the NumPy oracles."""

        def run(ref: tuple[int, int]) -> np.ndarray:
            source = self.sources[ref[0]]
            return kernels.expert(source.data, source.matrices, source.activation, x)

        out = np.zeros_like(x)
        for ref in self.sites[site].shared:
            out = out + run(ref)
        each = [run(ref) for ref in self.sites[site].experts]
        for j in range(ids.shape[1]):
            for token in range(len(x)):
                if ids[token, j] >= 0:
                    out[token] = out[token] + weights[token, j] * each[ids[token, j]][token]
        return out


def _expert(rng: np.random.Generator, width: int, type: WeightType, gated: bool, activation: Activation) -> PageSource:
    def matrix(rows: int, cols: int) -> np.ndarray:
        return (rng.normal(size=(rows, cols)) / 6).astype(np.float32)

    ups = [(matrix(width, HIDDEN), rng.normal(size=width).astype(np.float32)) for _ in range(1 + gated)]
    data, matrices = kernels.pack_expert([*ups, (matrix(HIDDEN, width), None)], type)
    return PageSource(PageKind.EXPERT, data, matrices, activation)


def make_case(directory: Path) -> Case:
    rng = np.random.default_rng(0)
    pages: list[PageSource] = []
    sites = []
    for number in range(SITES):
        type = (WeightType.INT4, WeightType.INT8, WeightType.F32)[number % 3]
        first = len(pages)
        for _ in range(EXPERTS):
            pages.append(_expert(rng, WIDTH, type, gated=number == 1, activation=Activation(1 + number)))
        pages.append(_expert(rng, 2 * WIDTH, WeightType.INT4, gated=False, activation=Activation.GELU))
        sites.append(native.Site([(first + e, 0) for e in range(EXPERTS)], [(first + EXPERTS, 0)], HIDDEN, TOP_K))
    linear = len(pages)
    data, matrices = kernels.pack_linear(
        rng.normal(size=(70, HIDDEN)).astype(np.float32), rng.normal(size=70).astype(np.float32), WeightType.INT8
    )
    pages.append(PageSource(PageKind.LINEAR, data, matrices))
    table = rng.normal(size=(300, HIDDEN)).astype(np.float32)
    pages.append(PageSource(PageKind.ROWS, kernels.pack_rows(table, WeightType.INT8), (Matrix(WeightType.INT8, 300, HIDDEN),)))
    path = directory / "case.edgeml"
    write_bundle(path, pages, MANIFEST)
    return Case(path, sites, linear, linear + 1, pages, table)


def random_call(tokens: int, seed: int, experts: int = EXPERTS, k: int = TOP_K) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (tokens, HIDDEN), ids (tokens, k) without repeats and with some -1, weights (tokens, k)."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]) if tokens else np.zeros((0, k), np.int64)
    ids = np.where(rng.random(ids.shape) < 0.1, -1, ids)
    x = rng.normal(size=(tokens, HIDDEN)).astype(np.float32)
    return x, ids.astype(np.int64), rng.random(ids.shape).astype(np.float32)
