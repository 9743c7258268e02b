"""One configuration of `edgeml bench`, in a process of its own: its peak memory is then nobody else's.

Started as `python -m edgeml.commands.bench_worker` with a job, one JSON document, on standard input. Writes JSON lines on
standard output: {"tick": 1} after each round, then {"record": ...}; or {"error": sentence, "exit_code": number}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from edgeml.errors import EdgemlError
from edgeml.measure import Counted, record, rss_bytes, time_rounds
from edgeml.session import Session
from edgeml.session import open as open_session

SYNTHETIC_ROWS = 64
SYNTHETIC_IMAGES = 8


def measure(job: dict[str, Any], tick: Callable[[], None]) -> dict[str, Any]:
    """Open, run and time a job; returns its record."""
    started = time.perf_counter()
    chosen = {key: job[key] for key in ("memory", "threads", "residency", "variant")} | job["limits"]
    with open_session(job["bundle"], **chosen) as session:
        open_s = time.perf_counter() - started
        for name in job["task"].split(","):
            session.load(name)
        after_open = rss_bytes()
        call = calls(session, job["task"], job["workload"])
        timing = time_rounds(call, session.evict_all, job["iterations"], job["warmup"], job["cold"], tick)
        workload = {key: value for key, value in job["workload"].items() if key not in ("texts", "paths")}
        settings = session.settings() | {"task": job["task"], "workload": workload, "warmup": job["warmup"], "notes": session.notes}
        return record(timing, settings | {"open_s": open_s, "rss_after_open_bytes": after_open}, "bench")


def calls(session: Session, task: str, workload: dict[str, Any]) -> Callable[[int], Counted]:
    """The function that runs round i of a workload: one text, one pair, one row of seeded random token ids, or one image."""
    if "image" in workload["kind"]:
        return _image_calls(session, task.split(","), workload)
    if "texts" in workload:
        rows: list[Any] = [tuple(row) if session.task(task).pair else row[0] for row in workload["texts"]]
        name = "pairs" if session.task(task).pair else "texts"
        inputs: list[dict[str, Any]] = [{name: [row]} for row in rows]
    else:
        vocabulary = session.preprocessor(session.task(task)).vocabulary
        drawn = np.random.default_rng(0).integers(0, vocabulary, (SYNTHETIC_ROWS, 1, workload["tokens"]))
        inputs = [{"arrays": {"ids": ids}} for ids in drawn]
    return lambda index: session.run(task, **inputs[index % len(inputs)]).counters


def _image_calls(session: Session, tasks: list[str], workload: dict[str, Any]) -> Callable[[int], Counted]:
    images: list[Any] = workload.get("paths", [])
    if not images:
        shape = (SYNTHETIC_IMAGES, workload["height"], workload["width"], workload["channels"])
        images = list(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    return lambda index: session.run_many(tasks, [images[index % len(images)]])[tasks[0]].counters


def main() -> int:
    """Read the job, do it, say what came of it."""
    try:
        job = json.load(sys.stdin)
        done: dict[str, Any] = {"record": measure(job, lambda: _say({"tick": 1}))}
    except EdgemlError as error:
        done = {"error": str(error), "exit_code": error.exit_code}
    except MemoryError:
        done = {"error": "this machine has not enough free memory for that; try a smaller --memory", "exit_code": 4}
    _say(done)
    return 0


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message, allow_nan=False), flush=True)


if __name__ == "__main__":
    try:
        code = main()
    except (KeyboardInterrupt, BrokenPipeError):
        code = 130
    os._exit(code)  # whoever asked has gone or has the answer: no time is lost in tidying up
