"""Our operators for onnx's reference evaluator, from the format's NumPy oracles: slow, and independent of the native code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import load_from_string
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edgeml import kernels
from edgeml.bundle import Bundle, PageKind
from edgeml.layout import WeightType
from edgeml.manifest import load_manifest

Tensors = dict[str, NDArray[Any]]


class Oracle:
    """An open bundle whose stages are run one by one."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.manifest = bundle, load_manifest(bundle)
        self._stages = {stage.name: stage for stage in self.manifest.stages}

    def run(self, names: tuple[str, ...], inputs: Mapping[str, NDArray[Any]]) -> Tensors:
        _Ours.oracle = self
        tensors = dict(inputs)
        for name in names:
            stage = self._stages[name]
            graph = ReferenceEvaluator(load_from_string(self.bundle.read(stage.page)), new_ops=[EmbedRows, Linear, PagedExperts])
            given = {key: tensors[key] for key in stage.inputs}
            tensors |= zip(stage.outputs, graph.run(list(stage.outputs), given), strict=True)
        return tensors

    def close(self) -> None:
        """As `Tracer.close`."""

    def expert(self, reference: Any, x: NDArray[np.float32]) -> NDArray[np.float32]:
        page = self.bundle.pages[reference.page]
        assert page.kind == PageKind.EXPERT
        return kernels.expert(self.bundle.read(page.id), page.matrices, page.activation, x)


class _Ours(OpRun):
    op_domain = "edgeml"
    oracle: ClassVar[Oracle]


class EmbedRows(_Ours):
    def _run(self, ids: NDArray[np.int64], page: int | None = None) -> tuple[NDArray[np.float32]]:
        record = self.oracle.bundle.pages[page]
        raw = np.frombuffer(self.oracle.bundle.read(record.id), np.uint8).reshape(record.matrices[0].rows, record.stride)[ids]
        if record.matrices[0].type == WeightType.F32:
            return (np.ascontiguousarray(raw[..., :-4]).view("<f4"),)
        return (np.ascontiguousarray(raw[..., 4:-4]).view(np.int8) * np.ascontiguousarray(raw[..., :4]).view("<f4"),)


class Linear(_Ours):
    def _run(self, x: NDArray[np.float32], page: int | None = None) -> tuple[NDArray[np.float32]]:
        record = self.oracle.bundle.pages[page]
        y = kernels.linear(self.oracle.bundle.read(record.id), record.matrices, x.reshape(-1, x.shape[-1]))
        return (y.reshape(*x.shape[:-1], -1),)


class PagedExperts(_Ours):
    def _run(
        self, x: NDArray[np.float32], ids: NDArray[np.int64], weights: NDArray[np.float32], site: int | None = None
    ) -> tuple[NDArray[np.float32]]:
        place = self.oracle.manifest.sites[site]
        flat, chosen = x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1])
        factors = weights.reshape(chosen.shape)
        out = np.zeros_like(flat)
        for shared in place.shared:
            out = out + self.oracle.expert(shared, flat)
        for column in range(chosen.shape[1]):
            for number, reference in enumerate(place.experts):
                tokens = chosen[:, column] == number
                if tokens.any():
                    out[tokens] += factors[tokens, column, None] * self.oracle.expert(reference, flat[tokens])
        return (out.reshape(x.shape),)
