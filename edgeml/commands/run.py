"""`edgeml run`: answers to texts and images, as lines for people or one JSON document for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import click

from edgeml.bundle import Bundle
from edgeml.commands._answers import answer_line, answers_of
from edgeml.commands._inputs import choose_tasks, given_rows, no_task_named, on_images
from edgeml.commands._options import bundle_argument, json_option, notes, quiet_option, variant_options
from edgeml.commands._run_auto import CHUNK_ROWS, answer_auto
from edgeml.commands._run_images import answer_images
from edgeml.data import Row
from edgeml.errors import UsageError
from edgeml.manifest import Preprocess, Task, load_manifest
from edgeml.measure import Timing, record
from edgeml.session import RESIDENCIES, Result, Session
from edgeml.session import open as open_session
from edgeml.variants import parse_seconds


@click.command("run")
@bundle_argument
@click.option(
    "--task", help="The task; may be left out where there is one or a router finds it. On images a list is one pass; default all."
)
@click.option("--text", "texts", multiple=True, help="A text; may be repeated.")
@click.option("--text-pair", "text_pairs", multiple=True, help="Its second text, for tasks that judge pairs.")
@click.option("--input", "source", help="A file of JSON lines with text (and text_pair); - is standard input.")
@click.option("--image", "images", multiple=True, help="A PNG or JPEG, for tasks on images; may be repeated.")
@click.option("-o", "--output", help="Write the map of a segmentation or edge task as a coloured PNG of the image's size.")
@variant_options
@click.option("--memory", help="Memory for weights: 64MiB, 1.5GB, 50%, auto (default, or EDGEML_MEMORY).")
@click.option(
    "--residency",
    type=click.Choice(RESIDENCIES),
    default="exact",
    show_default=True,
    help="masked: only experts that fit, chosen by task; hybrid: only for a --deadline.",
)
@click.option("--deadline", help="With --residency hybrid: mask what would make a call later than this, say 50ms.")
@click.option("--state", help="Folder of what is learned here of resident sets (default: EDGEML_STATE, or the bundle's own).")
@click.option("--threads", type=int, help="Threads to compute with (default: EDGEML_THREADS, or all processors).")
@quiet_option
@json_option
def command(
    bundle: str,
    task: str | None,
    texts: tuple[str, ...],
    text_pairs: tuple[str, ...],
    source: str | None,
    images: tuple[str, ...],
    output: str | None,
    memory: str | None,
    residency: str,
    deadline: str | None,
    state: str | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
    **variant: Any,
) -> None:
    """Answer texts or images with the tasks of a bundle.

    A line an answer: task, label, confidence, milliseconds (an input's share of its batch). Without --task, on a bundle with a
    router, the text decides: a line for each task of its group, the group first.

    Example: edgeml run model.edgeml --task banking77 --text "I lost my card"

    Example: edgeml run street.edgeml --task segmentation --image photo.png -o map.png
    """
    with Bundle.open(bundle) as opened:  # a wrong question is answered before any weight is loaded
        manifest = load_manifest(opened)
        routed = no_task_named(manifest, task, bool(images))
        tasks = [] if routed else choose_tasks(manifest, task, bundle, bool(images))
    deadline_s = _deadline(deadline, residency, bool(images) or routed)
    settings: dict[str, Any] = {"memory": memory, "threads": threads, "residency": residency, "state": state} | variant
    if images or (tasks and on_images(tasks[0])):
        if texts or text_pairs or source is not None or not images:
            raise UsageError(f"task '{tasks[0].name}' takes images: give --image FILE, and no texts")
        answer_images(bundle, tasks, images, output, settings, quiet, as_json)
        return
    if output is not None:
        raise UsageError("-o writes the map of a task on images; answers to texts go to standard output")
    if routed:
        answer_auto(bundle, manifest, texts, text_pairs, source, settings, quiet, as_json)
        return
    chosen = tasks[0]
    rows = given_rows(chosen, texts, text_pairs, source)
    with open_session(bundle, **settings) as session:
        notes(session.notes, quiet)
        session.load(chosen.name)
        answers: list[dict[str, Any]] = []
        timing, truncated = Timing(), 0
        for result in _results(session, chosen, rows, deadline_s):
            truncated += sum(result.truncated)
            _count(timing, result)
            for answer in answers_of(chosen, result):
                if as_json:
                    answers.append(answer)
                else:
                    click.echo(answer_line(answer))
        if as_json:
            click.echo(json.dumps({"results": answers, "record": record(timing, session.settings())}, allow_nan=False))
    if truncated and isinstance(chosen.preprocess, Preprocess):
        notes([f"{truncated} inputs were longer than {chosen.preprocess.max_tokens} tokens and were cut"], quiet)


def _deadline(text: str | None, residency: str, other: bool) -> float | None:
    """Seconds a call may take; `other`: the request is not for the texts of a named task."""
    if text is None:
        return None
    if residency != "hybrid":
        raise UsageError("--deadline is for --residency hybrid: exact never masks, and masked always does")
    if other:
        raise UsageError("--deadline is for the texts of one task: name it with --task")
    return parse_seconds(text)


def _results(session: Session, task: Task, rows: Iterator[Row], deadline_s: float | None) -> Iterator[Result]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        if task.pair:
            yield session.run(task.name, pairs=[(row.text, row.pair or "") for row in chunk], deadline_s=deadline_s)
        else:
            yield session.run(task.name, texts=[row.text for row in chunk], deadline_s=deadline_s)


def _count(timing: Timing, result: Result) -> None:
    warm, counters = timing.warm, result.counters
    warm.add(result.latency_s, counters)
    warm.latency_s[-1:] = result.row_s
