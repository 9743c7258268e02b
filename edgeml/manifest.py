"""The manifest as typed, checked records: what stages, sites and tasks a bundle has, and which pages they use.

`load_manifest` checks everything once; whoever holds a `Manifest` need not ask again whether a page exists or a shape fits.
Stages exchange tensors by fixed names (B batch, T tokens, S sites, E experts of a site, d hidden, k experts per token):

    ids, types (B, T) int64 -> embed -> hidden0 (B, T, d) f32 -> router -> bias (B, S, E) f32, minus infinity: not this expert
    hidden0, mask (B, T) f32, bias -> trunk -> hidden (B, T, d) f32, and optionally ids_0 .. ids_{S-1} (B, T, k) int64, the choices
    hidden, mask -> head -> scores (B, labels) f32, probabilities; or vector (B, n) f32
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from edgeml.bundle import Bundle, Page, PageKind
from edgeml.errors import BundleError

__all__ = [
    "FORMAT",
    "ExpertRef",
    "Manifest",
    "Preprocess",
    "Site",
    "Stage",
    "Task",
    "TaskStages",
    "load_manifest",
    "parse_manifest",
]

FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
STAGE_INPUTS = frozenset({"ids", "types", "hidden0", "mask", "bias", "hidden"})
STAGE_OUTPUT = re.compile(r"hidden0|bias|hidden|scores|vector|ids_(0|[1-9][0-9]{0,5})")
MAX_TOKENS = 65536
REQUIRED = frozenset({"format", "producer", "stages", "sites", "tasks"})
OPTIONAL = frozenset({"model", "usage", "variants", "evidence", "provenance"})

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One ONNX graph, run as a unit. `page` holds it; `inputs` and `outputs` are tensor names."""

    name: str
    page: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ExpertRef:
    """Where an expert lies: the `sub`-th of page `page`."""

    page: int
    sub: int


@dataclass(frozen=True)
class Site:
    """A place where experts are chosen. `hidden` is the width of its input; `top_k` experts per token."""

    name: str
    hidden: int
    experts: tuple[ExpertRef, ...]
    shared: tuple[ExpertRef, ...]
    top_k: int
    scoring: str
    bias_mode: str
    renormalised: bool


@dataclass(frozen=True)
class TaskStages:
    """The stages a request of a task runs, by name; without a router the bias is zero."""

    embed: str
    router: str | None
    trunk: str
    head: str


@dataclass(frozen=True)
class Preprocess:
    """How an input becomes tensors; `tokenizer` is a page, `max_tokens` where a text is cut."""

    kind: str
    tokenizer: int
    max_tokens: int


@dataclass(frozen=True)
class Task:
    """A task the bundle answers. `chance` is the metric's value for always naming the commonest label, in [0, 1]."""

    name: str
    domain: str
    kind: str
    pair: bool
    labels: tuple[str, ...]
    metric: str | None
    chance: float | None
    stages: TaskStages
    preprocess: Preprocess


@dataclass(frozen=True)
class Manifest:
    """`usage[task][site][expert]` is the mean combine weight per token, 1 in sum per site. Free parts stay plain dictionaries."""

    producer: Mapping[str, Any]
    model: Mapping[str, Any]
    stages: tuple[Stage, ...]
    sites: tuple[Site, ...]
    tasks: tuple[Task, ...]
    usage: Mapping[str, tuple[tuple[float, ...], ...]]
    variants: tuple[Mapping[str, Any], ...]
    evidence: Mapping[str, Any]
    provenance: Mapping[str, Any]


def load_manifest(bundle: Bundle) -> Manifest:
    """The checked manifest of an open bundle. Raises `BundleError` naming the file and the place in the manifest."""
    try:
        return parse_manifest(bundle.manifest, bundle.pages)
    except BundleError as error:
        raise BundleError(f"{bundle.path}: {error}") from None


def parse_manifest(document: Mapping[str, Any], pages: Sequence[Page]) -> Manifest:
    """Check a decoded manifest against the pages it speaks of. Raises `BundleError` naming the place, such as `tasks[2].chance`."""
    root = _Reader(document, "manifest")
    unknown = sorted(set(document) - REQUIRED - OPTIONAL)
    if unknown:
        raise root.error(f"unknown key '{unknown[0]}'")
    version = root.integer("format", 1, 1 << 31)
    if version > FORMAT:
        raise root.error(f"format {version}, and this edgeml reads {FORMAT}; install a newer edgeml-runtime")
    producer = root.mapping("producer")
    for key in ("name", "version"):
        _Reader(producer, "manifest.producer").string(key)
    stages = tuple(_stage(item, pages) for item in root.items("stages"))
    sites = tuple(_site(item, pages) for item in root.items("sites"))
    tasks = tuple(_task(item, pages) for item in root.items("tasks"))
    for kind, named in (("stages", stages), ("sites", sites), ("tasks", tasks)):
        _unique([item.name for item in named], f"manifest.{kind}")
    _check_outputs(stages, len(sites))
    _check_routed_pages(sites)
    _check_tasks(stages, tasks)
    return Manifest(
        producer=producer,
        model=root.mapping("model", optional=True),
        stages=stages,
        sites=sites,
        tasks=tasks,
        usage=_usage(root.mapping("usage", optional=True), sites, tasks),
        variants=tuple(item.document for item in root.items("variants", optional=True)),
        evidence=root.mapping("evidence", optional=True),
        provenance=root.mapping("provenance", optional=True),
    )


