"""`edgeml bench`: how fast a bundle answers and what it costs, for every combination of the settings asked for."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import click

from edgeml.bundle import Bundle
from edgeml.commands import _records
from edgeml.commands._inputs import choose_tasks, given_rows, on_images
from edgeml.commands._options import bundle_argument, json_option, notes, progress, quiet_option, records_option, variant_options
from edgeml.errors import DeviceError, EdgemlError, UsageError
from edgeml.image import read_image
from edgeml.manifest import ImagePreprocess, Manifest, Task, load_manifest
from edgeml.records import append
from edgeml.session import RESIDENCIES
from edgeml.store import plan_budget, resolve_threads
from edgeml.variants import Wish, choose_variant

DEFAULT_TOKENS = 32


@click.command("bench")
@bundle_argument
@click.option("--task", help="The task to answer; may be left out where there is only one. On images a list such as a,b is one pass.")
@click.option("--text", "texts", multiple=True, help="A text to answer; may be repeated.")
@click.option("--text-pair", "text_pairs", multiple=True, help="Its second text, for tasks that judge pairs.")
@click.option("--input", "source", help="A file of JSON lines with text (and text_pair); - is standard input.")
@click.option("--tokens", type=click.IntRange(1), help=f"Random inputs of this many tokens instead of texts (default: {DEFAULT_TOKENS}).")
@click.option("--image", "images", multiple=True, help="A PNG or JPEG for tasks on images, instead of a random one; may be repeated.")
@variant_options
@click.option("--iterations", type=click.IntRange(1), default=30, show_default=True, help="Rounds that are measured, one input each.")
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True, help="Rounds before them, left out.")
@click.option("--cold", type=click.IntRange(0), default=3, show_default=True, help="Rounds that begin without any expert in memory.")
@click.option("--threads", help="Threads, or a list: 1,2.")
@click.option("--memory", help="Memory for weights, or a list: 25%,50%,100%.")
@click.option("--residency", default="exact", show_default=True, help="exact, masked, or both: exact,masked.")
@click.option("-o", "--output", type=click.Choice(_records.FORMATS), default="md", show_default=True, help="How the records are printed.")
@records_option
@quiet_option
@json_option
def command(
    bundle: str,
    task: str | None,
    texts: tuple[str, ...],
    text_pairs: tuple[str, ...],
    source: str | None,
    tokens: int | None,
    images: tuple[str, ...],
    iterations: int,
    warmup: int,
    cold: int,
    threads: str | None,
    memory: str | None,
    residency: str,
    output: str,
    records_file: Path | None,
    quiet: bool,
    as_json: bool,
    **variant: Any,
) -> None:
    """Measure latency, page traffic and memory: each combination of settings in a process of its own.

    A list (--memory, --threads, --residency, --variant) makes a row for each of its values.

    Example: edgeml bench model.edgeml --task banking77 --memory 25%,50%,100% --threads 1,2
    """
    kind = "json" if as_json else output
    settings: dict[str, list[Any]] = {"memory": _list(memory), "threads": _threads(threads), "residency": _residencies(residency)}
    settings["variant"] = _list(variant.pop("variant"))
    combinations = [dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())]
    with Bundle.open(bundle) as opened:
        manifest = load_manifest(opened)
        chosen = choose_tasks(manifest, task, bundle, bool(images))
        for combination in combinations:
            _check(opened, manifest, combination | variant)
    if on_images(chosen[0]):
        cold = 0  # nothing is paged
    rounds = max(iterations, warmup, cold)
    names = ",".join(one.name for one in chosen)
    job: dict[str, Any] = {"bundle": os.path.abspath(bundle), "task": names, "iterations": iterations, "warmup": warmup, "cold": cold}
    job["limits"] = variant
    if isinstance(chosen[0].preprocess, ImagePreprocess):
        if texts or text_pairs or source is not None or tokens is not None:
            raise UsageError(f"task '{chosen[0].name}' takes images: give --image FILE, or nothing for a random one")
        job["workload"] = _image_workload(chosen[0].preprocess, images)
    else:
        job["workload"] = _workload(chosen[0], texts, text_pairs, source, tokens, rounds)
    records: list[dict[str, Any]] = []
    with progress((iterations + warmup + cold) * len(combinations), "measuring", quiet) as step:
        for combination in combinations:
            records.append(_run_worker(job | combination, step))
            if records_file is not None:
                append(records_file, records[-1])
            if kind != "json":
                _print(kind, records)
    if kind == "json":
        click.echo(_records.document(records))
    notes(list(dict.fromkeys(f"{record['memory']}: {note}" for record in records for note in record["notes"])), quiet)


def _print(kind: str, records: list[dict[str, Any]]) -> None:
    parts = [_records.head(kind, records[0]) if len(records) == 1 else None, _records.row(kind, records[-1])]
    for part in parts:
        if part is not None:
            click.echo(part)


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
    if texts or source is not None:
        if tokens is not None:
            raise UsageError("give texts or --tokens, not both")
        rows = [[row.text, row.pair] for row in islice(given_rows(task, texts, text_pairs, source), rounds)]
        if not rows:
            raise UsageError(f"{source} holds no rows to measure with")
        return {"kind": "texts", "rows": len(rows), "texts": rows}
    assert not isinstance(task.preprocess, ImagePreprocess)
    limit = task.preprocess.max_tokens
    if tokens is not None and tokens > limit:
        raise UsageError(f"task '{task.name}' reads at most {limit} tokens, not {tokens}")
    return {"kind": "random", "tokens": tokens or min(DEFAULT_TOKENS, limit)}


def _image_workload(preprocess: ImagePreprocess, images: tuple[str, ...]) -> dict[str, Any]:
    """Pictures, read again in each round as a user's would be; or random ones of the model's own size."""
    if not images:
        return {"kind": "random image", "height": preprocess.height, "width": preprocess.width, "channels": preprocess.channels}
    for path in images:
        read_image(path)  # a bad one is told now, and not after other rows
    return {"kind": "images", "rows": len(images), "paths": [os.path.abspath(path) for path in images]}


def _run_worker(job: dict[str, Any], step: Callable[[int], None]) -> dict[str, Any]:
    """Run one job in a child process and return its record. Raises the child's error."""
    home = str(Path(__file__).parents[2])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-P", "-m", "edgeml.commands.bench_worker"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment) as child,
    ):
        try:
            done = _converse(child, job, step)
            child.wait()
        finally:
            child.kill()
            child.wait()
        if done is None:
            log.seek(0)
            raise DeviceError(_ended(job, child.returncode, log.read()[-4000:].decode("utf-8", "replace")))
    if "error" in done:
        error = EdgemlError(done["error"])
        error.exit_code = int(done["exit_code"])
        raise error
    record: dict[str, Any] = done["record"]
    return record


def _converse(child: subprocess.Popen[bytes], job: dict[str, Any], step: Callable[[int], None]) -> dict[str, Any] | None:
    """Hand over the job and follow it; None when the child ends without a last word."""
    if child.stdin is None or child.stdout is None:
        return None
    try:
        with child.stdin as sink:
            sink.write(json.dumps(job).encode())
    except BrokenPipeError:
        return None
    for line in child.stdout:
        message: dict[str, Any] = json.loads(line)
        if "tick" not in message:
            return message
        step(message["tick"])
    return None


def _ended(job: dict[str, Any], code: int, log: str) -> str:
    what = f"the measurement with memory {job['memory'] or 'auto'} and residency {job['residency']}"
    if code == -signal.SIGKILL:
        return f"{what} was killed, most likely because the machine ran out of memory; try a smaller --memory"
    if code < 0:
        return f"{what} crashed ({signal.Signals(-code).name})"
    said = log.strip().splitlines()
    return f"{what} failed" + (f": {said[-1][:300]}" if said else "")
