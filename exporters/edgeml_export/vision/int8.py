"""Static int8 of a model's stages, by onnxruntime's own quantiser (QDQ, per channel), and the choices around it.

How activations are calibrated, and which nodes stay float, is decided by what it costs:

1. Each calibration method quantises every stage; the one with the best mean validation score stays.
2. While a task falls by more than its limit, nodes go back to float. They are ranked by what a quantised model with only this node
   in float is away from the float model on the calibration images, and go in this order, at most half of them.
3. Whether int8 is faster on this CPU is timed, in turns with the float model.

All of it is in the evidence, the refusals too. Weights have 7 bits where the CPU lacks VNNI (`reduce_range`): there the sum of two
products of an unsigned and a signed byte saturates at 16 bits.
"""

from __future__ import annotations

import io
import logging
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod, QuantType, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from edgeml_export.vision.graphs import Stages, canonical
from edgeml_export.vision.runner import Runner, in_batches, interleaved, speedup
from edgeml_export.vision.tasks import DENSE, VisionTask

__all__ = ["METHODS", "REDUCE", "WHEN", "Int8", "has_vnni", "quantize"]

#: What runs in int8; softmax and sigmoid, the ends of the heads, stay float.
KINDS = ["Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Flatten", "Gemm", "GlobalAveragePool", "MatMul"]
KINDS += ["MaxPool", "Relu", "Reshape", "Resize", "Squeeze", "Transpose", "Unsqueeze"]
HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add"})  # nodes that the search may put back
METHODS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "minmax": (CalibrationMethod.MinMax, {}),
    "entropy": (CalibrationMethod.Entropy, {}),
    "percentile": (CalibrationMethod.Percentile, {"percentile": 99.99, "symmetric": False}),
}
WHEN = ("faster", "always", "never")
REDUCE = ("auto", "yes", "no")

Floats = NDArray[np.float32]
Scores = dict[str, float]
Node = tuple[str, str]  # stage, node


@dataclass(frozen=True)
class Int8:
    """Choices of a recipe. Drops in points; `images` calibrate; `when`: kept if faster here, always, or never made."""

    when: str = "faster"
    methods: tuple[str, ...] = tuple(METHODS)
    images: int = 128
    max_drop: float = 0.5
    max_map_drop: float = 1.0
    reduce_range: str = "auto"

    def limit(self, task: VisionTask) -> float:
        """How far a task's score may fall, in [0, 1]."""
        return (self.max_map_drop if task.kind in DENSE else self.max_drop) / 100

    def reduced(self) -> bool:
        """Whether weights get 7 bits."""
        return {"yes": True, "no": False, "auto": not has_vnni()}[self.reduce_range]


