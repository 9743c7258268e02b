"""The experts that a trunk chose, token by token: what it tells, checked, and cut into one trace a text.

A bundle tells them through a stage of the same graph as the trunk, or the trunk itself, with the outputs ids_0 .. ids_{S-1}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import BundleError, UsageError
from edgeml.manifest import Manifest, Task, TaskStages

__all__ = ["choices", "tracing_stage"]


def tracing_stage(manifest: Manifest, task: Task, where: str) -> str:
    """The stage to run in place of the task's trunk. Raises `UsageError` where no stage tells the choices."""
    if not isinstance(task.stages, TaskStages):
        raise UsageError(f"task '{task.name}' takes images, and has no experts to choose")
    page = {stage.name: stage.page for stage in manifest.stages}[task.stages.trunk]
    wanted = {"hidden", *_names(manifest)}
    for stage in manifest.stages:
        if stage.page == page and wanted <= set(stage.outputs):
            return stage.name
    raise UsageError(f"{where}: its trunk does not tell which experts it chooses (outputs ids_0, ids_1, ...); export the model again")


def choices(manifest: Manifest, tensors: Mapping[str, NDArray[Any]], mask: NDArray[Any], where: str) -> Iterator[NDArray[np.int64]]:
    """For each text of a batch its trace (real tokens, sites, k) int64, -1 where none was chosen; k is the largest of the sites.

    `tensors` holds ids_0 .. of shape (B, T, k of the site), `mask` (B, T) is not 0 at real tokens. Raises `BundleError` for
    outputs of another shape and for ids out of range.
    """
    width = max((site.top_k for site in manifest.sites), default=0)
    chosen = np.full((*mask.shape, len(manifest.sites), width), -1, np.int64)
    for number, (name, site) in enumerate(zip(_names(manifest), manifest.sites, strict=True)):
        ids = tensors[name]
        if ids.dtype != np.int64 or ids.shape != (*mask.shape, site.top_k):
            wanted = (*mask.shape, site.top_k)
            raise BundleError(f"{where}: the trunk's output '{name}' is {ids.dtype} {ids.shape}, not int64 {wanted}")
        if ids.size and (ids.min() < -1 or ids.max() >= len(site.experts)):
            raise BundleError(f"{where}: the trunk's output '{name}' names an expert outside 0 to {len(site.experts) - 1}")
        chosen[:, :, number, : site.top_k] = ids
    return (row[real] for row, real in zip(chosen, mask != 0, strict=True))


def _names(manifest: Manifest) -> list[str]:
    return [f"ids_{site}" for site in range(len(manifest.sites))]
