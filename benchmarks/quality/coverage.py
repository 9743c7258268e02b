#!/usr/bin/env python3
"""How often the 95 % intervals of retention, DSI, GG, CDTR and forgetting hold what is true, on simulated data where that is known.

    coverage.py [--trials 1000] [--examples 200,500] [--draws 1000]

A table has three domains, one of them with two tasks, of so many examples each; four labels, so chance is a quarter; a reference, a
set specialised for each domain, and answers without any. Each answer is right with a known probability, independently, but the
same example is easier or harder for all variants alike, as real ones are. Situations differ in how much is retained away from home:

    far          0.4 to 0.8                      every interval must hold the truth in 92 to 98 % of the tables
    near         0.2 to 0.3                      the same
    at chance    0: away sets know nothing       the bootstrap is known to fail where retention is clipped: such an interval must be flagged

What is true of a table is the index of the probabilities themselves. Coverage of fewer trials varies: 1,000 tables know it to 1.4
points (95 %), which is why the bounds are wider than the 95 % aimed at.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from benchlib import Verdict, finish, numbers, parser, progress, run, verdict
from numpy.typing import NDArray

from edgeml.domains import Sheet, Table, gap_figures, specialised_figures, variant_figures
from edgeml.metrics import Interval, cdtr, corrected, dsi, forgetting, gg

Floats = NDArray[np.float64]

LABELS, CHANCE = 4, 0.25
LEAST, MOST = 0.92, 0.98
FLAGGED = 0.95
#: Retention of the sets (rows) on the domains (columns), and of no set at all.
SITUATIONS = {
    "far": ([[0.97, 0.70, 0.55], [0.60, 0.95, 0.65], [0.50, 0.80, 0.98]], [0.40, 0.45, 0.42]),
    "near": ([[0.97, 0.25, 0.22], [0.24, 0.95, 0.30], [0.28, 0.23, 0.98]], [0.21, 0.22, 0.20]),
    "at chance": ([[0.97, 0.0, 0.0], [0.0, 0.95, 0.0], [0.0, 0.0, 0.98]], [0.0, 0.0, 0.0]),
}
REFERENCE = [0.92, 0.85, 0.95]
TASKS = {"a": 0, "b": 1, "c": 1, "d": 2}  # task -> its domain


def probabilities(situation: str) -> Floats:
    """How often each variant (reference, three sets, none) is right on each domain."""
    kept, none = SITUATIONS[situation]
    reference = np.array(REFERENCE)
    return np.vstack([reference, *(CHANCE + np.array(row) * (reference - CHANCE) for row in [*kept, none])])


def simulated(right: Floats, examples: int, rng: np.random.Generator) -> list[Sheet]:
    """A table's sheets. Variants share a difficulty of each example, so that what they get right goes together."""
    sheets = []
    for name, domain in TASKS.items():
        labels = rng.integers(0, LABELS, examples)
        shared = rng.random(examples)
        answers = []
        for share in right[:, domain]:
            alike = rng.random(examples) < 0.5
            known = np.where(alike, shared, rng.random(examples)) < share
            answers.append(np.where(known, labels, (labels + rng.integers(1, LABELS, examples)) % LABELS))
        sheets.append(Sheet.of_labels(name, f"domain {domain}", "accuracy", labels, 0, answers))
    return sheets


def truths(right: Floats) -> dict[str, float | None]:
    chance = np.full(3, CHANCE)
    return {
        "retention": float(corrected(right, chance)[1, 1]),
        "dsi": dsi(right[:4], chance).value,
        "gg": gg(right, 1, [0], [1, 2]).value,
        "cdtr": cdtr(right[:4], right[4]).value,
        "forgetting": forgetting(right, chance, 1, [1, 2]),
    }


def found(sheets: list[Sheet], seed: int, draws: int) -> dict[str, dict[str, Any] | None]:
    table = Table(sheets, seed, draws)
    special, gap = specialised_figures(table, True), gap_figures(table, 1, ["domain 0"])
    retained = variant_figures(table, 1)["domains"]["domain 1"]["retention"]
    return {"retention": retained, "dsi": special["dsi"], "gg": gap["gg"], "cdtr": special["cdtr"], "forgetting": gap["forgetting"]}


def share(hits: int, of: int) -> Interval | None:
    """A share with its Wilson interval; None of nothing."""
    if not of:
        return None
    z, p = 1.96, hits / of
    centre, half = p + z * z / (2 * of), z * np.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return Interval(p, float((centre - half) / (1 + z * z / of)), float((centre + half) / (1 + z * z / of)), of)


def situation(name: str, examples: int, trials: int, draws: int, tick: Any) -> tuple[list[Verdict], dict[str, Any]]:
    """All trials of one situation: its verdicts, and by index the coverage and the share that was flagged."""
    right = probabilities(name)
    true = truths(right)
    held, given, flagged = (dict.fromkeys(true, 0) for _ in range(3))
    rng = np.random.default_rng([len(name), examples])
    for trial in range(trials):
        for index, interval in found(simulated(right, examples, rng), trial, draws).items():
            truth = true[index]
            if interval is None or interval["low"] is None or truth is None:
                continue
            given[index] += 1
            held[index] += interval["low"] <= truth <= interval["high"]
            flagged[index] += interval.get("near_clip", False)
        tick(1)
    figures, verdicts = {}, []
    for index in true:
        covered, marked = share(held[index], given[index]), share(flagged[index], given[index])
        figures[index] = {
            "truth": true[index],
            "coverage": None if covered is None else covered.as_json(),
            "flagged": None if marked is None else marked.as_json(),
        }
        what = f"{name}, {examples} examples a task: "
        if name == "at chance":
            if index in ("retention", "dsi", "forgetting") and marked is not None:
                label = f"{what}intervals of {index} that are flagged"
                verdicts.append(verdict(label, f">= {FLAGGED}", marked.value, marked.value >= FLAGGED, marked))
        elif covered is not None:
            holds = LEAST <= covered.value <= MOST
            verdicts.append(verdict(f"{what}coverage of {index}", f"{LEAST} to {MOST}", covered.value, holds, covered))
    return verdicts, figures


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--trials", type=int, default=1000, help="tables a situation (default: 1000)")
    options.add_argument("--examples", type=numbers, default=[200, 500], help="examples a task (default: 200,500)")
    options.add_argument("--draws", type=int, default=1000, help="resamples behind an interval (default: 1000)")
    chosen = options.parse_args()
    tick = progress(chosen.trials * len(SITUATIONS) * len(chosen.examples), "coverage")
    verdicts, figures = [], {}
    for examples in chosen.examples:
        for name in SITUATIONS:
            judged, figures[f"{name}, {examples}"] = situation(name, examples, chosen.trials, chosen.draws, tick)
            verdicts += judged
    about = {"trials": chosen.trials, "draws": chosen.draws, "situations": {n: probabilities(n).tolist() for n in SITUATIONS}}
    return finish("quality-coverage", verdicts, about | {"figures": figures}, chosen.records)


if __name__ == "__main__":
    run(main)
