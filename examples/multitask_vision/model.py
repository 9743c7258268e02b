"""The trained references as `edgeml export` takes them; `train.py` makes their checkpoints.

edgeml export model.py:multi_fashion -o multi-fashion.edgeml --recipe multi_fashion.toml --data DIR
edgeml export model.py:camvid -o camvid.edgeml --recipe camvid.toml --data DIR

Checkpoints lie in `runs/vision` of the repository, or where EDGEML_VISION_RUNS says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networks
import torch
from edgeml_export.vision import ImageFormat, MultiTaskCNN, Training, VisionModel, VisionTask
from edgeml_export.vision.model import Labels, TaskLoss
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from edgeml.errors import InputError, UsageError

RUNS = Path(os.environ.get("EDGEML_VISION_RUNS", Path(__file__).parents[2] / "runs" / "vision"))
CLOTHES = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
STREET = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist", "void")


@dataclass(frozen=True)
class Reference:
    """A model before training, and how it is trained."""

    tasks: tuple[VisionTask, ...]
    image: ImageFormat
    network: Callable[[], MultiTaskCNN]
    training: Training
    augment: Callable[[Tensor, Labels, torch.Generator], tuple[Tensor, Labels]]
    losses: Mapping[str, TaskLoss]
    provenance: Mapping[str, Any]

    def model(self, module: MultiTaskCNN, scores: Mapping[str, float], provenance: Mapping[str, Any]) -> VisionModel:
        """The description an export takes."""
        return VisionModel(module, self.tasks, self.image, self.losses, self.augment, scores, {**self.provenance, **provenance})


def shifted(x: Tensor, labels: Labels, random: torch.Generator) -> tuple[Tensor, Labels]:
    """The batch moved by up to two pixels; what leaves on one side comes back on the other, where these images are black."""
    down, right = torch.randint(-2, 3, (2,), generator=random).tolist()
    return torch.roll(x, (down, right), (2, 3)), labels


def mirrored(x: Tensor, labels: Labels, random: torch.Generator) -> tuple[Tensor, Labels]:
    """Half of the batches mirrored, cut to a window of up to nine tenths that is stretched back, and lit differently."""
    flip, top, left, light = torch.rand(4, generator=random).tolist()
    maps = dict(labels)
    if flip < 0.5:
        x, maps = x.flip(3), {name: values.flip(2) for name, values in maps.items()}
    share = 0.75 + 0.25 * float(torch.rand((), generator=random))
    height, width = (round(share * side) for side in x.shape[2:])
    y, z = int(top * (x.shape[2] - height + 1)), int(left * (x.shape[3] - width + 1))
    rows, columns = (
        torch.arange(side) * part // side + start for side, part, start in zip(x.shape[2:], (height, width), (y, z), strict=True)
    )
    x = x[:, :, rows][..., columns] * (0.8 + 0.4 * light)
    return x, {name: values[:, rows][..., columns] for name, values in maps.items()}


def weighted(frequencies: Mapping[int, float]) -> TaskLoss:
    """Cross entropy in which a rare class counts more, by the inverse square root of its share of pixels."""
    weights = torch.tensor([frequencies.get(number, 1.0) ** -0.5 for number in range(len(frequencies))])
    weights /= weights.mean()

    def loss(output: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(output, label, weights.to(output), ignore_index=len(frequencies))

    return loss


#: Share of labelled training pixels by class of CamVid at 72 x 96.
PIXELS = dict(enumerate((0.175, 0.242, 0.010, 0.329, 0.047, 0.101, 0.012, 0.012, 0.061, 0.007, 0.003)))
BOUNDARY = 2.0  # weight of an edge pixel: a tenth of the pixels are edges, and F1 counts those


def edges(output: Tensor, label: Tensor) -> Tensor:
    """Binary cross entropy over pixels that are not void; edges count more."""
    weight = (label != 2).float() * torch.where(label == 1, BOUNDARY, 1.0)
    each = F.binary_cross_entropy_with_logits(output[:, 0], (label == 1).float(), weight, reduction="sum")
    return each / weight.sum().clamp(min=1)


REFERENCES = {
    "multi_fashion_mnist": Reference(
        tasks=(
            VisionTask("digit", "multi_fashion_mnist", tuple("0123456789")),
            VisionTask("fashion", "multi_fashion_mnist", CLOTHES),
        ),
        image=ImageFormat(36, 36, 1, (0.2,), (0.33,)),
        network=lambda: networks.classifier({"digit": 10, "fashion": 10}),
        training=Training(epochs=8, rate=0.1, batch=128),
        augment=shifted,
        losses={},
        provenance={
            "source": "examples/multitask_vision, trained from scratch on digits of MNIST laid over garments of Fashion-MNIST",
            "licence": "Apache-2.0 for the code; weights CC BY-SA 3.0, for MNIST's part of the data (Fashion-MNIST: MIT)",
        },
    ),
    "camvid": Reference(
        tasks=(
            VisionTask("segmentation", "camvid", STREET, "miou", "segmentation", 11),
            VisionTask("edge", "camvid", ("no edge", "edge"), "edge_f1", "edge", 2),
        ),
        image=ImageFormat(72, 96, 3, (0.412, 0.425, 0.433), (0.294, 0.298, 0.294)),
        network=lambda: networks.dense({"segmentation": 11, "edge": 1}),
        training=Training(epochs=60, rate=0.05, batch=8, decay=1e-3),
        augment=mirrored,
        losses={"segmentation": weighted(PIXELS), "edge": edges},
        provenance={
            "source": "examples/multitask_vision, trained from scratch on CamVid at 72 x 96 (Brostow, Fauqueur and Cipolla, PRL 2009)",
            "licence": "code Apache-2.0; the images have no licence of their own and were published for research: cite the authors",
        },
    ),
}


def multi_fashion() -> VisionModel:
    """Digits and garments, as trained."""
    return load("multi_fashion_mnist")


def camvid() -> VisionModel:
    """Street scenes, as trained."""
    return load("camvid")


def load(name: str) -> VisionModel:
    """A reference from the checkpoint that `train.py` wrote."""
    path, reference = RUNS / f"{name}.safetensors", REFERENCES[name]
    if not path.exists():
        raise UsageError(f"{path}: the reference is not trained yet: python train.py {name} --data DIR, or make vision-models")
    try:
        with safe_open(path, "pt") as file:
            scores: dict[str, float] = json.loads(file.metadata()["scores"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        module = reference.network()
        module.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: this is not a checkpoint of this example ({' '.join(str(error).split())[:120]})") from error
    return reference.model(module, scores, {"checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
