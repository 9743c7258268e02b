"""The manifest as typed, checked records: what stages, sites and tasks a bundle has, and which pages they use.

`load_manifest` checks everything once; whoever holds a `Manifest` need not ask again whether a page exists or a shape fits.
Stages exchange tensors by fixed names (B batch, T tokens, S sites, E experts of a site, d hidden, k experts per token):

    ids, types (B, T) int64 -> embed -> hidden0 (B, T, d) f32 -> router -> bias (B, S, E) f32, minus infinity: not this expert
    hidden0, mask (B, T) f32, bias -> trunk -> hidden (B, T, d) f32, and optionally ids_0 .. ids_{S-1} (B, T, k) int64, the choices
    hidden, mask -> head -> scores (B, labels) f32, probabilities; or vector (B, n) f32

and for tasks on images (C channels, H x W pixels, h x w pixels of a map, which may be coarser):

    image (B, C, H, W) f32 -> backbone -> features, or features_0 .. features_7, any shapes
    those, image -> head -> scores or vector; or map f32: (B, classes, h, w) probabilities of a segmentation, (B, 1, h, w) of an edge task

A bundle may hold variants: other stages for the same image tasks, smaller or larger. The tasks' own stages are the first variant's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeml.bundle import Bundle, Page, PageKind
from edgeml.errors import BundleError
from edgeml.manifest_groups import GroupRouter, Way, read_router
from edgeml.manifest_reader import Reader, is_number, unique

__all__ = [
    "FORMAT",
    "ExpertRef",
    "ImagePreprocess",
    "ImageStages",
    "Manifest",
    "Preprocess",
    "Site",
    "Stage",
    "Task",
    "TaskStages",
    "Variant",
    "load_manifest",
    "parse_manifest",
]

FORMAT = 1
STAGE_INPUTS = frozenset({"ids", "types", "hidden0", "mask", "bias", "hidden", "image", "features", *(f"features_{i}" for i in range(8))})
STAGE_OUTPUT = re.compile(r"hidden0|groups|bias|hidden|scores|vector|map|features(_[0-7])?|ids_(0|[1-9][0-9]{0,5})")
MAX_TOKENS = 65536
MAX_SIDE = 8192
#: Kind of task -> (what its head answers, the metrics it may have). Class ids of a map are bytes.
KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "classification": ("scores", ("accuracy", "macro_f1")),
    "embedding": ("vector", ("accuracy", "macro_f1")),
    "segmentation": ("map", ("miou",)),
    "edge": ("map", ("edge_f1",)),
}
EDGE_LABELS = ("no edge", "edge")
REQUIRED = frozenset({"format", "producer", "stages", "sites", "tasks"})
OPTIONAL = frozenset({"model", "usage", "variants", "router", "evidence", "provenance"})


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

    @property
    def names(self) -> tuple[str, ...]:
        """In the order they run."""
        return tuple(name for name in (self.embed, self.router, self.trunk, self.head) if name is not None)


@dataclass(frozen=True)
class ImageStages:
    """The stages a request of a task on images runs, by name; tasks with one backbone share its pass."""

    backbone: str
    head: str

    @property
    def names(self) -> tuple[str, ...]:
        """In the order they run."""
        return (self.backbone, self.head)


@dataclass(frozen=True)
class Preprocess:
    """How a text becomes tensors; `tokenizer` is a page, `max_tokens` where a text is cut."""

    kind: str
    tokenizer: int
    max_tokens: int


@dataclass(frozen=True)
class ImagePreprocess:
    """How an image becomes `image` (B, channels, height, width) f32: resized, divided by 255, less `mean`, divided by `std`.

    `resize` "stretch": both sides are brought to the model's, whatever the aspect. `mean` and `std` have a number a channel.
    """

    kind: str
    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str


@dataclass(frozen=True)
class Task:
    """A task the bundle answers. `chance` is the metric's value for always naming the commonest label, in [0, 1].

    `void` is the label of pixels that are not scored: the last of a segmentation's labels, or the one after an edge task's two.
    """

    name: str
    domain: str
    kind: str
    pair: bool
    labels: tuple[str, ...]
    metric: str | None
    chance: float | None
    stages: TaskStages | ImageStages
    preprocess: Preprocess | ImagePreprocess
    void: int | None = None

    @property
    def dense(self) -> bool:
        """Whether the answer is a map: a class or a probability a pixel."""
        return KINDS[self.kind][0] == "map"


@dataclass(frozen=True)
class Variant:
    """Stages for all of a bundle's image tasks, and what was recorded of them at export.

    `bytes` of its graphs; `bound` is the loss ratio it was pruned to, None where it was not; `latency_s` the median of one image
    with all tasks on `latency_cpu`, None where it was not measured; `scores` by task on the validation split, all tasks or none.
    """

    name: str
    stages: Mapping[str, ImageStages]
    bytes: int
    macs: int
    parameters: int
    bound: float | None
    quantized: bool
    latency_s: float | None
    latency_cpu: str | None
    scores: Mapping[str, float]

    @property
    def score(self) -> float | None:
        """The mean score over its tasks, None where it was not measured."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else None


