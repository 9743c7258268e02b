"""Answers to texts as `run` gives them: a document for programs, a line for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edgeml.commands._options import printable
from edgeml.manifest import Task
from edgeml.session import Result

__all__ = ["answer_line", "answers_of"]


def answers_of(task: Task, result: Result) -> Iterator[dict[str, Any]]:
    """One document an input: task, label, score and scores, or the vector; and its share of the time."""
    for number, row_s in enumerate(result.row_s):
        answer: dict[str, Any] = {"task": task.name}
        if result.scores is None:
            answer["vector"] = _numbers(result.vectors[number] if result.vectors is not None else ())
        else:
            scores = _numbers(result.scores[number])
            answer |= {"label": result.labels[number], "score": max(scores), "scores": dict(zip(task.labels, scores, strict=True))}
        yield answer | {"latency_s": row_s}


def answer_line(answer: dict[str, Any]) -> str:
    """Task, label and confidence, milliseconds, separated by tabs."""
    if "vector" in answer:
        vector = answer["vector"]
        said = f"{len(vector)} numbers: {' '.join(f'{value:.4f}' for value in vector[:6])} ..."
    else:
        said = f"{printable(answer['label'])}\t{answer['score']:.3f}"
    return f"{answer['task']}\t{said}\t{answer['latency_s'] * 1e3:.1f} ms"


def _numbers(values: Sequence[Any] | Any) -> list[float]:
    return [float(value) for value in values]
