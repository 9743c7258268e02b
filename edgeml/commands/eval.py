"""`edgeml eval`: what a bundle scores on labelled data, alone or against a reference."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from edgeml.bundle import Bundle
from edgeml.bundle_writer import write_file
from edgeml.commands._eval_images import evaluate_images, image_lines
from edgeml.commands._options import bundle_argument, json_option, notes, printable, progress, quiet_option, variant_options
from edgeml.data import SPLITS, Row, TaskData, find_tasks
from edgeml.errors import UsageError
from edgeml.evaluate import Answered, Labels, answer_rows, kept_set, match_tasks, read_labelled, report
from edgeml.image_data import find_image_sets
from edgeml.manifest import load_manifest
from edgeml.measure import Timing, record
from edgeml.router import ResidentSet
from edgeml.session import RESIDENCIES, Session
from edgeml.session import open as open_session


@dataclass(frozen=True)
class _Kept:
    """Which routed experts may be used, for measuring: `share` of each site, by usage or (with a `seed`) at random."""

    share: float
    seed: int | None


@click.command("eval")
@bundle_argument
@click.option(
    "--data",
    required=True,
    type=click.Path(),
    help="DOMAIN/TASK/{train,test,...}.jsonl.gz with a task.json, or one task's folder; or SET/{train,test,...}.npz with an image.json.",
)
@click.option("--split", default="test", show_default=True, type=click.Choice(SPLITS), help="The rows to evaluate.")
@click.option("--tasks", help="Only these, separated by commas: TASK, or DOMAIN/TASK (of images SET/TASK).")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many rows a task, the first ones.")
@click.option("--reference", type=click.Path(), help="A bundle to compare with: gives retention.")
@variant_options
@click.option("--memory", help="Memory for weights: 64MiB, 1.5GB, 50%, auto (default, or EDGEML_MEMORY).")
@click.option(
    "--residency", default="exact", show_default=True, type=click.Choice(RESIDENCIES), help="Whether the budget may change answers."
)
@click.option("--threads", type=int, help="Threads to compute with (default: EDGEML_THREADS, or all processors).")
@click.option(
    "--experts-kept", default="all", metavar="all|none|SHARE", help="Measure with this share of each site's routed experts, say 0.5."
)
@click.option("--kept-by", default="usage", metavar="usage|random:SEED", help="How the kept experts are chosen.", show_default=True)
@click.option("--predictions", type=click.Path(), help="Also write JSON lines: task, row, label, predicted.")
@quiet_option
@json_option
def command(
    bundle: str,
    data: str,
    split: str,
    tasks: str | None,
    limit: int | None,
    reference: str | None,
    memory: str | None,
    residency: str,
    threads: int | None,
    experts_kept: str,
    kept_by: str,
    predictions: str | None,
    quiet: bool,
    as_json: bool,
    **variant: Any,
) -> None:
    """Scores of a bundle on labelled data, task by task.

    Example: edgeml eval model.edgeml --data data/text --tasks banking77,snips --reference full.edgeml
    """
    kept = _parse_kept(experts_kept, kept_by)
    if kept is not None and (memory is not None or residency != "exact"):
        raise UsageError("--experts-kept measures with everything in memory: leave out --memory and --residency")
    names = None if tasks is None else [name.strip() for name in tasks.split(",")]
    opening = {"memory": memory, "threads": threads, "residency": residency} | variant
    if sets := find_image_sets(Path(data)):
        if kept is not None:
            raise UsageError("--experts-kept is for mixtures of experts; a network for images has none")
        scored, timing, extra = evaluate_images(bundle, sets, names, split, limit, reference, opening, quiet)
        if predictions is not None:
            write_file(Path(predictions), image_lines(scored))
        _print(report(scored) | {"skipped": extra.pop("skipped"), "record": record(timing, extra)}, as_json)
        return
    found = find_tasks(Path(data), names)
    matched, skipped = _match(bundle, found)
    if reference is not None and (missing := _match(reference, matched)[1]):
        raise UsageError(f"the reference {reference} has no task '{missing[0]}'; choose others with --tasks")
    labelled = [read_labelled(task, split, limit) for task in matched]
    questions = {task.name: rows for task, (rows, _) in zip(matched, labelled, strict=True)}
    settings = {"split": split, "limit": limit, "experts_kept": experts_kept, "kept_by": kept_by, "reference_bundle_id": None}
    with open_session(bundle, **opening | ({} if kept is None else {"memory": "100%"})) as session:
        notes(session.notes, quiet)
        predicted, timing = _predict(session, questions, kept, "evaluating", quiet)
        settings |= session.settings()
    others: list[Labels | None] = [None] * len(matched)
    if reference is not None:
        with open_session(reference, threads=threads) as session:
            others[:] = _predict(session, questions, None, "the reference", quiet)[0]
            settings["reference_bundle_id"] = session.bundle.id
    answered = [
        Answered(task.name, task.domain, task.metric, _labels(rows), guesses, commonest, other)
        for task, (rows, commonest), guesses, other in zip(matched, labelled, predicted, others, strict=True)
    ]
    if predictions is not None:
        write_file(Path(predictions), _lines(answered))
    _print(report(answered) | {"skipped": skipped, "record": record(timing, settings)}, as_json)


def _print(document: dict[str, Any], as_json: bool) -> None:
    click.echo(json.dumps(document, allow_nan=False) if as_json else "\n".join(_table(document)))


def _match(bundle: str, data: Sequence[TaskData]) -> tuple[list[TaskData], list[str]]:
    """A wrong question is answered before any weight is loaded."""
    with Bundle.open(bundle) as opened:
        return match_tasks(data, load_manifest(opened), bundle)


def _parse_kept(share: str, by: str) -> _Kept | None:
    match = re.fullmatch(r"usage|random:([0-9]{1,9})", by)
    if match is None:
        raise UsageError(f"--kept-by is usage or random:SEED with a whole number, not {by!r:.40}")
    seed = None if match[1] is None else int(match[1])
    if share == "all":
        return None
    if share == "none":
        return _Kept(0.0, seed)
    if not re.fullmatch(r"0?\.[0-9]{1,6}|[01](\.0{1,6})?", share):
        raise UsageError(f"--experts-kept is all, none or a share from 0 to 1, not {share!r:.40}")
    return _Kept(float(share), seed)


def _predict(
    session: Session, questions: Mapping[str, list[Row]], kept: _Kept | None, label: str, quiet: bool
) -> tuple[list[Labels], Timing]:
    """The predicted labels of each task, and what they cost: one round of the timing is one input at its share of its batch's time."""
    timing, predicted = Timing(), []
    with progress(sum(map(len, questions.values())), label, quiet) as tick:
        for name, rows in questions.items():
            session.load(name)
            resident = None if kept is None else kept_set(session.manifest, name, kept.share, kept.seed)
            ask = partial(_ask, session, name, resident, timing)
            predicted.append(answer_rows(ask, rows, f"task '{name}'", tick))
    return predicted, timing


