#!/usr/bin/env python3
"""How fast the networks of compare.py are on onnxruntime, one thread, batch 1: in float and in static int8.

    latency.py --work DIR [--seed 1] [--loss soft] [--cuts 0.6,0.8] [--methods pagcp,...] [--records benchmarks/records]

DIR is the folder of `compare.py run`. Every network is timed in turns with the dense reference in float, so that a disturbance
meets both; a speedup is the median over rounds of the ratio within a round. int8 is onnxruntime's own static quantiser (QDQ, per
channel, activations unsigned, logits in float), on 128 calibration pictures, each calibration method tried and the one kept that
scores best on validation. Scores are of the test split. Graphs are kept in DIR, so that a second run only measures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import benchlib
import compare
import network
import numpy as np
import onnxruntime
import peers
import torch
from edgeml_export.vision.int8 import METHODS as CALIBRATIONS
from edgeml_export.vision.int8 import has_vnni
from edgeml_export.vision.runner import interleaved, speedup
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from timing import float_graph, session

from edgeml.errors import DataError

PICTURES, ROUNDS, BURST = 128, 15, 20
#: What must hold for ours: share of MACs -> (float, int8) speedup over dense float, by whether the CPU sums bytes without saturation.
BOUNDS = {True: {0.6: (2.4, 5.0), 0.8: (4.5, 8.0)}, False: {0.6: (2.4, 3.5), 0.8: (4.5, 5.5)}}
WITHIN = 0.5  # points that a task may lose from float to int8


class Pictures(CalibrationDataReader):  # type: ignore[misc]
    """Calibration pictures, one by one."""

    def __init__(self, pictures: torch.Tensor) -> None:
        self.rest = iter([{"image": picture[None].numpy()} for picture in pictures])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.rest, None)


def int8_graph(source: Path, data: dict[str, network.Split]) -> tuple[Path, str]:
    """The graph in int8, and the calibration method whose scores on validation are best."""
    scored: dict[str, float] = {}
    for method, (kind, _) in CALIBRATIONS.items():
        file = source.with_suffix(f".{method}.onnx")
        if not file.exists():
            scratch = file.with_suffix(f".{os.getpid()}")
            quantize_static(
                source, scratch, Pictures(data["calibration"][0][:PICTURES]), QuantFormat.QDQ, per_channel=True,
                reduce_range=not has_vnni(), weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8, calibrate_method=kind,
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
            )  # fmt: skip
            os.replace(scratch, file)
        scored[method] = sum(scores(session(file), data["validation"]).values())
    best = max(scored, key=lambda name: scored[name])
    return source.with_suffix(f".{best}.onnx"), best


def scores(running: onnxruntime.InferenceSession, split: network.Split) -> dict[str, float]:
    """Accuracy per task, in percent."""
    right = np.zeros(len(network.TASKS))
    for pictures, labels in network.batches(split, 250):
        outputs = running.run(list(network.TASKS), {"image": pictures.numpy()})
        right += [(logits.argmax(1) == labels[:, number].numpy()).sum() for number, logits in enumerate(outputs)]
    return {task: 100 * float(count) / len(split[0]) for task, count in zip(network.TASKS, right, strict=True)}


def graphs(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every network's two graphs with their scores on test; `dense` is the reference."""
    data = network.load(options.data)
    files = {"dense": None} | {
        f"{method} {share:.0%}": compare.tuned_file(options.work, method, share, options.loss, options.seed)
        for share in options.cuts
        for method in options.methods
    }
    found: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        if file is not None and not file.exists():
            raise DataError(f"{file.name} is not in {options.work}; run `compare.py run` for this row first")
        kept = options.work / f"{file.stem if file else f'reference-{options.seed}'}.onnx"
        summary = kept.with_suffix(".int8.json")
        if not summary.exists():
            net = torch.load(file, weights_only=False) if file else compare.reference(options.work, data, options.seed, options.epochs)
            small, method = int8_graph(float_graph(net, kept), data)
            about = {"int8": small.name, "calibration": method}
            about |= {kind: scores(session(graph), data["test"]) for kind, graph in (("float_test", kept), ("int8_test", small))}
            summary.write_text(json.dumps(about), "utf-8")
        about = json.loads(summary.read_text("utf-8"))
        found[name] = about | {"files": {"float": kept, "int8": options.work / about["int8"]}}
    return found


