"""Int8 of stages: close to float, per channel, searched where it is not close enough, and refused where it does not help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from edgeml_export.vision import VisionModel, int8
from edgeml_export.vision.graphs import Stages
from edgeml_export.vision.int8 import Int8, quantize
from edgeml_export.vision.runner import Runner, in_batches, interleaved, speedup

ALWAYS = Int8(when="always", images=16, max_drop=100, max_map_drop=100)


@pytest.fixture(scope="module")
def images(vision: VisionModel) -> np.ndarray:
    return vision.example(24).numpy()


@pytest.fixture(scope="module")
def score(vision: VisionModel, vision_stages: Stages, images: np.ndarray) -> Callable[[Stages], dict[str, float]]:
    """One less the mean distance from the float model's probabilities: a score that every rounding lowers."""
    truth = in_batches(Runner(vision_stages), images)

    def measure(stages: Stages) -> dict[str, float]:
        found = in_batches(Runner(stages), images)
        return {name: 1 - float(np.abs(found[name] - truth[name]).mean()) for name in truth}

    return measure


def run(vision: VisionModel, stages: Stages, how: Int8, images: np.ndarray, score: Any) -> tuple[Stages | None, dict[str, Any]]:
    return quantize(stages, vision.tasks, how, images[: how.images], score, lambda _more: None)


def test_int8_is_close_per_channel_and_small(vision: VisionModel, vision_stages: Stages, images: np.ndarray, score: Any) -> None:
    made, evidence = run(vision, vision_stages, ALWAYS, images, score)
    assert made is not None
    assert all(value > 0.9 for value in score(made).values())
    assert set(evidence["mean_score"]) == {"minmax", "entropy", "percentile"}
    assert evidence["mean_score"][evidence["method"]] == max(evidence["mean_score"].values())
    assert (evidence["calibration_images"], evidence["float_nodes"], evidence["kept"]) == (16, [], True)
    assert evidence["speedup"] > 0
    model = onnx.load_from_string(made.backbone)
    onnx.checker.check_model(model, full_check=True)  # nodes in order, too
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    scales = [weights[node.input[1]] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights]
    assert any(len(scale.dims) == 1 and scale.dims[0] == 16 for scale in scales)
    assert not [tensor for tensor in weights.values() if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 4]


def test_the_same_again_gives_the_same_bytes(vision: VisionModel, vision_stages: Stages, images: np.ndarray, score: Any) -> None:
    how = Int8(when="always", images=16, methods=("minmax",), max_drop=100, max_map_drop=100)
    assert run(vision, vision_stages, how, images, score)[0] == run(vision, vision_stages, how, images, score)[0]


@pytest.mark.parametrize(("reduce_range", "largest"), [("yes", 64), ("no", 128)])
def test_weights_have_seven_bits_where_sums_would_saturate(
    vision: VisionModel, vision_stages: Stages, images: np.ndarray, score: Any, reduce_range: str, largest: int
) -> None:
    how = Int8("always", ("minmax",), 8, 100, 100, reduce_range)
    made, evidence = run(vision, vision_stages, how, images, score)
    assert made is not None
    assert evidence["reduce_range"] == (reduce_range == "yes")
    tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(made.backbone).graph.initializer]
    extreme = max(int(np.abs(t.astype(int)).max()) for t in tensors if t.dtype == np.int8 and t.ndim == 4)
    assert largest // 2 < extreme <= largest


def test_nodes_go_back_to_float_until_the_limit_holds(vision: VisionModel, vision_stages: Stages, images: np.ndarray, score: Any) -> None:
    free, _ = run(vision, vision_stages, ALWAYS, images, score)
    assert free is not None
    drops = {name: 1 - value for name, value in score(free).items()}
    worst = max(drops.values())
    how = Int8("always", images=16, max_drop=90 * worst, max_map_drop=90 * worst)
    made, evidence = run(vision, vision_stages, how, images, score)
    assert evidence["float_nodes"]
    assert len(evidence["search"]) >= 2 * len(evidence["float_nodes"])
    errors = [node["error_without"] for node in evidence["search"]]
    assert errors == sorted(errors)
    assert [[node["stage"], node["node"]] for node in evidence["search"]][: len(evidence["float_nodes"])] == evidence["float_nodes"]
    if made is not None:
        assert max(1 - value for value in score(made).values()) <= 0.9 * worst


def test_a_limit_that_cannot_be_kept_leaves_int8_out(vision: VisionModel, vision_stages: Stages, images: np.ndarray, score: Any) -> None:
    how = Int8("always", ("minmax",), 8, max_drop=0, max_map_drop=0)
    made, evidence = run(vision, vision_stages, how, images, score)
    assert made is None
    assert "falls by more than its limit" in evidence["reason"]
    assert not evidence["kept"]


@pytest.mark.parametrize(("factor", "kept"), [(0.5, False), (2.0, True)])
def test_int8_is_kept_where_it_is_faster(
    vision: VisionModel, vision_stages: Stages, images: np.ndarray, score: Any, monkeypatch: Any, factor: float, kept: bool
) -> None:
    monkeypatch.setattr(int8, "interleaved", lambda calls: np.array([[factor, 1.0]] * 3))
    how = Int8("faster", ("minmax",), 8, 100, 100)
    made, evidence = run(vision, vision_stages, how, images, score)
    assert (made is not None) == kept
    assert evidence["speedup"] == factor
    assert kept or evidence["reason"] == "it is not faster than float on this CPU"


def test_calls_take_turns() -> None:
    order: list[str] = []
    seconds = interleaved([lambda: order.append("a"), lambda: order.append("b")], rounds=3, burst=2)
    assert "".join(order) == "aaaabbbb" * 3
    assert seconds.shape == (3, 2)
    assert speedup(np.array([2.0, 4.0, 90.0]), np.array([1.0, 2.0, 1.0])) == 2.0


def test_nothing_is_printed(vision: VisionModel, vision_stages: Stages, images: np.ndarray, score: Any, capfd: Any) -> None:
    run(vision, vision_stages, Int8("always", images=8, max_drop=100, max_map_drop=100), images, score)
    assert capfd.readouterr() == ("", "")
