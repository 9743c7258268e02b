"""How fast a bundle will answer on a device, in how much memory and with how much reading: arithmetic, before anything is copied.

Pure functions of a device profile and of what the bundle's index, manifest and graphs say. A request's time is a sum of terms:

    kernels     multiply-adds / rate, or bytes of weights / streaming rate where that is longer (few tokens); and values / rate for
                quantising inputs and writing outputs; and activations / rate
    graphs      operators x what one costs at least, values they visit / rate, matrix products (attention, routers), convolutions
    pages       what is missing under the budget, from the task's recorded usage: `predict_pages` plays some requests
    request     what Python and the session cost

Kernels are divided among threads by the profile's `parallel_share`. Low and high are the same sums with every rate at the bad or
the good end of its own range, widened by `STRUCTURE`, which is how far the sums themselves may be off. Every assumed rate is listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.device import Figure, Profile
from edgeml.errors import UsageError
from edgeml.graph_cost import GraphCost
from edgeml.layout import Activation, Page, PageKind, WeightType
from edgeml.manifest import Manifest, Preprocess, Task, TaskStages, Variant
from edgeml.predict_pages import Medium, Paged, Pager, draw_choices, inclusion
from edgeml.sizes import format_bytes
from edgeml.store import REQUESTS, Budget

__all__ = ["Prediction", "Routing", "Term", "page_seconds", "pages_of", "predict", "routing_of"]

#: How far the sums may be off with perfect rates: the bound that benchmarks/devices/predict.py holds them to.
STRUCTURE = 0.15
MEMORY_STRUCTURE = 0.10
#: Requests that are played: the first ones fill the slots and are left out.
WARM_UP, PLAYED, SEED = 8, 24, 0
#: Copies of a batch's activations that are alive at once, about: q, k, v, their transposes, hidden states, results.
LIVE_COPIES = 24
CHUNK_TOKENS = 128  # that native/src/context.h has working memory for
_NAMES = {WeightType.INT4: "int4", WeightType.INT8: "int8", WeightType.F32: "f32"}
_BLOCKS = (("4k", 1 << 12), ("64k", 1 << 16), ("1m", 1 << 20))

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Routing:
    """How tokens choose: for each site the chance of each expert, and how much a text's tokens agree (see `predict_pages`)."""

    chance: Sequence[Floats]
    agreement: float = 0.0
    source: str = "recorded usage; tokens taken to choose independently of each other, which is the most there is to read"


@dataclass(frozen=True)
class Term:
    """A part of the time, and its arithmetic in words."""

    name: str
    seconds: float
    said: str


@dataclass(frozen=True)
class Interval:
    """A figure with the range it is expected in."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, Any]:
        """As every interval is written; nothing was sampled, so there is no n."""
        return {**vars(self), "n": None}


@dataclass(frozen=True)
class Prediction:
    """Of one request: seconds, peak bytes of the process, bytes read; `terms` of the seconds, `assumed` figures that went in."""

    latency_s: Interval
    peak_memory_bytes: Interval
    page_in_bytes: Interval
    compute_s: float
    wait_s: float
    hits: float
    misses: float
    terms: list[Term]
    assumed: dict[str, Figure]
    memory_terms: dict[str, float]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The document that --json prints."""
        latency = self.latency_s
        throughput = Interval(1 / latency.value, 1 / latency.high, 1 / latency.low)
        return {
            "latency_s": latency.as_json(),
            "requests_per_s": throughput.as_json(),
            "peak_memory_bytes": self.peak_memory_bytes.as_json(),
            "page_in_bytes": self.page_in_bytes.as_json(),
            "compute_s": self.compute_s,
            "page_wait_s": self.wait_s,
            "hits": self.hits,
            "misses": self.misses,
            "terms": [vars(term) for term in self.terms],
            "memory_terms_bytes": dict(self.memory_terms),
            "assumed": {key: {"value": figure.value, "source": figure.source} for key, figure in self.assumed.items()},
            "notes": list(self.notes),
        }


