"""The dense reference as one plain ONNX graph, f32 or dynamically quantized: what a bundle is compared with in speed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from edgeml.bundle_writer import write_file
from edgeml_export.encoder import MultiTaskModel
from edgeml_export.graphs import dense_graph

__all__ = ["export_dense_onnx", "export_dense_onnx_int8"]


def export_dense_onnx(model: MultiTaskModel, out: str | os.PathLike[str], max_tokens: int, task: str | None = None) -> None:
    """Write ids, types, mask -> hidden (B, T, d), or the scores (B, labels) of `task`. It needs onnxruntime and nothing else."""
    write_file(Path(out), [dense_graph(model, max_tokens, task)])


def export_dense_onnx_int8(
    model: MultiTaskModel, out: str | os.PathLike[str], max_tokens: int, task: str | None = None, reduce_range: bool = False
) -> None:
    """The same graph through onnxruntime's dynamic quantization: weights int8 per channel, activations per tensor.

    `reduce_range` keeps weights to 7 bits, which a processor without VNNI needs: its 8-bit products saturate.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = Path(folder) / "f32.onnx", Path(folder) / "int8.onnx"
        export_dense_onnx(model, plain, max_tokens, task)
        quantize_dynamic(plain, quantized, per_channel=True, reduce_range=reduce_range, weight_type=QuantType.QInt8)
        write_file(Path(out), [quantized.read_bytes()])
