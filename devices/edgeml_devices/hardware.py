"""This machine: what it is, and what it can do, measured in under a minute with our own kernels, graphs and reads.

`describe` only looks. `measure_profile` works: kernels on made matrices, onnxruntime on made graphs, reads past the cache from a file
it writes for that, and small made bundles answered in processes of their own for what a process and a request cost. Each rate is
timed in several short batches: the profile has their median, and as low and high what all but the outermost show.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml import native
from edgeml.bundle import Bundle, PageKind, PageSource, WeightType, write_bundle
from edgeml.device import Figure, Profile
from edgeml.errors import DeviceError
from edgeml.graph import Graphs
from edgeml.graph_bytes import Attribute, Node, TensorType, graph
from edgeml.graph_cost import graph_cost
from edgeml.kernels import pack_matrix
from edgeml.made import make_mixture, tokenizer_json
from edgeml.manifest import load_manifest
from edgeml.measure import environment
from edgeml.predict import pages_of, predict
from edgeml.preprocess import TextPreprocessor
from edgeml.store import available_bytes, open_context, plan_budget

__all__ = ["STEPS", "answered", "describe", "energy_sensor", "measure_profile", "read_rates", "throttling"]

BATCHES, BATCH_S = 7, 0.04
READ_FILE_BYTES, READ_S = 64 << 20, 0.6
STREAM_BYTES = 24 << 20
TOKENS, HIDDEN, PROBE_TOKENS = 64, 384, 8
#: What a `tick` is called with, in order.
STEPS = ("kernels", "memory", "graphs", "reading", "processes")

Floats = NDArray[np.float32]
Tick = Callable[[str], None]


def describe(folder: Path) -> dict[str, Any]:
    """What the machine says of itself; `folder` is where models are to lie. Unknown is null."""
    disk = shutil.disk_usage(_writable(folder))
    with _scratch(folder, 1 << 16) as path:
        direct = _direct(path) is not None
    return environment() | {
        "kernels": native.backends(),
        "checksum": native.crc32c_name(),
        "available_bytes": available_bytes(),
        "disk_free_bytes": disk.free,
        "disk_total_bytes": disk.total,
        "direct_reads": direct,
        "throttling": throttling(),
        "energy_sensor": energy_sensor(),
        "load_average": os.getloadavg()[0],
    }


def throttling(sys_root: Path = Path("/sys")) -> dict[str, Any]:
    """Temperature, governor, and the clock now against the most it may be; null where the system does not say."""
    cpu = sys_root / "devices/system/cpu/cpu0"
    zones = [_number(zone) for zone in sorted((sys_root / "class/thermal").glob("thermal_zone*/temp"))]
    now, most = (_number(cpu / "cpufreq" / name) for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
    celsius = max((zone / 1000 for zone in zones if zone is not None), default=None)
    return {
        "celsius": celsius,
        "governor": _words(cpu / "cpufreq/scaling_governor"),
        "clock_hz": None if now is None else now * 1000,
        "most_clock_hz": None if most is None else most * 1000,
        "throttle_events": _number(cpu / "thermal_throttle/core_throttle_count"),
    }


def energy_sensor(sys_root: Path = Path("/sys")) -> str | None:
    """How energy can be read here, None where it cannot."""
    for file in sorted((sys_root / "class/powercap").glob("*/energy_uj")):
        if os.access(file, os.R_OK):
            return "powercap"
    board = _words(Path("/proc/device-tree/model")) or ""
    return "vcgencmd pmic_read_adc" if "Raspberry Pi 5" in board and shutil.which("vcgencmd") else None


def measure_profile(folder: Path, name: str = "host", tick: Tick = lambda _: None) -> Profile:
    """The profile of this machine, reads measured on the disk of `folder`. Raises `DeviceError` where that cannot be written."""
    _writable(folder)
    said, figures = environment(), {}  # type: dict[str, Any], dict[str, Figure]
    source = f"measured by edgeml device probe on {said['cpu'] or said['board'] or said['architecture']}"

    def add(key: str, values: list[float]) -> None:
        values = sorted(values)
        inner = values[1:-1] if len(values) > 3 else values
        figures[key] = Figure(median(values), source, inner[0], inner[-1])

    add("cpu.cores", [float(said["processors"])])
    for key, values in _kernels().items():
        add(key, values)
    tick(STEPS[0])
    add("memory.total_bytes", [float(said["memory_bytes"])])
    add("memory.usable_bytes", [float(available_bytes())])
    for key, values in _memory(said["processors"]).items():
        add(key, values)
    tick(STEPS[1])
    with tempfile.TemporaryDirectory(prefix=".edgeml-probe-", dir=_writable(folder)) as temporary:
        place = Path(temporary)
        for key, values in _graph_rates(place).items():
            add(key, values)
        tick(STEPS[2])
        for (block, depth), values in read_rates(place).items():
            add(f"storage.{block}_qd{depth}_bytes_per_s", values)
        tick(STEPS[3])
        title = said["board"] or said["cpu"] or "this machine"
        architecture, date = str(said["architecture"]), time.strftime("%Y-%m-%d", time.gmtime())
        profile = Profile(name, title, architecture, figures, native.backends()[-1], energy_sensor(), date)
        for key, values in _processes(place, profile, add).items():
            add(key, values)
        tick(STEPS[4])
    return profile


# ---- kernels and memory ----


def _seconds(call: Callable[[], Any], batches: int = BATCHES) -> list[float]:
    """Seconds of one call, in each of some batches of about BATCH_S, after one that is thrown away."""
    call()
    started = time.perf_counter()
    call()
    count = max(1, min(int(BATCH_S / max(time.perf_counter() - started, 1e-7)), 100_000))
    found = []
    for _ in range(batches):
        started = time.perf_counter()
        for _ in range(count):
            call()
        found.append((time.perf_counter() - started) / count)
    return found


def _kernels() -> dict[str, list[float]]:
    """Rates of our kernels, one thread."""
    rng = np.random.default_rng(0)
    x, found = rng.standard_normal((TOKENS, 1024)).astype(np.float32), {}  # type: Floats, dict[str, list[float]]
    empty = median(_seconds(lambda: native.apply_activation(None, 0, x[:1, :16])))  # what a call from Python costs

    def matrix(kind: WeightType, rows: int, cols: int, n: int) -> list[float]:
        high = rows if rows <= 1024 else 256  # a larger one repeats itself
        tiles = pack_matrix(rng.standard_normal((high, cols)).astype(np.float32), kind) * (rows // high)
        given = np.ascontiguousarray(x[:n, :cols])
        return [max(s - empty, 1e-9) for s in _seconds(lambda: native.apply_matrix(None, kind, tiles, rows, cols, given))]

    for kind, name in ((WeightType.INT8, "int8"), (WeightType.INT4, "int4"), (WeightType.F32, "f32")):
        found[f"kernels.{name}_macs_per_s"] = [TOKENS * 1024 * 1024 / s for s in matrix(kind, 1024, 1024, TOKENS)]
        if name != "f32":
            width = 1.0625 if name == "int8" else 0.5625  # bytes a weight, scales included
            rows = int(STREAM_BYTES / width / 1024) // 256 * 256
            found[f"kernels.{name}_stream_bytes_per_s"] = [rows * 1024 * width / s for s in matrix(kind, rows, 1024, 1)]
    products = TOKENS * 64 * 384 / median(found["kernels.int8_macs_per_s"])
    thin = [
        a + b - 2 * products
        for a, b in zip(matrix(WeightType.INT8, 64, 384, TOKENS), matrix(WeightType.INT8, 384, 64, TOKENS), strict=True)
    ]
    found["kernels.values_per_s"] = [2 * TOKENS * (64 + 384) / max(s, 1e-7) for s in thin]
    flat = np.ascontiguousarray(x[:, :256])
    activated = _seconds(lambda: native.apply_activation(None, 1, flat))
    found["kernels.activations_per_s"] = [flat.size / max(s - empty, 1e-9) for s in activated]
    return found


def _memory(cores: int) -> dict[str, list[float]]:
    """Copying in memory, which reads and writes; and how much of another core each further thread gives the kernels."""
    size = 32 << 20
    arrays = [(np.ones(size // 8), np.empty(size // 8)) for _ in range(min(cores, 4))]
    alone = _seconds(lambda: np.copyto(arrays[0][1], arrays[0][0]))
    found = {"memory.read_bytes_per_s": [2 * size / s for s in alone]}
    if len(arrays) == 1:
        return found
    together = [_together(lambda number: np.copyto(arrays[number][1], arrays[number][0]), len(arrays), 4) for _ in range(BATCHES)]
    found["memory.read_all_bytes_per_s"] = [2 * size * len(arrays) * 4 / s for s in together]
    rng = np.random.default_rng(0)
    tiles, x = pack_matrix(rng.standard_normal((512, 512)).astype(np.float32), WeightType.INT8), np.ones((TOKENS, 512), np.float32)

    def work(_: int) -> None:
        native.apply_matrix(None, WeightType.INT8, tiles, 512, 512, x)

    one, all_cores = ([_together(work, count, 100) for _ in range(BATCHES)] for count in (1, len(arrays)))
    found["cpu.parallel_share"] = [min(max((len(arrays) * median(one) / s - 1) / (len(arrays) - 1), 0.0), 1.0) for s in all_cores]
    return found


def _together(work: Callable[[int], Any], threads: int, times: int) -> float:
    """Seconds until `threads` threads have each done `work` `times` times."""

    def run(number: int) -> None:
        for _ in range(times):
            work(number)

    crew = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    started = time.perf_counter()
    for one in crew:
        one.start()
    for one in crew:
        one.join()
    return time.perf_counter() - started


# ---- onnxruntime ----


def _graph_rates(place: Path) -> dict[str, list[float]]:
    """Rates of onnxruntime, one thread, through a bundle of made graphs."""
    stages = {"chain": _chain(), "product": _product(), "conv": _conv(False), "conv8": _conv(True)}
    sources = [PageSource(PageKind.ONNX, data) for data, _, _, _ in stages.values()]
    documents = [
        {"name": name, "page": page, "inputs": [given], "outputs": [answer]}
        for page, (name, (_, given, answer, _)) in enumerate(stages.items())
    ]
    write_bundle(
        place / "graphs.edgeml",
        sources,
        {"format": 1, "producer": {"name": "edgeml-runtime", "version": "0"}, "stages": documents, "sites": [], "tasks": []},
    )
    rng = np.random.default_rng(0)

    def tokens(count: int, width: int) -> Floats:
        return rng.standard_normal((1, count, width)).astype(np.float32)

    with Bundle.open(place / "graphs.edgeml") as bundle:
        context, manifest, _ = open_context(bundle, threads=1)
        graphs = Graphs(bundle, manifest, context, 1)
        try:
            with context.request() as request:

                def run(stage: str, x: Floats) -> list[float]:
                    return _seconds(lambda: graphs.run(stage, {stages[stage][1]: x}, request))

                small, wide = run("chain", tokens(1, HIDDEN)), run("chain", tokens(TOKENS, HIDDEN))
                nodes, macs = stages["chain"][3], {name: stages[name][3] for name in stages}
                found = {"graphs.node_s": [s / nodes for s in small]}
                found["graphs.values_per_s"] = [nodes * TOKENS * HIDDEN / max(s - median(small), 1e-7) for s in wide]
                found["graphs.matmul_macs_per_s"] = [macs["product"] / s for s in run("product", tokens(TOKENS, HIDDEN))]
                image = rng.standard_normal((1, 32, 32, 32)).astype(np.float32)
                found["graphs.conv_macs_per_s"] = [macs["conv"] / s for s in run("conv", image)]
                found["graphs.conv_int8_macs_per_s"] = [macs["conv8"] / s for s in run("conv8", image)]
                return found
        finally:
            graphs.close()
            context.close()


Made = tuple[bytes, str, str, int]  # a graph, its input, its output, what it counts


def _chain() -> Made:
    """Operators that do little: as between the layers of an encoder."""
    nodes, x = [], "hidden0"
    for number in range(24):
        op = ("Add", "LayerNormalization", "Mul")[number % 3]
        y = f"t{number}" if number < 23 else "hidden"
        nodes.append(Node(op, [x, "c"], [y], {"axis": -1} if op == "LayerNormalization" else {}))
        x = y
    return _graph(nodes, "hidden0", "hidden", ("B", "T", HIDDEN), {"c": np.full(HIDDEN, 0.5, np.float32)}), "hidden0", "hidden", 24


def _product() -> Made:
    weights = np.random.default_rng(0).standard_normal((HIDDEN, HIDDEN)).astype(np.float32) / 20
    nodes = [Node("MatMul", [f"t{n - 1}" if n else "hidden0", "w"], [f"t{n}" if n < 3 else "hidden"]) for n in range(4)]
    data = _graph(nodes, "hidden0", "hidden", ("B", "T", HIDDEN), {"w": weights})
    return data, "hidden0", "hidden", 4 * TOKENS * HIDDEN * HIDDEN


def _conv(quantized: bool) -> Made:
    """Four 3 x 3 convolutions of 32 channels on 32 x 32 pixels, in f32 or between QuantizeLinear and DequantizeLinear."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((32, 32, 3, 3)) / 17).astype(np.float32)
    constants: dict[str, NDArray[np.generic]] = {"w": w}
    kernel: Mapping[str, Attribute] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes, x, name = [], "image", "w"
    if quantized:
        constants = {"s": np.array(0.05, np.float32), "z": np.array(0, np.int8), "ws": np.array(0.002, np.float32)}
        constants["w"] = np.clip(np.rint(w / 0.002), -127, 127).astype(np.int8)
        nodes += [Node("DequantizeLinear", ["w", "ws", "z"], ["wd"]), *_requantize("image", "x")]
        x, name = "x", "wd"
    for number in range(4):
        last = number == 3
        y = "features" if last and not quantized else f"c{number}"
        nodes.append(Node("Conv", [x, name], [y], kernel))
        if quantized:
            nodes += _requantize(y, "features" if last else f"d{number}")
            y = f"d{number}"
        x = y
    data = _graph(nodes, "image", "features", ("B", 32, 32, 32), constants)
    return data, "image", "features", 4 * 32 * 32 * 9 * 32 * 32