class _Reader:
    """One JSON object and the place it has in the manifest; every accessor checks the type and names the place."""

    def __init__(self, document: Any, where: str) -> None:
        self.where = where
        if not isinstance(document, Mapping):
            raise self.error("expected an object")
        self.document: Mapping[str, Any] = document

    def error(self, problem: str) -> BundleError:
        return BundleError(f"{self.where}: {problem}")

    def value(self, key: str) -> Any:
        if key not in self.document:
            raise self.error(f"the key '{key}' is missing")
        return self.document[key]

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.value(key)
        if type(value) is not int or not low <= value <= high:
            raise self.error(f"'{key}' must be an integer from {low} to {high}, not {value!r:.40}")
        return value

    def string(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str):
            raise self.error(f"'{key}' must be a string")
        return value

    def name(self, key: str) -> str:
        value = self.string(key)
        if not NAME.fullmatch(value):
            raise self.error(f"'{key}' must have 1 to 64 letters, digits, dots, dashes or underscores, not {value!r:.80}")
        return value

    def choice(self, key: str, *choices: str) -> str:
        value = self.value(key)
        if value not in choices:
            raise self.error(f"'{key}' must be one of {', '.join(choices)}, not {value!r:.40}")
        return str(value)

    def boolean(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.error(f"'{key}' must be true or false")
        return value

    def array(self, key: str) -> list[Any]:
        value = self.value(key)
        if not isinstance(value, list):
            raise self.error(f"'{key}' must be a list")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        values = self.array(key)
        if not all(isinstance(value, str) for value in values):
            raise self.error(f"'{key}' must be a list of strings")
        _unique(values, f"{self.where}.{key}")
        return tuple(values)

    def items(self, key: str, optional: bool = False) -> list[_Reader]:
        if optional and key not in self.document:
            return []
        return [_Reader(item, f"{self.where}.{key}[{number}]") for number, item in enumerate(self.array(key))]

    def mapping(self, key: str, optional: bool = False) -> Mapping[str, Any]:
        if optional and key not in self.document:
            return {}
        return self.child(key).document

    def child(self, key: str) -> _Reader:
        return _Reader(self.value(key), f"{self.where}.{key}")

    def page(self, key: str, kind: PageKind, pages: Sequence[Page]) -> int:
        number = self.integer(key, 0, (1 << 31) - 1)
        if number >= len(pages) or pages[number].kind != kind:
            raise self.error(f"'{key}' names page {number}, which is no {kind.name.lower()} page of this bundle")
        return number

    def nullable(self, key: str, read: Callable[[str], T]) -> T | None:
        return None if self.value(key) is None else read(key)


def _stage(item: _Reader, pages: Sequence[Page]) -> Stage:
    stage = Stage(item.name("name"), item.page("page", PageKind.ONNX, pages), item.strings("inputs"), item.strings("outputs"))
    for name in stage.inputs:
        if name not in STAGE_INPUTS:
            raise item.error(f"unknown input {name!r:.40}; a stage reads {', '.join(sorted(STAGE_INPUTS))}")
    for name in stage.outputs:
        if not STAGE_OUTPUT.fullmatch(name):
            raise item.error(f"unknown output {name!r:.40}")
    if not stage.inputs or not stage.outputs:
        raise item.error("a stage has at least one input and one output")
    return stage


def _site(item: _Reader, pages: Sequence[Page]) -> Site:
    hidden = item.integer("hidden", 1, 1 << 24)
    site = Site(
        name=item.name("name"),
        hidden=hidden,
        experts=_experts(item, "experts", hidden, pages),
        shared=_experts(item, "shared", hidden, pages),
        top_k=item.integer("top_k", 1, 1 << 16),
        scoring=item.choice("scoring", "sigmoid", "softmax"),
        bias_mode=item.choice("bias_mode", "logits", "selection"),
        renormalised=item.boolean("renormalised"),
    )
    if site.top_k > len(site.experts):
        raise item.error(f"top_k is {site.top_k}, but there are {len(site.experts)} routed experts")
    return site


def _experts(item: _Reader, key: str, hidden: int, pages: Sequence[Page]) -> tuple[ExpertRef, ...]:
    refs: list[ExpertRef] = []
    for number, pair in enumerate(item.array(key)):
        where = f"{key}[{number}]"
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(part) is int for part in pair)):
            raise item.error(f"{where} must be [page, sub]")
        ref = ExpertRef(*pair)
        if not 0 <= ref.page < len(pages) or pages[ref.page].kind != PageKind.EXPERT:
            raise item.error(f"{where} names page {ref.page}, which is no expert page of this bundle")
        page = pages[ref.page]
        if not 0 <= ref.sub < page.count:
            raise item.error(f"{where} names expert {ref.sub} of page {ref.page}, which holds {page.count}")
        if page.matrices[0].cols != hidden:
            raise item.error(f"{where} takes {page.matrices[0].cols} inputs, the site has {hidden}")
        refs.append(ref)
    if len(set(refs)) != len(refs):
        raise item.error(f"'{key}' names an expert twice")
    return tuple(refs)


