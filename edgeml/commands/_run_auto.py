"""The part of `edgeml run` that answers texts whose task nobody named: the bundle's router finds the group."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import click

from edgeml.autoroute import Routed
from edgeml.commands._answers import answer_line, answers_of
from edgeml.commands._inputs import any_rows
from edgeml.commands._options import notes
from edgeml.data import Row
from edgeml.manifest import Manifest
from edgeml.measure import Timing, record
from edgeml.session import Session
from edgeml.session import open as open_session

#: Rows answered at a time: enough to batch by length, few enough that the first answers come soon.
CHUNK_ROWS = 128


def answer_auto(
    bundle: str,
    manifest: Manifest,
    texts: Sequence[str],
    text_pairs: Sequence[str],
    source: str | None,
    settings: dict[str, Any],
    quiet: bool,
    as_json: bool,
) -> None:
    """Route and answer every row; an input has an answer from each task of its group that takes its form."""
    rows, first = any_rows(texts, text_pairs, source), 0
    answers: list[dict[str, Any]] = []
    timing, truncated = Timing(), 0
    with open_session(bundle, **settings) as session:
        notes(session.notes, quiet)
        while chunk := list(islice(rows, CHUNK_ROWS)):
            by_input: dict[int, list[dict[str, Any]]] = {}
            for places, routed in _by_form(session, chunk):
                timing.warm.add(routed.latency_s, routed.counters)
                timing.warm.latency_s[-1:] = routed.row_s
                truncated += sum(routed.truncated)
                for row, answer in _answers(manifest, routed):
                    by_input.setdefault(places[row], []).append({"input": first + places[row], **answer})
            for _, given in sorted(by_input.items()):
                answers += given if as_json else []
                for answer in () if as_json else given:
                    click.echo(f"{answer['group']}\t{answer_line(answer)}")
            first += len(chunk)
        if as_json:
            click.echo(json.dumps({"results": answers, "record": record(timing, session.settings())}, allow_nan=False))
    if truncated:
        notes([f"{truncated} inputs were longer than the tasks read and were cut"], quiet)


def _by_form(session: Session, chunk: Sequence[Row]) -> Iterator[tuple[list[int], Routed]]:
    """Single texts, then pairs, each with the places of its rows in the chunk."""
    single = [place for place, row in enumerate(chunk) if row.pair is None]
    paired = [place for place, row in enumerate(chunk) if row.pair is not None]
    if single:
        yield single, session.run_auto(texts=[chunk[place].text for place in single])
    if paired:
        yield paired, session.run_auto(pairs=[(chunk[place].text, chunk[place].pair or "") for place in paired])


def _answers(manifest: Manifest, routed: Routed) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row and answer, task by task; an answer's group comes with the group's probability."""
    tasks = {task.name: task for task in manifest.tasks}
    assert manifest.router is not None
    place = {group.name: number for number, group in enumerate(manifest.router.groups)}
    for name, result in routed.results.items():
        for row, answer in zip(routed.rows[name], answers_of(tasks[name], result), strict=True):
            group = routed.groups[row]
            yield row, {"group": group, "group_score": float(routed.scores[row, place[group]]), **answer}