def predict(
    profile: Profile,
    pages: Sequence[Page],
    manifest: Manifest,
    graphs: Mapping[str, GraphCost],
    budget: Budget,
    task: Task,
    *,
    tokens: int = 64,
    threads: int = 1,
    residency: str = "exact",
    variant: Variant | None = None,
    routing: Routing | None = None,
) -> Prediction:
    """Predict one request of `tokens` tokens (or one image) with everything opened and warm.

    `graphs` has the stages of the task; `budget` what the memory option resolves to (`store.plan_budget`). Raises `UsageError`
    where the profile lacks a figure that is needed, and for a residency that depends on a deadline.
    """
    if residency not in ("exact", "masked"):
        raise UsageError(f"a prediction is for residency exact or masked, not '{residency}': what hybrid does depends on the deadline")
    runs = []
    for end in (0, -1, 1):
        rates = _Rates(profile, end, threads)
        runs.append(_Run(rates, pages, manifest, graphs, budget, task, tokens, residency, variant, routing))
    middle, worst, best = runs
    low, high = sorted((best.seconds, worst.seconds))
    least, most = sorted((best.peak, worst.peak))
    notes = list(middle.notes)
    return Prediction(
        latency_s=Interval(middle.seconds, low * (1 - STRUCTURE), high * (1 + STRUCTURE)),
        peak_memory_bytes=Interval(middle.peak, least * (1 - MEMORY_STRUCTURE), most * (1 + MEMORY_STRUCTURE)),
        page_in_bytes=Interval(middle.read_bytes, *_around(middle.read_bytes, routing is None)),
        compute_s=middle.seconds - middle.paged.waited_s,
        wait_s=middle.paged.waited_s,
        hits=middle.paged.hits,
        misses=middle.paged.misses,
        terms=middle.terms,
        assumed={key: figure for key, figure in sorted(middle.rates.used.items()) if figure.assumed},
        memory_terms=middle.memory,
        notes=notes,
    )


def _around(read: float, independent: bool) -> tuple[float, float]:
    """The range of bytes read: tokens that agree more than taken read less."""
    return read * (0.5 if independent else 1 - STRUCTURE), read * (1 + STRUCTURE)


def routing_of(manifest: Manifest, traces: Sequence[NDArray[np.int64]]) -> Routing:
    """The routing that traces (tokens, sites, k) of some texts show: how often each expert is chosen, and how much a text's tokens
    agree, such that as many different experts a text are expected as were seen."""
    chance, seen = [], 0.0
    tokens = sum(map(len, traces))
    for number, site in enumerate(manifest.sites):
        chosen = [trace[:, number][trace[:, number] >= 0] for trace in traces]
        counts = np.bincount(np.concatenate(chosen), minlength=len(site.experts))
        chance.append((counts + 0.5 / len(site.experts)) / max(tokens, 1))
        seen += sum(len(np.unique(ids)) for ids in chosen)
    low, high = 0.0, 1.0
    for _ in range(7):
        agreement = (low + high) / 2
        rng, found = np.random.default_rng(SEED), 0
        for trace in traces:
            found += sum(
                int((draw_choices(p, site.top_k, len(trace), agreement, rng) > 0).sum())
                for p, site in zip(chance, manifest.sites, strict=True)
            )
        low, high = (agreement, high) if found > seen else (low, agreement)
    return Routing(chance, low, f"traces of {len(traces)} texts: chances of each expert, and an agreement of {low:.2f} within a text")


def pages_of(manifest: Manifest, task: Task) -> dict[str, int]:
    """The pages of the graphs that a request of the task runs, by stage."""
    pages = {stage.name: stage.page for stage in manifest.stages}
    return {name: pages[name] for name in task.stages.names}


def page_seconds(profile: Profile, length: int, depth: int, end: int = 0) -> float:
    """Seconds between pages of `length` bytes read at a depth of 1 or 2: between the profile's block sizes, time is linear in bytes."""
    return _Rates(profile, end, 1).page_s(length, depth)


