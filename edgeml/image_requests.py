"""Requests on images: batches through one backbone pass and the heads that were asked for, and no others.

Tasks that share a backbone and its preprocessing share its pass. Images are read and resized a batch at a time, so that a long
list of files costs the memory of one batch; a batch is one native request.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import UsageError
from edgeml.graph import Graphs
from edgeml.image import ImageInput, encode_images
from edgeml.manifest import ImagePreprocess, ImageStages, Task
from edgeml.native import Request
from edgeml.result import Result, checked_answer

__all__ = ["BATCH_IMAGES", "BATCH_PIXELS", "image_list", "run_images"]

#: A batch ends at either; one image is always allowed.
BATCH_IMAGES = 32
BATCH_PIXELS = 1 << 18

Answers = dict[str, NDArray[Any]]


def image_list(images: Any) -> list[ImageInput]:
    """The images as a list. Raises `UsageError` for one image that is none, or what holds no images at all."""
    if images is None or isinstance(images, str | os.PathLike | np.ndarray) or not isinstance(images, Iterable):
        raise UsageError("images is a list of uint8 arrays or paths, even for one image")
    return list(images)


def run_images(
    graphs: Graphs,
    request: Callable[[], AbstractContextManager[Request]],
    tasks: Sequence[Task],
    images: Sequence[ImageInput],
    where: str,
) -> dict[str, Result]:
    """Answer each task on all images. Raises `DataError` naming a bad image, `BundleError` for a faulty graph."""
    started = time.perf_counter()
    results = {task.name: Result(task.name) for task in tasks}
    shared: dict[tuple[Any, str], list[Task]] = {}
    for task in tasks:
        assert isinstance(task.stages, ImageStages)
        shared.setdefault((task.preprocess, task.stages.backbone), []).append(task)
    row_s = np.zeros(len(images))
    for (preprocess, backbone), group in shared.items():
        answers: dict[str, list[NDArray[Any]]] = {task.name: [] for task in group}
        size = max(1, min(BATCH_IMAGES, BATCH_PIXELS // (preprocess.height * preprocess.width)))
        for first in range(0, len(images), size):
            tick = time.perf_counter()
            batch = encode_images(images[first : first + size], preprocess, first)
            with request() as running:
                found = _run_batch(graphs, running, backbone, group, batch, where)
            for task in group:
                answers[task.name].append(found[task.name])
                results[task.name].counters.add(running)
            row_s[first : first + size] += (time.perf_counter() - tick) / len(batch)
        for task in group:
            results[task.name].fill(task, np.concatenate(answers[task.name]) if images else _nothing(task, preprocess))
    for result in results.values():
        result.truncated, result.row_s = [False] * len(images), row_s.tolist()
        result.latency_s = time.perf_counter() - started
    return results


def _run_batch(
    graphs: Graphs, request: Request, backbone: str, tasks: Sequence[Task], batch: NDArray[np.float32], where: str
) -> Mapping[str, NDArray[Any]]:
    tensors: Answers = {"image": batch}
    tensors |= graphs.run(backbone, tensors, request)
    return {task.name: checked_answer(task, graphs.run(task.stages.head, tensors, request), len(batch), where) for task in tasks}


def _nothing(task: Task, preprocess: ImagePreprocess) -> NDArray[Any]:
    if task.dense:
        return np.zeros((0, preprocess.height, preprocess.width), np.float32 if task.kind == "edge" else np.uint8)
    return np.zeros((0, len(task.labels)), np.float32)
