#!/usr/bin/env python3
"""Requests that name no task: do they reach the right group, what does that cost, and how long does the router take?

    router.py [--bundle models/multitask-text.edgeml] [--data ../shared/data/text] [--limit N] [--lengths 64,256,1024,4096]

Groups are fixed in the bundle (examples/multitask_text/groups.toml). On every test row:

- `right group`: the share of requests that the router sends to their task's group. A request's form, one text or a pair, is known.
- `told`: the task's score when it is named. `given the group`: when only the group is, so that the trunk runs with the group's bias
  and the task's head answers. `told nothing`: neither; a request that reached another group counts as wrong.

The router's time is of its stage alone, one thread, on `hidden0` of random texts as long as asked: embeddings of real words where the
bundle reads that many, repeated where it does not.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "text"))

import numpy as np
from answers import SEED, Cache, Labels, Questions, bundle_answers, mean_difference, read_questions
from benchlib import MODEL, ROOT, Verdict, finish, numbers, parser, progress, run, shared_text, verdict
from numpy.typing import NDArray

import edgeml
from edgeml.autoroute import AutoRouter, Routed, router_of
from edgeml.batching import batches
from edgeml.errors import DataError
from edgeml.manifest import TaskStages
from edgeml.manifest_groups import GroupRouter
from edgeml.metrics import bootstrap
from edgeml.preprocess import TextBatch
from edgeml.session import Session

RIGHT, WITHIN = 0.95, 1.0
WINDOW = 512
WORDS = 100  # a text's words for the router's time: what they mean is all the same to it
Floats = NDArray[np.float32]


class Given(AutoRouter):
    """A router that was told the group: everything else is as it is. The group's bias is what the router gives its own requests."""

    group: int
    bias: Floats | None = None

    def _route(self, router: GroupRouter, window: TextBatch, counters: Any) -> tuple[Floats, Floats | None]:
        scores, bias = super()._route(router, window, counters)
        own = np.flatnonzero(scores.argmax(-1) == self.group)
        if self.bias is None and bias is not None and own.size:
            self.bias = bias[own[0]]
        if self.bias is None:
            raise DataError(f"no request of group '{router.groups[self.group].name}' reaches it, so that its bias is unknown")
        told = np.zeros_like(scores)
        told[:, self.group] = 1
        return told, np.repeat(self.bias[None], len(scores), 0)


def routed(session: Session, task: Questions) -> Routed:
    """The task's rows, with no task named."""
    rows = task.rows
    return (
        session.run_auto(pairs=[(row.text, row.pair or "") for row in rows])
        if task.task.pair
        else session.run_auto(texts=[row.text for row in rows])
    )


def given(session: Session, task: Questions, group: int) -> Labels:
    """The task's answers when its group is known and its name is not."""

    def named(*_: Any) -> Floats:
        raise AssertionError("a group with a bias is answered together")

    auto = Given(session.manifest, str(session.bundle.path), session._graphs, session._image_request, batches, named, False)
    auto.group = group
    texts, pairs = [row.text for row in task.rows], [row.pair or "" for row in task.rows]
    encoder = session.preprocessor(session.task(task.task.name))
    parts = (slice(start, start + WINDOW) for start in range(0, len(texts), WINDOW))
    windows = (encoder.encode(texts[part], pairs[part] if task.task.pair else None) for part in parts)
    return labels_of(auto.answer(windows, task.task.pair), task)


def labels_of(answer: Routed, task: Questions) -> Labels:
    """A label for each row; a request that went to another group has one that does not exist."""
    found, name = np.full(len(task.rows), len(task.task.labels), np.int64), task.task.name
    if name in answer.results:
        scores = answer.results[name].scores
        assert scores is not None
        found[answer.rows[name]] = scores.argmax(-1)
    return found


