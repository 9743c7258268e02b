"""What `edgeml bench` is asked to measure, as jobs for its workers: everything that can be wrong with the question is found here."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import click

from edgeml.bundle import Bundle
from edgeml.commands._bench_compare import Other
from edgeml.commands._inputs import choose_tasks, given_rows, on_images, read_rows
from edgeml.commands._options import Function
from edgeml.errors import DataError, UsageError
from edgeml.image import read_image
from edgeml.manifest import ImagePreprocess, Manifest, Task, load_manifest
from edgeml.session import RESIDENCIES, find_task
from edgeml.store import plan_budget, resolve_threads
from edgeml.variants import Wish, choose_variant
from edgeml.workload import Workload, load_workload

__all__ = ["DEFAULT_ROUNDS", "DEFAULT_TOKENS", "DEFAULT_WARMUP", "combinations_of", "job_of", "job_options", "their_job"]

DEFAULT_TOKENS, DEFAULT_ROUNDS, DEFAULT_WARMUP = 32, 30, 3
INPUTS = ("texts", "text_pairs", "source", "tokens")


def job_options(command: Function) -> Function:
    """The options that say what is answered in a round, as `job_of` takes them."""
    tokens = f"Random inputs of this many tokens instead of texts (default: {DEFAULT_TOKENS})."
    for option in (
        click.option(
            "--image", "images", multiple=True, help="A PNG or JPEG for tasks on images, instead of a random one; may be repeated."
        ),
        click.option("--tokens", type=click.IntRange(1), help=tokens),
        click.option("--input", "source", help="A file of JSON lines with text (and text_pair); - is standard input."),
        click.option("--text-pair", "text_pairs", multiple=True, help="Its second text, for tasks that judge pairs."),
        click.option("--text", "texts", multiple=True, help="A text to answer; may be repeated."),
        click.option(
            "--task", help="The task to answer; may be left out where there is only one. On images a list such as a,b is one pass."
        ),
    ):
        command = option(command)
    return command


def combinations_of(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the settings that are lists."""
    settings: dict[str, list[Any]] = {"memory": _list(options["memory"]), "threads": _threads(options["threads"])}
    settings |= {"residency": _residencies(options["residency"]), "variant": _list(options["variant"])}
    return [dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())]


def job_of(bundle: str, options: Mapping[str, Any], combinations: list[dict[str, Any]]) -> dict[str, Any]:
    """What a worker is to do, but for the settings in `combinations`, which are tried out here."""
    limits = {key: options[key] for key in ("max_latency", "max_bytes", "min_score")}
    workload = None if options["workload"] is None else load_workload(Path(options["workload"]))
    if workload is not None and any(options[key] for key in ("task", "images", *INPUTS)):
        raise UsageError("--workload says which tasks and inputs there are: leave out --task and the options for inputs")
    iterations = options["iterations"] or (workload.requests if workload else None) or DEFAULT_ROUNDS
    given = [options["warmup"], workload.warmup if workload else None, DEFAULT_WARMUP]
    warmup = next(value for value in given if value is not None)
    with Bundle.open(bundle) as opened:
        manifest = load_manifest(opened)
        if workload is None:
            chosen = choose_tasks(manifest, options["task"], bundle, bool(options["images"]))
        else:
            chosen = [find_task(manifest, name, bundle) for name in dict.fromkeys(kind.task for kind in workload.mix)]
        for combination in combinations:
            _check(opened, manifest, combination | limits)
    cold = 0 if workload is not None or on_images(chosen[0]) else options["cold"]  # nothing is paged, or not by one request alone
    job: dict[str, Any] = {"bundle": os.path.abspath(bundle), "task": ",".join(one.name for one in chosen), "limits": limits}
    job |= {"iterations": iterations, "warmup": warmup, "cold": cold}
    job["input_files"] = [Path(one).name for one in (options["source"] or "-", *options["images"]) if one != "-"]
    if workload is not None:
        return job | {"workload": _mix_workload(workload, Path(options["workload"]), {task.name: task for task in chosen})}
    if isinstance(chosen[0].preprocess, ImagePreprocess):
        if any(options[key] for key in INPUTS):
            raise UsageError(f"task '{chosen[0].name}' takes images: give --image FILE, or nothing for a random one")
        return job | {"workload": _image_workload(chosen[0].preprocess, options["images"])}
    texts, pairs, source, tokens = (options[key] for key in INPUTS)
    return job | {"workload": _workload(chosen[0], texts, pairs, source, tokens, max(iterations, warmup, cold))}