@dataclass(frozen=True)
class Manifest:
    """`usage[task][site][expert]` is the mean combine weight per token, 1 in sum per site. Free parts stay plain dictionaries."""

    producer: Mapping[str, Any]
    model: Mapping[str, Any]
    stages: tuple[Stage, ...]
    sites: tuple[Site, ...]
    tasks: tuple[Task, ...]
    usage: Mapping[str, tuple[tuple[float, ...], ...]]
    variants: tuple[Variant, ...]
    evidence: Mapping[str, Any]
    provenance: Mapping[str, Any]
    router: GroupRouter | None = None


def load_manifest(bundle: Bundle) -> Manifest:
    """The checked manifest of an open bundle. Raises `BundleError` naming the file and the place in the manifest."""
    try:
        return parse_manifest(bundle.manifest, bundle.pages)
    except BundleError as error:
        raise BundleError(f"{bundle.path}: {error}") from None


def parse_manifest(document: Mapping[str, Any], pages: Sequence[Page]) -> Manifest:
    """Check a decoded manifest against the pages it speaks of. Raises `BundleError` naming the place, such as `tasks[2].chance`."""
    root = Reader(document, "manifest")
    unknown = sorted(set(document) - REQUIRED - OPTIONAL)
    if unknown:
        raise root.error(f"unknown key '{unknown[0]}'")
    version = root.integer("format", 1, 1 << 31)
    if version > FORMAT:
        raise root.error(f"format {version}, and this edgeml reads {FORMAT}; install a newer edgeml-runtime")
    producer = root.mapping("producer")
    for key in ("name", "version"):
        Reader(producer, "manifest.producer").string(key)
    stages = tuple(_stage(item, pages) for item in root.items("stages"))
    sites = tuple(_site(item, pages) for item in root.items("sites"))
    tasks = tuple(_task(item, pages) for item in root.items("tasks"))
    variants = tuple(_variant(item) for item in root.items("variants", optional=True))
    for kind, named in (("stages", stages), ("sites", sites), ("tasks", tasks), ("variants", variants)):
        unique([item.name for item in named], f"manifest.{kind}")
    _check_outputs(stages, len(sites))
    _check_routed_pages(sites)
    _check_tasks(stages, tasks)
    _check_variants(variants, stages, tasks, pages)
    return Manifest(
        producer=producer,
        model=root.mapping("model", optional=True),
        stages=stages,
        sites=sites,
        tasks=tasks,
        usage=_usage(root.mapping("usage", optional=True), sites, tasks),
        variants=variants,
        evidence=root.mapping("evidence", optional=True),
        provenance=root.mapping("provenance", optional=True),
        router=_router(root, stages, tasks),
    )


def _router(root: Reader, stages: Sequence[Stage], tasks: Sequence[Task]) -> GroupRouter | None:
    if "router" not in root.document or root.document["router"] is None:
        return None
    ways = {t.name: Way(t.stages.embed, t.stages.trunk, t.preprocess) for t in tasks if isinstance(t.stages, TaskStages)}
    return read_router(root.child("router"), {stage.name: (stage.inputs, stage.outputs) for stage in stages}, ways)