def _requantize(x: str, y: str) -> list[Node]:
    return [Node("QuantizeLinear", [x, "s", "z"], [f"{y}_q"]), Node("DequantizeLinear", [f"{y}_q", "s", "z"], [y])]


def _graph(nodes: list[Node], given: str, answer: str, shape: tuple[Any, ...], constants: Mapping[str, NDArray[np.generic]]) -> bytes:
    kind: TensorType = ("float32", shape)
    return graph(nodes, {given: kind}, {answer: kind}, constants, {"": 17})


# ---- reading ----


def read_rates(folder: Path, seconds: float = READ_S) -> dict[tuple[str, int], list[float]]:
    """(block, depth) -> bytes a second of random reads, in three slices each, past the cache; empty where that cannot be."""
    with _scratch(folder, READ_FILE_BYTES) as path:
        file = _direct(path)
        if file is None:
            return {}
        try:
            size = os.fstat(file).st_size
            return {
                (name, depth): [_read(file, size, block, depth, seconds / 3) for _ in range(3)]
                for name, block in (("4k", 1 << 12), ("64k", 1 << 16), ("1m", 1 << 20))
                for depth in (1, 2)
            }
        except OSError as error:
            raise DeviceError(f"{folder}: cannot be read ({error.strerror})") from None
        finally:
            os.close(file)