def their_job(job: Mapping[str, Any], other: Other, combinations: list[dict[str, Any]]) -> dict[str, Any]:
    """In which ways the job of the other side differs."""
    changes: dict[str, Any] = {key: value for key, value in other.settings.items() if key != "threads"}
    if "threads" in other.settings:
        changes["threads"] = _threads(other.settings["threads"])[0]
    _residencies(changes.get("residency", "exact"))
    with Bundle.open(other.path) as opened:
        manifest = load_manifest(opened)
        for combination in combinations:
            _check(opened, manifest, combination | changes | job["limits"])
        with Bundle.open(job["bundle"]) as first:
            ours = load_manifest(first)
        for name in job["task"].split(","):
            one, two = find_task(ours, name, job["bundle"]), find_task(manifest, name, other.path)
            if (one.pair, on_images(one)) != (two.pair, on_images(two)):
                raise UsageError(f"{other.path}: its task '{name}' takes other inputs, so both cannot be compared")
    return changes | {"bundle": os.path.abspath(other.path)}


def _list(text: str | None) -> list[str | None]:
    if text is None:
        return [None]
    values = [value.strip() for value in text.split(",")]
    if not all(values):
        raise UsageError(f"'{text}' is not a list: separate its values by single commas")
    return list(values)


def _threads(text: str | None) -> list[int | None]:
    values = _list(text)
    for value in values:
        if value is not None and not (value.isascii() and value.isdigit()):
            raise UsageError(f"--threads takes a number or a list such as 1,2, not {text!r:.40}")
    return [None if value is None else resolve_threads(int(value[:6])) for value in values]


def _residencies(text: str) -> list[str]:
    values = [value or "" for value in _list(text)]
    for value in values:
        if value not in RESIDENCIES:
            raise UsageError(f"residency must be one of {', '.join(RESIDENCIES)}, not '{value}'")
    return values


def _check(bundle: Bundle, manifest: Manifest, combination: dict[str, Any]) -> None:
    """Refuse a budget below the floor now, and not after the minutes that the rows before it take."""
    limits = {key: combination[key] for key in ("variant", "max_latency", "max_bytes", "min_score")}
    choose_variant(manifest, Wish(**limits), str(bundle.path))
    plan_budget(bundle, manifest, combination["memory"], resolve_threads(combination["threads"]))


def _workload(
    task: Task, texts: tuple[str, ...], text_pairs: tuple[str, ...], source: str | None, tokens: int | None, rounds: int
) -> dict[str, Any]:
    if texts or text_pairs or source is not None:
        if tokens is not None:
            raise UsageError("give texts or --tokens, not both")
        rows = [[row.text, row.pair] for row in islice(given_rows(task, texts, text_pairs, source), rounds)]
        if not rows:
            raise UsageError(f"{source} holds no rows to measure with")
        return {"kind": "texts", "rows": len(rows), "texts": rows}
    limit = _most_tokens(task)
    if tokens is not None and tokens > limit:
        raise UsageError(f"task '{task.name}' reads at most {limit} tokens, not {tokens}")
    return {"kind": "random", "tokens": tokens or min(DEFAULT_TOKENS, limit)}


def _most_tokens(task: Task) -> int:
    assert not isinstance(task.preprocess, ImagePreprocess)
    return task.preprocess.max_tokens


def _image_workload(preprocess: ImagePreprocess, images: tuple[str, ...]) -> dict[str, Any]:
    """Pictures, read again in each round as a user's would be; or random ones of the model's own size."""
    if not images:
        return {"kind": "random image", "height": preprocess.height, "width": preprocess.width, "channels": preprocess.channels}
    for path in images:
        read_image(path)  # a bad one is told now, and not after other rows
    return {"kind": "images", "rows": len(images), "paths": [os.path.abspath(path) for path in images]}


def _mix_workload(workload: Workload, path: Path, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """What a worker needs to play a workload file, once its entries fit their tasks and its inputs are read."""
    rows: dict[str, list[list[str | None]]] = {}
    for number, kind in enumerate(workload.mix, 1):
        where, task = f"{path}: [[mix]] number {number}", tasks[kind.task]
        if on_images(task):
            if kind.input is not None or kind.tokens is not None:
                raise DataError(f"{where}: task '{task.name}' takes images: give images, or nothing for random ones")
            for image in kind.images:
                read_image(str(image))
        elif kind.images or (kind.input is None and kind.tokens is None):
            raise DataError(f"{where}: task '{task.name}' takes texts: give input or tokens")
        elif kind.tokens is not None and int(kind.tokens["most"]) > _most_tokens(task):
            raise DataError(f"{where}: task '{task.name}' reads at most {_most_tokens(task)} tokens, not {kind.tokens['most']}")
        elif kind.input is not None:
            rows[str(kind.input.absolute())] = found = [[row.text, row.pair] for row in read_rows(str(kind.input), task.pair)]
            if not found:
                raise DataError(f"{kind.input}: it holds no rows to measure with")
    return {"kind": "mix", "source": workload.source, "path": str(path.absolute()), "rows": rows}
