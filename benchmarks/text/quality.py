#!/usr/bin/env python3
"""How good the text model is, and what each step of making it cost: probe -> dense reference -> fp32 mixture -> bundle.

    quality.py --dense model.pt [--mixture model.pt | mixture.safetensors | file.py:function] [--bundle B] [--data ../shared/data/text]

1. The dense reference against a linear probe of the untouched encoder, on the probe's own test rows (the first 400): on every task
   at least the probe within two standard errors of the difference, and at least 4 points above it on the mean. The standard
   error is the spread of a paired bootstrap over rows. The probe is that of the shared benches: the same features, rows and
   logistic regression, solved with torch; --probe-table FILE checks it against the rows which that script printed.
2. The bundle against the fp32 mixture, whole test split: mean at most 0.5 points lower, no task with 500 rows or more by over 2.
3. The fp32 mixture against the dense reference, whole test split: within 1 point on the mean.

Every task is scored by its own metric. Predictions are kept in --cache, so a run that is stopped goes on where it was.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from answers import Cache, Labels, Questions, bundle_answers, mean_difference, read_questions, task_difference
from benchlib import MODEL, ROOT, Verdict, finish, parser, progress, run, shared_text, verdict
from torch_models import load_model, predictions, probe_predictions, source_model

from edgeml.metrics import accuracy, macro_f1
from edgeml.session import open as open_session

ABOVE_PROBE, ERRORS = 4.0, 2.0
MEAN_DROP, TASK_DROP, TASK_ROWS = 0.5, 2.0, 500
WITHIN_DENSE = 1.0

#: A row of the shared script's output: task, accuracy, macro-F1.
PRINTED = re.compile(r"^\| \w+/(\w+) \| ([0-9.]+) \| ([0-9.]+) \|", re.M)


def against_probe(questions: Sequence[Questions], dense: Sequence[Labels], probe: Sequence[Labels]) -> tuple[list[Verdict], dict[str, Any]]:
    """The first bound, and its figures by task."""
    tasks, below = {}, []
    for task, ours, floor in zip(questions, dense, probe, strict=True):
        rows = slice(0, len(floor))
        found, error = task_difference(task, ours, floor)
        if not found.value >= -ERRORS * error:
            below.append(task.task.name)
        tasks[task.task.name] = {
            "metric": task.task.metric,
            "n": len(floor),
            "dense": task.score(ours, rows),
            "probe": task.score(floor, rows),
            "probe_accuracy": accuracy(task.labels[rows], floor),
            "probe_macro_f1": macro_f1(task.labels[rows], floor),
            "difference_points": found.as_json(),
            "standard_error_points": error,
        }
    worst = min((t["difference_points"]["value"] / max(t["standard_error_points"], 1e-9) for t in tasks.values()), default=None)
    ahead = mean_difference(questions, [[p] for p in dense], [[p] for p in probe])
    every = verdict("dense against the probe, worst task, in standard errors", f">= {-ERRORS}", worst, not below, below=below)
    mean = verdict("points of the dense mean above the probe", f">= {ABOVE_PROBE}", ahead.value, ahead.value >= ABOVE_PROBE, ahead)
    return [every, mean], tasks


def table_check(table: Path, tasks: dict[str, Any]) -> dict[str, Any]:
    """Our probe and the dense reference against the rows that the shared script printed, in points."""
    printed = {name: (float(a), float(f)) for name, a, f in PRINTED.findall(table.read_text("utf-8"))}
    found = {}
    for name in sorted(tasks.keys() & printed.keys()):
        task, theirs = tasks[name], printed[name][tasks[name]["metric"] == "macro_f1"]
        found[name] = {
            "printed": theirs,
            "probe_less_printed_points": 100 * (task["probe"] - theirs),
            "dense_less_printed_points": 100 * (task["dense"] - theirs),
            "dense_not_below": 100 * (task["dense"] - theirs) >= -ERRORS * task["standard_error_points"],
        }
    return found


def steps(questions: Sequence[Questions], bundle: Sequence[Labels], mixture: Sequence[Labels]) -> tuple[list[Verdict], dict[str, Any]]:
    """The second bound, and its figures by task."""
    tasks, broken, worst = {}, [], None
    for task, ours, other in zip(questions, bundle, mixture, strict=True):
        found, _ = task_difference(task, ours, other)
        tasks[task.task.name] = {
            "metric": task.task.metric,
            "n": len(task.rows),
            "bundle": task.score(ours),
            "mixture": task.score(other),
            "difference_points": found.as_json(),
            "other_labels": float((ours != other).mean()),
        }
        if len(task.rows) >= TASK_ROWS:
            worst = -found.value if worst is None else max(worst, -found.value)
            broken += [task.task.name] if found.value < -TASK_DROP else []
    lost = mean_difference(questions, [[p] for p in mixture], [[p] for p in bundle])
    mean = verdict("points of mean score from the fp32 mixture to the bundle", f"<= {MEAN_DROP}", lost.value, lost.value <= MEAN_DROP, lost)
    name = f"largest drop of a task with {TASK_ROWS} rows or more, points"
    return [mean, verdict(name, f"<= {TASK_DROP}", worst, None if worst is None else not broken, broken=broken)], tasks


def distilled(questions: Sequence[Questions], mixture: Sequence[Labels], dense: Sequence[Labels]) -> tuple[Verdict, dict[str, Any]]:
    """The third bound, and the scores by task."""
    found = mean_difference(questions, [[p] for p in mixture], [[p] for p in dense])
    tasks = {q.task.name: {"mixture": q.score(m), "dense": q.score(d)} for q, m, d in zip(questions, mixture, dense, strict=True)}
    name, bound = "points of mean score, fp32 mixture less dense", f"within {WITHIN_DENSE}, or above"
    return verdict(name, bound, found.value, found.value >= -WITHIN_DENSE, found), tasks


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--dense", help="the dense reference: a model.pt, or file.py:function")
    options.add_argument("--mixture", default=str(ROOT / "examples" / "multitask_text" / "mixture.safetensors"), help="the fp32 mixture")
    options.add_argument("--bundle", type=Path, default=MODEL)
    options.add_argument("--data", type=Path, default=shared_text())
    options.add_argument("--probe-encoder", help="file.py:function of the untouched encoder (default: the example's source model)")
    options.add_argument("--probe-table", type=Path, help="rows that the shared linear_probe.py printed, to check the probe against")
    options.add_argument("--limit", type=int, help="at most this many rows a task, for trials (default: the whole test split)")
    options.add_argument("--cache", type=Path, default=ROOT / "runs" / "predictions", help="where predictions are kept")
    options.add_argument("--threads", type=int)
    chosen = options.parse_args()
    cache, figures, verdicts = Cache(chosen.cache), {}, []
    with open_session(chosen.bundle, "100%", chosen.threads) as session:
        questions = read_questions(chosen.data, session.manifest, str(chosen.bundle), chosen.limit)
        tick = progress(sum(len(task.rows) for task in questions), "bundle")
        bundle = [bundle_answers(session, task, cache, "all", None, tick) for task in questions]
        figures |= {"bundle": session.settings(), "limit": chosen.limit}
    mixture = predictions(load_model(chosen.mixture, "mixture", questions), questions, cache, "fp32 mixture")
    found, figures["bundle_against_mixture"] = steps(questions, bundle, mixture)
    verdicts += found
    if chosen.dense is None:
        for name in ("dense against the probe", "fp32 mixture against dense"):
            verdicts.append(verdict(name, "see the script's help", None, None, why="no --dense was given"))
    else:
        dense = predictions(load_model(chosen.dense, "dense", questions), questions, cache, "dense reference")
        one, figures["mixture_against_dense"] = distilled(questions, mixture, dense)
        probe = probe_predictions(source_model(chosen.probe_encoder), questions, cache)
        found, figures["dense_against_probe"] = against_probe(questions, dense, probe)
        verdicts += [one, *found]
        if chosen.probe_table is not None:
            figures["probe_against_table"] = table_check(chosen.probe_table, figures["dense_against_probe"])
    figures["means"] = {
        name: sum(map(Questions.score, questions, labels)) / len(questions)
        for name, labels in {"bundle": bundle, "mixture": mixture, "dense": None if chosen.dense is None else dense}.items()
        if labels is not None
    }
    return finish("text-quality", verdicts, figures, chosen.records)


if __name__ == "__main__":
    run(main)
