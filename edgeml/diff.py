"""Which part of a bundle lost the quality: the parts of two bundles that differ in their weights, and bundles put together from both.

Two bundles of one architecture have the same pages in the same order, stored in other ways: f32 here, int4 there. A part is a set
of pages: the embeddings, the routers, each site's experts, the dense layers, the graphs of trunk and heads. For each part two mixtures
of both are made, and are bundles like any other:

    error   the reference with this part alone taken from the bundle: how far its answers are from the reference's own, as
            |p - p_ref| / |p_ref| over all scores of all rows (Euclidean norm)
    gain    the bundle with this part alone taken from the reference: its mean score less the bundle's

Errors say where the damage is done, gains what undoing it would bring; they add up only as far as parts do not correct each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.bundle import Bundle
from edgeml.bundle_writer import PageSource, write_bundle
from edgeml.errors import DataError
from edgeml.layout import Page, PageKind
from edgeml.manifest import ImageStages, Manifest, TaskStages

__all__ = ["Part", "check_alike", "parts", "relative_error", "write_mixture"]


@dataclass(frozen=True)
class Part:
    """Pages that are taken together. `kind`: embedding, router, experts, dense, trunk or head."""

    name: str
    kind: str
    pages: frozenset[int]


def parts(manifest: Manifest, pages: Sequence[Page], differing: frozenset[int]) -> list[Part]:
    """The parts that have pages in `differing`, in the order in which a request meets them. Every such page is in exactly one."""
    stages = {stage.name: stage.page for stage in manifest.stages}
    ways = [task.stages for task in manifest.tasks if isinstance(task.stages, TaskStages)]
    found: list[Part] = []
    taken: set[int] = set()

    def add(name: str, kind: str, wanted: set[int]) -> None:
        own = frozenset(wanted & differing) - taken
        if own:
            found.append(Part(name, kind, own))
            taken.update(own)

    rows = {page.id for page in pages if page.kind == PageKind.ROWS}
    add("embeddings", "embedding", rows | {stages[way.embed] for way in ways})
    routers = {stages[way.router] for way in ways if way.router is not None}
    add("routers", "router", routers | ({stages[manifest.router.stage]} if manifest.router is not None else set()))
    for site in manifest.sites:
        add(f"experts of {site.name}", "experts", {expert.page for expert in (*site.experts, *site.shared)})
    add("dense layers", "dense", {page.id for page in pages if page.kind == PageKind.LINEAR})
    add("trunk", "trunk", {stages[name] for way in ways for name in (way.trunk,)})
    for task in manifest.tasks:
        if isinstance(task.stages, TaskStages):
            add(f"head of {task.name}", "head", {stages[task.stages.head]})
    add("the rest", "trunk", {page.id for page in pages})
    return found


def check_alike(reference: Bundle, bundle: Bundle, first: Manifest, second: Manifest) -> frozenset[int]:
    """The pages that differ. Raises `DataError` naming the first thing that keeps the two from being mixed."""
    pair = f"{reference.path} and {bundle.path}"
    if any(isinstance(task.stages, ImageStages) for task in (*first.tasks, *second.tasks)):
        raise DataError(f"{pair}: diff is for bundles on texts; compare networks for images with edgeml eval --also NAME=BUNDLE")
    if [(task.name, task.labels, task.stages) for task in first.tasks] != [(task.name, task.labels, task.stages) for task in second.tasks]:
        raise DataError(f"{pair} answer other tasks, or by other stages: diff takes two bundles of one model")
    if first.stages != second.stages or first.sites != second.sites:
        raise DataError(f"{pair} have other stages or sites of experts: diff takes two bundles of one model")
    if len(reference.pages) != len(bundle.pages):
        raise DataError(f"{pair} have {len(reference.pages)} and {len(bundle.pages)} pages: diff takes two bundles of one model")
    for one, two in zip(reference.pages, bundle.pages, strict=True):
        shapes = [[(matrix.rows, matrix.cols) for matrix in page.matrices] for page in (one, two)]
        if (one.kind, one.count, one.activation) != (two.kind, two.count, two.activation) or shapes[0] != shapes[1]:
            raise DataError(f"{pair}: page {one.id} is of another kind or shape: diff takes two bundles of one model")
    return frozenset(one.id for one, two in zip(reference.pages, bundle.pages, strict=True) if one.sha256 != two.sha256)


def write_mixture(path: str | os.PathLike[str], base: Bundle, donor: Bundle, taken: frozenset[int]) -> Path:
    """Write `base` with the pages `taken` of `donor`. Raises as `write_bundle`."""
    sources = [_source(donor if page.id in taken else base, page.id) for page in base.pages]
    write_bundle(path, sources, {key: value for key, value in base.manifest.items() if key != "evidence"})
    return Path(path)


def relative_error(answers: Sequence[NDArray[Any]], reference: Sequence[NDArray[Any]]) -> float:
    """|a - r| / |r| over all arrays together; 0 of equal ones."""
    off = sum(float(np.square(one.astype(np.float64) - two).sum()) for one, two in zip(answers, reference, strict=True))
    size = sum(float(np.square(two.astype(np.float64)).sum()) for two in reference)
    return float(np.sqrt(off / size)) if size else float(off > 0)


def _source(bundle: Bundle, number: int) -> PageSource:
    page = bundle.pages[number]

    def read() -> Iterator[bytes]:
        yield bundle.read(number)

    return PageSource(page.kind, read, page.matrices, page.activation, max(page.count, 1))
