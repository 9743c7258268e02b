"""Stages of a bundle run one at a time, with graphs changed and inner tensors told, and errors summed over what they make.

A session answers; `diff` has to look inside, and to give a stage what another bundle's stage made. So it runs the stages itself, from
the same parts as a session does: the native context, the graphs, the tokenizer. Everything is in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeml import native
from edgeml.bundle import Bundle
from edgeml.bundle_writer import PageSource, write_bundle
from edgeml.graph import Graphs
from edgeml.manifest import ImageStages, Manifest, Stage, Task, load_manifest
from edgeml.router import checked_bias, mask_of
from edgeml.store import open_context, resolve_threads
from edgeml.variants import Wish, choose_variant, with_variant
from edgeml_report.diff_graph import Graph

__all__ = ["Errors", "Machine", "Opened", "Tensors", "forward", "roles", "write_mixture"]

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Opened:
    """A bundle, the manifest of the variant in use, and what runs it."""

    bundle: Bundle
    manifest: Manifest
    variant: str | None
    context: native.Context
    threads: int

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, variant: str | None, threads: int | None) -> Iterator[Opened]:
        """Raises as `edgeml.open`."""
        count = resolve_threads(threads)
        with ExitStack() as stack:
            bundle = stack.enter_context(Bundle.open(path))
            manifest = load_manifest(bundle)
            chosen = choose_variant(manifest, Wish(variant), str(path))
            context, _, _ = open_context(bundle, "100%", count)
            stack.callback(context.close)
            yield cls(bundle, with_variant(manifest, chosen), None if chosen is None else chosen.name, context, count)

    def stage(self, name: str) -> Stage:
        """A stage by its name."""
        return next(stage for stage in self.manifest.stages if stage.name == name)

    def task(self, name: str) -> Task:
        """A task by its name."""
        return next(task for task in self.manifest.tasks if task.name == name)

    def graph(self, name: str) -> bytes:
        """A stage's model."""
        return self.bundle.read(self.stage(name).page)


class _View:
    """A bundle some of whose pages are others."""

    def __init__(self, bundle: Bundle, pages: Mapping[int, bytes]) -> None:
        self._bundle, self._pages, self.path = bundle, pages, bundle.path

    def read(self, page: int) -> bytes:
        """A page's bytes."""
        return self._pages[page] if page in self._pages else self._bundle.read(page)


class Machine:
    """The stages of an open bundle, of which some are `changed` (by name: the model), tell more (`told`), or are new (`own`).

    A new stage is (model, inputs, outputs). Close it before the bundle.
    """

    def __init__(
        self,
        opened: Opened,
        changed: Mapping[str, bytes] | None = None,
        told: Mapping[str, Sequence[str]] | None = None,
        own: Mapping[str, tuple[bytes, Sequence[str], Sequence[str]]] | None = None,
    ) -> None:
        self.opened, self._told = opened, told or {}
        pages = {opened.stage(name).page: model for name, model in (changed or {}).items()}
        for name, names in self._told.items():
            page = opened.stage(name).page
            model = pages[page] if page in pages else opened.bundle.read(page)
            pages[page] = Graph.parse(model, f"{opened.bundle.path}: stage '{name}'").encode(names)
        stages = [
            replace(stage, outputs=tuple(dict.fromkeys((*stage.outputs, *self._told.get(stage.name, ())))))
            for stage in opened.manifest.stages
        ]
        for number, (name, (model, inputs, outputs)) in enumerate((own or {}).items(), len(opened.bundle.pages)):
            pages[number] = model
            stages.append(Stage(name, number, tuple(inputs), tuple(outputs)))
        view = cast(Bundle, _View(opened.bundle, pages))
        self.graphs = Graphs(view, replace(opened.manifest, stages=tuple(stages)), opened.context, opened.threads)

    def run(self, stage: str, tensors: Mapping[str, NDArray[Any]], role: str = "") -> Tensors:
        """A stage's outputs; what it tells besides is called `role/NAME`. Raises as a session."""
        with self.opened.context.request() as request:
            made = self.graphs.run(stage, tensors, request)
        told = self._told.get(stage, ())
        declared = next((one.outputs for one in self.opened.manifest.stages if one.name == stage), tuple(made))
        return {name: value for name, value in made.items() if name in declared} | {f"{role}/{name}": made[name] for name in told}

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.graphs.close()