def _read(file: int, size: int, block: int, depth: int, seconds: float) -> float:
    done, faults = [0] * depth, []  # type: list[int], list[OSError]
    ends = time.perf_counter() + seconds

    def reader(number: int) -> None:
        rng = random.Random(number)
        with mmap.mmap(-1, block) as memory, memoryview(memory) as view:
            try:
                while time.perf_counter() < ends or not done[number]:
                    done[number] += os.preadv(file, [view], rng.randrange(size // block) * block)
            except OSError as error:
                faults.append(error)

    started = time.perf_counter()
    _together(reader, depth, 1)
    if faults:
        raise faults[0]
    return sum(done) / (time.perf_counter() - started)


def _direct(path: Path) -> int | None:
    """A descriptor that reads past the cache, None where the file system has no such thing."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


@contextmanager
def _scratch(folder: Path, size: int) -> Iterator[Path]:
    """A file of that many random bytes on the disk of `folder`, gone afterwards. It is not named there longer than need be."""
    try:
        with tempfile.NamedTemporaryFile(dir=_writable(folder), prefix=".edgeml-probe-") as file:
            piece = os.urandom(min(size, 1 << 20))
            for _ in range(max(size // len(piece), 1)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            yield Path(file.name)
    except OSError as error:
        raise DeviceError(f"{folder}: {size >> 20} MiB cannot be written there ({error.strerror}); name another folder") from None


def _writable(folder: Path) -> Path:
    """The folder, once a file could be made in it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise DeviceError(f"{folder}: nothing can be written there ({error.strerror}); name another folder") from None


# ---- processes ----


def _processes(place: Path, profile: Profile, add: Callable[[str, list[float]], None]) -> dict[str, list[float]]:
    """What a process and a request cost: three small made bundles, each answered by a process of its own."""
    small = {"layers": 1, "hidden": 32, "width": 32, "experts": 2, "top_k": 1}
    made = {
        "plain": small,
        "words": small | {"vocabulary": 16384},
        "graphs": small | {"hidden": 512, "layers": 8, "experts": 128},
    }
    nothing = {
        "process.bytes": 1 << 20,
        "process.bytes_per_tokenizer_byte": 0,
        "process.bytes_per_graph_byte": 0,
        "process.request_s": 1e-6,
    }
    for key, value in nothing.items():
        add(key, [float(value)])  # what `predict` says with these is what is known without them
    rest, tokenizers, graphs, request = {}, {}, {}, []  # type: dict[str, float], dict[str, int], dict[str, int], list[float]
    for name, changes in made.items():
        path = place / f"{name}.edgeml"
        make_mixture(path, **changes)  # type: ignore[arg-type]
        record = answered({"bundle": str(path)})
        with Bundle.open(path) as bundle:
            manifest = load_manifest(bundle)
            task = next(task for task in manifest.tasks if task.kind == "classification")
            costs = {stage: graph_cost(bundle.read(page)) for stage, page in pages_of(manifest, task).items()}
            known = predict(profile, bundle.pages, manifest, costs, plan_budget(bundle, manifest, "100%", 1), task, tokens=PROBE_TOKENS)
            tokenizers[name] = sum(page.length for page in bundle.pages if page.kind == PageKind.TOKENIZER)
        rest[name] = record["peak_rss_bytes"] - known.peak_memory_bytes.value + nothing["process.bytes"]
        graphs[name] = sum(cost.bytes for cost in costs.values())
        if name == "plain":
            latency = record["latency_s"]
            request = [max(latency[at] - known.latency_s.value, 1e-6) for at in ("min", "min", "p50", "p90", "p90")]

    words = [" ".join(f"w{number * 37 + word}" for word in range(TOKENS - 2)) for number in range(16)]
    preprocessor = TextPreprocessor(tokenizer_json(1 << 14), TOKENS)
    texts = iter(range(1 << 30))
    encode = _seconds(lambda: preprocessor.encode([words[next(texts) % len(words)]], None))

    def slope(name: str, sizes: dict[str, int]) -> list[float]:
        return [max((rest[name] - rest["plain"]) / (sizes[name] - sizes["plain"]), 0.0)]

    return {
        "process.request_s": request,
        "process.tokens_per_s": [TOKENS / s for s in encode],
        "process.bytes": [rest["plain"]],
        "process.bytes_per_tokenizer_byte": slope("words", tokenizers),
        "process.bytes_per_graph_byte": slope("graphs", graphs),
    }


def answered(job: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a job of `edgeml.commands.bench_worker`, in a process of its own, whose memory is then nobody else's."""
    plain = {"task": "weather", "iterations": 100, "warmup": 5, "cold": 0, "limits": {}, "memory": "100%", "threads": 1}
    plain |= {"residency": "exact", "variant": None, "workload": {"kind": "random", "tokens": PROBE_TOKENS}}
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "edgeml.commands.bench_worker"],
        input=json.dumps(plain | dict(job)).encode(),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )
    said = json.loads((done.stdout.splitlines() or [b"{}"])[-1])
    if "record" not in said:
        raise DeviceError(f"a process that was to be measured ended with code {done.returncode}: {said.get('error', 'it said nothing')}")
    record: dict[str, Any] = said["record"]
    return record


def _number(file: Path) -> int | None:
    text = _words(file)
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


def _words(file: Path) -> str | None:
    try:
        return file.read_text("utf-8", "replace").strip("\0 \n") or None
    except OSError:
        return None
