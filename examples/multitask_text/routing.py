"""The text model's task groups, and the bias each group's requests run with."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

GROUPS = Path(__file__).parent / "groups.toml"


def read_groups(path: Path = GROUPS) -> dict[str, list[str]]:
    """Group -> its tasks, in the file's order."""
    return {group["name"]: list(group["tasks"]) for group in tomllib.loads(path.read_text("utf-8"))["group"]}


def group_bias(task_bias: NDArray[np.float32], tasks: Sequence[str], groups: Mapping[str, Sequence[str]]) -> NDArray[np.float32]:
    """(G, S, E): the mean of the biases that a group's tasks learned; `task_bias` (tasks + 1, S, E) has `tasks`' rows first."""
    rows = dict(zip(tasks, task_bias, strict=False))
    return np.stack([np.mean([rows[task] for task in members], axis=0) for members in groups.values()]).astype(np.float32)