def has_vnni() -> bool:
    """Whether products of bytes are summed without saturation here: VNNI on x86; other CPUs do."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text("ascii", "replace").split()
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def quantize(
    stages: Stages, tasks: Sequence[VisionTask], how: Int8, images: Floats, score: Callable[[Stages], Scores], tick: Callable[[int], None]
) -> tuple[Stages | None, dict[str, Any]]:
    """An int8 version and its evidence; None where a limit cannot be kept or, by the recipe, where it is not faster.

    `images` (n, C, H, W) are of the training split, `score` gives the scores of stages on validation.
    """
    float_scores = score(stages)
    calibrated = {method: _calibrate(stages, method, images) for method in how.methods}
    tried: dict[str, tuple[Stages, Scores]] = {}
    for method, ranges in calibrated.items():
        made = _build(stages, ranges, how.reduced(), frozenset())
        tried[method] = made, score(made)
        tick(1)
    method = max(tried, key=lambda name: sum(tried[name][1].values()))  # the first of the best
    made, scores = tried[method]
    evidence: dict[str, Any] = {
        "method": method,
        "mean_score": {name: sum(found.values()) / len(found) for name, (_, found) in tried.items()},
        "calibration_images": len(images),
        "reduce_range": how.reduced(),
        "float_nodes": [],
    }
    if _broken(tasks, how, float_scores, scores):
        made, scores, search = _search(stages, tasks, how, calibrated[method], images, score, float_scores)
        evidence |= search
    evidence["drop_points"] = {name: round(100 * (float_scores[name] - value), 4) for name, value in scores.items()}
    broken = _broken(tasks, how, float_scores, scores)
    if broken:
        return None, {
            **evidence,
            "kept": False,
            "reason": f"task '{broken[0]}' falls by more than its limit, with half of the nodes in float",
        }
    one = images[:1]
    times = interleaved([lambda run=run: run(one) for run in (Runner(stages), Runner(made))])  # type: ignore[misc]
    evidence["speedup"] = round(speedup(times[:, 0], times[:, 1]), 3)
    if how.when == "faster" and evidence["speedup"] <= 1:
        return None, {**evidence, "kept": False, "reason": "it is not faster than float on this CPU"}
    return made, {**evidence, "kept": True}


def _broken(tasks: Sequence[VisionTask], how: Int8, before: Scores, after: Scores) -> list[str]:
    return [task.name for task in tasks if before[task.name] - after[task.name] > how.limit(task) + 1e-9]


def _search(
    stages: Stages,
    tasks: Sequence[VisionTask],
    how: Int8,
    ranges: Mapping[str, Any],
    images: Floats,
    score: Callable[[Stages], Scores],
    float_scores: Scores,
) -> tuple[Stages, Scores, dict[str, Any]]:
    """Put the most sensitive nodes back to float, one by one, until every task is inside its limit."""
    nodes = [(stage, node.name) for stage, graph in _named(stages) for node in _heavy(graph)]
    truth, errors = in_batches(Runner(stages), images), dict[Node, float]()
    for node in nodes:
        errors[node] = _error(truth, in_batches(Runner(_build(stages, ranges, how.reduced(), frozenset({node}))), images))
    ranked = sorted(nodes, key=lambda node: errors[node])
    chosen: list[Node] = []
    made, scores = stages, float_scores
    for node in ranked[: max(len(ranked) // 2, 1)]:
        chosen.append(node)
        made = _build(stages, ranges, how.reduced(), frozenset(chosen))
        scores = score(made)
        if not _broken(tasks, how, float_scores, scores):
            break
    searched = [{"stage": stage, "node": name, "error_without": round(errors[stage, name], 8)} for stage, name in ranked]
    return made, scores, {"float_nodes": [list(node) for node in chosen], "search": searched}


def _error(truth: Mapping[str, Floats], found: Mapping[str, Floats]) -> float:
    """Mean over tasks of the squared distance between probabilities."""
    return float(np.mean([np.mean((truth[name] - found[name]) ** 2, dtype=np.float64) for name in truth]))


def _named(stages: Stages) -> list[tuple[str, bytes]]:
    return [("backbone", stages.backbone), *((f"head_{name}", graph) for name, graph in stages.heads.items())]


def _heavy(graph: bytes) -> list[onnx.NodeProto]:
    return [node for node in onnx.load_from_string(graph).graph.node if node.op_type in HEAVY]


@contextmanager
def _quietly() -> Iterator[None]:
    """onnxruntime's quantiser prints its progress and logs advice that does not apply: standard output belongs to our document."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


class _Reader:
    """Hands calibration images to onnxruntime one by one."""

    def __init__(self, inputs: Mapping[str, Floats]) -> None:
        count = len(next(iter(inputs.values())))
        self._rest = iter([{name: values[row : row + 1] for name, values in inputs.items()} for row in range(count)])

    def get_next(self) -> dict[str, Floats] | None:
        return next(self._rest, None)


def _calibrate(stages: Stages, method: str, images: Floats) -> dict[str, Any]:
    """Each stage's ranges of activations. Heads see what the float backbone gives."""
    features = in_batches(Runner(stages).features, images)
    found = {}
    kind, options = METHODS[method]
    for stage, graph in _named(stages):
        inputs = {"image": images} if stage == "backbone" else features
        names = {value.name for value in onnx.load_from_string(graph).graph.input}
        with tempfile.TemporaryDirectory(prefix="edgeml-") as folder, _quietly():
            plain, augmented = Path(folder, "plain.onnx"), Path(folder, "augmented.onnx")
            plain.write_bytes(graph)
            calibrator = create_calibrator(plain, KINDS, str(augmented), kind, extra_options=options)
            calibrator.collect_data(_Reader({name: values for name, values in inputs.items() if name in names}))
            found[stage] = calibrator.compute_data()
            del calibrator  # its session holds the files
    return found


def _build(stages: Stages, ranges: Mapping[str, Any], reduced: bool, floats: frozenset[Node]) -> Stages:
    """Every stage quantised with these ranges, but for the nodes named."""
    made = {}
    for stage, graph in _named(stages):
        model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph))
        excluded = [name for place, name in floats if place == stage]
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=reduced,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=ranges[stage],
            nodes_to_quantize=[],
            nodes_to_exclude=excluded,
            op_types_to_quantize=KINDS,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},  # logits: 256 steps would tie classes
        )
        with _quietly():
            quantizer.quantize_model()
        made[stage] = canonical(quantizer.model.model, stage)
    heads = {name: made[f"head_{name}"] for name in stages.heads}
    return replace(stages, backbone=made["backbone"], heads=heads)