def forward(machine: Machine, tasks: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> dict[str, Tensors]:
    """All tensors of each task's request on `inputs`; a stage that tasks share runs once."""
    made: dict[str, Tensors] = {}
    found: dict[str, Tensors] = {}
    for name in tasks:
        task, tensors = machine.opened.task(name), dict(inputs)
        for role, stage in roles(task).items():
            if role == "trunk":
                tensors["bias"] = _bias(machine.opened, task, tensors)
            if stage not in made:
                made[stage] = machine.run(stage, tensors, role)
            tensors |= made[stage]
        found[name] = tensors
    return found


def roles(task: Task) -> dict[str, str]:
    """What each of a task's stages is for, and its name, in the order they run."""
    if isinstance(task.stages, ImageStages):
        return {"backbone": task.stages.backbone, "head": task.stages.head}
    own = task.stages
    named = {"embed": own.embed, "router": own.router, "trunk": own.trunk, "head": own.head}
    return {role: stage for role, stage in named.items() if stage is not None}


def _bias(opened: Opened, task: Task, tensors: Tensors) -> NDArray[np.float32]:
    rows = len(tensors["ids"])
    bias = tensors.get("bias", np.zeros((rows, *mask_of(opened.manifest, ()).shape), np.float32))
    return checked_bias(opened.manifest, bias, rows, f"{opened.bundle.path}: the router of task '{task.name}'")


class Errors:
    """|a - r| / |r| (Euclidean) of places by name, summed over batches; None where the shapes differ or nothing came."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._broken: set[str] = set()
        self._same: dict[str, list[int]] = {}

    def add(self, name: str, value: NDArray[Any] | None, reference: NDArray[Any], mask: NDArray[Any] | None = None) -> None:
        """`mask` (B, T): of tensors (B, T, ...), only what is not padding counts. What is infinite, as forbidden experts, is left out."""
        if value is None or value.shape != reference.shape:
            self._broken.add(name)
            return
        if mask is not None and value.shape[:2] == mask.shape:
            value, reference = value[mask != 0], reference[mask != 0]
        if value.dtype.kind in "biu":
            same = self._same.setdefault(name, [0, 0])
            same[0] += int(np.count_nonzero((value[..., :, None] == reference[..., None, :]).any(-1)))
            same[1] += value.size
            return
        counted = np.isfinite(value) & np.isfinite(reference)
        ours, theirs = value[counted].astype(np.float64), reference[counted].astype(np.float64)
        sums = self._sums.setdefault(name, [0.0, 0.0])
        sums[0] += float(np.square(ours - theirs).sum())
        sums[1] += float(np.square(theirs).sum())

    def of(self, name: str) -> float | None:
        """The error of a place."""
        if name in self._broken or name not in self._sums:
            return None
        off, size = self._sums[name]
        return float(np.sqrt(off / size)) if size else float(off > 0)

    def same(self, name: str) -> float | None:
        """Of whole numbers: the share that is equal, whatever the order on the last axis."""
        right, of = self._same.get(name, [0, 0])
        return right / of if of and name not in self._broken else None


def write_mixture(path: Path, base: Bundle, donor: Bundle, taken: Collection[int]) -> Path:
    """Write `base` with the pages `taken` of `donor`. Raises as `write_bundle`."""
    sources = [_source(donor if page.id in taken else base, page.id) for page in base.pages]
    write_bundle(path, sources, {key: value for key, value in base.manifest.items() if key != "evidence"})
    return path


def _source(bundle: Bundle, number: int) -> PageSource:
    page = bundle.pages[number]
    return PageSource(page.kind, lambda: iter([bundle.read(number)]), page.matrices, page.activation, max(page.count, 1))
