"""Requests that name no task: the bundle's group router chooses a task group, and every task of the group that fits answers.

A request's form is known, one text or a pair, so groups without a task of that form are not candidates. Rows are routed window by
window, embedding and router only; then each group's rows run together. Where the router answers a bias, a group's tasks share one
pass of the trunk with it. Under masked residency, whose sets belong to tasks, each task has a pass of its own, where that bias and the
task's mask add. Where the router answers none, and where the likeliest group had to be passed over, each task runs as if it had been
named, and answers as if it had.

A router is data from outside: what it answers is checked before it is trusted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import BundleError, UsageError
from edgeml.graph import Graphs
from edgeml.manifest import Manifest, Task, TaskStages
from edgeml.manifest_groups import GroupRouter
from edgeml.native import Request
from edgeml.preprocess import TextBatch
from edgeml.result import Counters, Result, checked_answer
from edgeml.router import checked_bias

__all__ = ["AutoRouter", "Choice", "Routed", "choose_groups", "router_of"]

Floats = NDArray[np.float32]
#: Cuts a window into batches of similar length, each with the rows it came from.
Cut = Callable[[TextBatch], Iterator[tuple[NDArray[np.intp], TextBatch]]]


class Choice(NamedTuple):
    """Where a request that names no task belongs: the group, its probability, and those of its tasks that take the request's form.

    `bias` (S, E): what the tasks are to be run with; None: each as its own router says.
    """

    group: str
    score: float
    tasks: tuple[str, ...]
    bias: Floats | None = None


@dataclass
class Routed:
    """Answers to n requests that named no task.

    `groups[i]` is the group of input i and `scores` (n, G) the groups' probabilities, in the manifest's order. `results[task]`
    holds the answers to the inputs `rows[task]`, in input order. `row_s`, `truncated`, `latency_s` and `counters` as in `Result`.
    """

    groups: list[str]
    scores: Floats
    results: dict[str, Result] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    truncated: list[bool] = field(default_factory=list)
    row_s: list[float] = field(default_factory=list)
    latency_s: float = 0.0
    counters: Counters = field(default_factory=Counters)


@dataclass
class AutoRouter:
    """What an open session lends: its graphs, native requests, the way it cuts windows, and how it runs a named task."""

    manifest: Manifest
    where: str
    graphs: Graphs
    request: Callable[[], AbstractContextManager[Request]]
    cut: Cut
    run_task: Callable[[Task, TextBatch, Counters], Floats]
    masked: bool

    def answer(self, windows: Iterable[TextBatch], pair: bool) -> Routed:
        """Route and answer the rows of `windows`. Raises `UsageError` where no group takes their form, `BundleError` for a bad router."""
        router = router_of(self.manifest, self.where)
        fits = self._fitting(router, pair)
        started = time.perf_counter()
        total = Routed([], np.zeros((0, len(router.groups)), np.float32))
        answers: dict[str, list[Floats]] = {}
        for window in windows:
            self._answer_window(router, fits, window, total, answers)
        for name, parts in answers.items():
            result, order = total.results[name], np.argsort(total.rows[name])
            result.fill(self._tasks[name], np.concatenate(parts)[order])
            total.rows[name] = sorted(total.rows[name])
            result.row_s = [total.row_s[row] for row in total.rows[name]]
            result.truncated = [total.truncated[row] for row in total.rows[name]]
        total.latency_s = time.perf_counter() - started
        return total

    def choose(self, windows: Iterable[TextBatch], pair: bool) -> list[Choice]:
        """The group of every row; nothing is answered. Raises as `answer`."""
        router = router_of(self.manifest, self.where)
        fits = self._fitting(router, pair)
        found: list[Choice] = []
        for window in windows:
            scores, bias = self._route(router, window, Counters())
            for row, number in enumerate(choose_groups(scores, [bool(tasks) for tasks in fits])):
                own = bias[row] if bias is not None and scores[row].argmax() == number else None
                tasks = tuple(task.name for task in fits[number])
                found.append(Choice(router.groups[number].name, float(scores[row, number]), tasks, own))
        return found

    def _answer_window(
        self, router: GroupRouter, fits: list[list[Task]], window: TextBatch, total: Routed, answers: dict[str, list[Floats]]
    ) -> None:
        first, started = len(total.groups), time.perf_counter()
        scores, bias = self._route(router, window, total.counters)
        group = choose_groups(scores, [bool(tasks) for tasks in fits])
        likeliest = scores.argmax(-1) == group
        row_s = np.full(len(group), (time.perf_counter() - started) / max(len(group), 1))
        for number in np.unique(group):
            for ours in (True, False):
                rows = np.flatnonzero((group == number) & (likeliest == ours))
                if not rows.size:
                    continue
                part = window.rows(rows)
                if bias is not None and ours:
                    part = replace(part, bias=bias[rows])
                started = time.perf_counter()
                values = self._run_group(fits[number], part, total.counters)
                row_s[rows] += (time.perf_counter() - started) / len(rows)
                for task, value in zip(fits[number], values, strict=True):
                    self._keep(total, answers, task, value, rows, first)
        total.groups += [router.groups[number].name for number in group]
        total.scores = np.concatenate([total.scores, scores])
        total.row_s += row_s.tolist()
        total.truncated += window.truncated

    @staticmethod
    def _keep(total: Routed, answers: dict[str, list[Floats]], task: Task, value: Floats, rows: NDArray[np.intp], first: int) -> None:
        total.results.setdefault(task.name, Result(task.name))
        total.rows.setdefault(task.name, []).extend(int(row) + first for row in rows)
        answers.setdefault(task.name, []).append(value)

    def _route(self, router: GroupRouter, window: TextBatch, counters: Counters) -> tuple[Floats, Floats | None]:
        """Probabilities (n, G) and, where the router has one, bias (n, S, E)."""
        embed = self._stages(self._tasks[router.groups[0].tasks[0]]).embed
        scores = np.zeros((len(window.ids), len(router.groups)), np.float32)
        bias: Floats | None = None
        for rows, batch in self.cut(window):
            with self.request() as request:
                tensors = self._embedded(embed, batch, request)
                tensors |= self.graphs.run(router.stage, tensors, request)
            counters.add(request)
            scores[rows] = _checked_scores(router, tensors["groups"], len(rows), self.where)
            if router.biased:
                given = checked_bias(self.manifest, tensors["bias"], len(rows), f"{self.where}: stage '{router.stage}'")
                bias = np.zeros((len(window.ids), *given.shape[1:]), np.float32) if bias is None else bias
                bias[rows] = given
        return scores, bias

    def _run_group(self, tasks: list[Task], window: TextBatch, counters: Counters) -> list[Floats]:
        """Each task's answers to all rows of the window."""
        parts: list[list[Floats]] = [[] for _ in tasks]
        order: list[NDArray[np.intp]] = []
        for rows, batch in self.cut(window):
            if batch.bias is None or self.masked:
                values = [self.run_task(task, batch, counters) for task in tasks]
            else:
                values = self._run_together(tasks, batch, batch.bias, counters)
            for part, value in zip(parts, values, strict=True):
                part.append(value)
            order.append(rows)
        back = np.argsort(np.concatenate(order), kind="stable")
        return [np.concatenate(part)[back] for part in parts]

    def _run_together(self, tasks: list[Task], batch: TextBatch, bias: Floats, counters: Counters) -> list[Floats]:
        """One pass of the trunk, then every head."""
        stages = [self._stages(task) for task in tasks]
        with self.request() as request:
            tensors = self._embedded(stages[0].embed, batch, request) | {"bias": bias}
            tensors |= self.graphs.run(stages[0].trunk, tensors, request)
            answered = [self.graphs.run(stage.head, tensors, request) for stage in stages]
        counters.add(request, int(batch.mask.sum()))
        return [checked_answer(task, answer, len(batch.ids), self.where) for task, answer in zip(tasks, answered, strict=True)]

    def _embedded(self, stage: str, batch: TextBatch, request: Request) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {"ids": batch.ids, "types": batch.types, "mask": batch.mask}
        return tensors | self.graphs.run(stage, tensors, request)

    def _fitting(self, router: GroupRouter, pair: bool) -> list[list[Task]]:
        """Of each group the tasks that take this form."""
        fits = [[self._tasks[name] for name in group.tasks if self._tasks[name].pair == pair] for group in router.groups]
        if not any(fits):
            form = "pairs of texts" if pair else "single texts"
            raise UsageError(f"{self.where}: no task group takes {form}; name a task")
        return fits

    @property
    def _tasks(self) -> dict[str, Task]:
        return {task.name: task for task in self.manifest.tasks}

    @staticmethod
    def _stages(task: Task) -> TaskStages:
        assert isinstance(task.stages, TaskStages)  # the manifest's rule for a router's tasks
        return task.stages


def router_of(manifest: Manifest, where: str) -> GroupRouter:
    """The bundle's group router. Raises `UsageError` where it has none, naming its tasks."""
    if manifest.router is None:
        names = ", ".join(task.name for task in manifest.tasks[:20])
        raise UsageError(f"{where} has no router for requests that name no task; name one of its tasks: {names}")
    return manifest.router


def choose_groups(scores: Floats, fits: list[bool]) -> NDArray[np.intp]:
    """The likeliest group of each row (n, G) among those that fit, the first on a tie."""
    group: NDArray[np.intp] = np.where(fits, scores, -np.inf).argmax(-1)
    return group


def _checked_scores(router: GroupRouter, scores: NDArray[Any], rows: int, where: str) -> Floats:
    wanted = (rows, len(router.groups))
    if scores.dtype != np.float32 or scores.shape != wanted:
        raise BundleError(f"{where}: stage '{router.stage}' answers groups {scores.dtype} {scores.shape} instead of float32 {wanted}")
    if not np.isfinite(scores).all():
        raise BundleError(f"{where}: stage '{router.stage}' answers groups that are not finite; its weights are faulty")
    return scores