class _Rates:
    """The figures of a profile at one end of their ranges: 0 the values, -1 the bad ends, 1 the good ones. Notes which were used."""

    def __init__(self, profile: Profile, end: int, threads: int) -> None:
        self.profile, self.end, self.used = profile, end, {}  # type: Profile, int, dict[str, Figure]
        cores = profile.value("cpu.cores") or threads
        extra = min(threads, cores) - 1
        self.speed = 1 + extra * self.get("cpu.parallel_share") if extra > 0 else 1.0

    def get(self, key: str) -> float:
        figure = self.used[key] = self.profile.need(key)
        low, high = figure.range
        good = low if not key.endswith("_per_s") and key != "cpu.parallel_share" else high
        return figure.value if self.end == 0 else good if self.end > 0 else low + high - good

    def kernel_s(self, type: WeightType, rows: int, cols: int, bytes: int, n: int) -> float:
        """A matrix applied to n tokens, one thread: its products, or the streaming of its weights, and what goes in and out."""
        name = _NAMES[type]
        stream = self.get("memory.read_bytes_per_s" if name == "f32" else f"kernels.{name}_stream_bytes_per_s")
        return max(n * rows * cols / self.get(f"kernels.{name}_macs_per_s"), bytes / stream) + n * (rows + cols) / self.get(
            "kernels.values_per_s"
        )

    def page_s(self, length: int, depth: int) -> float:
        known = [(size, key) for block, size in _BLOCKS if (key := f"storage.{block}_qd{depth}_bytes_per_s") in self.profile.figures]
        if not known:
            if depth > 1:
                return self.page_s(length, 1)
            self.profile.need("storage.64k_qd1_bytes_per_s")
        points = [(size, size / self.get(key)) for size, key in known]
        for (size, seconds), (larger, more) in pairwise(points):
            if length <= larger:
                return max(seconds + (more - seconds) * (length - size) / (larger - size), 0.0)
        size, seconds = points[-1]
        return seconds * max(length / size, 0.1)


