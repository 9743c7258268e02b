"""ONNX graphs of a bundle, run by onnxruntime: the only module that imports it.

A stage's graph is loaded when a request first needs it, and its bytes are given back at once. Trunks and the stages of tasks on
images get the session's threads, everything else one. Execution is sequential, so a custom operator runs on the thread that called
`run` and finds its request there. No memory arena: one per graph would keep each graph's largest batch for ever, outside the budget.

A trunk's layers take so little time that waking a thread for each costs more than it brings. So its threads spin until the run ends, and
its custom operators compute on them too: two pools would take each other's processors. Where experts come from a file the readers need
those processors, so there threads sleep, and the operators use the context's own. Networks for images gain from spinning only when
requests follow each other at once, and lose after a pause; theirs sleep.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from edgeml import native
from edgeml.bundle import Bundle
from edgeml.errors import BundleError, DeviceError, EdgemlError, UsageError
from edgeml.manifest import ImageStages, Manifest, Stage
from edgeml.store import open_context

__all__ = ["Graphs", "check_stages"]

CONTEXT_KEY, THREADS_KEY = "edgeml.context", "edgeml.threads"
FATAL = 4  # onnxruntime's log level: what matters is raised, the rest would only repeat it on stderr
OUT_OF_MEMORY = re.compile(r"bad.?alloc|allocate memory|out of memory", re.IGNORECASE)


@dataclass
class _Graph:
    """A loaded stage. The frames of a raised error refer to this and not to onnxruntime's session, so `close` can end that."""

    session: Any

    def has(self, stage: Stage) -> bool:
        """Whether its inputs are exactly those of the stage, and the stage's outputs among its own."""
        inputs, outputs = ({value.name for value in part()} for part in (self.session.get_inputs, self.session.get_outputs))
        return inputs == set(stage.inputs) and set(stage.outputs) <= outputs


class Graphs:
    """The stages of one open bundle bound to one native context. Safe for several threads."""

    def __init__(self, bundle: Bundle, manifest: Manifest, context: native.Context, threads: int, paged: bool = False) -> None:
        self._bundle, self._context = bundle, context
        self._stages: dict[str, Stage] = {stage.name: stage for stage in manifest.stages}
        trunks = {self._stages[task.stages.trunk].page for task in manifest.tasks if not isinstance(task.stages, ImageStages)}
        images = {self._stages[name].page for task in manifest.tasks if isinstance(task.stages, ImageStages) for name in task.stages.names}
        # By page: a trunk that tells its choices is a stage of its own on the trunk's page.
        self._threads = {stage.name: threads for stage in manifest.stages if stage.page in trunks | images}
        self._spinning = {stage.name for stage in manifest.stages if stage.page in trunks and threads > 1 and not paged}
        self._loaded: dict[str, _Graph] = {}
        self._lock = threading.Lock()
        #: For `profile`: called with each stage's name and when it began, on CLOCK_MONOTONIC; and where onnxruntime writes its own.
        self.observe: Callable[[str, int], None] | None = None
        self.profile_folder: str | None = None

    def run(self, name: str, tensors: Mapping[str, NDArray[Any]], request: native.Request) -> dict[str, NDArray[Any]]:
        """Run a stage on the tensors it names, and return its outputs by name.

        Raises what the request met (`PageError`, ...); `BundleError` when the graph itself cannot run on its inputs.
        """
        stage = self._stages[name]
        graph, options = self._graph(stage), _run_options()
        missing = [key for key in stage.inputs if key not in tensors]
        if missing:
            raise BundleError(f"{self._bundle.path}: stage '{name}' reads '{missing[0]}', which no stage before it makes")
        began = 0 if self.observe is None else time.monotonic_ns()
        try:
            outputs = graph.session.run(list(stage.outputs), {key: tensors[key] for key in stage.inputs}, options)
            if self.observe is not None:
                self.observe(name, began)
            return dict(zip(stage.outputs, outputs, strict=True))
        except Exception as error:  # onnxruntime has one class per status and no common base
            failure = self._met(stage, request) or self._failure(f"stage '{name}' failed", error)
        raise failure  # out here, so that it does not carry onnxruntime's error, whose frames would keep the graph alive

    def load(self, name: str) -> None:
        """Create a stage's session now. Raises `BundleError` when the graph is not one that onnxruntime accepts."""
        self._graph(self._stages[name])

    def end_profiles(self) -> dict[str, str]:
        """Of each stage that was loaded with a `profile_folder`, the file that onnxruntime has written; it writes no more."""
        with self._lock:
            return {name: str(graph.session.end_profiling()) for name, graph in self._loaded.items()}

    def close(self) -> None:
        """Release all graphs; afterwards the native context may be closed. No call may be running."""
        with self._lock:
            for graph in self._loaded.values():
                graph.session = None
            self._loaded.clear()

    def _graph(self, stage: Stage) -> _Graph:
        with self._lock:
            graph = self._loaded.get(stage.name)
            if graph is None:
                graph = _Graph(self._create(stage))
                if not graph.has(stage):
                    graph.session = None
                    raise BundleError(f"{self._bundle.path}: stage '{stage.name}' declares other inputs or outputs than its graph has")
                self._loaded[stage.name] = graph
            return graph

    def _create(self, stage: Stage) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads.get(stage.name, 1), 1
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        spinning = stage.name in self._spinning
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.profile_folder is not None:
            options.enable_profiling, options.profile_file_prefix = True, f"{self.profile_folder}/{len(self._loaded)}"
        graph, context = self._bundle.read(stage.page), self._context

        def make(data: bytes) -> Any:
            return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

        try:
            if not isinstance(context, native.Context):
                from edgeml.graph_split import SplitGraph  # NumPy's, which nobody else needs

                return SplitGraph(graph, make, context.operator)
            options.add_session_config_entry(CONTEXT_KEY, context.handle)
            if spinning:
                options.add_session_config_entry(THREADS_KEY, "session")
            options.register_custom_ops_library(native.LIBRARY_PATH)
            return make(graph)
        except Exception as error:  # as above
            failure = self._failure(f"stage '{stage.name}' (page {stage.page}) is not a graph that runs", error)
        raise failure

    def _met(self, stage: Stage, request: native.Request) -> EdgemlError | None:
        """What the native side met; None where the graph itself asked for what cannot be, as no caller's token ids reach it."""
        met = request.error
        if met is None or (isinstance(met, UsageError) and "ids" not in stage.inputs):
            return None
        return type(met)(f"{self._bundle.path}: {met}")

    def _failure(self, what: str, error: Exception) -> EdgemlError:
        text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
            return DeviceError(f"{self._bundle.path}: {what}: not enough free memory; try shorter texts, fewer images or a smaller budget")
        return BundleError(f"{self._bundle.path}: {what}: {text[:300] or type(error).__name__}")


def check_stages(bundle: Bundle, manifest: Manifest) -> Iterator[str]:
    """Load every graph of the bundle once, yielding each stage's name; raises `BundleError` naming the first that fails.

    Opening the native side for it also reads and checks every pinned page.
    """
    if not manifest.stages:
        return
    context, _, _ = open_context(bundle, memory="0%", threads=1)
    graphs = Graphs(bundle, manifest, context, 1)
    try:
        for stage in manifest.stages:
            graphs.load(stage.name)
            graphs.close()  # one at a time in memory
            yield stage.name
    finally:
        graphs.close()
        context.close()


def _run_options() -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = FATAL
    return options
