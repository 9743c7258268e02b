"""Stage graphs of CNNs: they compute what torch computes, are the same bytes again, and what cannot be traced is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edgeml_export.vision import ImageFormat, MultiTaskCNN, VisionModel, VisionTask
from edgeml_export.vision.cost import count, count_stages
from edgeml_export.vision.graphs import stage_graphs
from edgeml_export.vision.model import task_loss
from edgeml_export.vision.runner import Runner, in_batches
from torch import Tensor, nn

from edgeml.errors import UsageError

LABELS = ("a", "b", "c")


def simple(backbone: nn.Module, head: nn.Module, size: int = 8, **changes: Any) -> VisionModel:
    """A model with one classifier of three labels."""
    return VisionModel(MultiTaskCNN(backbone, {"t": head}), [VisionTask("t", "d", LABELS)], ImageFormat(size, size, 3), **changes)


def head(inputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 3))


def test_graphs_compute_what_torch_computes(vision: VisionModel, vision_stages: Any) -> None:
    images = vision.example(5).numpy()
    found, wanted = in_batches(Runner(vision_stages), images), vision.predict(images)
    assert list(found) == ["place", "size", "pixels", "edge"]
    for name, truth in wanted.items():
        assert found[name].shape == truth.shape
        np.testing.assert_allclose(found[name], truth, atol=1e-4)
    assert found["pixels"].shape == (5, 2, 16, 16)
    np.testing.assert_allclose(found["place"].sum(1), 1, atol=1e-5)


def test_graphs_are_small_and_say_what_they_are(vision_stages: Any) -> None:
    backbone = onnx.load_from_string(vision_stages.backbone)
    onnx.checker.check_model(backbone, full_check=True)
    assert [value.name for value in backbone.graph.input] == ["image"]
    assert [value.name for value in backbone.graph.output] == ["features_0", "features_1"]
    assert [(item.domain, item.version) for item in backbone.opset_import] == [("", 17)]
    assert backbone.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    place, pixels = (onnx.load_from_string(vision_stages.heads[name]).graph for name in ("place", "pixels"))
    assert [value.name for value in place.input] == ["features_1"]  # what it does not read it does not ask for
    assert [value.name for value in pixels.output] == ["map"]
    kinds = {node.op_type for graph in (backbone.graph, place, pixels) for node in graph.node}
    assert not kinds & {"BatchNormalization", "Dropout", "Identity"}


def test_equal_models_give_equal_bytes(vision: VisionModel, vision_stages: Any) -> None:
    other = VisionModel(copy.deepcopy(vision.module), vision.tasks, vision.image)
    assert stage_graphs(other) == vision_stages


def test_a_module_left_in_training_mode_is_exported_for_evaluation(vision: VisionModel, vision_stages: Any) -> None:
    vision.module.train()
    assert stage_graphs(vision) == vision_stages


def test_cost_is_counted_on_the_graph() -> None:
    model = simple(nn.Conv2d(3, 4, 3, 2, 1), head())
    stages = stage_graphs(model)
    assert count(stages.backbone) == (4 * 4 * 4 * 27, 4 * 27 + 4)
    assert count_stages(stages) == (4 * 4 * 4 * 27 + 12, 4 * 27 + 4 + 12 + 3)


def test_grouped_and_transposed_convolutions_are_counted() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.ConvTranspose2d(6, 4, 2, 2))
    macs, _ = count(stage_graphs(simple(backbone, head())).backbone)
    assert macs == 64 * 6 * 9 + 64 * 6 * 4 * 4


class ByBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(len(x))


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.double().sum()) == NOISE else -x


NOISE = float(torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0)).double().sum())


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.qr(x)[0]


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (ByBatch(), r"the graphs of task 't' and the module differ by .* on 3 images"),
        (ByValue(), r"the graphs of task 't' and the module differ by .* on 3 images"),
        (Untraceable(), r"stage 'backbone' cannot be traced into a graph"),
    ],
)
def test_what_cannot_be_traced_is_refused(part: nn.Module, sentence: str) -> None:
    model = simple(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), part), head())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if isinstance(part, ByValue):
            model = simple(part, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
        with pytest.raises(UsageError, match=sentence):
            stage_graphs(model)


class Many(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,) * 9


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = head(3)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.out(features[0])


def test_at_most_eight_tensors_pass_between_stages() -> None:
    with pytest.raises(UsageError, match="gives 9 tensors"):
        stage_graphs(simple(Many(), First()))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: VisionModel(head(), [VisionTask("t", "d", LABELS)], ImageFormat(8, 8)), "needs a 'backbone'"),
        (lambda: simple(nn.Conv2d(3, 4, 1), head(5)), r"the module fails on images \(2, 3, 8, 8\): RuntimeError"),
        (lambda: simple(nn.Conv2d(3, 4, 1), nn.Flatten()), r"task 't': for two images its head must give \(2, 3\), it gives \(2, 256\)"),
        (lambda: simple(nn.Identity(), head(3), losses={"u": task_loss(VisionTask("u", "d", LABELS))}), "a loss for 'u'"),
        (
            lambda: VisionModel(MultiTaskCNN(nn.Identity(), {"u": head(3)}), [VisionTask("t", "d", LABELS)], ImageFormat(8, 8)),
            "the heads u",
        ),
        (lambda: VisionTask("t", "d", ("a",)), "at least two labels"),
        (lambda: VisionTask("t", "d", LABELS, "miou"), "the metric of classification"),
        (lambda: VisionTask("t", "d", LABELS, "accuracy", "detection"), "kind must be one of"),
        (lambda: VisionTask("t", "d", LABELS, "miou", "segmentation", 1), "void can be 2, not 1"),
        (lambda: VisionTask("e", "d", LABELS, "edge_f1", "edge"), "the labels of an edge task"),
        (lambda: VisionTask("a b", "d", LABELS), "is named by 1 to 48"),
        (lambda: ImageFormat(8, 8, 2), "channels 1 or 3"),
        (lambda: ImageFormat(0, 8), "sides are 1 to 8192"),
        (lambda: ImageFormat(8, 8, 3, (0.5,)), "one number for each of the 3 channels"),
        (lambda: ImageFormat(8, 8, 1, (0.5,), (0.0,)), "std above 0"),
    ],
)
def test_a_description_that_does_not_fit_is_refused_in_a_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as refusal:
        make()
    assert "\n" not in str(refusal.value)
