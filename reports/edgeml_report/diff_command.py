"""`edgeml diff`: which stage, site or layer of a bundle lost the quality that a reference has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from edgeml.batching import batches
from edgeml.bundle_writer import interruptible
from edgeml.commands._inputs import choose_tasks, given_rows, on_images
from edgeml.commands._options import json_option, progress, quiet_option, records_option
from edgeml.data import SPLITS, Row, find_tasks
from edgeml.errors import DataError, UsageError
from edgeml.evaluate import match_images, match_tasks, tally_maps
from edgeml.image import encode_images, read_image
from edgeml.image_data import ImageRows, ImageTask, find_image_sets
from edgeml.image_requests import BATCH_IMAGES, BATCH_PIXELS
from edgeml.manifest import ImagePreprocess, Manifest, Preprocess
from edgeml.metrics import one_hot
from edgeml.preprocess import TextPreprocessor
from edgeml.records import append, complete
from edgeml.session import open as open_session
from edgeml_report.diff import Asked, compare
from edgeml_report.diff_parts import Pair, paired
from edgeml_report.diff_print import table
from edgeml_report.diff_run import Opened, Tensors

Counts = NDArray[np.integer[Any]]


@click.command("diff")
@click.argument("reference", type=click.Path())
@click.argument("bundle", type=click.Path(), required=False)
@click.option("--data", type=click.Path(), help="DOMAIN/TASK/SPLIT.jsonl.gz with a task.json, or SET/SPLIT.npz with an image.json.")
@click.option("--split", default="validation", show_default=True, type=click.Choice(SPLITS), help="Of the data: the rows to answer.")
@click.option("--tasks", help="Of the data: only these, separated by commas: TASK, DOMAIN/TASK or SET/TASK.")
@click.option("--limit", type=click.IntRange(min=1), default=64, show_default=True, help="Of the data: rows a task, the first ones.")
@click.option("--text", "texts", multiple=True, help="A text to answer, without data and scores; may be repeated.")
@click.option("--text-pair", "text_pairs", multiple=True, help="Its second text, for tasks that judge pairs.")
@click.option("--image", "images", multiple=True, help="A PNG or JPEG to answer, without data and scores; may be repeated.")
@click.option("--task", help="Of --text or --image: the task that answers; on images a list, by default all.")
@click.option("--variant", help="Of BUNDLE: the variant of this name.")
@click.option("--reference-variant", help="Of REFERENCE; without BUNDLE, two variants of one bundle are compared.")
@click.option("--threads", type=int, help="Threads to compute with (default: EDGEML_THREADS, or all processors).")
@records_option
@quiet_option
@json_option
def command(
    reference: str,
    bundle: str | None,
    variant: str | None,
    reference_variant: str | None,
    threads: int | None,
    records_file: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Which part of BUNDLE lost the quality of REFERENCE: embeddings, routers, dense layers, experts of a site, backbone, heads, layers.

    Both are exports of one model, stored in different ways. For each part, in the order in which a request meets it: how far its
    activations are off when it alone is the bundle's, and as the request meets it; and what score comes back when it alone is
    restored. Weights are exchanged in a temporary file, one part at a time.

    \b
    Examples: edgeml diff full.edgeml small.edgeml --data data/text --limit 200
      edgeml diff full.edgeml small.edgeml --task banking77 --text "I lost my card"
      edgeml diff street.edgeml --reference-variant dense-f32 --variant dense-int8 --data data/images
    """
    other = bundle or reference
    _check(bundle, variant, reference_variant, options)
    with interruptible(), ExitStack() as stack:
        second = stack.enter_context(Opened.open(other, variant, threads))
        first = stack.enter_context(Opened.open(reference, reference_variant, threads))
        if bundle is None and first.variant == second.variant:
            raise UsageError(f"variant '{first.variant}' of {other} would be compared with itself; name another with --reference-variant")
        pair = paired(second, first)
        asked = _labelled(pair, Path(options["data"]), options) if options["data"] is not None else _given(pair, options)
        found = compare(pair, asked, lambda rows: progress(rows, "comparing", quiet))
    document = {
        "reference_bundle": Path(reference).name,
        "reference_bundle_id": first.bundle.id,
        "reference_variant": first.variant,
        "split": options["split"] if options["data"] is not None else None,
        "limit": options["limit"] if options["data"] is not None else None,
        "images": pair.on_images,
        **found,
    }
    if records_file is not None:
        with open_session(other, memory="100%", threads=threads, variant=variant) as session:
            append(records_file, complete("diff", session.settings(), diff=document))
    click.echo(json.dumps(document, allow_nan=False) if as_json else "\n".join(table(document, Path(other).name, second.variant)))


def _check(bundle: str | None, variant: str | None, reference_variant: str | None, options: dict[str, Any]) -> None:
    """What can be wrong before any file is opened."""
    ways = [name for name, given in (("--data", options["data"]), ("--text", options["texts"]), ("--image", options["images"])) if given]
    if len(ways) != 1:
        raise UsageError(f"give one of --data DIRECTORY, --text and --image{', not ' + ' and '.join(ways) if ways else ''}")
    if options["data"] is not None and (options["task"] is not None or options["text_pairs"]):
        raise UsageError("--task and --text-pair go with --text; of the data, --tasks names some")
    if options["images"] and options["text_pairs"]:
        raise UsageError("--text-pair goes with --text, not with --image")
    if options["data"] is None and options["tasks"] is not None:
        raise UsageError("--tasks goes with --data; name the task of --text or --image with --task")
    if bundle is None and variant is None and reference_variant is None:
        raise UsageError("name the BUNDLE to compare with, or two variants of one: --reference-variant NAME --variant NAME")


