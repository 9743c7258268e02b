"""Put a trained router into the text model's bundle, and measure what naming no task costs.

    python attach_router.py --router router.safetensors --bundle models/multitask-text.edgeml --out routed.edgeml [--measure 500]

The bias of a group is the mean of its tasks' learned biases, so that one pass of the trunk serves all of them; with `--own` the
router answers none, and each task of the group has a pass with its own, exactly as if it had been named. `--measure N` takes N
test rows a task: the score when told the task, the score given the group (the same with the group's bias), and, with neither, how
many requests reach the right group and what is answered then.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from corpus import data_root
from edgeml_export.graphs import router_graph
from edgeml_export.routers import attach_bias_router, attach_group_router, group_graph, load_router
from model import CHECKPOINT, load
from routing import group_bias, read_groups

import edgeml
from edgeml.bundle import Bundle
from edgeml.data import Row, TaskData, find_tasks
from edgeml.manifest import load_manifest
from edgeml.metrics import score


def attach(bundle: Path, out: Path, router: Path, checkpoint: Path, own: bool) -> np.ndarray:
    """Write `out`; returns the groups' biases (G, S, E), which it leaves out when each task is to have its `own`."""
    trained, names = load_router(router)
    groups = read_groups()
    if names != list(groups):
        raise SystemExit(f"{router}: it was trained for other groups than groups.toml has; train it again")
    model = load(checkpoint)
    table = group_bias(model.module.task_bias.detach().numpy(), [task.name for task in model.tasks], groups)
    attach_group_router(bundle, out, group_graph(trained, None if own else table), groups, biased=not own)
    return table


def told_the_group(bundle: Path, folder: Path, table: np.ndarray, groups: Mapping[str, Sequence[str]]) -> Path:
    """A bundle whose tasks run with their group's bias instead of their own."""
    with Bundle.open(bundle) as opened:
        hidden = load_manifest(opened).sites[0].hidden
    path = bundle
    for number, (name, tasks) in enumerate(groups.items()):
        if len(tasks) > 1:  # alone in its group, a task has the group's bias already
            following, stage = folder / f".group-{number}.edgeml", f"group_{name}"
            attach_bias_router(path, following, router_graph(stage, table[number], hidden), stage, tasks, ["hidden0"])
            if path != bundle:
                path.unlink()
            path = following
    return path


def ask(session: edgeml.Session, data: TaskData, rows: Sequence[Row]) -> list[int]:
    """The label that a named task gives each row."""
    given: dict[str, Any] = {"pairs": [(row.text, row.pair) for row in rows]} if data.pair else {"texts": [row.text for row in rows]}
    return [data.labels.index(label) for label in session.run(data.name, **given).labels]


def measure(plain: Path, by_group: Path, routed: Path, groups: Mapping[str, Sequence[str]], limit: int) -> dict[str, Any]:
    """Scores told the task, given the group, and told nothing, in [0, 1], by task."""
    group_of = {task: name for name, tasks in groups.items() for task in tasks}
    out: dict[str, Any] = {}
    with edgeml.open(plain, threads=1) as told, edgeml.open(by_group, threads=1) as given, edgeml.open(routed, threads=1) as nothing:
        for data in find_tasks(data_root(), list(group_of)):
            rows = data.rows("test", limit)
            labels = [row.label or 0 for row in rows]
            figures = {"rows": len(rows), "told": score(data.metric, labels, ask(told, data, rows))}
            shared = len(groups[group_of[data.name]]) > 1
            figures["given_group"] = score(data.metric, labels, ask(given, data, rows)) if shared else figures["told"]
            form: dict[str, Any] = {"pairs": [(row.text, row.pair) for row in rows]} if data.pair else {"texts": [row.text for row in rows]}
            answer = nothing.run_auto(**form)
            right = [group == group_of[data.name] for group in answer.groups]
            figures["right_group"] = float(np.mean(right))
            figures["told_nothing"] = _auto_score(data, labels, answer)
            out[data.name] = figures
            print(data.name, {key: round(value, 4) for key, value in figures.items()}, flush=True)
    return out


def _auto_score(data: TaskData, labels: Sequence[int], answer: Any) -> float:
    """A request that went to another group is wrong: it counts as a label that does not exist."""
    said = [len(data.labels)] * len(labels)
    if data.name in answer.results:
        for row, label in zip(answer.rows[data.name], answer.results[data.name].labels, strict=True):
            said[row] = data.labels.index(label)
    return float(score(data.metric, labels, said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--own", action="store_true", help="a pass a task, with the task's own bias")
    parser.add_argument("--measure", type=int, default=0, help="test rows a task")
    options = parser.parse_args()
    groups = read_groups()
    table = attach(options.bundle, options.out, options.router, options.checkpoint, options.own)
    if options.measure:
        by_group = told_the_group(options.bundle, options.out.parent, table, groups)
        try:
            figures = measure(options.bundle, by_group, options.out, groups, options.measure)
        finally:
            by_group.unlink(missing_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