def _ask(session: Session, task: str, resident: ResidentSet | None, timing: Timing, rows: list[Row]) -> Labels:
    if session.task(task).pair:
        result = session.run(task, pairs=[(row.text, row.pair or "") for row in rows], resident=resident)
    else:
        result = session.run(task, texts=[row.text for row in rows], resident=resident)
    timing.warm.add(result.latency_s, result.counters)
    timing.warm.latency_s[-1:] = result.row_s
    assert result.scores is not None  # `match_tasks` lets only classifications through
    predicted: Labels = result.scores.argmax(-1).astype(np.int64)
    return predicted


def _labels(rows: Sequence[Row]) -> Labels:
    return np.array([row.label for row in rows], np.int64)


def _lines(answered: Sequence[Answered]) -> Iterator[bytes]:
    for task in answered:
        for row, (label, predicted) in enumerate(zip(task.labels.tolist(), task.predicted.tolist(), strict=True)):
            line = {"task": task.name, "row": row, "label": label, "predicted": predicted}
            yield json.dumps(line, separators=(",", ":")).encode("utf-8") + b"\n"


def _table(document: dict[str, Any]) -> Iterator[str]:
    """The document for people: figures in hundredths, differences in points."""
    compared = document["reference_mean"] is not None
    width = max(len("mean"), *(len(name) for name in document["tasks"]))
    domains = max(len("domain"), *(len(printable(task["domain"])) for task in document["tasks"].values()))
    yield f"{'task':<{width}}  {'domain':<{domains}}  {'metric':<8}  {'n':>6}  chance  score" + ("  reference   diff" if compared else "")
    for name, task in document["tasks"].items():
        line = f"{name:<{width}}  {printable(task['domain']):<{domains}}  {task['metric']:<8}  {task['n']:>6}  "
        line += f"{task['chance']:>6.1%}  {task['score']:>5.1%}".replace("%", "")
        yield line + _difference(task["score"], task["reference_score"])
    blank = f"{'mean':<{width}}  {'':<{domains}}  {'':<8}  {'':>6}  {'':>6}  "
    yield blank + f"{100 * document['mean']:>5.1f}" + _difference(document["mean"], document["reference_mean"])
    if compared:
        yield _retention_line(document["retention"])
    if document["excluded"]:
        yield f"left out of retention, the reference is less than 10 points above chance: {', '.join(document['excluded'])}"
    if document["skipped"]:
        yield f"skipped, the bundle has no such task: {printable(', '.join(document['skipped']))}"


def _difference(score: float, reference: float | None) -> str:
    return "" if reference is None else f"  {100 * reference:>9.1f}  {round(100 * (score - reference), 1) + 0.0:>+5.1f}"


def _retention_line(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return "retention: none, no reference score is 10 points above chance"
    between = "" if interval["low"] is None else f", 95 % between {interval['low']:.1%} and {interval['high']:.1%}"
    return f"retention: {interval['value']:.1%}{between} ({interval['n']} rows)"
