"""What two bundles are made of, part by part in the order in which a request meets them, and how to take or restore a part alone.

A part that is the `same` in both bundles has nothing to restore, yet what it makes of a wrong input is worth knowing.

    alone     what the bundle's part makes of the reference's inputs
    restored  the bundle with this part of the reference: other graphs (`models`), other pages of weights (`pages`), or both
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from edgeml.errors import DataError
from edgeml.manifest import KINDS, ImageStages, Preprocess, Task
from edgeml_report.diff_graph import Graph, logits
from edgeml_report.diff_run import Opened, Tensors, roles

__all__ = ["ONE_MODEL", "Alone", "Keys", "Pair", "Part", "answer_places", "paired", "shared"]

ONE_MODEL = "diff compares two bundles of one model"
#: A tensor in the bundle, and the same in the reference.
Keys = tuple[str, str]
#: From a task and the reference's tensors to what the bundle's part makes of them, in the order of its places.
Alone = Callable[[str, Tensors], Sequence[NDArray[Any]]]


@dataclass(frozen=True)
class Part:
    """`places`: by task the tensors that the part makes; `tokens`: they have an axis of tokens, padding among them.

    `kind`: embedding, router, dense, experts, trunk, head, backbone or layer; a layer is `within` a stage. `tasks` depend on it.
    `state`: the sum that takes up what it makes; `choices`: the experts that were chosen. `bytes` in the bundle and in the reference.
    `models` and `pages` are what restores it: by the bundle's stage the reference's model, and numbers of pages.
    """

    name: str
    kind: str
    tasks: tuple[str, ...]
    places: Mapping[str, Sequence[Keys]]
    alone: Alone | None = None
    tokens: bool = False
    state: Keys | None = None
    choices: Keys | None = None
    within: str | None = None
    pages: frozenset[int] = frozenset()
    models: Mapping[str, bytes] = field(default_factory=dict)
    bytes: tuple[int, int] | None = None
    same: bool = False

    @property
    def restorable(self) -> bool:
        """Whether there is anything to restore, and it can be."""
        return bool(self.pages or self.models)


@dataclass
class Pair:
    """Two bundles taken apart: `told` are the inner tensors that bundle and reference have to tell, by stage, and `why` says in a
    sentence each what cannot be restored."""

    bundle: Opened
    reference: Opened
    tasks: Sequence[str]
    told: tuple[dict[str, list[str]], dict[str, list[str]]] = field(default_factory=lambda: ({}, {}))
    why: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """Both, for messages."""
        return f"{self.reference.bundle.path} and {self.bundle.bundle.path}"

    @property
    def on_images(self) -> bool:
        """Whether the tasks take images."""
        return isinstance(self.bundle.task(self.tasks[0]).stages, ImageStages)

    def graphs(self, stages: Keys) -> tuple[Graph, Graph]:
        """The graphs of a stage of the bundle and one of the reference."""
        both = zip((self.bundle, self.reference), stages, strict=True)
        own, other = (Graph.parse(one.graph(name), f"{one.bundle.path}: stage '{name}'") for one, name in both)
        return own, other

    def models(self, stages: Keys) -> dict[str, bytes]:
        """The reference's model for the bundle's stage, where they differ."""
        own, other = self.bundle.graph(stages[0]), self.reference.graph(stages[1])
        return {} if own == other else {stages[0]: other}

    def sizes(self, stages: Keys) -> tuple[int, int]:
        """Bytes of both models."""
        return len(self.bundle.graph(stages[0])), len(self.reference.graph(stages[1]))

    def tell(self, side: int, stage: str, graph: Graph, name: str, role: str) -> str:
        """Have a stage tell a tensor; returns what it is called among a request's tensors."""
        if name in graph.inputs:
            return name
        told = self.told[side].setdefault(stage, [])
        if name not in told:
            told.append(name)
        return f"{role}/{name}"


def paired(bundle: Opened, reference: Opened) -> Pair:
    """The tasks that both answer. Raises `DataError` naming the first thing that makes the two bundles of different models."""
    ours, theirs = ({task.name: task for task in one.manifest.tasks} for one in (bundle, reference))
    names = [name for name in ours if name in theirs]
    pair = Pair(bundle, reference, names)
    if not names:
        raise DataError(f"{pair.where} have no task in common: {ONE_MODEL}")
    for name in names:
        for key in ("kind", "pair", "labels", "void"):
            if getattr(ours[name], key) != getattr(theirs[name], key):
                raise DataError(f"{pair.where}: task '{name}' differs in its {key}: {ONE_MODEL}")
        if list(roles(ours[name])) != list(roles(theirs[name])):
            raise DataError(f"{pair.where}: task '{name}' runs other stages in the two: {ONE_MODEL}")
        if _inputs(bundle, ours[name]) != _inputs(reference, theirs[name]):
            raise DataError(f"{pair.where}: task '{name}' prepares its inputs otherwise in the two: {ONE_MODEL}")
    return pair


def _inputs(opened: Opened, task: Task) -> Any:
    prepare = task.preprocess
    if isinstance(prepare, Preprocess):
        return opened.bundle.pages[prepare.tokenizer].sha256, prepare.max_tokens
    return prepare


def shared(pair: Pair, role: str) -> dict[Keys, tuple[str, ...]]:
    """The stages of a role, of bundle and reference, and the tasks that run them."""
    found: dict[Keys, tuple[str, ...]] = {}
    for name in pair.tasks:
        own, other = (roles(one.task(name)).get(role) for one in (pair.bundle, pair.reference))
        if own is not None and other is not None:
            found[own, other] = (*found.get((own, other), ()), name)
    return found


def answer_places(pair: Pair, stages: Keys, task: str) -> list[Keys]:
    """What a head makes: its logits, or its answer where it has none."""
    answer = KINDS[pair.bundle.task(task).kind][0]
    names = []
    for side, (stage, graph) in enumerate(zip(stages, pair.graphs(stages), strict=True)):
        inner = logits(graph, answer)
        names.append(answer if inner == answer else pair.tell(side, stage, graph, inner, "head"))
    return [(names[0], names[1])]
