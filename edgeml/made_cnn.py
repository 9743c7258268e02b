"""Made CNNs: seeded random networks for images as bundles, with nothing but NumPy. They know nothing, but they are built like real ones.

    make_cnn(path, kind="classification" | "dense", **sizes) -> bundle id

    make_cnn("digits.edgeml")                     # 36 x 36 grey; tasks `digit` and `garment`, 10 classes each
    make_cnn("street.edgeml", kind="dense")       # 24 x 32 colours; tasks `segmentation` (4 classes and void) and `edge`

Equal arguments give equal bytes. Each bundle has the variants `full` and `small`, the second with half the channels: stages
`backbone_VARIANT` and `head_VARIANT_TASK`. A backbone is two convolutions that halve the sides, with the outputs features_0 and
features_1; a head of a classification reads the second, a dense head both. The figures of the variants are made up as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml import __version__
from edgeml.bundle_writer import PageSource, write_bundle
from edgeml.errors import UsageError
from edgeml.graph_bytes import Attribute, Node, TensorType, graph
from edgeml.layout import PageKind

__all__ = ["make_cnn"]

OPSETS = {"": 17}
DIGITS = tuple("0123456789")
GARMENTS = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
STREET = ("sky", "building", "road", "tree", "void")
#: Name of a variant -> (share of the channels, made-up score, made-up seconds).
VARIANTS: Mapping[str, tuple[float, float, float]] = {"full": (1.0, 0.9, 0.004), "small": (0.5, 0.8, 0.002)}


def make_cnn(
    path: str | os.PathLike[str],
    kind: str = "classification",
    *,
    height: int | None = None,
    width: int | None = None,
    channels: int | None = None,
    filters: int = 16,
    variants: Sequence[str] = tuple(VARIANTS),
    seed: int = 0,
) -> str:
    """Write a made CNN; returns the bundle's identity. Sides are multiples of 4; `variants` may be empty (then `full` alone).

    Raises `UsageError` for sizes that do not fit, `DeviceError` when the disk is full or fails.
    """
    if kind not in ("classification", "dense"):
        raise UsageError(f"a made CNN is of the kind classification or dense, not {kind!r:.40}")
    dense = kind == "dense"
    image = (channels or (3 if dense else 1), height or (24 if dense else 36), width or (32 if dense else 36))
    if image[0] not in (1, 3) or image[1] % 4 or image[2] % 4 or filters < 2 or set(variants) - set(VARIANTS):
        raise UsageError("a made CNN needs 1 or 3 channels, sides in multiples of 4, at least 2 filters and known variants")
    labels = {"segmentation": STREET, "edge": ("no edge", "edge")} if dense else {"digit": DIGITS, "garment": GARMENTS}
    maker = _Maker(labels, dense, image, filters, seed)
    recorded = [maker.variant(name) for name in variants or ("full",)]
    write = {
        "format": 1,
        "producer": {"name": "edgeml-runtime", "version": __version__},
        "model": {"family": "made-cnn", "filters": filters},
        "stages": maker.stages,
        "sites": [],
        "tasks": [maker.task(name, recorded[0]["stages"][name]) for name in labels],
        "variants": recorded if variants else [],
        "evidence": {},
        "provenance": {"source": "random weights", "seed": seed},
    }
    return write_bundle(path, maker.pages, write)


@dataclass
class _Drawing:
    """A graph while it is drawn, and what it costs."""

    rng: np.random.Generator
    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    macs: int = 0

    def add(self, op: str, *inputs: str, out: str = "", **attributes: Attribute) -> str:
        name = out or f"t{len(self.nodes)}"
        self.nodes.append(Node(op, inputs, [name], attributes))
        return name

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.weights[name] = value
        return name

    def conv(self, x: str, shape: tuple[int, int, int], pixels: int, stride: int = 1) -> str:
        """A convolution of `shape` (out, in, side) with a bias, to `pixels` outputs a channel."""
        filters, channels, side = shape
        drawn = self.rng.standard_normal((filters, channels, side, side)) * (2 / (channels * side * side)) ** 0.5
        number = len(self.weights)
        kernel = self.constant(f"kernel{number}", drawn.astype(np.float32))
        bias = self.constant(f"bias{number}", (self.rng.standard_normal(filters) * 0.1).astype(np.float32))
        self.macs += drawn.size * pixels
        return self.add("Conv", x, kernel, bias, strides=[stride, stride], pads=[side // 2] * 4, kernel_shape=[side, side])

    def enlarge(self, x: str, times: int) -> str:
        scales = self.constant(f"scales{times}", np.array([1, 1, times, times], np.float32))
        return self.add("Resize", x, "", scales, mode="linear")

    @property
    def parameters(self) -> int:
        return sum(value.size for name, value in self.weights.items() if not name.startswith("scales"))


class _Maker:
    """Draws pages and manifest; `image` is (channels, height, width)."""

    def __init__(self, labels: Mapping[str, Sequence[str]], dense: bool, image: tuple[int, int, int], filters: int, seed: int) -> None:
        self.labels, self.dense, self.image, self.filters, self.seed = labels, dense, image, filters, seed
        self.pages: list[PageSource] = []
        self.stages: list[dict[str, Any]] = []
        channels, height, width = image
        self._image: TensorType = ("float32", ("B", channels, height, width))

    def variant(self, name: str) -> dict[str, Any]:
        """Draw the stages of a variant; returns its entry in the manifest."""
        share, score, seconds = VARIANTS[name]
        wide, (_, height, width) = max(1, int(self.filters * share)), self.image
        features: dict[str, TensorType] = {
            "features_0": ("float32", ("B", wide, height // 2, width // 2)),
            "features_1": ("float32", ("B", 2 * wide, height // 4, width // 4)),
        }
        drawings = [self._backbone(f"backbone_{name}", wide, features)]
        drawings += [self._head(f"head_{name}_{task}", task, wide, features) for task in self.labels]
        first = len(self.pages) - len(drawings)
        return {
            "name": name,
            "stages": {task: {"backbone": f"backbone_{name}", "head": f"head_{name}_{task}"} for task in self.labels},
            "bytes": sum(len(page.data) for page in self.pages[first:] if isinstance(page.data, bytes)),
            "macs": sum(drawing.macs for drawing in drawings),
            "parameters": sum(drawing.parameters for drawing in drawings),
            "bound": None if share == 1 else 1.1,
            "quantized": False,
            "latency_s": {"p50": seconds, "cpu": "a made processor"},
            "scores": dict.fromkeys(self.labels, score),
        }

    def task(self, name: str, stages: Mapping[str, str]) -> dict[str, Any]:
        """A task's entry in the manifest."""
        channels, height, width = self.image
        kind = name if self.dense else "classification"
        preprocess = {"kind": "image", "height": height, "width": width, "channels": channels, "resize": "stretch"}
        return {
            "name": name,
            "domain": "made",
            "kind": kind,
            "labels": list(self.labels[name]),
            "metric": {"segmentation": "miou", "edge": "edge_f1"}.get(kind, "accuracy"),
            "chance": None,
            "void": len(self.labels[name]) - (kind == "segmentation") if self.dense else None,
            "stages": dict(stages),
            "preprocess": preprocess | {"mean": [0.5] * channels, "std": [0.25] * channels},
        }

    def _backbone(self, name: str, wide: int, features: Mapping[str, TensorType]) -> _Drawing:
        channels, height, width = self.image
        drawing = _Drawing(np.random.default_rng([self.seed, len(self.pages)]))
        first = drawing.conv("image", (wide, channels, 3), height * width // 4, stride=2)
        drawing.add("Relu", first, out="features_0")
        second = drawing.conv("features_0", (2 * wide, wide, 3), height * width // 16, stride=2)
        drawing.add("Relu", second, out="features_1")
        self._stage(name, drawing, {"image": self._image}, features)
        return drawing

    def _head(self, name: str, task: str, wide: int, features: Mapping[str, TensorType]) -> _Drawing:
        _, height, width = self.image
        drawing, classes = _Drawing(np.random.default_rng([self.seed, len(self.pages)])), len(self.labels[task])
        if not self.dense:
            deep = drawing.add("Relu", drawing.conv("features_1", (2 * wide, 2 * wide, 3), height * width // 16))
            flat = drawing.add(
                "Flatten", drawing.add("GlobalAveragePool", drawing.conv(deep, (classes, 2 * wide, 1), height * width // 16))
            )
            drawing.add("Softmax", flat, out="scores", axis=-1)
            self._stage(name, drawing, {"features_1": features["features_1"]}, {"scores": ("float32", ("B", classes))})
            return drawing
        classes = 1 if task == "edge" else classes
        joined = drawing.add("Concat", "features_0", drawing.enlarge("features_1", 2), axis=1)
        logits = drawing.enlarge(drawing.conv(joined, (classes, 3 * wide, 3), height * width // 4), 2)
        if task == "edge":
            drawing.add("Sigmoid", logits, out="map")
        else:
            drawing.add("Softmax", logits, out="map", axis=1)
        self._stage(name, drawing, features, {"map": ("float32", ("B", classes, height, width))})
        return drawing

    def _stage(self, name: str, drawing: _Drawing, inputs: Mapping[str, TensorType], outputs: Mapping[str, TensorType]) -> None:
        self.stages.append({"name": name, "page": len(self.pages), "inputs": list(inputs), "outputs": list(outputs)})
        self.pages.append(PageSource(PageKind.ONNX, graph(drawing.nodes, inputs, outputs, drawing.weights, OPSETS)))
