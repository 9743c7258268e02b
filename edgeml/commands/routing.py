"""`edgeml routing`: how predictable a mixture's choices are, what a cache makes of that, and what to do about it here."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from edgeml.bundle import Bundle
from edgeml.bundle_writer import write_file
from edgeml.commands._options import bundle_argument, json_option, notes, printable, progress, quiet_option, records_option
from edgeml.commands._routing_plot import plot
from edgeml.data import SPLITS, TaskData, find_tasks
from edgeml.disk import ReadRate, read_rate
from edgeml.errors import DataError, UsageError
from edgeml.evaluate import match_tasks
from edgeml.manifest import Manifest, load_manifest
from edgeml.measure import Timing, record
from edgeml.records import append, complete
from edgeml.replay import Trace
from edgeml.routing import Storage, advise, document
from edgeml.session import RESIDENCIES, Session
from edgeml.session import open as open_session

TEXTS = 160


@click.command("routing")
@bundle_argument
@click.option(
    "--data", required=True, type=click.Path(), help="DOMAIN/TASK/{train,test,...}.jsonl.gz with a task.json, or one task's folder."
)
@click.option("--split", default="test", show_default=True, type=click.Choice(SPLITS), help="The rows to follow.")
@click.option("--tasks", help="Only these, separated by commas: TASK, or DOMAIN/TASK.")
@click.option("--limit", type=click.IntRange(min=1), help=f"At most this many rows a task, the first ones (default: about {TEXTS} in all).")
@click.option("--memory", help="Memory for weights while following: 64MiB, 50%, auto. With --residency masked it changes the choices.")
@click.option(
    "--residency", default="exact", show_default=True, type=click.Choice(RESIDENCIES), help="Follow all experts, or the resident."
)
@click.option("--threads", type=int, help="Threads to compute with (default: EDGEML_THREADS, or all processors).")
@click.option("--plot", "picture", type=click.Path(), metavar="FILE.svg", help="Also draw hit rate against capacity.")
@records_option
@quiet_option
@json_option
def command(
    bundle: str,
    data: str,
    split: str,
    tasks: str | None,
    limit: int | None,
    memory: str | None,
    residency: str,
    threads: int | None,
    picture: str | None,
    records_file: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Locality of the experts that tokens choose, hit rate against capacity, and advice with this disk's speed in it.

    Example: edgeml routing model.edgeml --data data/text --plot routing.svg
    """
    names = None if tasks is None else [name.strip() for name in tasks.split(",")]
    with Bundle.open(bundle) as opened:
        manifest = load_manifest(opened)
        if not manifest.sites:
            raise UsageError(f"{bundle} has no place where experts are chosen, so there is no routing to look at")
        matched, skipped = match_tasks(find_tasks(Path(data), names), manifest, bundle)
    limit = limit or max(8, -(-TEXTS // len(matched)))
    with open_session(bundle, memory=memory, threads=threads, residency=residency) as session:
        notes(session.notes, quiet)
        traces, compute_s = _follow(session, matched, split, limit, quiet)
        rate, settings = _read_rate(session), session.settings()
    experts, top_k = [len(site.experts) for site in manifest.sites], [site.top_k for site in manifest.sites]
    with progress(2 * len(experts), "replaying", quiet) as tick:
        figures = document(traces, [site.name for site in manifest.sites], experts, top_k, tick)
    storage = Storage(rate.bytes_per_s, _expert_bytes(session), compute_s)
    figures |= advise(figures, experts, top_k, storage)
    figures |= {"disk": rate.as_json(), "expert_bytes": storage.expert_bytes, "tasks": [task.name for task in matched], "skipped": skipped}
    settings |= {"split": split, "limit": limit, "tasks": tasks}
    if records_file is not None:
        append(records_file, complete("routing", settings, routing=dict(figures)))
    figures["record"] = record(Timing(), settings, "routing")
    if picture is not None:
        title = f"{session.bundle.path.name}: how often an expert is in memory"
        note = f"{figures['tokens']} tokens of {figures['texts']} texts, all sites sharing one cache, warm"
        write_file(Path(picture), [plot(figures["hit_rate"], title, note).encode("utf-8")])
    click.echo(json.dumps(figures, allow_nan=False) if as_json else "\n".join(_lines(figures, rate)))


def _follow(session: Session, tasks: Sequence[TaskData], split: str, limit: int, quiet: bool) -> tuple[list[Trace], float]:
    """The traces of all texts in the order of the data, and seconds of computing a token."""
    rows = {task.name: task.rows(split, limit) for task in tasks}
    traces: list[Trace] = []
    seconds = 0.0
    with progress(sum(map(len, rows.values())), "following", quiet) as tick:
        for task in tasks:
            asked = rows[task.name]
            session.load(task.name)
            started = time.perf_counter()
            if task.pair:
                traces += session.trace(task.name, pairs=[(row.text, row.pair or "") for row in asked])
            else:
                traces += session.trace(task.name, texts=[row.text for row in asked])
            seconds += time.perf_counter() - started
            tick(len(asked))
    tokens = sum(map(len, traces))
    if not tokens:
        raise DataError(f"the split '{split}' has no rows to follow")
    return traces, seconds / tokens


def _routed_pages(manifest: Manifest) -> list[int]:
    return sorted({expert.page for site in manifest.sites for expert in site.experts})


def _read_rate(session: Session) -> ReadRate:
    pages = [session.bundle.pages[page] for page in _routed_pages(session.manifest)]
    return read_rate(session.bundle.fd, [(page.offset, page.length) for page in pages], str(session.bundle.path))


def _expert_bytes(session: Session) -> float:
    """Bytes of a routed page for each routed expert, their mean."""
    stored = sum(session.bundle.pages[page].length for page in _routed_pages(session.manifest))
    return stored / sum(len(site.experts) for site in session.manifest.sites)


def _lines(figures: dict[str, Any], rate: ReadRate) -> Iterator[str]:
    """The document for people."""
    yield f"{figures['tokens']} tokens of {figures['texts']} texts, {len(figures['sites'])} sites"
    yield ""
    yield "segment  " + "  ".join(f"{m:>22}" for m in figures["srp"])
    yield "SRP      " + "  ".join(f"{_interval(value):>22}" for value in figures["srp"].values())
    yield "chance   " + "  ".join(f"{'-' if value is None else f'{value:.3f}':>22}" for value in figures["srp_null"].values())
    width = max(len(printable(site["name"])) for site in figures["sites"])
    yield ""
    yield f"{'SRP(16) by site':<{max(width, 15)}}  of it by chance"
    for site in figures["sites"]:
        chance = site["srp_null"]["16"]
        yield f"{printable(site['name']):<{max(width, 15)}}  {_interval(site['srp']['16'])}  {'-' if chance is None else f'{chance:.3f}'}"
    for key, title in (("hit_rate", "warm: the texts are one stream"), ("hit_rate_cold", "cold: each text begins with an empty cache")):
        yield ""
        yield from _curves(figures[key], title)
    yield ""
    past = "past the system's cache" if rate.direct else "through the system's cache"
    yield f"read {rate.reads} pages in {rate.duration_s:.2f} s, {past}: {rate.bytes_per_s / (1 << 20):.0f} MiB/s"
    yield figures["advice"]


def _curves(curves: dict[str, Any], title: str) -> Iterator[str]:
    yield f"hit rate in %, all sites sharing one cache; {title}"
    yield "capacity  " + "  ".join(f"{name:>12}" for name in curves)
    for number, (ratio, _) in enumerate(next(iter(curves.values()))):
        yield f"{ratio:>7.2f}x  " + "  ".join(f"{100 * curve[number][1]:>12.1f}" for curve in curves.values())


def _interval(value: dict[str, Any] | None) -> str:
    if value is None:
        return "texts too short"
    between = "" if value["low"] is None else f" ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value['value']:.3f}{between}"
