#!/usr/bin/env python3
"""How often `edgeml bench --compare` is wrong: the same bundle against itself, and against itself slowed down by a tenth.

    gate.py [--bundle m.edgeml] [--task NAME] [--runs 100] [--threads 1] [--seconds 20] [--memory 100%]

Each run opens the bundle in two new processes, as the command does, and lets them take turns on this machine with all its noise. An
identical pair that is called slower or faster is a false alarm. A slow-down by a tenth is the same run with our latencies times 1.1: it
shifts the interval and changes nothing else, so each run answers both questions.

Bounds: at most 5 of 100 identical pairs called different, at least 90 of 100 slow-downs found; the gate is built for 2 and 95. A
simulation of other machines (log-normal noise of several sizes, drift, spikes, processes that differ) has the same bounds.

Beside them: how much two processes of one program differ for good (`PROCESS` in edgeml/compare.py, `THREADS` for several, should be no
smaller), how much one run's median differs from the next one's (`RUN`), and what the gate against earlier records makes of each run and
the one before it, or the eight before it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from benchlib import MODEL, finish, parser, progress, run, verdict

from edgeml.bundle import Bundle
from edgeml.commands._bench_compare import take_turns
from edgeml.compare import FEWEST_RECORDS, PROCESS, RUN, SHARE, THREADS, Comparison, Z, compare_records, in_turns
from edgeml.errors import UsageError
from edgeml.manifest import load_manifest

ALARMS, FOUND = 0.05, 0.90
SLOWER = 1.1
NOISES = (0.02, 0.05, 0.1, 0.2)


def simulated(noise: float, slower: float, seed: int, rounds: int = 4) -> Comparison:
    """A comparison on a made machine: latencies are log-normal, drift by a fifth up and down and at random, and spike; the two
    processes differ by as much as `PROCESS` says."""
    rng, state = np.random.default_rng([seed, int(1e4 * noise), int(1e4 * slower)]), [0.0, 0.0]
    own = np.exp(rng.normal(0, PROCESS, 2)) * [slower, 1]

    def turn(side: int) -> Callable[[int], list[float]]:
        def take(_: int) -> list[float]:
            found = []
            for _ in range(rounds):
                state[0], state[1] = state[0] + 1, 0.995 * state[1] + rng.normal(0, 0.01)
                level = (1 + 0.2 * math.sin(state[0] / 97)) * math.exp(state[1])
                spike = rng.uniform(1.5, 6) if rng.random() < 0.03 else 1.0
                found.append(0.01 * own[side] * level * spike * math.exp(rng.normal(0, noise)))
            return found

        return take

    return in_turns(turn(0), turn(1), seed=seed)


def shares(found: list[Comparison], slower: list[Comparison]) -> dict[str, float]:
    """Of identical pairs called different, and of slow-downs found."""
    return {
        "false_alarms": float(np.mean([one.difference is not None for one in found])),
        "found": float(np.mean([one.refused for one in slower])),
        "pairs": float(np.mean([one.n for one in found])),
        "too_noisy": float(np.mean([one.noisy for one in found])),
    }


def slowed(one: Comparison) -> Comparison:
    """The same with our side slower by a tenth."""
    return Comparison(one.ratio * SLOWER, one.low * SLOWER, one.high * SLOWER, one.n, one.allowed)


def spread_of(values: list[float]) -> float:
    """Standard deviation, from the median absolute deviation."""
    return float(1.4826 * np.median(np.abs(np.array(values) - np.median(values))))


def by_record(records: list[dict[str, Any]], before: int) -> dict[str, float] | None:
    """The gate against earlier records, of each run and so many before; None where there are too few."""
    if len(records) <= before:
        return None
    found = [compare_records(records[place], records[place - before : place]) for place in range(before, len(records))]
    return shares(found, [slowed(one) for one in found])


def main() -> int:
    """Measure, judge, write the record."""
    options = parser(__doc__)
    options.add_argument("--bundle", type=Path, default=MODEL)
    options.add_argument("--task", help="default: the bundle's first")
    options.add_argument("--runs", type=int, default=100)
    options.add_argument("--simulations", type=int, default=200, help="of each noise")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--memory", default="100%")
    options.add_argument("--seconds", type=float, default=20, help="at most for a run")
    chosen = options.parse_args()
    if chosen.runs < 2:
        raise UsageError("--runs must be at least 2")
    with Bundle.open(chosen.bundle) as bundle:
        task = chosen.task or load_manifest(bundle).tasks[0].name
    job = {
        "bundle": str(chosen.bundle.absolute()), "task": task, "iterations": 30, "warmup": 3, "cold": 0, "memory": chosen.memory,
        "threads": chosen.threads, "residency": "exact", "variant": None, "limits": {}, "turns": True,
        "workload": {"kind": "random", "tokens": chosen.tokens},
    }  # fmt: skip
    found: list[Comparison] = []
    records: list[dict[str, Any]] = []
    tick = progress(chosen.runs, "runs")
    for _ in range(chosen.runs):
        one, (record, _) = take_turns([job, job], 0.0, chosen.seconds, 30, lambda: None)
        found.append(one)
        records.append(record)
        tick(1)
    real = shares(found, [slowed(one) for one in found])
    process = PROCESS if chosen.threads == 1 else THREADS
    within = [(math.log(one.high / one.low) / 2 / Z) ** 2 - 2 * process**2 for one in found]  # squared errors without what is added
    logs, medians = [math.log(one.ratio) for one in found], [math.log(record["latency_s"]["p50"]) for record in records]
    between = max(spread_of(logs) ** 2 - float(np.mean(within)), 0.0)
    made = {
        str(noise): shares(*([simulated(noise, slower, seed) for seed in range(chosen.simulations)] for slower in (1.0, SLOWER)))
        for noise in NOISES
    }
    verdicts = [
        verdict("share of identical pairs called different", f"at most {ALARMS}", real["false_alarms"], real["false_alarms"] <= ALARMS),
        verdict("share of slow-downs by a tenth that are found", f"at least {FOUND}", real["found"], real["found"] >= FOUND),
    ]
    for noise, one in made.items():
        verdicts += [
            verdict(
                f"the same, simulated noise {noise}: false alarms", f"at most {ALARMS}", one["false_alarms"], one["false_alarms"] <= ALARMS
            ),
            verdict(f"the same, simulated noise {noise}: found", f"at least {FOUND}", one["found"], one["found"] >= FOUND),
        ]
    figures = {
        "runs": chosen.runs, "task": task, "threads": chosen.threads, "tokens": chosen.tokens, "memory": chosen.memory, "real": real,
        "ratios": [one.as_json()["ratio"] for one in found], "simulated": made,
        "process": {"assumed": process, "measured": math.sqrt(between / 2)},
        "run": {"assumed": RUN, "measured": spread_of(list(np.diff(medians))) / math.sqrt(2)},
        "against_the_record_before": by_record(records, 1), "against_the_eight_before": by_record(records, 2 * FEWEST_RECORDS),
        "design": {"share": SHARE, "z": Z},
    }  # fmt: skip
    name = "bench-gate" if chosen.threads == 1 else f"bench-gate-{chosen.threads}-threads"
    return finish(name, verdicts, figures, chosen.records)


if __name__ == "__main__":
    run(main)