def _task(item: _Reader, pages: Sequence[Page]) -> Task:
    kind = item.choice("kind", "classification", "embedding")
    labels = item.strings("labels")
    if (kind == "classification") != bool(labels):
        raise item.error("a classification task has labels, an embedding task has none")
    stages, preprocess = item.child("stages"), item.child("preprocess")
    chance = item.nullable("chance", item.value)
    if chance is not None and (not _is_number(chance) or not 0 <= chance <= 1):
        raise item.error(f"'chance' must be null or a number from 0 to 1, not {chance!r:.40}")
    return Task(
        name=item.name("name"),
        domain=item.name("domain"),
        kind=kind,
        pair=item.boolean("pair"),
        labels=labels,
        metric=item.nullable("metric", lambda key: item.choice(key, "accuracy", "macro_f1")),
        chance=None if chance is None else float(chance),
        stages=TaskStages(
            stages.string("embed"),
            stages.nullable("router", stages.string),
            stages.string("trunk"),
            stages.string("head"),
        ),
        preprocess=Preprocess(
            preprocess.choice("kind", "text"),
            preprocess.page("tokenizer", PageKind.TOKENIZER, pages),
            preprocess.integer("max_tokens", 1, MAX_TOKENS),
        ),
    )


def _check_outputs(stages: Sequence[Stage], sites: int) -> None:
    for stage in stages:
        for name in stage.outputs:
            if name.startswith("ids_") and int(name[4:]) >= sites:
                raise BundleError(f"manifest: stage '{stage.name}' has the output {name}, but there are {sites} sites")


def _check_routed_pages(sites: Sequence[Site]) -> None:
    """A routed page belongs to one site: its distance to the next use, which eviction orders by, must be one number."""
    owner: dict[int, str] = {}
    for site in sites:
        for ref in site.experts:
            if owner.setdefault(ref.page, site.name) != site.name:
                raise BundleError(f"manifest: page {ref.page} has routed experts of two sites, '{owner[ref.page]}' and '{site.name}'")


def _check_tasks(stages: Sequence[Stage], tasks: Sequence[Task]) -> None:
    by_name = {stage.name: stage for stage in stages}
    for task in tasks:
        answer = "scores" if task.kind == "classification" else "vector"
        roles = [("embed", task.stages.embed, "hidden0"), ("trunk", task.stages.trunk, "hidden"), ("head", task.stages.head, answer)]
        if task.stages.router is not None:
            roles.append(("router", task.stages.router, "bias"))
        for role, name, output in roles:
            if name not in by_name:
                raise BundleError(f"manifest: task '{task.name}' has the {role} stage {name!r:.80}, which does not exist")
            if output not in by_name[name].outputs:
                raise BundleError(f"manifest: task '{task.name}': its {role} stage '{name}' has no output '{output}'")


def _usage(document: Mapping[str, Any], sites: Sequence[Site], tasks: Sequence[Task]) -> dict[str, tuple[tuple[float, ...], ...]]:
    known = {task.name for task in tasks}
    usage = {}
    for name, rows in document.items():
        where = f"manifest.usage[{name!r:.80}]"
        if name not in known:
            raise BundleError(f"{where}: there is no such task")
        if not isinstance(rows, list) or len(rows) != len(sites):
            raise BundleError(f"{where}: expected one list for each of the {len(sites)} sites")
        usage[name] = tuple(_importance(row, site, where) for row, site in zip(rows, sites, strict=True))
    return usage


def _importance(row: Any, site: Site, where: str) -> tuple[float, ...]:
    if not isinstance(row, list) or len(row) != len(site.experts):
        raise BundleError(f"{where}: site '{site.name}' needs {len(site.experts)} numbers, one for each routed expert")
    if not all(_is_number(value) and value >= 0 for value in row):
        raise BundleError(f"{where}: site '{site.name}' has a value that is no number from 0 upwards")
    if abs(sum(row) - 1) > 0.01:
        raise BundleError(f"{where}: site '{site.name}' sums to {sum(row):.4g} instead of 1")
    return tuple(float(value) for value in row)


def _is_number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 1 << 53)


def _unique(names: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BundleError(f"{where}: {name!r:.80} occurs twice")
        seen.add(name)