def _labelled(pair: Pair, data: Path, options: dict[str, Any]) -> list[Asked]:
    """The rows of the data. Raises `DataError` for an empty split, and as `match_tasks` and `match_images`."""
    split, limit, where = options["split"], options["limit"], str(pair.bundle.bundle.path)
    names = None if options["tasks"] is None else [name.strip() for name in options["tasks"].split(",")]
    sets = find_image_sets(data) if data.is_dir() else []
    if pair.on_images != bool(sets) and data.is_dir():
        there, kind = ("images", "texts") if sets else ("no image.json", "images")
        raise DataError(f"{data}: {there} in it, and {where} answers {kind}; give a directory of {kind}")
    if not sets:
        matched, _ = match_tasks(find_tasks(data, names), _common(pair), where)
        return [_texts(pair, task.name, _filled(task.rows(split, limit), task.path, split), {task.name: task.metric}) for task in matched]
    asked, left = [], set(names or ())
    for one, tasks in match_images(sets, _common(pair), where)[0]:
        wanted = [task for task in tasks if names is None or {task.name, f"{one.name}/{task.name}"} & set(names)]
        left -= {name for task in wanted for name in (task.name, f"{one.name}/{task.name}")}
        if wanted:
            rows = one.rows(split, limit)
            images = _filled(list(rows.images), one.path, split)
            asked.append(_images(pair, tuple(task.name for task in wanted), images, rows, wanted))
    if left:
        raise DataError(f"{data}: no task '{min(left)}' that is both in the data and in the bundles")
    return asked


def _filled(rows: list[Any], path: Path, split: str) -> list[Any]:
    if not rows:
        raise DataError(f"{path}: the split '{split}' has no rows")
    return rows


def _common(pair: Pair) -> Manifest:
    """The manifest of the bundle with the tasks that both have."""
    manifest = pair.bundle.manifest
    return replace(manifest, tasks=tuple(task for task in manifest.tasks if task.name in pair.tasks))


def _given(pair: Pair, options: dict[str, Any]) -> list[Asked]:
    """The texts or images of the command line, which nobody labelled."""
    manifest, where, images = _common(pair), str(pair.bundle.bundle.path), bool(options["images"])
    if not images and all(map(on_images, manifest.tasks)):
        raise UsageError(f"{where} answers images: give --image FILE in place of --text")
    tasks = choose_tasks(manifest, options["task"], where, images)
    if on_images(tasks[0]) != images:
        raise UsageError(f"task '{tasks[0].name}' takes {'texts: give --text' if images else 'images: give --image FILE'}")
    if images:
        return [_images(pair, tuple(task.name for task in tasks), [read_image(file) for file in options["images"]])]
    rows = list(given_rows(tasks[0], options["texts"], options["text_pairs"], None))
    return [_texts(pair, tasks[0].name, rows)]


def _texts(pair: Pair, name: str, rows: Sequence[Row], metrics: dict[str, str] | None = None) -> Asked:
    task = pair.bundle.task(name)
    assert isinstance(task.preprocess, Preprocess)  # `roles` are those of texts
    encoder = TextPreprocessor(pair.bundle.bundle.read(task.preprocess.tokenizer), task.preprocess.max_tokens)
    window = encoder.encode([row.text for row in rows], [row.pair or "" for row in rows] if task.pair else None)
    made: list[tuple[NDArray[np.intp], Tensors]] = [
        (numbers, {"ids": batch.ids, "types": batch.types, "mask": batch.mask}) for numbers, batch in batches(window)
    ]
    labels = np.array([row.label for row in rows if row.label is not None], np.int64)

    def counts(_: str, answers: NDArray[Any]) -> Counts:
        return one_hot(labels, answers.argmax(-1), len(task.labels))

    return Asked((name,), len(rows), lambda: iter(made), None if metrics is None else counts, metrics or {})


def _images(
    pair: Pair, names: tuple[str, ...], pixels: Sequence[NDArray[Any]], rows: ImageRows | None = None, tasks: Sequence[ImageTask] = ()
) -> Asked:
    prepare = pair.bundle.task(names[0]).preprocess
    assert isinstance(prepare, ImagePreprocess)
    recipe, size = prepare, max(1, min(BATCH_IMAGES, BATCH_PIXELS // (prepare.height * prepare.width)))

    def made() -> Iterator[tuple[NDArray[np.intp], Tensors]]:
        for first in range(0, len(pixels), size):
            some = pixels[first : first + size]
            yield np.arange(first, first + len(some)), {"image": encode_images(list(some), recipe, first)}

    known = {task.name: task for task in tasks}

    def counts(name: str, answers: NDArray[Any]) -> Counts:
        assert rows is not None
        task, labels = known[name], rows.labels[name]
        if task.kind == "classification":
            return one_hot(labels.astype(np.int64), answers.argmax(-1), len(task.labels))
        return tally_maps(task, labels, answers)

    given: Callable[[str, NDArray[Any]], Counts] | None = None if rows is None else counts
    return Asked(names, len(pixels), made, given, {task.name: task.metric for task in tasks})