class _Run:
    """The sums at one end of the rates."""

    def __init__(
        self,
        rates: _Rates,
        pages: Sequence[Page],
        manifest: Manifest,
        graphs: Mapping[str, GraphCost],
        budget: Budget,
        task: Task,
        tokens: int,
        residency: str,
        variant: Variant | None,
        routing: Routing | None,
    ) -> None:
        self.rates, self.pages, self.manifest, self.budget, self.tokens = rates, pages, manifest, budget, tokens
        self.terms: list[Term] = []
        self.notes: list[str] = []
        self.read_bytes = 0.0
        self.paged = Paged()
        self.held_pages = 0
        stages = [graphs[name] for name in task.stages.names]
        self.request_s = rates.get("process.request_s")
        self._term("request", self.request_s, "Python and the session, whatever is asked")
        if isinstance(task.stages, TaskStages):
            self._tokenizing()
            self._rows()
            self._graphs(stages, graphs[task.stages.trunk])
            self._linears()
            if manifest.sites:
                self._experts(routing or self._usual(task), residency)
        else:
            self._convolutions(stages, variant)
        self.seconds = sum(term.seconds for term in self.terms)
        self.memory = self._memory(stages, task)
        self.peak = sum(self.memory.values())

    def _term(self, name: str, seconds: float, said: str) -> None:
        self.terms.append(Term(name, seconds, said))

    def _tokenizing(self) -> None:
        if "process.tokens_per_s" in self.rates.profile.figures:
            rate = self.rates.get("process.tokens_per_s")
            self._term("tokenizing", self.tokens / rate, f"{self.tokens} tokens / {rate / 1e3:.3g} thousand a second")

    def _rows(self) -> None:
        """Rows of embeddings are read once and then in the system's cache, so they are no part of a warm request."""
        profile = self.rates.profile
        if any(page.kind == PageKind.ROWS for page in self.pages) and any(key.startswith("storage.") for key in profile.figures):
            seconds = self.tokens * page_seconds(profile, 1 << 12, 2)
            self.notes.append(f"words met for the first time are read from the file: up to {1e3 * seconds:.2g} ms on top")

    # ---- graphs ----

    def _hidden(self) -> int:
        return max((site.hidden for site in self.manifest.sites), default=int(self.manifest.model.get("hidden", 0)))

    def _graphs(self, stages: Sequence[GraphCost], trunk: GraphCost) -> None:
        rates, hidden, tokens = self.rates, self._hidden(), self.tokens
        nodes, wide = sum(stage.nodes for stage in stages), sum(stage.wide for stage in stages)
        node_s, values = rates.get("graphs.node_s"), rates.get("graphs.values_per_s")
        heads = self.manifest.model.get("heads") if trunk.products else None
        scores = 3 * (trunk.products // 2) * tokens * tokens * heads if isinstance(heads, int) else 0  # mask, softmax, its copy
        visited = wide * tokens * hidden + scores
        self._term(
            "operators",
            nodes * node_s + visited / values,
            f"{nodes} operators x {node_s * 1e6:.2g} us + {visited / 1e6:.3g} million values / {values / 1e9:.3g} G/s",
        )
        products = trunk.products * tokens * tokens * hidden
        macs = products + trunk.weight_macs * tokens + sum(stage.weight_macs for stage in stages if stage is not trunk)
        rate = rates.get("graphs.matmul_macs_per_s")
        split = f" / {rates.speed:.2g} (threads)" if rates.speed != 1 else ""
        self._term(
            "matrix products",
            macs / rate / rates.speed,
            f"attention and routers: {macs / 1e6:.3g} million multiply-adds / {rate / 1e9:.3g} G/s{split}",
        )

    def _convolutions(self, stages: Sequence[GraphCost], variant: Variant | None) -> None:
        rates = self.rates
        if variant is None:
            raise UsageError("this bundle records no multiply-adds of its convolutions, so nothing can be predicted; measure with bench")
        nodes, node_s = sum(stage.nodes for stage in stages), rates.get("graphs.node_s")
        self._term("operators", nodes * node_s, f"{nodes} operators x {node_s * 1e6:.2g} us")
        kind = "conv_int8" if variant.quantized else "conv"
        rate = rates.get(f"graphs.{kind}_macs_per_s")
        split = f" / {rates.speed:.2g} (threads)" if rates.speed != 1 else ""
        said = f"variant {variant.name}: {variant.macs / 1e6:.3g} million multiply-adds in {'int8' if variant.quantized else 'f32'}"
        self._term("convolutions", variant.macs / rate / rates.speed, f"{said} / {rate / 1e9:.3g} G/s{split}")

    # ---- kernels ----

    def _linears(self) -> None:
        rates, seconds, macs, held = self.rates, 0.0, 0, 0
        for page in self.pages:
            if page.kind == PageKind.LINEAR:
                matrix = page.matrices[0]
                seconds += rates.kernel_s(matrix.type, matrix.rows, matrix.cols, page.length, self.tokens)
                macs, held = macs + matrix.rows * matrix.cols * self.tokens, held + page.length
        if macs:
            said = f"{macs / 1e6:.3g} million multiply-adds, {format_bytes(held)} of weights{self._by_threads()}"
            self._term("dense layers", seconds / rates.speed, said)

    def _by_threads(self) -> str:
        return f", by {self.rates.speed:.2g} (threads)" if self.rates.speed != 1 else ""

    def _expert_s(self, page: Page, n: int) -> float:
        """One expert of a page for n of a request's tokens, one thread."""
        seconds = sum(self.rates.kernel_s(m.type, m.rows, m.cols, page.stride // len(page.matrices), n) for m in page.matrices)
        if page.activation != Activation.NONE:
            seconds += n * page.matrices[0].rows / self.rates.get("kernels.activations_per_s")
        return seconds

    def _usual(self, task: Task) -> Routing:
        recorded = self.manifest.usage.get(task.name)
        if recorded is None:
            self.notes.append(f"no usage of task '{task.name}' is recorded: every expert is taken to be as likely as any other")
            recorded = tuple((1.0 / len(site.experts),) * len(site.experts) for site in self.manifest.sites)
        chance = [inclusion(np.array(row, float), site.top_k) for row, site in zip(recorded, self.manifest.sites, strict=True)]
        return Routing(chance)

    def _experts(self, routing: Routing, residency: str) -> None:
        rates, sites, tokens = self.rates, self.manifest.sites, self.tokens
        most = max(len(site.experts) for site in sites)
        every = [sorted({site * most + _first(where.experts, e) for e in range(len(where.experts))}) for site, where in enumerate(sites)]
        chance, masked = list(routing.chance), residency == "masked"
        if masked and not self.budget.complete:
            chance = self._kept(chance)
        shared_s = sum(self._expert_s(self.pages[ref.page], tokens) for site in sites for ref in site.shared)
        combined = sum(tokens * (site.top_k + len(site.shared)) * site.hidden for site in sites)
        fixed_s = (shared_s + combined / rates.get("kernels.values_per_s")) / rates.speed / len(sites)
        other_s = sum(term.seconds for term in self.terms) / len(sites)
        length = max((self.pages[ref.page].length for site in sites for ref in site.experts), default=0)
        complete = self.budget.complete or masked
        medium = Medium(0, 0) if complete else Medium(rates.page_s(length, 1), rates.page_s(length, 2))
        pager = Pager(len(sites), sum(map(len, every)) if complete else self.budget.slots, medium)
        rng, played = np.random.default_rng(SEED), []
        known: dict[tuple[int, int], float] = {}
        kernels = 0.0
        for number in range(WARM_UP + PLAYED):
            visits = []
            for site, where in enumerate(sites):
                k = min(where.top_k, int((chance[site] > 0).sum()))
                counts = draw_choices(chance[site], k, tokens, routing.agreement, rng) if k else np.zeros(len(where.experts), np.int64)
                used: dict[int, float] = {}
                for e in np.flatnonzero(counts):
                    n = int(counts[e])
                    if (site, n) not in known:
                        known[site, n] = self._expert_s(self.pages[where.experts[e].page], n) / rates.speed
                    page = site * most + _first(where.experts, int(e))
                    used[page] = used.get(page, 0.0) + known[site, n]
                visits.append(used)
            paged = pager.request(visits, every, fixed_s, other_s)
            if number >= WARM_UP:
                played.append(paged)
                kernels += sum(sum(used.values()) for used in visits) / PLAYED
        mean = Paged(*(sum(getattr(one, name) for one in played) / PLAYED for name in ("seconds", "waited_s", "hits", "misses", "read")))
        if complete:
            mean = Paged(mean.seconds, 0.0, mean.hits + mean.misses, 0, 0)
        self.paged, self.read_bytes, self.held_pages = mean, mean.read * length, pager.held
        self._term("experts", fixed_s * len(sites) + kernels, self._said(mean, tokens))
        if not complete:
            alone, following = medium.alone_s, medium.following_s
            said = (
                f"{mean.misses:.1f} of {mean.hits + mean.misses:.1f} pages missing, {format_bytes(int(self.read_bytes))} read: "
                f"{alone * 1e3:.3g} ms for one, {following * 1e3:.3g} ms for each that follows; what computing does not hide"
            )
            self._term("waiting for pages", mean.waited_s, said)

    def _said(self, mean: Paged, tokens: int) -> str:
        sites = self.manifest.sites
        macs = sum(
            tokens * sum(m.rows * m.cols for m in self.pages[refs[0].page].matrices) * count
            for site in sites
            for refs, count in ((site.experts, site.top_k), (site.shared, len(site.shared)))
            if refs
        )
        return f"{macs / 1e6:.3g} million multiply-adds, {mean.hits + mean.misses:.1f} pages a request, activations{self._by_threads()}"

    def _kept(self, chance: Sequence[Floats]) -> list[Floats]:
        """The chances under a mask of the budget's size: what does not fit is never chosen."""
        order = sorted(((p, site, e) for site, row in enumerate(chance) for e, p in enumerate(row)), reverse=True)
        kept = {(site, e) for _, site, e in order[: self.budget.pages]}
        return [np.array([max(p, 1e-6) if (site, e) in kept else 0.0 for e, p in enumerate(row)]) for site, row in enumerate(chance)]

    # ---- memory ----

    def _memory(self, stages: Sequence[GraphCost], task: Task) -> dict[str, float]:
        rates, budget = self.rates, self.budget
        found = {
            "process": rates.get("process.bytes"),
            "graphs": sum(stage.bytes for stage in stages) * rates.get("process.bytes_per_graph_byte"),
        }
        if isinstance(task.preprocess, Preprocess):
            tokenizer = self.pages[task.preprocess.tokenizer].length
            held = min(budget.slots, self.held_pages) * budget.slot_bytes
            found |= {
                "tokenizer": tokenizer * rates.get("process.bytes_per_tokenizer_byte"),
                "pinned weights": float(budget.pinned_bytes),
                "experts in slots": float(held),
                "working memory": budget.scratch_bytes / REQUESTS * min(self.tokens / CHUNK_TOKENS, 1),  # what is touched of it
                "activations": 4.0 * LIVE_COPIES * self.tokens * self._hidden(),
            }
        return found


def _first(experts: Sequence[Any], number: int) -> int:
    """The first expert on the same page: experts that share one count as one page."""
    page = experts[number].page
    return next(e for e in range(number + 1) if experts[e].page == page)
