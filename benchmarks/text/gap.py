#!/usr/bin/env python3
"""What calibrating the text model on three of its domains does to the others: the generalisation gap, GG.

    gap.py [--bundle models/multitask-text.edgeml] [--data ../shared/data/text] [--mixture MODEL] [--calibrated a+b+c ...]

A variant keeps a share of each site's routed experts, chosen by the mean usage of the tasks of three domains, for all tasks: what a
device would hold that knows only those three. It is compared with the uncompressed mixture in torch, which --mixture names (default:
the committed checkpoint, if it is there, otherwise the bundle with all its experts), on all domains; GG is the mean drop on the
other domains less that on the three, in points, with forgetting beside it (edgeml's own formulas, edgeml/indices.py).

Calibrated on the three domains are usage and with it the resident sets. The bundle's quantisation reads no data at all: its scales
come from the weights, so it is the same whatever it would be calibrated on, and its own drop is in every row, `all experts` too.
The tasks' routers and heads were trained on their own tasks, in every variant. Predictions are kept in --cache, so a run that is
stopped goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from answers import Cache, Labels, Questions, bundle_answers, read_questions, text_parser
from benchlib import Verdict, finish, progress, run, verdict
from masks import torch_reference

from edgeml.domains import Table, gap_figures, variant_figures
from edgeml.errors import UsageError
from edgeml.evaluate import kept_set, tasks_of
from edgeml.metrics import Interval
from edgeml.session import Session
from edgeml.session import open as open_session

SHARES = {"half": 0.5, "quarter": 0.25}
CALIBRATED = ("conversational+finance+healthcare", "commonsense+law+stem")
MOST = 0.02
FEWEST_OTHERS = 3


def predict(
    session: Session, questions: Sequence[Questions], triples: Sequence[Sequence[str]], cache: Cache
) -> tuple[list[Labels], dict[str, list[Labels]]]:
    """The answers with all experts, and those of each variant."""
    domains = {task.task.name: task.task.domain for task in questions}
    tick = progress((1 + len(triples) * len(SHARES)) * sum(len(task.rows) for task in questions), "gap")
    whole = [bundle_answers(session, task, cache, "all", None, tick) for task in questions]
    found = {}
    for seen in triples:
        chosen = [name for domain in seen for name in tasks_of(session.manifest, domain, domains)]
        for name, share in SHARES.items():
            found[f"{name} for {'+'.join(seen)}"] = [
                bundle_answers(
                    session, task, cache, f"gap-{share:g}", kept_set(session.manifest, task.task.name, share, None, chosen), tick
                )
                for task in questions
            ]
    return whole, found


def judged(name: str, gap: dict[str, Any]) -> Verdict:
    """What must hold is that the gap is known with an interval. `accepted` says what edgeml's gate says of it: refused if even its
    lower bound is above 2 points."""
    what, bound = f"GG of {name}", "measured, with an interval"
    if gap["gg"] is None or gap["gg"]["low"] is None:
        return verdict(what, bound, None, None, why=gap["why"] or "too few examples")
    found = Interval(**gap["gg"])
    assert found.low is not None
    return verdict(what, bound, found.value, True, found, accepted=found.low <= MOST, unseen=gap["unseen"])


def checked(triples: Sequence[str], questions: Sequence[Questions]) -> list[list[str]]:
    """The domains of each calibration. Raises `UsageError` for names that are none, and where fewer than three others remain."""
    there = {task.task.domain for task in questions}
    found = [text.split("+") for text in triples]
    for seen in found:
        if not set(seen) <= there:
            raise UsageError(f"the data has no domain '{sorted(set(seen) - there)[0]}'; it has {', '.join(sorted(there))}")
        if len(there - set(seen)) < FEWEST_OTHERS:
            raise UsageError(f"with {'+'.join(seen)} calibrated on, fewer than {FEWEST_OTHERS} domains remain to measure GG on")
    return found


def main() -> int:
    options = text_parser(__doc__)
    options.add_argument("--calibrated", action="append", help=f"domains, a+b+c; may be repeated (default: {' and '.join(CALIBRATED)})")
    chosen = options.parse_args()
    cache = Cache(chosen.cache)
    with open_session(chosen.bundle, "100%", chosen.threads) as session:
        questions = read_questions(chosen.data, session.manifest, str(chosen.bundle), chosen.limit)
        triples = checked(chosen.calibrated or list(CALIBRATED), questions)
        whole, found = predict(session, questions, triples, cache)
        about = {"bundle": session.settings(), "limit": chosen.limit}
    mixture = torch_reference(chosen.mixture, questions, cache)
    reference = whole if mixture is None else mixture
    names = ["all experts", *found]
    answers = [reference, whole, *found.values()]
    table = Table([task.sheet(*(one[number] for one in answers)) for number, task in enumerate(questions)])
    verdicts, variants = [], {}
    for row, name in enumerate(names, 1):
        figures = variant_figures(table, row)
        variants[name] = {key: figures[key] for key in ("mean", "reference_mean", "retention", "excluded", "domains")}
        for seen in triples:
            if name == "all experts" or name.endswith("+".join(seen)):
                gap = gap_figures(table, row, seen)
                variants[name].setdefault("gaps", {})["+".join(seen)] = gap
                if name != "all experts":
                    verdicts.append(judged(name, gap))
    about |= {"reference": "the bundle with all its experts" if mixture is None else "the uncompressed mixture in torch"}
    about |= {"quantisation": "reads no data: the same whatever it would be calibrated on", "seed": table.seed, "draws": table.resamples}
    return finish("text-gap", verdicts, about | {"variants": variants}, chosen.records)


if __name__ == "__main__":
    run(main)