def timed(found: dict[str, dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """A row per network and kind: milliseconds, and how many times faster than the dense network in float."""
    picture = {"image": network.EXAMPLE.numpy()}

    def call(file: Path) -> Callable[[], object]:
        running = session(file)
        return lambda: running.run(None, picture)

    kinds = [(name, kind) for name in found for kind in ("float", "int8")]
    seconds = interleaved([call(found[name]["files"][kind]) for name, kind in kinds], rounds, BURST)
    return [
        {
            "network": name,
            "kind": kind,
            "ms": 1000 * float(np.median(seconds[:, place])),
            "speedup": speedup(seconds[:, 0], seconds[:, place]),
            "test": found[name][f"{kind}_test"],
            "calibration": found[name]["calibration"] if kind == "int8" else None,
        }
        for place, (name, kind) in enumerate(kinds)
    ]


def judge(rows: list[dict[str, Any]], cuts: list[float]) -> list[benchlib.Verdict]:
    """At each cut the network of ours that counts against the limits for this kind of CPU: the one pruned by latency where it is there,
    since its quality is in the same table. And every int8 network of ours against its float one."""
    at = {(row["network"], row["kind"]): row for row in rows}
    verdicts = []
    for share in cuts:
        names = [name for name in (f"{method} {share:.0%}" for method in compare.OURS) if (name, "float") in at]
        for kind, least in zip(("float", "int8"), BOUNDS[has_vnni()].get(share, ()), strict=False):
            if names:
                measured = at[names[-1], kind]["speedup"]
                verdicts.append(benchlib.verdict(f"{names[-1]}, {kind}: times dense float", f">= {least}", measured, measured >= least))
        for name in names:
            falls = [at[name, "float"]["test"][task] - at[name, "int8"]["test"][task] for task in network.TASKS]
            worst = max(falls)
            verdicts.append(benchlib.verdict(f"{name}: points a task loses to int8", f"<= {WITHIN}", worst, worst <= WITHIN))
    return verdicts


def main() -> int:
    made = benchlib.parser(__doc__)
    made.add_argument("--work", type=Path, required=True, help="folder of compare.py")
    made.add_argument("--data", type=Path, default=benchlib.shared_text().parent / "images", help="folder that holds multi_fashion_mnist")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--loss", choices=compare.LOSSES, default=compare.SOFT)
    made.add_argument("--cuts", type=lambda text: [float(part) for part in text.split(",")], default=[0.6, 0.8])
    made.add_argument("--methods", type=lambda text: text.split(","), default=[*compare.OURS, *peers.PEERS])
    made.add_argument("--epochs", type=int, default=8, help="of the reference's training")
    made.add_argument("--rounds", type=int, default=ROUNDS)
    made.add_argument("--prepare", action="store_true", help="only make the graphs, so that the measurement proper is short")
    options = made.parse_args()
    found = graphs(options)
    if options.prepare:
        return 0
    rows = timed(found, options.rounds)
    print(f"| network | kind | ms | x dense float | {' | '.join(network.TASKS)} |\n|---|---|---|---|{'---|' * len(network.TASKS)}")
    for row in rows:
        percent = " | ".join(f"{row['test'][task]:.2f}" for task in network.TASKS)
        print(f"| {row['network']} | {row['kind']} | {row['ms']:.3f} | {row['speedup']:.2f} | {percent} |")
    return benchlib.finish("pruning-latency", judge(rows, options.cuts), {"rows": rows, "vnni": has_vnni()}, options.records)


if __name__ == "__main__":
    benchlib.run(main)
