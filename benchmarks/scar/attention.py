#!/usr/bin/env python3
"""Bucketed sparse attention (`edgeml.ScarAttention`) against onnxruntime's own dense attention operator (`MultiHeadAttention`).

    attention.py [--tokens 1024,4096] [--threads 1] [--rounds 40]

Both are graphs of one node in onnxruntime sessions with the same number of threads, and answer the same q, k and v in the same layout,
(1, tokens, heads * size) with 6 heads of 64. They take turns, in another order each round; the first round is left out.

Three masks of density 0.125, tokens in random places: `domains`, 8 equal domains all tokens are sure of, with 32 clusters inside each;
`clusters`, 8 equal clusters and nobody sure; `both`, 15 clusters and, independent of them, 16 domains. Each is checked against the dense
masked oracle (1e-5, on up to 512 queries) before it is timed. `published`, the mask of the paper's code with half of the tokens sure, is
over the density at which all pairs are computed; it has no bound.

The bound: with 1 thread the dense operator takes at least 4 times as long, at each mask and token count; as a ratio of medians whose
interval (bootstrap over rounds) stays above 4.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
import onnxruntime
from benchlib import Verdict, finish, numbers, parser, progress, run, verdict

from edgeml import native, scar
from edgeml.bundle import Bundle, write_bundle
from edgeml.errors import DeviceError
from edgeml.measure import percentile
from edgeml.metrics import Interval, bootstrap

HEADS, SIZE, THRESHOLD = 6, 64, 0.5
BOUND, AIM, TOLERANCE, CHECKED = 4.0, 6.0, 1e-5, 512
MASKS = ("domains", "clusters", "both", "published")
#: An onnxruntime thread that has nothing to do spins for a while; with more than one, a pause keeps them from the next contestant.
PAUSE_S = 0.01
MANIFEST = {"format": 1, "producer": {"name": "attention.py", "version": "0"}, "stages": [], "sites": [], "tasks": []}

Feeds = dict[str, Any]


def routing(mask: str, tokens: int, rng: np.random.Generator) -> tuple[Feeds, dict[str, Any]]:
    """Cluster, domain and confidence of each token, and the operator's attributes."""
    place = rng.permutation(tokens)
    if mask == "domains":
        domain = place % 8
        cluster, sure, counts = domain * 32 + rng.integers(0, 32, tokens), np.ones(tokens), (256, 8)
    elif mask == "clusters":
        cluster, domain, sure, counts = place % 8, place % 8, np.zeros(tokens), (8, 8)
    elif mask == "both":
        cluster, domain, sure, counts = place % 15, rng.permutation(tokens) % 16, np.ones(tokens), (15, 16)
    else:
        cluster, domain, sure, counts = rng.integers(0, 256, tokens), place % 8, place % 2, (256, 8)
    fed = {"cluster": cluster.astype(np.int32), "domain": domain.astype(np.int32), "confidence": np.asarray(sure, np.float32)}
    attributes = {
        "clusters": counts[0],
        "domains": counts[1],
        "threshold": THRESHOLD,
        "heads": HEADS,
        "published": int(mask == "published"),
    }
    return {name: value[None] for name, value in fed.items()}, attributes


def one_node(operator: str, domain: str, inputs: dict[str, int], outputs: list[str], attributes: dict[str, Any]) -> bytes:
    node = onnx.helper.make_node(operator, list(inputs), outputs, domain=domain, **attributes)
    given = [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()]
    wanted = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(domain, 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "one", given, wanted), opset_imports=opsets, ir_version=8)
    return bytes(model.SerializeToString())


