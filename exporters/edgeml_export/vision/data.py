"""A model's images and labels, split by split, as the export reads them: through edgeml's own reader and preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeml import metrics
from edgeml.errors import DataError
from edgeml.image import encode_images
from edgeml.image_data import ImageSet, commonest_label, find_image_sets
from edgeml_export.vision.tasks import ImageFormat, VisionTask

__all__ = ["Split", "VisionData", "chances", "predicted", "scores"]

Floats = NDArray[np.float32]
Labels = Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class Split:
    """`images` float32 (n, C, H, W), as the backbone reads them; `labels` by task, uint8 (n,) or (n, h, w)."""

    name: str
    images: Floats
    labels: Labels

    def first(self, count: int) -> Split:
        """The first `count` images."""
        return Split(self.name, self.images[:count], {name: values[:count] for name, values in self.labels.items()})


@dataclass(frozen=True)
class VisionData:
    """The image set of a model's tasks. Splits are read when they are asked for, and kept."""

    set: ImageSet
    image: ImageFormat
    tasks: tuple[VisionTask, ...]

    @classmethod
    def find(cls, root: Path, image: ImageFormat, tasks: Sequence[VisionTask]) -> VisionData:
        """The set named by the tasks' domain, at or below `root`. Raises `DataError` where it or a task is missing, or differs."""
        sets = find_image_sets(root)
        found = [one for one in sets if one.name == tasks[0].domain]
        if len(found) != 1:
            there = ", ".join(one.name for one in sets) or "no image.json"
            raise DataError(f"{root}: the model's tasks are on the image set '{tasks[0].domain}', and there is {there}")
        known = {task.name: VisionTask.of(found[0].name, task) for task in found[0].tasks}
        for task in tasks:
            if task.name not in known:
                raise DataError(f"{found[0].path}: task '{task.name}' is missing; there is {', '.join(known)}")
            for what in ("kind", "labels", "metric", "void"):
                if getattr(known[task.name], what) != getattr(task, what):
                    raise DataError(f"{found[0].path}: the {what} of task '{task.name}' is not that of the model")
        return cls(found[0], image, tuple(tasks))

    def check(self) -> None:
        """Read every split now: what is wrong with one is not to be found out after the work."""
        for split in (self.train, self.validation, self.test):
            assert len(split.images)

    @cached_property
    def train(self) -> Split:
        """For calibration, pruning and fine-tuning. Raises `DataError` where a class has no example."""
        split = self._read("train")
        for task in self.tasks:
            counts = np.bincount(split.labels[task.name].ravel(), minlength=len(task.labels))
            absent = [label for number, label in enumerate(task.labels) if not counts[number] and number != task.void]
            if absent:
                raise DataError(f"{self.set.path}: no training image is labelled '{absent[0]}', a class of task '{task.name}'")
        return split

    @cached_property
    def validation(self) -> Split:
        """For every choice."""
        return self._read("validation")

    @cached_property
    def test(self) -> Split:
        """For the report."""
        return self._read("test")

    def _read(self, name: str) -> Split:
        rows = self.set.rows(name)
        if not len(rows.images):
            raise DataError(f"{self.set.path}: the split '{name}' has no images")
        images = encode_images(list(rows.images), self.image.preprocess)
        return Split(name, images, {task.name: rows.labels[task.name] for task in self.tasks})


def predicted(task: VisionTask, answers: Floats) -> NDArray[np.int64]:
    """What probabilities (or logits of classes) say: label indices (n,) or (n, h, w); void is no answer."""
    if task.kind == "edge":
        return (answers[:, 0] >= 0.5).astype(np.int64)
    return answers[:, : task.void].argmax(1) if task.kind == "segmentation" else answers.argmax(1)


def scores(tasks: Sequence[VisionTask], split: Split, answers: Mapping[str, Floats]) -> dict[str, float]:
    """Each task's score of probabilities, in [0, 1]. Raises `DataError` where maps are not as large as the labels."""
    found = {}
    for task in tasks:
        labels, said = split.labels[task.name], predicted(task, answers[task.name])
        if labels.shape != said.shape:
            raise DataError(f"task '{task.name}' answers {said.shape[1:]} an image, and its labels are {labels.shape[1:]}")
        found[task.name] = metrics.score(task.metric, labels, said, len(task.labels), task.void)
    return found


def chances(tasks: Sequence[VisionTask], train: Split, test: Split) -> dict[str, float]:
    """Each task's score on `test` for always giving the commonest label of `train`."""
    found = {}
    for task in tasks:
        common = commonest_label(train.labels[task.name], task.void)
        found[task.name] = metrics.chance(task.metric, test.labels[task.name], common, len(task.labels), task.void)
    return found
