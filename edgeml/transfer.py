"""The transfer matrix: what each domain's resident set makes of every domain's data, measured by the runtime itself.

    with edgeml.open("m.edgeml", memory="50%") as session:
        found = measure_transfer(session, {task.name: task.rows("validation", 100) for task in find_tasks(data)})
        session.residents.keep(found)

S[i, j] is the score on domain j's rows when only domain i's resident set may be used, under the session's budget; `resident.Transfer`
has it with what T[i, j] and CDTR need besides: scores with nothing masked, and without any routed expert. Kept in the sidecar, it says
whose set may stand in for another's where a deadline leaves no time to read that.

A domain's score is the unweighted mean over its tasks, each by its own metric. Where any row has no label, the score of every task is
the share of its rows whose answer is the one given with nothing masked: agreement, which needs no labels and says nothing about truth.
Sets are measured one after the other, so that each is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeml.data import Row
from edgeml.errors import DataError, UsageError
from edgeml.manifest import Task, TaskStages
from edgeml.metrics import FEWEST_EXAMPLES, score
from edgeml.resident import Transfer, all_pages
from edgeml.router import ResidentSet, mask_of
from edgeml.session import Session

__all__ = ["measure_transfer"]

Labels = NDArray[np.int64]


def measure_transfer(session: Session, data: Mapping[str, Sequence[Row]], tick: Callable[[int], None] = lambda _: None) -> Transfer:
    """Measure a session's transfer matrix on rows of its tasks on texts; `tick` gets the rows answered since the last call.

    Each row is answered once for every domain and up to twice more. Raises `UsageError` where there is nothing to measure (one domain,
    everything in memory, masked residency), `DataError` for a domain of fewer than 30 rows, otherwise as `Session.run`.
    """
    manifest, residents = session.manifest, session.residents
    tasks, domains, examples = _checked(session, data)
    labelled = all(row.label is not None for rows in data.values() for row in rows)

    def answers(resident: ResidentSet | None) -> dict[str, Labels]:
        found = {}
        for task in tasks:
            found[task.name] = _answers(session, task.name, task.pair, data[task.name], resident)
            tick(len(data[task.name]))
        return found

    sets = [residents.domain_set(domain) for domain in domains]  # before anything is learned from what follows
    reference = answers(None)
    metrics = {task.name: task.metric or "accuracy" if labelled else "accuracy" for task in tasks}
    truth = {name: np.array([row.label for row in rows], np.int64) if labelled else reference[name] for name, rows in data.items()}

    def scores(given: Mapping[str, Labels]) -> tuple[float, ...]:
        by_task = {task.name: score(metrics[task.name], truth[task.name], given[task.name]) for task in tasks if data[task.name]}
        return tuple(float(np.mean([by_task[task.name] for task in tasks if task.domain == d and task.name in by_task])) for d in domains)

    table = tuple(scores(answers(resident)) for resident in sets)
    bare = all(site.shared for site in manifest.sites) and bool(all_pages(manifest.sites))
    baseline = scores(answers(ResidentSet((), mask_of(manifest, ())))) if bare else None
    pages = tuple(resident.pages for resident in sets)
    return Transfer(domains, pages, table, scores(reference), baseline, examples, "labels" if labelled else "agreement")


def _checked(session: Session, data: Mapping[str, Sequence[Row]]) -> tuple[list[Task], tuple[str, ...], tuple[int, ...]]:
    """The tasks, their domains and how many rows each of those has."""
    where, tasks = session.bundle.path, [session.task(name) for name in data]
    if session.residency == "masked":
        raise UsageError(f"{where}: unmasked answers are compared with, so measure with residency exact or hybrid")
    if session.budget.complete:
        raise UsageError(f"{where}: everything fits this budget, so no set leaves anything out; give less memory, such as 50%")
    for task in tasks:
        if task.kind != "classification" or not isinstance(task.stages, TaskStages):
            raise UsageError(f"{where}: task '{task.name}' has no labels on texts, so nothing can be measured on it")
    domains = tuple(sorted({task.domain for task in tasks}))
    if len(domains) < 2:
        known = ", ".join(domains) or "none"
        raise UsageError(f"{where}: transfer is between the bundle's domains, and there is data of {known} only; give two")
    examples = tuple(sum(len(data[task.name]) for task in tasks if task.domain == domain) for domain in domains)
    for domain, count in zip(domains, examples, strict=True):
        if count < FEWEST_EXAMPLES:
            raise DataError(f"domain '{domain}' has {count} rows, and {FEWEST_EXAMPLES} are the fewest that a transfer is measured on")
    return tasks, domains, examples


def _answers(session: Session, task: str, pair: bool, rows: Sequence[Row], resident: ResidentSet | None) -> Labels:
    """Predicted label indices (n,)."""
    if pair:
        result = session.run(task, pairs=[(row.text, row.pair or "") for row in rows], resident=resident)
    else:
        result = session.run(task, texts=[row.text for row in rows], resident=resident)
    assert result.scores is not None  # of a classification
    found: Labels = result.scores.argmax(-1).astype(np.int64)
    return found
