"""The text model's task groups: fixed, complete, and with a bias each."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "multitask_text"


@pytest.fixture(scope="module")
def routing() -> Any:
    spec = importlib.util.spec_from_file_location("edgeml_test_routing", EXAMPLE / "routing.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_task_is_in_one_group(routing: Any) -> None:
    tasks = [name.partition("/")[2] for name in tomllib.loads((EXAMPLE / "tasks.toml").read_text("utf-8"))["tasks"]]
    grouped = [task for members in routing.read_groups().values() for task in members]
    assert sorted(grouped) == sorted(tasks)


def test_a_groups_bias_is_the_mean_of_its_tasks(routing: Any) -> None:
    bias = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)
    table = routing.group_bias(bias, ["a", "b", "c"], {"one": ["b"], "two": ["a", "c"]})
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, np.stack([bias[1], (bias[0] + bias[2]) / 2]))
