#!/usr/bin/env python3
"""How much faster `edgeml eval` answers a model's test rows than one row at a time, and whether the answers are the same.

    evaluate.py [--rows 256 | --all] [--rounds 2] [--bundle models/multitask-text.edgeml] [--data ../shared/data/text] [--threads N]

Both ways get the same rows of every task in one process, taking turns, so that what else the machine does strikes both alike:

    one at a time    Session.run on one text after another, with all threads
    evaluated        what `edgeml eval` does: chunks ordered by length, batches, and with two threads or more two streams of them

A row's time is the mean over its task's sampled rows; the sum over tasks weighs each by all its test rows, so the ratio is that of
evaluating everything. Its interval is a bootstrap over tasks and rounds. With --all nothing is extrapolated. Answers are labels, and
every one of both ways is compared. Run it on a machine that does nothing else: two streams need two processors.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from answers import Questions, read_questions
from benchlib import MODEL, finish, parser, progress, run, shared_text, verdict
from numpy.typing import NDArray

from edgeml.bundle import Bundle
from edgeml.commands._eval_run import ask_texts, keep_freed_memory, plan_streams
from edgeml.commands._eval_settings import Setting
from edgeml.evaluate import CHUNK_ROWS
from edgeml.manifest import load_manifest
from edgeml.measure import Timing
from edgeml.metrics import interval_of
from edgeml.session import Session
from edgeml.session import open as open_session

RATIO = 1.5
RESAMPLES = 2000


def one_at_a_time(session: Session, task: Questions) -> tuple[float, list[int]]:
    started = time.perf_counter()
    found = [int(ask_texts(session, task.task.name, None, Timing(), [row])[0]) for row in task.rows]
    return time.perf_counter() - started, found


def evaluated(session: Session, task: Questions, streams: int) -> tuple[float, list[int]]:
    started, found = time.perf_counter(), list[int]()
    for first in range(0, len(task.rows), CHUNK_ROWS):
        found += ask_texts(session, task.task.name, None, Timing(), task.rows[first : first + CHUNK_ROWS], streams).tolist()
    return time.perf_counter() - started, found


def measure(
    session: Session, streaming: Session, streams: int, questions: list[Questions], rounds: int, tick: Any
) -> tuple[NDArray[np.float64], int, dict[str, Any]]:
    """Seconds a row of every task, round and way (tasks, rounds, 2); how many answers differ; and the figures by task."""
    seconds, differ, figures = np.zeros((len(questions), rounds, 2)), 0, {}
    for number, task in enumerate(questions):
        for opened in (session, streaming):
            opened.load(task.task.name)
            ask_texts(opened, task.task.name, None, Timing(), task.rows[:4])
        for turn in range(rounds):
            found: list[list[int]] = [[], []]
            for way in (0, 1) if turn % 2 == 0 else (1, 0):
                took, found[way] = one_at_a_time(session, task) if way == 0 else evaluated(streaming, task, streams)
                seconds[number, turn, way] = took / len(task.rows)
            differ += sum(one != other for one, other in zip(*found, strict=True))
            tick(len(task.rows))
        single, batched = seconds[number].mean(0)
        figures[task.task.name] = {"rows": len(task.rows), "single_s": single, "evaluated_s": batched, "ratio": single / batched}
    return seconds, differ, figures


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--bundle", type=Path, default=MODEL)
    options.add_argument("--data", type=Path, default=shared_text())
    options.add_argument("--rows", type=int, default=256, help="rows a task, the first ones (default: 256)")
    options.add_argument("--all", action="store_true", help="all test rows, in place of --rows")
    options.add_argument("--rounds", type=int, default=2, help="times that both ways answer a task's rows (default: 2)")
    options.add_argument("--threads", type=int, help="threads for either way (default: all processors)")
    chosen = options.parse_args()
    with Bundle.open(chosen.bundle) as bundle:
        manifest = load_manifest(bundle)
    whole = read_questions(chosen.data, manifest, str(chosen.bundle), None)
    questions = whole if chosen.all else read_questions(chosen.data, manifest, str(chosen.bundle), chosen.rows)
    each, streams = plan_streams(Setting("bundle", str(chosen.bundle), "100%"), chosen.threads, True)
    keep_freed_memory()
    tick = progress(chosen.rounds * sum(len(task.rows) for task in questions), "evaluate")
    with open_session(chosen.bundle, "100%", chosen.threads) as session, open_session(chosen.bundle, "100%", each) as streaming:
        seconds, differ, tasks = measure(session, streaming, streams, questions, chosen.rounds, tick)
        about = {"bundle": session.settings(), "streams": streams, "stream_threads": each}
    weights = np.array([len(task.rows) for task in whole], np.float64)
    rng = np.random.default_rng(0)

    def ratio(sample: NDArray[np.intp], turns: NDArray[np.intp]) -> float:
        single, batched = (weights[sample, None, None] * seconds[np.ix_(sample, turns)]).sum((0, 1))
        return float(single / batched)

    everything, rounds = np.arange(len(questions)), np.arange(chosen.rounds)
    drawn = [ratio(rng.integers(0, len(everything), len(everything)), rng.integers(0, len(rounds), len(rounds))) for _ in range(RESAMPLES)]
    faster = interval_of(ratio(everything, rounds), drawn, sum(len(task.rows) for task in questions))
    assert faster is not None
    totals = (weights[:, None, None] * seconds).sum(0).mean(0)
    verdicts = [
        verdict("all test rows, one at a time over evaluated", f">= {RATIO}", faster.value, faster.value >= RATIO, faster),
        verdict("answers that differ", "0", differ, differ == 0),
    ]
    figures = about | {
        "tasks": tasks,
        "test_rows": int(weights.sum()),
        "one_at_a_time_s": totals[0],
        "evaluated_s": totals[1],
        "extrapolated": not chosen.all,
        "rounds": chosen.rounds,
    }
    return finish("text-evaluate", verdicts, figures, chosen.records)


if __name__ == "__main__":
    run(main)
