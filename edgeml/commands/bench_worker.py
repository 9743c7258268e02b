"""One configuration of `edgeml bench`, in a process of its own: its peak memory is then nobody else's.

Started as `python -m edgeml.commands.bench_worker` with a job, one line of JSON, on standard input. Writes JSON lines on standard
output: {"tick": 1} after each round, then {"record": ...}; or {"error": sentence, "exit_code": number}.

A job with "turns" is measured as it is told to: after {"ready": seconds of a round}, each line {"turn": number, "rounds": n, "lead": bool,
"processor": number or null} is answered by {"latency_s": [...]}; the record comes at the end of input. A turn's inputs are those of its
number; with `lead`, a round that is not counted comes first, since what ran in between has left other things in the processor's caches.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edgeml.errors import EdgemlError
from edgeml.measure import Counted, Timing, record, rss_bytes, time_more, time_rounds, watched
from edgeml.session import Session
from edgeml.session import open as open_session

SYNTHETIC_ROWS = 64
SYNTHETIC_IMAGES = 8


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Open, run and time a job; returns its record."""
    started = time.perf_counter()
    chosen = {key: job[key] for key in ("memory", "threads", "residency", "variant")} | job["limits"]
    with open_session(job["bundle"], **chosen) as session:
        settings: dict[str, Any] = {"open_s": time.perf_counter() - started}
        for name in job["task"].split(","):
            session.load(name)
        settings["rss_after_open_bytes"] = rss_bytes()
        settings |= session.settings() | {"task": job["task"], "warmup": job["warmup"], "notes": list(session.notes)}
        settings["input_files"] = job.get("input_files", [])
        run = _mix if job["workload"]["kind"] == "mix" else _rounds
        timing, workload, figures = run(session, job)
        notes = settings["notes"] + figures.pop("notes", [])
        return record(timing, settings | {"workload": workload, "notes": notes}, "bench", job["bundle"]) | figures


def _rounds(session: Session, job: dict[str, Any]) -> tuple[Timing, dict[str, Any], dict[str, Any]]:
    """One request after the other."""
    call = calls(session, job["task"], job["workload"])
    iterations = 0 if "turns" in job else job["iterations"]
    timing = time_rounds(call, session.evict_all, iterations, job["warmup"], job["cold"], _tick)
    if "turns" in job:
        with watched(timing):
            _take_turns(_ready(call), lambda turn, rounds: time_more(timing, call, range(turn * rounds, (turn + 1) * rounds)), call)
    return timing, {key: value for key, value in job["workload"].items() if key not in ("texts", "paths")}, {}


def _mix(session: Session, job: dict[str, Any]) -> tuple[Timing, dict[str, Any], dict[str, Any]]:
    """Requests that overlap, as a workload has them: part 0 to warm up, then others."""
    from edgeml.commands._bench_mix import Mix
    from edgeml.workload import parse_workload

    given = job["workload"]
    workload, timing = parse_workload(given["source"], Path(given["path"])), Timing()
    Mix(session, workload, given["rows"]).play(0, job["warmup"], Timing())
    mix = Mix(session, workload, given["rows"])
    with watched(timing):
        if "turns" in job:
            _take_turns(0.0, lambda turn, rounds: mix.play(turn + 1, rounds, timing), lambda _: None)
        else:
            mix.play(1, job["iterations"], timing)
            _say({"tick": job["iterations"]})
    return timing, workload.as_json(), mix.figures(timing.warm.tokens) | {"notes": mix.notes()}


def _ready(call: Callable[[int], Counted]) -> float:
    """Seconds of a round, the median of three."""
    timing = Timing()
    return median(time_more(timing, call, range(3)))


def _take_turns(round_s: float, turn: Callable[[int, int], list[float]], lead: Callable[[int], Any]) -> None:
    _say({"ready": round_s})
    for line in sys.stdin:
        order = json.loads(line)
        if order["processor"] is not None:
            os.sched_setaffinity(0, {order["processor"]})  # of this thread, which computes, and none that reads
        if order["lead"]:
            lead(order["turn"] * order["rounds"])
        _say({"latency_s": turn(order["turn"], order["rounds"])})


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
        done: dict[str, Any] = {"record": measure(json.loads(sys.stdin.readline()))}
    except EdgemlError as error:
        done = {"error": str(error), "exit_code": error.exit_code}
    except MemoryError:
        done = {"error": "this machine has not enough free memory for that; try a smaller --memory", "exit_code": 4}
    _say(done)
    return 0


def _tick() -> None:
    _say({"tick": 1})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message, allow_nan=False), flush=True)


if __name__ == "__main__":
    try:
        code = main()
    except (KeyboardInterrupt, BrokenPipeError):
        code = 130
    os._exit(code)  # whoever asked has gone or has the answer: no time is lost in tidying up
