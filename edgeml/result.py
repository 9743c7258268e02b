"""What a request answers and what it cost, and the check that a graph's answer has to pass before it is trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import BundleError
from edgeml.manifest import KINDS, Task
from edgeml.native import Request

__all__ = ["Counters", "Result", "checked_answer"]


@dataclass
class Counters:
    """What one call cost: `hits` and `misses` in pages, `page_in_bytes`, `page_wait_s` spent waiting, `tokens` without padding,
    `masked_tokens` of them run with experts forbidden. `stand_in`: the domain whose resident set stood in (last), "" for none."""

    hits: int = 0
    misses: int = 0
    page_in_bytes: int = 0
    page_wait_s: float = 0.0
    tokens: int = 0
    masked_tokens: int = 0
    stand_in: str = ""

    def add(self, request: Request, tokens: int = 0, masked: bool = False) -> None:
        """Count a native request that has ended."""
        self.hits += request.hits
        self.misses += request.misses
        self.page_in_bytes += request.page_in_bytes
        self.page_wait_s += request.page_wait_ns / 1e9
        self.tokens += tokens
        self.masked_tokens += tokens if masked else 0


@dataclass
class Result:
    """Answers in input order: `labels` and `scores` (n, classes) of a classification, `vectors` (n, d) of an embedding task.

    `maps` (n, h, w) of a task with an answer a pixel, at the model's own resolution: uint8 class ids of a segmentation (never void),
    float32 probabilities of an edge task. `truncated[i]`: input i was longer than the model reads and was cut. `row_s[i]`: its
    share of its batch's time, in seconds; `latency_s`: the whole call, which several tasks asked together share.
    """

    task: str
    labels: list[str] = field(default_factory=list)
    scores: NDArray[np.float32] | None = None
    vectors: NDArray[np.float32] | None = None
    maps: NDArray[Any] | None = None
    truncated: list[bool] = field(default_factory=list)
    row_s: list[float] = field(default_factory=list)
    latency_s: float = 0.0
    counters: Counters = field(default_factory=Counters)

    def fill(self, task: Task, answers: NDArray[Any]) -> None:
        """Take a task's answers, as `checked_answer` gave them, of all rows in input order."""
        if task.dense:
            self.maps = answers
        elif task.kind == "embedding":
            self.vectors = answers
        else:
            self.scores = answers
            self.labels = [task.labels[index] for index in answers.argmax(-1)]


def checked_answer(task: Task, tensors: Mapping[str, NDArray[Any]], rows: int, where: str) -> NDArray[Any]:
    """What a head answered: scores or vectors (rows, n), or maps (rows, h, w). Raises `BundleError`, which begins with `where`.

    A graph is data from outside: what it answers is checked before it is trusted.
    """
    answer = tensors[KINDS[task.kind][0]]
    if answer.dtype != np.float32 or answer.ndim != (4 if task.dense else 2) or len(answer) != rows or not _fits(task, answer.shape):
        raise BundleError(f"{where}: the head of task '{task.name}' answers {answer.dtype} {answer.shape} to {rows} rows")
    if not np.isfinite(answer).all():
        raise BundleError(f"{where}: task '{task.name}' answers with numbers that are not finite; its weights are faulty")
    if task.kind == "edge":
        answer = answer[:, 0]
    elif task.kind == "segmentation":
        answer = answer[:, : task.void].argmax(1).astype(np.uint8)  # void is last, and no answer
    return answer


def _fits(task: Task, shape: tuple[int, ...]) -> bool:
    if task.kind == "edge":
        return shape[1] == 1 and 0 not in shape[2:]
    if task.kind == "segmentation":
        return shape[1] in (len(task.labels), task.void) and 0 not in shape[2:]
    return not task.labels or shape[1] == len(task.labels)