def times(session: Session, lengths: Sequence[int], rounds: int) -> dict[str, float]:
    """Median milliseconds of the router's stage, by tokens."""
    router = router_of(session.manifest, str(session.bundle.path))
    task = session.task(router.groups[0].tasks[0])
    batch = session.preprocessor(task).encode([" ".join(str(number) for number in range(WORDS))], None)
    assert isinstance(task.stages, TaskStages)
    found = {}
    with session._image_request() as request:
        tensors = {"ids": batch.ids, "types": batch.types, "mask": batch.mask}
        hidden = session._graphs.run(task.stages.embed, tensors, request)["hidden0"][0]
        for length in lengths:
            rows = np.resize(np.arange(len(hidden)), length)
            fed = {"hidden0": hidden[rows][None], "mask": np.ones((1, length), np.float32)}
            seconds = []
            for _ in range(rounds + 1):
                started = time.perf_counter()
                session._graphs.run(router.stage, fed, request)
                seconds.append(time.perf_counter() - started)
            found[str(length)] = 1e3 * float(np.median(seconds[1:]))
    return found


def measured(session: Session, questions: Sequence[Questions], cache: Cache) -> tuple[dict[str, Any], list[Verdict]]:
    """Every figure of the quality, and what must hold."""
    groups = router_of(session.manifest, str(session.bundle.path)).groups
    group_of = {task: (number, group.name, len(group.tasks)) for number, group in enumerate(groups) for task in group.tasks}
    step = progress(3 * sum(len(task.rows) for task in questions), "requests")
    told, known, nothing, right = [], [], [], []
    for task in questions:
        number, name, together = group_of[task.task.name]
        told.append(bundle_answers(session, task, cache, "all", None, step))
        known.append(given(session, task, number) if together > 1 else told[-1])  # alone in a group, a task has the group's bias
        step(len(task.rows))
        answer = routed(session, task)
        step(len(task.rows))
        nothing.append(labels_of(answer, task))
        right.append(np.array([group == name for group in answer.groups]))
    share = bootstrap(
        lambda rows: float(np.concatenate([one[drawn] for one, drawn in zip(right, rows, strict=True)]).mean()),
        [len(one) for one in right],
        SEED,
    )
    lost = mean_difference(questions, [[one] for one in told], [[one] for one in known])
    tasks = {
        task.task.name: {"group": group_of[task.task.name][1], "n": len(task.rows), "right_group": float(one.mean())}
        | {key: task.score(values) for key, values in (("told", a), ("given_the_group", b), ("told_nothing", c))}
        for task, one, a, b, c in zip(questions, right, told, known, nothing, strict=True)
    }
    means = {
        key: float(np.mean([one[key] for one in tasks.values()])) for key in ("right_group", "told", "given_the_group", "told_nothing")
    }
    verdicts = [
        verdict("share of requests that reach the right group", f">= {RIGHT}", share.value, share.value >= RIGHT, share),
        verdict("points lost by naming the group, not the task, mean", f"<= {WITHIN}", lost.value, lost.value <= WITHIN, lost),
    ]
    return {"groups": {group.name: list(group.tasks) for group in groups}, "tasks": tasks, "means_over_tasks": means}, verdicts


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--bundle", type=Path, default=MODEL)
    options.add_argument("--data", type=Path, default=shared_text())
    options.add_argument("--limit", type=int, help="at most this many rows a task, for trials (default: the whole test split)")
    options.add_argument("--lengths", type=numbers, default=[64, 256, 1024, 4096], help="tokens for the router's time")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--cache", type=Path, default=ROOT / "runs" / "predictions", help="where predictions are kept")
    chosen = options.parse_args()
    with edgeml.open(chosen.bundle, memory="100%", threads=1) as session:
        figures: dict[str, Any] = {"bundle": session.settings(), "limit": chosen.limit}
        figures["router_ms"] = times(session, chosen.lengths, chosen.rounds)
        questions = read_questions(chosen.data, session.manifest, str(chosen.bundle), chosen.limit)
        found, verdicts = measured(session, questions, Cache(chosen.cache))
    return finish("routing-router", verdicts, figures | found, chosen.records)


if __name__ == "__main__":
    run(main)
