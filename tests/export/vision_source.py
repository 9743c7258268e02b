"""A small CNN with four kinds of heads, data for it, made and trained in seconds: what the vision tests export.

Images of 16 x 16: a square in one of four corners, large or small. Tasks: where it is, how large, its pixels, its outline.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from edgeml_export.vision import ImageFormat, MultiTaskCNN, Training, VisionModel, VisionTask, fit
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, SET = 16, "squares"
PLACES, SIZES, PIXELS = ("left top", "right top", "left bottom", "right bottom"), ("small", "large"), ("ground", "square", "void")
TASKS = (
    VisionTask("place", SET, PLACES),
    VisionTask("size", SET, SIZES),
    VisionTask("pixels", SET, PIXELS, "miou", "segmentation", 2),
    VisionTask("edge", SET, ("no edge", "edge"), "edge_f1", "edge", 2),
)
IMAGE = ImageFormat(SIDE, SIDE, 1, (0.3,), (0.25,))
ROWS = {"train": 320, "validation": 120, "test": 120}


def rows(split: str) -> dict[str, np.ndarray]:
    """The arrays of a split's file."""
    rng = np.random.default_rng(list(ROWS).index(split))
    count = ROWS[split]
    place, size = rng.integers(0, 4, count).astype(np.uint8), rng.integers(0, 2, count).astype(np.uint8)
    x = rng.integers(0, 90, (count, SIDE, SIDE)).astype(np.uint8)
    pixels, edge = np.zeros((2, count, SIDE, SIDE), np.uint8)
    for row in range(count):
        top, left = 8 * (place[row] // 2) + 1, 8 * (place[row] % 2) + 1
        side = 6 if size[row] else 3
        area = (row, slice(top, top + side), slice(left, left + side))
        x[area] += 140
        pixels[area], edge[area] = 1, 1
        edge[row, top + 1 : top + side - 1, left + 1 : left + side - 1] = 0
    pixels[:, 0] = 2  # the upper row is void
    return {"x": x, "y_place": place, "y_size": size, "pixels": pixels, "edge": edge}


def write_data(root: Path) -> Path:
    """The image set below `root`, as images/squares."""
    place = root / "images" / SET
    place.mkdir(parents=True)
    labels = {"y_place": PLACES, "y_size": SIZES, "pixels": PIXELS}
    (place / "image.json").write_text(json.dumps({"name": SET, "labels": labels, "licence": "CC0-1.0"}))
    for split in ROWS:
        np.savez_compressed(place / f"{split}.npz", **rows(split))
    return root


class Backbone(nn.Module):
    """Two scales, with a residual block in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        inner = [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        self.block = nn.Sequential(*inner, nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.down = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = F.relu(self.stem(x))
        fine = F.relu(self.block(fine) + fine)
        return fine, F.relu(self.down(fine))


class Classify(nn.Module):
    """Only the coarse scale; with dropout, which must not survive the export."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.conv, self.drop, self.out = nn.Conv2d(24, 16, 3, padding=1), nn.Dropout(0.3), nn.Linear(16 * 4, labels)

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        pooled = F.adaptive_avg_pool2d(F.relu(self.conv(features[1])), 2)
        return self.out(self.drop(torch.flatten(pooled, 1)))


class Decode(nn.Module):
    """Both scales, to the image's size."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.up, self.out = nn.Conv2d(24, 16, 1), nn.Conv2d(16, outputs, 3, padding=1)

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        return self.out(F.relu(F.interpolate(self.up(features[1]), scale_factor=2.0, mode="nearest") + features[0]))


def network(seed: int = 0) -> MultiTaskCNN:
    torch.manual_seed(seed)
    return MultiTaskCNN(Backbone(), {"place": Classify(4), "size": Classify(2), "pixels": Decode(2), "edge": Decode(1)})


def tensors(split: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A split as training takes it; edges are void where pixels are."""
    arrays = rows(split)
    x = (torch.from_numpy(arrays["x"])[:, None].float() / 255 - 0.3) / 0.25
    labels = {name: torch.from_numpy(arrays[key].astype(np.int64)) for name, key in zip(TITLES, KEYS, strict=True)}
    labels["edge"][labels["pixels"] == 2] = 2
    return x, labels


TITLES, KEYS = ("place", "size", "pixels", "edge"), ("y_place", "y_size", "pixels", "edge")


def model() -> VisionModel:
    """The trained model."""
    made = VisionModel(network(), TASKS, IMAGE, provenance={"source": "a toy", "licence": "CC0-1.0"})
    fit(made.module, *tensors("train"), made.losses, Training(epochs=6, rate=0.1, batch=32))
    return made


def fails() -> VisionModel:
    raise RuntimeError("no such weights")