def session(data: bytes, threads: int, context: native.Context | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if context is not None:
        options.add_session_config_entry("edgeml.context", context.handle)
        options.register_custom_ops_library(native.LIBRARY_PATH)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@contextmanager
def threads_only(threads: int) -> Iterator[native.Context]:
    """A context on an empty bundle: attention wants its threads and kernels, and no weights."""
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(Path(folder) / "empty.edgeml", [], MANIFEST)
        with Bundle.open(Path(folder) / "empty.edgeml") as bundle:
            context = native.Context(bundle.fd, bundle.index_bytes, [], slots=1, threads=threads)
            try:
                yield context
            finally:
                context.close()


def check(fed: Feeds, mask: str, y: Any, density: float) -> float:
    """The largest difference to the oracle over some queries of every head."""
    route = [fed[name][0] for name in ("cluster", "domain", "confidence")]
    rows = np.linspace(0, y.shape[1] - 1, min(CHECKED, y.shape[1])).astype(int)
    full = scar.published(route[0], route[2], THRESHOLD) if mask == "published" else scar.allowed(*route, THRESHOLD)
    q, k, v, got = (np.moveaxis(x[0].reshape(-1, HEADS, SIZE), 1, 0) for x in (fed["q"], fed["k"], fed["v"], y))
    worst = max(np.abs(scar.attention(q[h][rows], k[h], v[h], full[rows]) - got[h][rows]).max() for h in range(HEADS))
    if not worst <= TOLERANCE or abs(scar.density(full) - density) > TOLERANCE:
        raise DeviceError(f"the operator is wrong by {worst:.3g} on the mask '{mask}'; run the tests")
    return float(worst)


def race(calls: dict[str, Callable[[], Any]], rounds: int, pause: float, tick: Callable[[int], None]) -> dict[str, list[float]]:
    """Seconds of each contestant in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    orders = list(itertools.permutations(calls))
    for number in range(rounds + 1):
        for name in orders[number % len(orders)]:
            time.sleep(pause)
            started = time.perf_counter()
            calls[name]()
            if number:
                seconds[name].append(time.perf_counter() - started)
        tick(1)
    return seconds


def speedup(dense: list[float], ours: list[float]) -> Interval:
    """Ratio of medians, with a bootstrap over rounds."""
    a, b = np.array(dense), np.array(ours)
    return bootstrap(lambda rows: float(np.median(a[rows[0]]) / np.median(b[rows[0]])), [len(a)], 0)


def measure(tokens: int, threads: int, rounds: int, context: native.Context) -> tuple[list[Verdict], dict[str, Any]]:
    rng = np.random.default_rng(tokens)
    floats, words = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    tensors = {name: rng.normal(size=(1, tokens, HEADS * SIZE)).astype(np.float32) for name in "qkv"}
    dense = session(one_node("MultiHeadAttention", "com.microsoft", dict.fromkeys("qkv", floats), ["y"], {"num_heads": HEADS}), threads)
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: dense.run(None, tensors)}
    kinds = dict.fromkeys("qkv", floats) | {"cluster": words, "domain": words, "confidence": floats}
    found: dict[str, Any] = {"tokens": tokens, "threads": threads, "rounds": rounds, "masks": {}}
    for mask in MASKS:
        route, attributes = routing(mask, tokens, rng)
        ours = session(one_node("ScarAttention", "edgeml", kinds, ["y", "density"], attributes), threads, context)
        y, density = ours.run(None, tensors | route)
        worst = check(tensors | route, mask, y, float(density[0]))
        found["masks"][mask] = {"density": float(density[0]), "largest_difference": worst}
        calls[mask] = lambda ours=ours, fed=tensors | route: ours.run(None, fed)
    seconds = race(calls, rounds, PAUSE_S if threads > 1 else 0, progress(rounds + 1, f"{tokens} tokens, {threads} threads"))
    for name, values in seconds.items():
        times = {
            "p50_ms": 1e3 * (percentile(values, 0.5) or 0),
            "p90_ms": 1e3 * (percentile(values, 0.9) or 0),
            "min_ms": 1e3 * min(values),
        }
        (found if name == "dense" else found["masks"][name]).update({"dense": times} if name == "dense" else times)
    verdicts = []
    for mask in MASKS:
        ratio = speedup(seconds["dense"], seconds[mask])
        found["masks"][mask]["speedup"] = ratio.as_json()
        if threads == 1 and mask != "published":
            about = {"aim": AIM, "reaches_aim": ratio.value >= AIM, "density": found["masks"][mask]["density"]}
            name = f"dense time over sparse, {tokens} tokens, mask '{mask}', 1 thread"
            verdicts.append(verdict(name, f">= {BOUND:g}, with its interval", ratio.value, (ratio.low or 0) >= BOUND, ratio, **about))
    return verdicts, found


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--tokens", type=numbers, default=[1024, 4096])
    options.add_argument("--threads", type=numbers, default=[1])
    options.add_argument("--rounds", type=int, default=40)
    chosen = options.parse_args()
    verdicts, results = [], []
    for threads in chosen.threads:
        with threads_only(threads) as context:
            isa = context.stats()["isa"]
            for tokens in chosen.tokens:
                judged, found = measure(tokens, threads, chosen.rounds, context)
                verdicts += judged
                results.append(found)
    figures = {"heads": HEADS, "head_size": SIZE, "batch": 1, "isa": isa, "onnxruntime": onnxruntime.__version__, "results": results}
    return finish("scar-attention", verdicts, figures, chosen.records)


if __name__ == "__main__":
    run(main)
