"""A network as an ONNX graph on onnxruntime, one thread, batch 1: the time that pruning by latency asks for."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import network
import onnxruntime
import torch
from edgeml_export.vision.graphs import simplify
from torch import nn

RUNS = 80


class Logits(nn.Module):
    """The network with a tuple for outputs, in the order of the tasks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.net(x)
        return tuple(outputs[task] for task in network.TASKS)


def float_graph(net: nn.Module, file: Path) -> Path:
    """The network as ONNX with its batch normalisations folded."""
    if not file.exists():
        raw = file.with_suffix(".raw")
        free = {name: {0: "batch"} for name in ("image", *network.TASKS)}
        torch.onnx.export(
            Logits(net).eval(), (network.EXAMPLE,), raw, input_names=["image"], output_names=list(network.TASKS),
            dynamic_axes=free, opset_version=17, dynamo=False,
        )  # fmt: skip
        file.write_bytes(simplify(raw.read_bytes(), "network"))
        raw.unlink()
    return file


def session(file: Path) -> onnxruntime.InferenceSession:
    """One thread, no spinning."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def against(dense: nn.Module) -> Callable[[nn.Module], float]:
    """A cost for `prune`: a network's time as a share of the dense one's. They take turns and the shortest run of each counts, so
    that neither a busy machine nor a drift of its clock looks like a saving."""
    yardstick, picture = _opened(dense), {"image": network.EXAMPLE.numpy()}

    def share(net: nn.Module) -> float:
        sessions = (_opened(net), yardstick)
        best = [float("inf"), float("inf")]
        for _ in range(RUNS):
            for place, running in enumerate(sessions):
                start = time.perf_counter()
                running.run(None, picture)
                best[place] = min(best[place], time.perf_counter() - start)
        return best[0] / best[1]

    return share


def _opened(net: nn.Module) -> onnxruntime.InferenceSession:
    with tempfile.TemporaryDirectory(prefix="pruning-") as folder:
        return session(float_graph(net, Path(folder, "net.onnx")))
