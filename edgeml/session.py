"""A session answers requests on one open bundle. It decides nothing: policy is in `router`, `store` and the pager.

    with edgeml.open("m.edgeml", memory="50%") as session:
        print(session.run("banking77", text="I lost my card").labels)

A session may be used from several threads. Under residency "exact" the answer does not depend on the budget; under
"masked" the router may only choose experts of the task's resident set, which is pinned while the request runs; "hybrid" is
exact, except for batches of a call with a deadline that would break it.

A call on texts becomes batches: its rows are tokenized in windows, ordered by length, and cut where a batch would hold too many
rows or tokens, so that little is padding and memory stays bounded. Each batch is one native request with its own counters.
How images become batches stands in `image_requests`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import edgeml
from edgeml import native
from edgeml.batching import BATCH_ROWS, BATCH_TOKENS, batches, checked_arrays
from edgeml.bundle import Bundle
from edgeml.errors import UsageError
from edgeml.graph import Graphs
from edgeml.manifest import ImageStages, Preprocess, Task, TaskStages, load_manifest
from edgeml.preprocess import TextBatch, TextPreprocessor
from edgeml.residency import Pick, Residents
from edgeml.result import Counters, Result, checked_answer
from edgeml.router import ResidentSet, checked_bias, checked_set, mask_of
from edgeml.store import REQUESTS, naming, open_context, resolve_threads
from edgeml.tasks import find_task, takes
from edgeml.trace import choices, tracing_stage
from edgeml.variants import Wish, choose_variant, with_variant

if TYPE_CHECKING:  # what only images, requests that name no task, or submitted ones need is loaded with the first of them
    from edgeml.autoroute import AutoRouter, Choice, Routed
    from edgeml.image import ImageInput
    from edgeml.scheduler_events import WorkingSet
    from edgeml.serving import Serving, Ticket

__all__ = ["RESIDENCIES", "Counters", "Result", "Session", "find_task", "open"]

RESIDENCIES = ("exact", "masked", "hybrid")
WINDOW_ROWS = 512
NO_WISH = Wish()

Floats = NDArray[np.float32]


class Session:
    """One open bundle with its budget; use `edgeml.open`, and `close` it or use it as a context manager.

    `notes` are sentences a user should see, such as that the budget is small; `budget` what was resolved from `memory`; `variant`
    the one in use, None where the bundle has none.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        memory: int | str | None = None,
        threads: int | None = None,
        residency: str = "exact",
        isa: str | None = None,
        wish: Wish = NO_WISH,
        state: str | None = None,
    ) -> None:
        if residency not in RESIDENCIES:
            raise UsageError(f"residency must be one of {', '.join(RESIDENCIES)}, not '{residency}'")
        self.residency = residency
        self.bundle = Bundle.open(path)
        try:
            manifest = load_manifest(self.bundle)
            self.variant = choose_variant(manifest, wish, str(self.bundle.path))
            self.manifest = with_variant(manifest, self.variant)
            self._context, _, self.budget = open_context(self.bundle, memory, threads, isa)
            self._residents = Residents(self.bundle, self.manifest, self._context, self.budget, residency, state)
        except BaseException:
            self.bundle.close()
            raise
        opened = self._context.stats()
        self.threads, self.backend, self.direct_reads = resolve_threads(threads), str(opened["isa"]), bool(opened["direct"])
        self.notes = self._residents.notes
        self.notes += self.budget.notes(residency) + self._variant_notes(wish)
        self._graphs = Graphs(self.bundle, self.manifest, self._context, self.threads, not self.budget.complete)
        self._preprocessors: dict[tuple[int, int], TextPreprocessor] = {}
        self._lock = threading.RLock()
        self._turns = threading.BoundedSemaphore(REQUESTS)
        self._calls = 0
        self._closed = self._sealed = False  # sealed: nothing begins to serve any more
        self._serving: Serving | None = None

    def task(self, name: str) -> Task:
        """The task of that name. Raises `UsageError` listing those there are, the closest first."""
        return find_task(self.manifest, name, str(self.bundle.path))

    def run(
        self,
        task: str,
        text: str | None = None,
        *,
        texts: Sequence[str] | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        images: Sequence[ImageInput] | None = None,
        resident: ResidentSet | None = None,
        deadline_s: float | None = None,
    ) -> Result:
        """Answer one text, several texts, several (text, text_pair), token ids; or, for a task on images, several images.

        An image is an array, uint8 (H, W) or (H, W, 3), or the path of a PNG or JPEG: see `image`. `arrays` holds `ids` (n, T) int64,
        and if wanted `types` (n, T) int64 and `mask` (n, T) float32, 0 or 1. `resident` is used in place of the task's own set.
        `deadline_s`: seconds from now; residency "hybrid" masks what would be later. It is a wish: a late answer is an answer.
        Raises `UsageError` for what does not fit the task, `DataError` for a bad text or image, `PageError` when a page could not
        be read; other calls are not touched by it.
        """
        chosen = self.task(task)
        if isinstance(chosen.stages, ImageStages) or images is not None:
            if (text, texts, pairs, arrays, resident) != (None,) * 5:
                raise UsageError(f"task '{chosen.name}' takes {takes(chosen)}, and nothing beside them")
            return self.run_many([task], images)[task]
        windows = self._windows(chosen, text, texts, pairs, arrays)
        with self._call():
            started = time.perf_counter()
            pick = self._residents.pick(task, resident, deadline_s)
            result, values = Result(task), [np.zeros((0, len(chosen.labels)), np.float32)]
            tick = time.perf_counter()
            for batch in windows:
                encode_s = (time.perf_counter() - tick) / max(len(batch.ids), 1)
                window, row_s = self._run_window(chosen, batch, pick, result.counters)
                values.append(window)
                result.truncated += batch.truncated
                result.row_s += [share + encode_s for share in row_s]
                tick = time.perf_counter()
            result.latency_s = time.perf_counter() - started
        result.fill(chosen, np.concatenate(values[1:] or values))
        return result

    def run_auto(
        self, text: str | None = None, *, texts: Sequence[str] | None = None, pairs: Sequence[tuple[str, str]] | None = None
    ) -> Routed:
        """Answer texts, or pairs of them, that name no task: the bundle's router sends each to a task group, whose tasks answer.

        Raises `UsageError` where the bundle has no such router, otherwise as `run`.
        """
        with self._call():
            auto, windows = self._auto(text, texts, pairs)
            return auto.answer(windows, pairs is not None)

    def route(self, *, texts: Sequence[str] | None = None, pairs: Sequence[tuple[str, str]] | None = None) -> list[Choice]:
        """The task group of each text, or pair, that names no task; nothing is answered yet. Raises as `run_auto`."""
        with self._call():
            auto, windows = self._auto(None, texts, pairs)
            return auto.choose(windows, pairs is not None)

    def _auto(
        self, text: str | None, texts: Sequence[str] | None, pairs: Sequence[tuple[str, str]] | None
    ) -> tuple[AutoRouter, Iterator[TextBatch]]:
        from edgeml.autoroute import AutoRouter, router_of

        where, masked = str(self.bundle.path), self.residency == "masked"
        first = self.task(router_of(self.manifest, where).groups[0].tasks[0])

        def run_task(task: Task, batch: TextBatch, counters: Counters) -> Floats:
            return self._run_batch(task, batch, self.resident_set(task.name) if masked else None, counters)

        auto = AutoRouter(self.manifest, where, self._graphs, self._image_request, batches, run_task, masked)
        return auto, self._windows(replace(first, pair=pairs is not None), text, texts, pairs, None)

    def run_many(self, tasks: Sequence[str], images: Sequence[ImageInput] | None) -> dict[str, Result]:
        """Answer several tasks on the same images with one pass of the backbone that they share, and no head besides theirs.

        Raises `UsageError` for a task that takes texts, otherwise as `run`.
        """
        from edgeml.image_requests import image_list, run_images

        chosen = [self.task(name) for name in dict.fromkeys([tasks] if isinstance(tasks, str) else tasks)]
        for task in chosen:
            if not isinstance(task.stages, ImageStages):
                raise UsageError(f"task '{task.name}' takes {takes(task)}")
        given = image_list(images)
        with self._call():
            return run_images(self._graphs, self._image_request, chosen, given, str(self.bundle.path))

    def trace(
        self, task: str, *, texts: Sequence[str] | None = None, pairs: Sequence[tuple[str, str]] | None = None
    ) -> list[NDArray[np.int64]]:
        """Which experts each text's tokens choose: for each text int64 (its tokens, sites, k), -1 where none was chosen.

        k is the largest of the sites. Raises `UsageError` as `run`, and where the bundle has no stage that tells the choices.
        """
        chosen = self.task(task)
        if isinstance(chosen.stages, ImageStages):
            raise UsageError(f"task '{task}' takes images, and has no experts to choose")
        stages = replace(chosen.stages, trunk=tracing_stage(self.manifest, chosen, str(self.bundle.path)))
        traces: list[NDArray[np.int64]] = []
        with self._call():
            resident = self.resident_set(task) if self.residency == "masked" else None
            for window in self._windows(chosen, None, texts, pairs, None):
                found: dict[int, NDArray[np.int64]] = {}
                for rows, batch in batches(window):
                    tensors = self._run_stages(chosen, stages, batch, resident, Counters())
                    found |= zip(rows, choices(self.manifest, tensors, batch.mask, str(self.bundle.path)), strict=True)
                traces += [found[row] for row in range(len(window.ids))]
        return traces

    def submit(
        self,
        task: str,
        text: str | None = None,
        *,
        texts: Sequence[str] | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        arrays: Mapping[str, NDArray[Any]] | None = None,
        images: Sequence[ImageInput] | None = None,
        resident: ResidentSet | None = None,
        bias: Floats | None = None,
        deadline: float | None = None,
        priority: int = 0,
        on_end: Callable[[Ticket], None] | None = None,
    ) -> Ticket:
        """Queue what `run` takes, and return at once: `Ticket.result` waits for the answers, `Ticket.cancel` gives them up.

        Requests run in the order that reads fewest pages, within the bounds that `scheduler` states. `bias` (n, S, E): what `route` said.
        `deadline`: seconds from now after which nobody wants the answer; `priority` from -100 to 100, 0 as a rule, higher goes first.
        `on_end(ticket)` is called, by another thread, when it has ended. Raises as `run` for inputs that are wrong, and `UsageError`
        for such a deadline or priority.
        """
        from edgeml.submission import ImageWork, text_work

        chosen = self.task(task)
        with self._call():
            if isinstance(chosen.stages, ImageStages) or images is not None:
                if any(given is not None for given in (text, texts, pairs, arrays, resident, bias)) or images is None:
                    raise UsageError(f"task '{chosen.name}' takes {takes(chosen)}, and nothing beside them")
                from edgeml.image_requests import image_list

                given = image_list(images)
                work = ImageWork(chosen, lambda: self.run_many([task], given)[task])
                return self.serve().submit(work, task, deadline, priority, on_end)
            windows, leased = self._windows(chosen, text, texts, pairs, arrays), checked_set(self.manifest, resident)
            queued = text_work(chosen, windows, leased, self.manifest, bias)
            return self.serve().submit(queued, task, deadline, priority, on_end)

    def serve(self, queue: int = 256, patience: int = 2, order: str = "overlap", rows: int = BATCH_ROWS) -> Serving:
        """What runs submitted requests, begun with these limits when first asked for: most that wait, and see `Limits`."""
        from edgeml.scheduler_events import Limits
        from edgeml.serving import Serving
        from edgeml.submission import SessionEngine

        with self._lock:
            if self._serving is None:
                if self._sealed:
                    raise UsageError(f"{self.bundle.path}: the session is closed")
                limits = Limits(self.budget.slots, queue, rows, BATCH_TOKENS, 1, patience, order)
                engine = SessionEngine(self._working_set, self._residents, self._run_batch, self._advise)
                self._serving = Serving(engine, limits)
            return self._serving

    def load(self, task: str) -> None:
        """Load a task's tokenizer and graphs now rather than with its first request."""
        chosen = self.task(task)
        with self._call():
            stages = chosen.stages
            if isinstance(stages, TaskStages):
                self.preprocessor(chosen)
                stages = self._residents.stages(chosen, stages)
            for name in stages.names:
                self._graphs.load(name)
            self._residents.loaded(task)

    def preprocessor(self, task: Task) -> TextPreprocessor:
        """The tokenizer of a task on texts, loaded when first asked for. Raises `UsageError` for another task."""
        if not isinstance(task.preprocess, Preprocess):
            raise UsageError(f"task '{task.name}' takes {takes(task)}, which need no tokenizer")
        key = (task.preprocess.tokenizer, task.preprocess.max_tokens)
        with self._lock:
            if key not in self._preprocessors:
                self._preprocessors[key] = TextPreprocessor(self.bundle.read(key[0]), key[1])
            return self._preprocessors[key]

    def resident_set(self, task: str) -> ResidentSet:
        """The pages a masked request of this task may use under the session's budget. Raises `BudgetError` if a site is left bare."""
        return self._residents.resident_set(task)

    @property
    def residents(self) -> Residents:
        """What its resident sets are chosen by."""
        return self._residents

    def settings(self) -> dict[str, Any]:
        """The resolved configuration, as every record carries it."""
        return {
            "tool_version": edgeml.__version__,
            "bundle": self.bundle.path.name,
            "bundle_id": self.bundle.id,
            "variant": None if self.variant is None else self.variant.name,
            "backend": self.backend,
            "threads": self.threads,
            "memory": self.budget.asked,
            "memory_budget_bytes": self.budget.total_bytes,
            "pinned_bytes": self.budget.pinned_bytes,
            "scratch_bytes": self.budget.scratch_bytes,
            "slots": self.budget.slots,
            "slot_bytes": self.budget.slot_bytes,
            "pageable_pages": self.budget.pageable_pages,
            "residency": self.residency,
            "direct_reads": self.direct_reads,
            "graph_bytes": self._graph_bytes(),
            "masked_retention": self._residents.retention(),
        }

    def stats(self) -> dict[str, Any]:
        """Counters since opening, and what is held: see `native.Context.stats`."""
        with self._call():
            return self._context.stats()

    def evict_all(self) -> None:
        """Give up every page that is not pinned, here and in the system's page cache, so that the next request starts cold."""
        with self._call():
            self._context.evict_all()
            os.posix_fadvise(self.bundle.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Release graphs, memory and the file; a second call does nothing. Raises `UsageError` while calls run."""
        with self._lock:
            self._sealed, serving = True, self._serving
        if serving is not None:
            serving.close()
        with self._lock:
            if self._calls:
                raise UsageError(f"{self.bundle.path}: {self._calls} calls still run; close the session after them")
            self._closed = True
            self._residents.close()
            self._graphs.close()
            self._context.close()
            self.bundle.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _graph_bytes(self) -> int:
        """Bytes of the graphs that the tasks run, as stored: onnxruntime holds them, outside the budget."""
        used = {name for task in self.manifest.tasks for name in task.stages.names}
        used |= {self.manifest.router.stage} if self.manifest.router is not None else set()
        return sum(self.bundle.pages[page].length for page in {stage.page for stage in self.manifest.stages if stage.name in used})

    def _variant_notes(self, wish: Wish) -> list[str]:
        if self.variant is None or self.variant.latency_s is None or wish.max_latency is None:
            return []
        recorded = f"{self.variant.latency_s * 1e3:.3g} ms, recorded on {self.variant.latency_cpu or 'an unnamed processor'}"
        return [f"variant '{self.variant.name}' was chosen by its {recorded}; measure it here with bench"]

    @contextmanager
    def _image_request(self) -> Iterator[native.Request]:
        with self._turns, self._context.request() as request:
            yield request

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise UsageError(f"{self.bundle.path}: the session is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1

    def _working_set(self, task: Task) -> WorkingSet:
        from edgeml.submission import working_set

        masked = self.residency == "masked" and not isinstance(task.stages, ImageStages)
        return working_set(self.manifest, task, self.budget, self.resident_set(task.name) if masked else None)

    def _advise(self, pages: Sequence[int], priority: int, load: bool) -> None:
        if load:
            self._context.prefetch(pages, priority)
        else:
            self._context.set_priority(pages, priority)

    def _windows(
        self,
        task: Task,
        text: str | None,
        texts: Sequence[str] | None,
        pairs: Sequence[tuple[str, str]] | None,
        arrays: Mapping[str, NDArray[Any]] | None,
    ) -> Iterator[TextBatch]:
        if sum(value is not None for value in (text, texts, pairs, arrays)) != 1:
            raise UsageError("give exactly one of text, texts, pairs and arrays")
        if arrays is not None:
            return iter([checked_arrays(arrays)])
        if task.pair != (pairs is not None):
            wanted = "pairs of texts (text and text_pair)" if task.pair else "single texts, not pairs"
            raise UsageError(f"task '{task.name}' takes {wanted}")
        if pairs is not None:
            return self._encode(task, [first for first, _ in pairs], [second for _, second in pairs])
        return self._encode(task, [text] if text is not None else list(texts or []), None)

    def _encode(self, task: Task, firsts: list[str], seconds: list[str] | None) -> Iterator[TextBatch]:
        preprocessor = self.preprocessor(task)
        for start in range(0, len(firsts), WINDOW_ROWS):
            part = slice(start, start + WINDOW_ROWS)
            yield preprocessor.encode(firsts[part], None if seconds is None else seconds[part])

    def _run_window(self, task: Task, window: TextBatch, pick: Pick, counters: Counters) -> tuple[Floats, list[float]]:
        outputs: list[Floats] = []
        order, row_s = [], np.zeros(len(window.ids))
        for rows, batch in batches(window):
            started = time.perf_counter()
            outputs.append(self._run_batch(task, batch, pick(batch), counters))
            row_s[rows] = (time.perf_counter() - started) / len(rows)
            order.append(rows)
        if not outputs:
            return np.zeros((0, len(task.labels)), np.float32), []
        mixed = np.concatenate(outputs)
        values = np.empty_like(mixed)
        values[np.concatenate(order)] = mixed
        return values, [float(value) for value in row_s]

    def _run_batch(
        self, task: Task, batch: TextBatch, resident: ResidentSet | None, counters: Counters, paged: Callable[[], None] = lambda: None
    ) -> Floats:
        assert isinstance(task.stages, TaskStages)
        tensors = self._run_stages(task, self._residents.stages(task, task.stages), batch, resident, counters, paged)
        return checked_answer(task, tensors, len(batch.ids), str(self.bundle.path))

    def _run_stages(
        self,
        task: Task,
        stages: TaskStages,
        batch: TextBatch,
        resident: ResidentSet | None,
        counters: Counters,
        paged: Callable[[], None] = lambda: None,
    ) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {"ids": batch.ids, "types": batch.types, "mask": batch.mask}
        masked = self._residents.hides(resident)
        with self._turns, self._context.request() as request:
            started = time.perf_counter()
            if resident is not None:
                with naming(self.bundle):
                    request.lease(resident.pages)
            paged()
            tensors |= self._graphs.run(stages.embed, tensors, request)
            if batch.bias is not None:
                tensors["bias"] = batch.bias
            elif stages.router is not None:
                tensors |= self._graphs.run(stages.router, tensors, request)
            else:
                tensors["bias"] = np.zeros((len(batch.ids), *mask_of(self.manifest, ()).shape), np.float32)
            router = f"{self.bundle.path}: the router of task '{task.name}'"
            tensors["bias"] = checked_bias(self.manifest, tensors["bias"], len(batch.ids), router, resident)
            tensors |= self._graphs.run(stages.trunk, tensors, request)
            tensors |= self._graphs.run(stages.head, tensors, request)
        counters.add(request, int(batch.mask.sum()), masked)
        counters.stand_in = (resident and resident.stand_in) or counters.stand_in
        self._residents.ran(task.name, batch, tensors, request, time.perf_counter() - started, masked)
        return tensors


def open(
    path: str | os.PathLike[str],
    memory: int | str | None = None,
    threads: int | None = None,
    residency: str = "exact",
    isa: str | None = None,
    *,
    variant: str | None = None,
    max_latency: float | str | None = None,
    max_bytes: int | str | None = None,
    min_score: float | None = None,
    state: str | None = None,
) -> Session:
    """Open a bundle. `memory`: bytes, "64MiB", "50%" or "auto"; `threads` to compute with; `residency`: "exact", "masked" or "hybrid".

    None for `memory` is EDGEML_MEMORY or "auto": everything where it fits; for `threads` EDGEML_THREADS or all processors allowed.
    Of a bundle with variants, `variant` names one; or limits pick it by what its export recorded: `max_latency` in seconds or as
    "20ms", `max_bytes` or "2MiB" for its graphs, `min_score` the mean over its tasks (`variants` has the rule).
    `state` (or EDGEML_STATE): the folder of what is learned of the bundle on this device (`residency`, `sidecar`), by default its own.
    Raises `BundleError` for a bad file, `BudgetError` below the floor, `UsageError` listing the variants when none keeps to the
    limits, `DeviceError` when reading fails.
    """
    return Session(path, memory, threads, residency, isa, Wish(variant, max_latency, max_bytes, min_score), state)