def _stage(item: Reader, pages: Sequence[Page]) -> Stage:
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


def _site(item: Reader, pages: Sequence[Page]) -> Site:
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


def _experts(item: Reader, key: str, hidden: int, pages: Sequence[Page]) -> tuple[ExpertRef, ...]:
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


def _task(item: Reader, pages: Sequence[Page]) -> Task:
    kind = item.choice("kind", *KINDS)
    chance = item.nullable("chance", lambda key: item.number(key, 0, 1))
    preprocess = _preprocess(item.child("preprocess"), pages)
    on_images = isinstance(preprocess, ImagePreprocess)
    task = Task(
        name=item.name("name"),
        domain=item.name("domain"),
        kind=kind,
        pair=item.boolean("pair") if "pair" in item.document or not on_images else False,
        labels=item.strings("labels"),
        metric=item.nullable("metric", lambda key: item.choice(key, *KINDS[kind][1])),
        chance=chance,
        stages=_task_stages(item.child("stages"), on_images),
        preprocess=preprocess,
        void=item.nullable("void", lambda key: item.integer(key, 0, 255)) if "void" in item.document else None,
    )
    if (kind == "embedding") != (not task.labels):
        raise item.error(f"a {kind} task has labels, an embedding task has none")
    if on_images and task.pair:
        raise item.error("'pair' is for texts; a task on images takes one at a time")
    if task.dense or task.void is not None:
        _check_dense(item, task, on_images)
    return task


def _preprocess(item: Reader, pages: Sequence[Page]) -> Preprocess | ImagePreprocess:
    if item.choice("kind", "text", "image") == "text":
        return Preprocess("text", item.page("tokenizer", PageKind.TOKENIZER, pages), item.integer("max_tokens", 1, MAX_TOKENS))
    channels = item.integer("channels", 1, 3)
    if channels == 2:
        raise item.error("'channels' must be 1 (grey) or 3 (red, green, blue)")
    preprocess = ImagePreprocess(
        kind="image",
        height=item.integer("height", 1, MAX_SIDE),
        width=item.integer("width", 1, MAX_SIDE),
        channels=channels,
        mean=item.numbers("mean", channels),
        std=item.numbers("std", channels),
        resize=item.choice("resize", "stretch"),
    )
    if not all(1e-6 <= value <= 1e6 for value in preprocess.std) or not all(abs(value) <= 1e6 for value in preprocess.mean):
        raise item.error("'std' must lie from 1e-6 to 1e6, and 'mean' within a million of zero")
    return preprocess


def _task_stages(item: Reader, on_images: bool) -> TaskStages | ImageStages:
    wanted = ("backbone", "head") if on_images else ("embed", "router", "trunk", "head")
    other = sorted(set(item.document) - set(wanted))
    if other:
        raise item.error(f"unknown key {other[0]!r:.80}; a task on {'images' if on_images else 'texts'} has {', '.join(wanted)}")
    if on_images:
        return ImageStages(item.string("backbone"), item.string("head"))
    return TaskStages(item.string("embed"), item.nullable("router", item.string), item.string("trunk"), item.string("head"))


def _check_dense(item: Reader, task: Task, on_images: bool) -> None:
    """Maps come from images; their labels are bytes, and void is the last of them."""
    if not task.dense or not on_images:
        raise item.error(f"a {task.kind} task cannot have 'void'" if not task.dense else f"a {task.kind} task needs images as inputs")
    if task.kind == "edge":
        if task.labels != EDGE_LABELS:
            raise item.error(f"the labels of an edge task are {', '.join(EDGE_LABELS)}")
        last = len(task.labels)
    else:
        if not 2 <= len(task.labels) <= 256:
            raise item.error(f"a segmentation has from 2 to 256 labels, not {len(task.labels)}")
        last = len(task.labels) - 1
    if task.void not in (None, last):
        raise item.error(f"'void' must be null or {last}, not {task.void}")


