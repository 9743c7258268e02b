"""The manifest's `router`: which stage answers a request that names no task, and the task groups it chooses among.

    "router": {"stage": "router", "groups": [{"name": "banking", "tasks": ["banking77", "clinc_banking"]}, ...]}

The stage reads `hidden0` and, if it likes, `mask`. Its output `groups` (B, G) f32 has a probability a group, in this order; an
output `bias` (B, S, E) is the one to run the likeliest group with, and without it each task's own router is asked. Tasks of a group
share their inputs: one text is a request to all of them. They share embed and trunk, and every task here one embed stage and
tokenizer, because the group is not known before the text is embedded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeml.manifest_reader import Reader, unique

__all__ = ["GroupRouter", "TaskGroup", "Way", "read_router"]

INPUTS = {"hidden0", "mask"}
MAX_GROUPS = 4096


@dataclass(frozen=True)
class TaskGroup:
    """Tasks that share inputs, in the order in which they answer."""

    name: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class GroupRouter:
    """The stage that chooses a group; `biased` where it also answers `bias`."""

    stage: str
    groups: tuple[TaskGroup, ...]
    biased: bool


@dataclass(frozen=True)
class Way:
    """What the rules need of a task on texts: its stages, and how its text is read."""

    embed: str
    trunk: str
    preprocess: object


def read_router(item: Reader, stages: Mapping[str, tuple[Sequence[str], Sequence[str]]], ways: Mapping[str, Way]) -> GroupRouter:
    """Check the manifest's `router` against the stages (inputs, outputs) and the tasks on texts. Raises `BundleError` naming the place."""
    odd = sorted(set(item.document) - {"stage", "groups"})
    if odd:
        raise item.error(f"unknown key {odd[0]!r:.80}; a router has stage and groups")
    name = item.string("stage")
    if name not in stages:
        raise item.error(f"the stage {name!r:.80} does not exist")
    inputs, outputs = stages[name]
    if "groups" not in outputs or not set(inputs) <= INPUTS:
        raise item.error(f"the stage '{name}' must read no more than hidden0 and mask, and answer 'groups'")
    groups = tuple(TaskGroup(group.name("name"), group.strings("tasks")) for group in item.items("groups"))
    if not 1 <= len(groups) <= MAX_GROUPS:
        raise item.error(f"'groups' must have from 1 to {MAX_GROUPS} groups, not {len(groups)}")
    unique([group.name for group in groups], f"{item.where}.groups")
    unique([task for group in groups for task in group.tasks], f"{item.where}.groups")
    for group in groups:
        _check_group(item, group, ways)
    names = [task for group in groups for task in group.tasks]
    for task in names:
        if (ways[task].embed, ways[task].preprocess) != (ways[names[0]].embed, ways[names[0]].preprocess):
            raise item.error(f"tasks '{names[0]}' and '{task}' must share embed stage and preprocess")
    return GroupRouter(name, groups, "bias" in outputs)


def _check_group(item: Reader, group: TaskGroup, ways: Mapping[str, Way]) -> None:
    if not group.tasks:
        raise item.error(f"group '{group.name}' has no tasks")
    for task in group.tasks:
        if task not in ways:
            raise item.error(f"group '{group.name}' has {task!r:.80}, which is no task on texts of this bundle")
    if len({ways[task].trunk for task in group.tasks}) > 1:
        raise item.error(f"the tasks of group '{group.name}' must share one trunk")
