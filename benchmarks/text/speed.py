#!/usr/bin/env python3
"""One request with everything in memory, against onnxruntime's own time for the dense model: f32, and its dynamic int8.

    speed.py [--dense model.pt] [--bundle models/multitask-text.edgeml] [--task banking77] [--tokens 32,64,128] [--threads 1,2]

Three contestants answer the same seeded random token ids, batch 1, one after the other in every round and in another order each
round: the bundle's request (embed, router, trunk and head through `Session.run`, ids given, so without tokenizing); the dense
reference with a head of the same task as one f32 graph in onnxruntime; and the same graph after onnxruntime's dynamic
quantization. Both graphs run with all graph optimisations and as many threads as the bundle. The first round of each is left out.

The bound: at 64 tokens and 1 thread the bundle takes less time than f32, as a ratio of medians whose interval (bootstrap over
rounds) stays below 1. Everything else is reported. Token counts are capped at what the model reads.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnxruntime
from answers import read_questions
from benchlib import MODEL, Verdict, finish, numbers, parser, progress, run, shared_text, verdict
from numpy.typing import NDArray

from edgeml.measure import percentile
from edgeml.metrics import Interval, bootstrap
from edgeml.session import Session
from edgeml.session import open as open_session

GATE_TOKENS, GATE_THREADS = 64, 1
NAMES = ("bundle", "f32", "int8")
#: onnxruntime's idle threads spin for a while after an answer; with more than one, a pause keeps them from the next contestant.
PAUSE_S = 0.01

Ids = NDArray[np.int64]
Calls = dict[str, Callable[[Ids], Any]]


def write_graphs(chosen: Any, folder: Path) -> None:
    """Export both dense graphs into `folder`: in a process of its own, so that torch is not in the one that measures."""
    from edgeml_export.dense import export_dense_onnx, export_dense_onnx_int8
    from torch_models import load_model

    with open_session(chosen.bundle, "0%", 1) as session:
        questions = read_questions(chosen.data, session.manifest, str(chosen.bundle), 1)
        limit = session.task(chosen.task).preprocess.max_tokens
    model = load_model(chosen.dense, "dense", questions)
    export_dense_onnx(model.module, folder / "f32.onnx", limit, chosen.task)
    export_dense_onnx_int8(model.module, folder / "int8.onnx", limit, chosen.task, reduce_range=not has_vnni())


def has_vnni() -> bool:
    """Whether 8-bit products do not saturate here; on x86 without VNNI onnxruntime's advice is 7-bit weights."""
    text = Path("/proc/cpuinfo").read_text("utf-8", "replace") if Path("/proc/cpuinfo").exists() else ""
    is_x86 = "GenuineIntel" in text or "AuthenticAMD" in text
    return "vnni" in text or not is_x86


def contestants(session: Session, task: str, folder: Path, threads: int) -> Calls:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    calls: Calls = {"bundle": lambda ids: session.run(task, arrays={"ids": ids})}
    for name in NAMES[1:]:
        graph = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
        calls[name] = lambda ids, graph=graph: graph.run(
            ["scores"], {"ids": ids, "types": np.zeros_like(ids), "mask": np.ones(ids.shape, np.float32)}
        )
    return calls


def race(
    calls: dict[str, Callable[[Ids], Any]], inputs: Sequence[Ids], pause: float, tick: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, the first round left out."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    orders = list(itertools.permutations(calls))
    for number, ids in enumerate(inputs):
        for name in orders[number % len(orders)]:
            if pause:
                time.sleep(pause)
            started = time.perf_counter()
            calls[name](ids)
            if number:
                seconds[name].append(time.perf_counter() - started)
        tick(1)
    return seconds


def ratio(ours: Sequence[float], other: Sequence[float]) -> Interval:
    """Ratio of medians, with a bootstrap over rounds."""
    a, b = np.array(ours), np.array(other)
    return bootstrap(lambda rows: float(np.median(a[rows[0]]) / np.median(b[rows[0]])), [len(a)], 0)


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    times = {
        name: {"p50_ms": 1e3 * (percentile(values, 0.5) or 0), "p90_ms": 1e3 * (percentile(values, 0.9) or 0), "min_ms": 1e3 * min(values)}
        for name, values in seconds.items()
    }
    return times | {f"ratio_to_{name}": ratio(seconds["bundle"], seconds[name]).as_json() for name in NAMES[1:]}


def measure(chosen: Any, folder: Path) -> tuple[list[Verdict], dict[str, Any]]:
    gate, found, settings = None, [], {}
    tick = progress(len(chosen.threads) * len(chosen.tokens) * (chosen.rounds + 1), "speed")
    for threads in chosen.threads:
        with open_session(chosen.bundle, "100%", threads) as session:
            settings = session.settings()
            task = session.task(chosen.task)
            calls = contestants(session, chosen.task, folder, threads)
            vocabulary = session.preprocessor(task).vocabulary
            for tokens in sorted({min(count, task.preprocess.max_tokens) for count in chosen.tokens}):
                drawn = np.random.default_rng(tokens).integers(0, vocabulary, (chosen.rounds + 1, 1, tokens))
                seconds = race(calls, drawn, PAUSE_S if threads > 1 else 0, tick)
                found.append({"threads": threads, "tokens": tokens, "rounds": chosen.rounds, **summary(seconds)})
                print(json.dumps({"threads": threads, "tokens": tokens, **{name: found[-1][name]["p50_ms"] for name in NAMES}}))
                if (tokens, threads) == (GATE_TOKENS, GATE_THREADS):
                    gate = ratio(seconds["bundle"], seconds["f32"])
    name = f"time of the bundle over dense f32, {GATE_TOKENS} tokens, {GATE_THREADS} thread"
    if gate is None:
        why = {"why": "not among --tokens and --threads, or the model reads fewer tokens"}
        one = verdict(name, "< 1, with its interval", None, None, **why)
    else:
        one = verdict(name, "< 1, with its interval", gate.value, None if gate.high is None else gate.high < 1, gate)
    about = {
        "bundle": settings,
        "dense": "given" if chosen.dense or chosen.graphs else "untrained",
        "task": chosen.task,
        "int8_weights_bits": 8 if has_vnni() else 7,
    }
    sizes = {name: (folder / f"{name}.onnx").stat().st_size for name in NAMES[1:]}
    return [one], about | {"graph_bytes": sizes, "results": found}


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--dense", help="the dense reference: a model.pt, or file.py:function (default: as it is before training, which takes as long)"
    )
    options.add_argument("--bundle", type=Path, default=MODEL)
    options.add_argument("--data", type=Path, default=shared_text(), help="where the tasks' names and labels are read")
    options.add_argument("--task", default="banking77")
    options.add_argument("--tokens", type=numbers, default=[32, 64, 128])
    options.add_argument("--threads", type=numbers, default=[1, 2])
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--graphs", type=Path, help="folder with f32.onnx and int8.onnx; written there if they are missing")
    options.add_argument("--export-only", action="store_true", help="write the graphs and stop")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.graphs or Path(temporary)
        if not all((folder / f"{name}.onnx").is_file() for name in NAMES[1:]):
            folder.mkdir(parents=True, exist_ok=True)
            if chosen.export_only:
                write_graphs(chosen, folder)
                return 0
            print("exporting the dense graphs ...", file=sys.stderr)
            child = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--graphs", str(folder), "--export-only"], check=False)
            if child.returncode:
                return child.returncode
        verdicts, figures = measure(chosen, folder)
    return finish("text-speed", verdicts, figures, chosen.records)


if __name__ == "__main__":
    run(main)