def _variant(item: Reader) -> Variant:
    latency = item.nullable("latency_s", item.child)
    stages, scores = item.child("stages"), item.child("scores")
    return Variant(
        name=item.name("name"),
        stages={name: _as_image_stages(stages.child(name)) for name in stages.document},
        bytes=item.integer("bytes", 0, 1 << 46),
        macs=item.integer("macs", 0, 1 << 53),
        parameters=item.integer("parameters", 0, 1 << 53),
        bound=item.nullable("bound", lambda key: item.number(key, 1)),
        quantized=item.boolean("quantized"),
        latency_s=None if latency is None else latency.number("p50", 0),
        latency_cpu=None if latency is None else latency.nullable("cpu", latency.string),
        scores={name: scores.number(name, 0, 1) for name in scores.document},
    )


def _as_image_stages(item: Reader) -> ImageStages:
    stages = _task_stages(item, on_images=True)
    assert isinstance(stages, ImageStages)
    return stages


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
        _check_stages(f"manifest: task '{task.name}'", task.kind, task.stages, by_name)


def _check_stages(where: str, kind: str, stages: TaskStages | ImageStages, by_name: Mapping[str, Stage]) -> None:
    roles: list[tuple[str, str, str | None]] = [("head", stages.head, KINDS[kind][0])]
    if isinstance(stages, ImageStages):
        roles.append(("backbone", stages.backbone, None))
    else:
        roles += [("embed", stages.embed, "hidden0"), ("trunk", stages.trunk, "hidden")]
        roles += [("router", stages.router, "bias")] if stages.router is not None else []
    for role, name, output in roles:
        if name not in by_name:
            raise BundleError(f"{where} has the {role} stage {name!r:.80}, which does not exist")
        if output is not None and output not in by_name[name].outputs:
            raise BundleError(f"{where}: its {role} stage '{name}' has no output '{output}'")
    if isinstance(stages, ImageStages):
        backbone, head = by_name[stages.backbone], by_name[stages.head]
        for stage, known in ((backbone, {"image"}), (head, {"image", *backbone.outputs})):
            unmade = sorted(set(stage.inputs) - known)
            if unmade:
                raise BundleError(f"{where}: its stage '{stage.name}' reads '{unmade[0]}', which no stage before it makes")


def _check_variants(variants: Sequence[Variant], stages: Sequence[Stage], tasks: Sequence[Task], pages: Sequence[Page]) -> None:
    """Each variant answers every task on images, and no other; what can be checked of its figures is."""
    by_name = {stage.name: stage for stage in stages}
    on_images = {task.name: task for task in tasks if isinstance(task.stages, ImageStages)}
    if variants and not on_images:
        raise BundleError("manifest: there are variants, but no task on images to have them for")
    for number, variant in enumerate(variants):
        where = f"manifest: variant '{variant.name}'"
        for names, what in ((set(variant.stages), "stages"), (set(variant.scores), "scores")):
            odd = sorted(names ^ set(on_images))
            if odd and (names or what == "stages"):
                raise BundleError(f"{where}: its {what} are not for the tasks on images; {odd[0]!r:.80} is in only one of the two")
        for name, chosen in variant.stages.items():
            _check_stages(f"{where}: task '{name}'", on_images[name].kind, chosen, by_name)
            if number == 0 and chosen != on_images[name].stages:
                raise BundleError(f"{where}: the first variant's stages must be those of task '{name}' itself")
        used = {by_name[name].page for chosen in variant.stages.values() for name in chosen.names}
        if variant.bytes != sum(pages[page].length for page in used):
            raise BundleError(f"{where}: 'bytes' is {variant.bytes}, but its graphs have {sum(pages[page].length for page in used)}")


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
    if not all(is_number(value) and value >= 0 for value in row):
        raise BundleError(f"{where}: site '{site.name}' has a value that is no number from 0 upwards")
    if abs(sum(row) - 1) > 0.01:
        raise BundleError(f"{where}: site '{site.name}' sums to {sum(row):.4g} instead of 1")
    return tuple(float(value) for value in row)
