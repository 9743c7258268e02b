"""The section about a diff: which stage, site or layer lost the quality, and how the error grows along a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeml_report import plots
from edgeml_report.content import Block, Cell, Column, Plot, Section, Table
from edgeml_report.diff_print import grown, states
from edgeml_report.runs import Record, documents, figure, items, mapping, text
from edgeml_report.text import NBSP, UNMEASURED, clean, interval, percent, points

__all__ = ["lost"]

NONE = "\u2013"
#: Fewer places than this make no line.
FEWEST = 3


def lost(records: Sequence[Record]) -> Section | None:
    """Which part lost the quality; None where nobody asked."""
    blocks: list[Block] = []
    for number, (record, document) in enumerate(documents(records, "diff")):
        parts = [part for part in map(mapping, items(document, "parts")) if part]
        if parts:
            blocks += _differences(f"lost-{number + 1}", record, document, parts)
    lead = (
        "Each part is restored in turn, everything else stays as it is stored. Errors are relative: alone, of what a part makes of the "
        "reference's inputs; so far, of what it makes in the bundle; left, of the logits once it is restored."
    )
    return Section("lost", "Which part lost it", lead, blocks) if blocks else None


def _differences(name: str, record: Record, document: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> list[Block]:
    """One diff: what it found in a sentence, and its parts in the order in which a request meets them."""
    found = clean(text(record, "bundle") or "the bundle")
    sides = [(found, text(record, "variant")), (text(document, "reference_bundle") or "the reference", text(document, "reference_variant"))]
    ours, theirs = (clean(one) if variant is None else f"{clean(one)}, {clean(variant)}" for one, variant in sides)
    rows = [
        [
            Cell(clean(text(part, "name") or "unnamed"), _state(part)),
            Cell("same" if part.get("same") is True else _share(part, "alone_error")),
            Cell(_share(part, "error")),
            Cell(NONE if part.get("same") is True else _share(part, "restored_error")),
            Cell(NONE) if part.get("same") is True else _gained(part),
        ]
        for part in parts
    ]
    said = [f"{ours} against {theirs}: the logits are {_share(document, 'error')} off."]
    worst = next((part for part in parts if part.get("name") == document.get("worst")), None)
    if worst is not None:
        left, gain = _share(worst, "restored_error"), figure(worst, "gain.value")
        gained = f" and gains {points(gain)}" if gain is not None else ""
        said.append(f"Most is lost in {clean(worst['name'])}: restored alone, it leaves {left}{gained}.")
    said += [f"{clean(why, 400).capitalize()}." for why in (text(document, "why"),) if why]
    heads = ("part", "alone", "so far", "left when restored", "gained when restored")
    table = Table(f"{ours} against {theirs}, part by part", [Column(head, head != "part") for head in heads], rows)
    return [" ".join(said), *_grown(name, parts, ours), table]


def _gained(part: Mapping[str, Any]) -> Cell:
    gain = mapping(part, "gain")
    return Cell(points(figure(gain, "value")), interval(gain, points) if gain else "")


def _state(part: Mapping[str, Any]) -> str:
    same = figure(part, "same_choices")
    told = [f"the state is {_share(part, 'state_error')} off"] if figure(part, "state_error") is not None else []
    return ", ".join(told + ([f"{percent(same)} of the choices are the same"] if same is not None else []))


def _share(found: Mapping[str, Any], key: str) -> str:
    """An error in %, with the two decimals that tell parts apart."""
    value = figure(found, key)
    return UNMEASURED if value is None else f"{100 * value:.2f}{NBSP}%"


def _grown(name: str, parts: Sequence[Mapping[str, Any]], title: str) -> list[Plot]:
    """The error along a request: of the state that goes on, or of the layers of the first stage."""
    chain, key = [part for part in states(parts) if figure(part, "state_error") is not None], "state_error"
    if len(chain) < FEWEST:
        first = next((part.get("within") for part in parts if text(part, "within")), None)
        layers = [part for part in parts if first is not None and part.get("within") == first]
        chain, key = [part for part in layers if figure(part, "error") is not None], "error"
    if len(chain) < FEWEST:
        return []
    names, most = [clean(text(part, "name") or "unnamed") for part in chain], grown(chain, key)
    alt = f"The error of {title} along a request: {_share(chain[0], key)} after {names[0]}, {_share(chain[-1], key)} after {names[-1]}."
    alt += f" It grows most at {clean(most[1].get('name'))}." if most is not None else ""
    errors, alone = ([100 * (figure(part, which) or 0.0) for part in chain] for which in (key, "alone_error"))
    return [Plot(f"{name}-grown", f"Error along a request, {title}", alt, plots.trail(names, errors, alone), height=260)]
