"""What a vision bundle answers and what it reads: tasks and the input image, for torch models and ONNX files alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgeml.errors import UsageError
from edgeml.image_data import ImageTask
from edgeml.manifest import ImagePreprocess

__all__ = ["DENSE", "METRICS", "ImageFormat", "VisionTask", "check_tasks"]

#: Metrics of each kind of task; the first is the usual one.
METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1"),
    "segmentation": ("miou",),
    "edge": ("edge_f1",),
}
DENSE = frozenset({"segmentation", "edge"})
EDGE_LABELS = ("no edge", "edge")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,48}")


@dataclass(frozen=True)
class VisionTask:
    """A task with a head of its own. `domain` is the image set it comes from.

    A classification or segmentation head gives one logit for each label, (B, labels) or (B, labels, h, w); an edge head gives one a
    pixel, (B, 1, h, w), and its labels are "no edge", "edge". `void` is the label that is neither learned nor scored: the last of a
    segmentation's, or 2 for edges.
    """

    name: str
    domain: str
    labels: tuple[str, ...]
    metric: str = "accuracy"
    kind: str = "classification"
    void: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in METRICS:
            raise UsageError(f"task '{self.name}': kind must be one of {', '.join(METRICS)}, not {self.kind!r:.40}")
        if self.metric not in METRICS[self.kind]:
            raise UsageError(f"task '{self.name}': the metric of {self.kind} is {' or '.join(METRICS[self.kind])}, not {self.metric!r:.40}")
        for name in (self.name, self.domain):
            if not _NAME.fullmatch(name):
                raise UsageError(f"a task or domain is named by 1 to 48 letters, digits, dots, dashes or underscores, not {name!r:.60}")
        if self.kind == "edge" and self.labels != EDGE_LABELS:
            raise UsageError(f"task '{self.name}': the labels of an edge task are 'no edge' and 'edge', in this order")
        last = {"segmentation": len(self.labels) - 1, "edge": len(EDGE_LABELS)}.get(self.kind)
        if self.void is not None and self.void != last:
            raise UsageError(f"task '{self.name}': void can be {'no label' if last is None else last}, not {self.void}")
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise UsageError(f"task '{self.name}' needs at least two labels, all different")

    @classmethod
    def of(cls, domain: str, found: ImageTask) -> VisionTask:
        """A task as its image set describes it."""
        return cls(found.name, domain, found.labels, found.metric, found.kind, found.void)

    @property
    def channels(self) -> tuple[int, ...]:
        """The widths that its head's output may have: a segmentation need not answer void."""
        if self.kind == "edge":
            return (1,)
        return (len(self.labels),) if self.void is None else (self.void, len(self.labels))

    @property
    def output(self) -> str:
        """What its head stage gives: `scores` (B, labels) or `map` (B, channels, h, w), probabilities."""
        return "map" if self.kind in DENSE else "scores"


def check_tasks(tasks: tuple[VisionTask, ...]) -> None:
    """Raise `UsageError` for no task at all, two of one name, or tasks on different images."""
    names = [task.name for task in tasks]
    if not names:
        raise UsageError("the model has no tasks; describe at least one")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two tasks are called '{twice[0]}'")
    domains = sorted({task.domain for task in tasks})
    if len(domains) > 1:
        raise UsageError(f"the tasks of one model label the same images, so they have one domain, not {' and '.join(domains[:2])}")


@dataclass(frozen=True)
class ImageFormat:
    """The image a model reads: size in pixels, grey (1) or RGB (3); a byte becomes (byte / 255 - mean) / std, by channel."""

    height: int
    width: int
    channels: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: str = "stretch"

    def __post_init__(self) -> None:
        if not (1 <= self.height <= 8192 and 1 <= self.width <= 8192 and self.channels in (1, 3)):
            raise UsageError(
                f"an image of {self.height} x {self.width} with {self.channels} channels: sides are 1 to 8192, channels 1 or 3"
            )
        object.__setattr__(self, "mean", tuple(map(float, self.mean)) or (0.0,) * self.channels)
        object.__setattr__(self, "std", tuple(map(float, self.std)) or (1.0,) * self.channels)
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise UsageError(f"mean and std need one number for each of the {self.channels} channels")
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(self.std)) or min(self.std) <= 0:
            raise UsageError("mean must be finite and std above 0")
        if self.resize != "stretch":
            raise UsageError(f"resize can be 'stretch', not {self.resize!r:.40}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    @property
    def preprocess(self) -> ImagePreprocess:
        """The same, as the runtime knows it."""
        size = (self.height, self.width, self.channels)
        return ImagePreprocess("image", *size, self.mean, self.std, self.resize)

    def as_json(self) -> dict[str, Any]:
        """The manifest's `preprocess`."""
        return {**asdict(self), "kind": "image", "mean": list(self.mean), "std": list(self.std)}
