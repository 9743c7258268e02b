#!/usr/bin/env python3
"""What the routed experts are worth: the bundle's test scores with all, some and none of them.

    masks.py [--bundle models/multitask-text.edgeml] [--data ../shared/data/text] [--mixture MODEL] [--seeds 0,1,2]

Every site keeps at most a share of its routed experts (of 23: 11 for a half, 5 for a quarter): the task's most used ones (the
bundle's recorded usage), or as many at random. A random set's score is the mean over the seeds, task by task. Predictions are kept
in --cache, so a run that is stopped goes on.

The retention that must hold is against the uncompressed mixture in torch, which --mixture names (default: the committed
checkpoint, if it is there); retention against the bundle with all its experts is reported beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from answers import Cache, Labels, Questions, bundle_answers, mean_difference, read_questions, text_parser
from benchlib import Verdict, finish, numbers, progress, run, verdict

from edgeml.evaluate import kept_set, report
from edgeml.metrics import Interval
from edgeml.session import Session
from edgeml.session import open as open_session

SHARES = {"half": 0.5, "quarter": 0.25}
MASKED_AT_LEAST, AHEAD_AT_LEAST, RETENTION_AT_LEAST = 5.0, 3.0, 0.97


def predict(session: Session, questions: Sequence[Questions], seeds: Sequence[int], cache: Cache) -> dict[str, list[list[Labels]]]:
    """Variant -> for each task its predictions: one, or one a seed."""
    variants: dict[str, list[tuple[float, int | None]]] = {"all": [(1.0, None)], "none": [(0.0, None)]}
    for name, share in SHARES.items():
        variants |= {f"{name} by usage": [(share, None)], f"{name} at random": [(share, seed) for seed in seeds]}
    passes = sum(map(len, variants.values()))
    tick = progress(passes * sum(len(task.rows) for task in questions), "masks")
    found: dict[str, list[list[Labels]]] = {}
    for name, draws in variants.items():
        found[name] = [
            [
                bundle_answers(
                    session,
                    task,
                    cache,
                    f"kept-{share:g}-{'usage' if seed is None else f'random{seed}'}" if name != "all" else "all",
                    None if name == "all" else kept_set(session.manifest, task.task.name, share, seed),
                    tick,
                )
                for share, seed in draws
            ]
            for task in questions
        ]
    return found


def retention_of(questions: Sequence[Questions], predicted: list[list[Labels]], reference: Sequence[Labels]) -> dict[str, Any]:
    """Retention against a reference's predictions, its interval, and the tasks that are left out."""
    sheets = [task.sheet(other, one[0]) for task, one, other in zip(questions, predicted, reference, strict=True)]
    document = report(sheets)
    return {"retention": document["retention"], "excluded": document["excluded"]}


def torch_reference(source: str, questions: Sequence[Questions], cache: Cache) -> list[Labels] | None:
    """The uncompressed mixture's predictions, if there is one."""
    if source == "none":
        return None
    from torch_models import load_model, predictions

    return predictions(load_model(source, "mixture", questions), questions, cache, "fp32 mixture")


def judge(questions: Sequence[Questions], found: dict[str, list[list[Labels]]], reference: list[Labels] | None) -> list[Verdict]:
    lost = mean_difference(questions, found["all"], found["none"])
    ahead = mean_difference(questions, found["half by usage"], found["half at random"])
    verdicts = [
        verdict("points lost with all routed experts masked", f">= {MASKED_AT_LEAST}", lost.value, lost.value >= MASKED_AT_LEAST, lost),
        verdict(
            "points by which half by usage is ahead of random halves",
            f">= {AHEAD_AT_LEAST}, interval above 0",
            ahead.value,
            None if ahead.low is None else ahead.value >= AHEAD_AT_LEAST and ahead.low > 0,
            ahead,
        ),
    ]
    name, bound = "retention of half by usage against the fp32 mixture", f">= {RETENTION_AT_LEAST}"
    if reference is None:
        verdicts.append(verdict(name, bound, None, None, why="there was no --mixture"))
    else:
        kept = retention_of(questions, found["half by usage"], reference)["retention"]
        if kept is None:
            verdicts.append(verdict(name, bound, None, None, why="the mixture is nowhere 10 points above chance"))
        else:
            verdicts.append(verdict(name, bound, kept["value"], kept["value"] >= RETENTION_AT_LEAST, Interval(**kept)))
    return verdicts


def figures(questions: Sequence[Questions], found: dict[str, list[list[Labels]]], reference: list[Labels] | None) -> dict[str, Any]:
    whole = [one[0] for one in found["all"]]
    tasks = {}
    for number, task in enumerate(questions):
        scores = {name: sum(task.score(p) for p in parts[number]) / len(parts[number]) for name, parts in found.items()}
        tasks[task.task.name] = {"metric": task.task.metric, "n": len(task.rows), **scores}
    against = {}
    for name, parts in found.items():
        if name != "all" and "random" not in name:
            against[name] = retention_of(questions, parts, whole)
    return {
        "tasks": tasks,
        "mean": {name: sum(task[name] for task in tasks.values()) / len(tasks) for name in found},
        "retention_against_the_whole_bundle": against,
        "fp32_mixture_mean": None if reference is None else sum(map(Questions.score, questions, reference)) / len(questions),
        "quarter_by_usage_ahead_of_random": mean_difference(questions, found["quarter by usage"], found["quarter at random"]).as_json(),
    }


def main() -> int:
    options = text_parser(__doc__)
    options.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="seeds of the random sets (default: 0,1,2)")
    chosen = options.parse_args()
    cache = Cache(chosen.cache)
    with open_session(chosen.bundle, "100%", chosen.threads) as session:
        questions = read_questions(chosen.data, session.manifest, str(chosen.bundle), chosen.limit)
        found = predict(session, questions, chosen.seeds, cache)
        about = {"bundle": session.settings(), "limit": chosen.limit, "seeds": chosen.seeds}
    reference = torch_reference(chosen.mixture, questions, cache)
    document = figures(questions, found, reference)
    for name, value in document["mean"].items():
        print(f"{name:<18} {100 * value:6.2f}")
    return finish("text-masks", judge(questions, found, reference), about | document, chosen.records)


if __name__ == "__main__":
    run(main)
