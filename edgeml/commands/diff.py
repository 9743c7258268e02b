"""`edgeml diff`: which part of a bundle lost the quality that a reference has."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from edgeml.bundle import Bundle
from edgeml.commands._options import json_option, printable, progress, quiet_option, records_option
from edgeml.data import SPLITS, Row, TaskData, find_tasks
from edgeml.diff import check_alike, parts, relative_error, write_mixture
from edgeml.evaluate import match_tasks, read_labelled
from edgeml.manifest import load_manifest
from edgeml.metrics import score
from edgeml.records import append, complete
from edgeml.session import open as open_session

Answers = dict[str, NDArray[np.float32]]


@click.command("diff")
@click.argument("reference", type=click.Path())
@click.argument("bundle", type=click.Path())
@click.option(
    "--data", required=True, type=click.Path(), help="DOMAIN/TASK/{train,validation,...}.jsonl.gz with a task.json, or one task's."
)
@click.option("--split", default="validation", show_default=True, type=click.Choice(SPLITS), help="The rows to answer.")
@click.option("--tasks", help="Only these, separated by commas: TASK, or DOMAIN/TASK.")
@click.option("--limit", type=click.IntRange(min=1), default=64, show_default=True, help="At most this many rows a task, the first ones.")
@click.option("--threads", type=int, help="Threads to compute with (default: EDGEML_THREADS, or all processors).")
@records_option
@quiet_option
@json_option
def command(
    reference: str,
    bundle: str,
    data: str,
    split: str,
    tasks: str | None,
    limit: int,
    threads: int | None,
    records_file: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Which part of BUNDLE lost the quality of REFERENCE: embeddings, routers, each site's experts, dense layers, heads.

    Both are exports of one model, stored in different ways. Each part is put into the reference, to see how far the answers move, and
    restored in the bundle, to see what score comes back. The mixtures are written to a temporary folder, one at a time.

    Example: edgeml diff full.edgeml small.edgeml --data data/text --limit 200
    """
    names = None if tasks is None else [name.strip() for name in tasks.split(",")]
    with Bundle.open(reference) as first, Bundle.open(bundle) as second, tempfile.TemporaryDirectory(prefix="edgeml-diff-") as folder:
        manifest = load_manifest(second)
        differing = check_alike(first, second, load_manifest(first), manifest)
        matched, _ = match_tasks(find_tasks(Path(data), names), manifest, bundle)
        rows = {task.name: read_labelled(task, split, limit)[0] for task in matched}
        found = parts(manifest, second.pages, differing)
        with progress((2 + 2 * len(found)) * sum(map(len, rows.values())), "comparing", quiet) as tick:
            whole, _ = _answer(reference, matched, rows, threads, tick)
            lossy, settings = _answer(bundle, matched, rows, threads, tick)
            told = []
            for part in found:
                mixture = write_mixture(Path(folder, "mixture.edgeml"), first, second, part.pages)
                damaged, _ = _answer(str(mixture), matched, rows, threads, tick)
                mixture = write_mixture(mixture, second, first, part.pages)
                restored, _ = _answer(str(mixture), matched, rows, threads, tick)
                mixture.unlink()
                told.append(
                    {
                        "name": part.name,
                        "kind": part.kind,
                        "pages": len(part.pages),
                        "bytes": sum(second.pages[page].length for page in part.pages),
                        "reference_bytes": sum(first.pages[page].length for page in part.pages),
                        "error": relative_error(list(damaged.values()), list(whole.values())),
                        "gain": _mean(matched, rows, restored) - _mean(matched, rows, lossy),
                    }
                )
        document = {
            "reference_bundle_id": first.id,
            "split": split,
            "rows": sum(map(len, rows.values())),
            "tasks": list(rows),
            "score": _mean(matched, rows, lossy),
            "reference_score": _mean(matched, rows, whole),
            "error": relative_error(list(lossy.values()), list(whole.values())),
            "parts": told,
        }
    if records_file is not None:
        append(records_file, complete("diff", settings, diff=document))
    click.echo(json.dumps(document, allow_nan=False) if as_json else "\n".join(_table(document)))


def _answer(
    path: str, tasks: Sequence[TaskData], rows: Mapping[str, list[Row]], threads: int | None, tick: Callable[[int], None]
) -> tuple[Answers, dict[str, Any]]:
    """Every task's scores (n, labels), with everything in memory."""
    found: Answers = {}
    with open_session(path, memory="100%", threads=threads) as session:
        for task in tasks:
            asked = rows[task.name]
            if task.pair:
                result = session.run(task.name, pairs=[(row.text, row.pair or "") for row in asked])
            else:
                result = session.run(task.name, texts=[row.text for row in asked])
            assert result.scores is not None  # `match_tasks` lets only classifications through
            found[task.name] = result.scores
            tick(len(asked))
        return found, session.settings()


def _mean(tasks: Sequence[TaskData], rows: Mapping[str, list[Row]], answers: Answers) -> float:
    """Mean score over the tasks."""
    labels = {name: np.array([row.label for row in asked], np.int64) for name, asked in rows.items()}
    scores = [score(task.metric, labels[task.name], answers[task.name].argmax(-1)) for task in tasks]
    return float(np.mean(scores))


def _table(document: dict[str, Any]) -> Iterator[str]:
    lost = 100 * (document["score"] - document["reference_score"])
    yield f"{document['rows']} rows of {len(document['tasks'])} tasks ({document['split']}): answers are {document['error']:.2%} off"
    yield f"mean score {100 * document['score']:.2f}, the reference {100 * document['reference_score']:.2f} ({lost:+.2f} points)"
    if not document["parts"]:
        yield "no page differs: the two have the same weights and graphs"
        return
    width = max(len("part"), *(len(printable(part["name"])) for part in document["parts"]))
    yield ""
    yield f"{'part':<{width}}  {'KiB':>8}  {'was KiB':>8}  {'error':>7}  gain, points"
    for part in sorted(document["parts"], key=lambda part: -part["error"]):
        sizes = f"{part['bytes'] / 1024:>8.0f}  {part['reference_bytes'] / 1024:>8.0f}"
        yield f"{printable(part['name']):<{width}}  {sizes}  {part['error']:>7.2%}  {100 * part['gain']:>+12.2f}"
    yield ""
    yield "error: how far answers move when this part alone is taken from the bundle; gain: what restoring it alone brings"
