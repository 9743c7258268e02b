"""Stages run by onnxruntime as a device runs them, to score and to time them while an export chooses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgeml_export.vision.graphs import Stages

__all__ = ["Runner", "interleaved", "open_session", "speedup"]

BATCH = 64
WARM_UP = 2  # calls of a burst that are not counted

Floats = NDArray[np.float32]


def open_session(graph: bytes) -> Any:
    """A session with the runtime's own settings: one thread, no arena. Raises what onnxruntime raises."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Runner:
    """One version of a model, loaded."""

    def __init__(self, stages: Stages) -> None:
        self._backbone = open_session(stages.backbone)
        self._names = [value.name for value in self._backbone.get_outputs()]
        self._heads = {name: open_session(graph) for name, graph in stages.heads.items()}
        self._inputs = {name: [value.name for value in head.get_inputs()] for name, head in self._heads.items()}

    def features(self, images: Floats) -> dict[str, Floats]:
        """What the backbone gives for images (B, C, H, W)."""
        return dict(zip(self._names, self._backbone.run(None, {"image": images}), strict=True))

    def __call__(self, images: Floats) -> dict[str, Floats]:
        """Every task's probabilities, one backbone pass for all."""
        features = self.features(images)
        return {name: head.run(None, {key: features[key] for key in self._inputs[name]})[0] for name, head in self._heads.items()}


def in_batches(predict: Callable[[Floats], Mapping[str, Floats]], images: Floats) -> dict[str, Floats]:
    """Answers for many images (n, C, H, W), asked for in batches."""
    parts = [predict(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def interleaved(calls: Sequence[Callable[[], object]], rounds: int = 20, burst: int = 10) -> NDArray[np.float64]:
    """Seconds of a call, (rounds, calls): the median of a short burst. The calls take turns, so that a disturbance meets all."""
    found = np.empty((rounds, len(calls)))
    for number in range(rounds):
        for place, call in enumerate(calls):
            times = []
            for _ in range(burst + WARM_UP):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            found[number, place] = np.median(times[WARM_UP:])
    return found


def speedup(slow: NDArray[np.float64], fast: NDArray[np.float64]) -> float:
    """How many times faster, as the median over rounds of their ratio in the same round."""
    return float(np.median(slow / fast))
