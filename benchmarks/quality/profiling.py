#!/usr/bin/env python3
"""What profiling costs: answers with the event log on against off, and off against an edgeml that has no log.

    profiling.py [--bundle m.edgeml] [--task NAME] [--pairs 200] [--threads 1] [--tokens 32] [--memory 100%,50%] [--before FOLDER]

On against off: one session, one process; turns of a few rounds, on and off in an order that is drawn, on the same inputs. Bound: the median
of the pairs' ratios is below 1.03, its interval too.

Off against none: `--before` names a folder with an edgeml package built from sources without the log (a checkout of an earlier commit, its
extension in place). Two processes of each are made, since two processes of one program differ for good by a little, and take turns.
Bound: the interval of the ratio holds 1, or its lower end is below what the two processes of one program differ by. Without a folder it
is undecided.

An interval is that of the median over pairs, by rank (95 %).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from benchlib import MODEL, finish, parser, progress, run, verdict

import edgeml
from edgeml.errors import UsageError
from edgeml.measure import percentile_interval
from edgeml.metrics import Interval

BOUND = 1.03
ROUNDS = 4
INPUTS = 64

Turn = Callable[[int], float]


def answers(session: Any, task: str, tokens: int) -> Callable[[int], Any]:
    """Round i of seeded random inputs."""
    vocabulary = session.preprocessor(session.task(task)).vocabulary
    ids = np.random.default_rng(0).integers(0, vocabulary, (INPUTS, 1, tokens))
    return lambda number: session.run(task, arrays={"ids": ids[number % INPUTS]}).latency_s


def ratios(one: Turn, other: Turn, pairs: int, tick: Callable[[int], None]) -> list[float]:
    """One's time over the other's, of each pair of turns."""
    rng, found, first = np.random.default_rng(1), [], 0
    for number in range(pairs):
        first = int(rng.integers(2)) if number % 2 == 0 else 1 - first
        took = [0.0, 0.0]
        for side in (first, 1 - first):
            took[side] = (one, other)[side](number)
        found.append(took[0] / took[1])
        tick(1)
    return found


def middle(values: list[float]) -> Interval:
    """The median and its interval."""
    told = percentile_interval(values, 0.5)
    assert told is not None
    return Interval(float(median(values)), told["low"] or min(values), told["high"] or max(values), len(values))


def on_against_off(chosen: Any, task: str, memory: str, tick: Callable[[int], None]) -> Interval:
    """In one session. What was noted is taken after each round, as a profile does, outside its time."""
    from edgeml.profile import Recorder

    with edgeml.open(chosen.bundle, memory=memory, threads=chosen.threads) as session:
        answer, recorder = answers(session, task, chosen.tokens), Recorder(session)
        for number in range(INPUTS):
            answer(number)

        def on(number: int) -> float:
            recorder.start()
            took = []
            for place in range(ROUNDS):
                took.append(answer(ROUNDS * number + place))
                recorder.drain()
            recorder.stop()
            recorder._events.clear(), recorder.stages.clear()
            return float(median(took))

        def off(number: int) -> float:
            return float(median(answer(ROUNDS * number + place) for place in range(ROUNDS)))

        return middle(ratios(on, off, chosen.pairs, tick))


def child(folder: Path | None, chosen: Any, task: str, memory: str) -> tuple[subprocess.Popen[str], Turn]:
    """A process that answers turn after turn, with the edgeml of `folder`, or this one."""
    path = str(folder) if folder else str(Path(edgeml.__file__).parents[1])
    asked = ["--child", "--bundle", str(chosen.bundle), "--task", task, "--threads", str(chosen.threads), "--tokens", str(chosen.tokens)]
    made = subprocess.Popen(
        [sys.executable, "-P", __file__, *asked, "--memory", memory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )

    def turn(number: int) -> float:
        assert made.stdin is not None
        assert made.stdout is not None
        print(number, file=made.stdin, flush=True)
        line = made.stdout.readline()
        if not line:
            raise UsageError(f"{path}: this edgeml does not run; name a folder with a package edgeml and its extension")
        return float(json.loads(line))

    return made, turn


def serve(chosen: Any) -> int:
    """The child's side."""
    with edgeml.open(chosen.bundle, memory=chosen.memory, threads=chosen.threads) as session:
        answer = answers(session, chosen.task, chosen.tokens)
        for number in range(INPUTS):
            answer(number)
        for line in sys.stdin:
            print(json.dumps(median(answer(ROUNDS * int(line) + place) for place in range(ROUNDS))), flush=True)
    return 0


def off_against_none(chosen: Any, task: str, memory: str, tick: Callable[[int], None]) -> tuple[Interval, Interval]:
    """Our two processes over the earlier edgeml's two, and of our own two the one over the other."""
    children = [child(folder, chosen, task, memory) for folder in (None, None, chosen.before, chosen.before)]
    try:
        turns = [turn for _, turn in children]
        for turn in turns:
            turn(0)
        found: list[list[float]] = [ratios(turns[one], turns[two], chosen.pairs // 2, tick) for one, two in ((0, 2), (1, 3), (0, 1))]
        return middle(found[0] + found[1]), middle(found[2])
    finally:
        for process, _ in children:
            process.kill()
            process.communicate()


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--bundle", type=Path, default=MODEL)
    options.add_argument("--task", help="default: the bundle's first")
    options.add_argument("--pairs", type=int, default=200)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--memory", default="100%,50%")
    options.add_argument("--before", type=Path, help="a folder with an edgeml package that has no event log")
    options.add_argument("--child", action="store_true", help="(used by the script itself)")
    chosen = options.parse_args()
    if chosen.child:
        return serve(chosen)
    if chosen.pairs < 8:
        raise UsageError("--pairs must be at least 8")
    if chosen.before is not None and not (chosen.before / "edgeml" / "__init__.py").is_file():
        raise UsageError(f"{chosen.before}: there is no package edgeml in it")
    with edgeml.open(chosen.bundle, threads=1) as session:
        task = chosen.task or session.manifest.tasks[0].name
    budgets = chosen.memory.split(",")
    each = chosen.pairs + (3 * (chosen.pairs // 2) if chosen.before else 0)
    tick = progress(len(budgets) * each, "pairs")
    verdicts, figures = [], {}
    for memory in budgets:
        cost = on_against_off(chosen, task, memory, tick)
        label = f"memory {memory}, {chosen.threads} threads: time with the log on over off"
        verdicts.append(verdict(label, f"< {BOUND}", cost.value, cost.high is not None and cost.high < BOUND, cost))
        figures[memory] = {"on_over_off": cost.as_json()}
        label = f"memory {memory}, {chosen.threads} threads: time with the log off over none"
        if chosen.before is None:
            verdicts.append(verdict(label, "1 within noise", None, None, why="no --before folder was given"))
            continue
        rest, same = off_against_none(chosen, task, memory, tick)
        noise = max(abs(same.value - 1), abs((same.high or 1) - 1), abs((same.low or 1) - 1))
        verdicts.append(verdict(label, "1 within noise", rest.value, (rest.low or 0) <= 1 + noise, rest, noise=noise))
        figures[memory] |= {"off_over_none": rest.as_json(), "same_program": same.as_json()}
    about = {"task": task, "pairs": chosen.pairs, "rounds_a_turn": ROUNDS, "tokens": chosen.tokens, "threads": chosen.threads}
    name = "profiling-overhead" if chosen.threads == 1 else f"profiling-overhead-{chosen.threads}-threads"
    return finish(name, verdicts, about | {"figures": figures}, chosen.records)


if __name__ == "__main__":
    run(main)
