#!/usr/bin/env python3
"""Predicted against measured: latency, peak memory and bytes read of five bundles under three caps, on this machine.

    predict.py [--bundles a.edgeml,b.edgeml] [--tokens 64] [--rounds 20] [--threads 1,2] [--emulate]

The machine's profile is probed in the same run, before anything is predicted, so no constant comes from what is measured afterwards. Each
bundle is predicted and then measured, in a process of its own, with all its weights in memory, with a quarter and with a twelfth;
`--emulate` (root) also slows the disk down, to a third and to a tenth of what was probed, for the two smaller ones. Texts are random
words of the bundle's own tokenizer, as many as the tokens asked for; how such texts choose experts is learned from eight other
texts first, as a bundle's recorded usage is from its data. Networks for images are measured on random images, once: they do not page.
With several counts of threads each case is predicted and measured under every one of them; how much of a core each further thread
gives is the probe's figure.

A disk that is slowed down gives its bytes in bursts, a tenth of a second's at a time: short runs are not slowed at all, and the median
round says little. So rounds go on for a second at least, and where the disk is slowed their mean is compared, elsewhere their median.
The record has both, and what the error would be with medians throughout.

The bounds, for each count of threads: the median over all its cases of the absolute error is at most 15 % for latency, 10 % for peak memory
and 10 % for bytes read (cases that read less than a page a request are left out of the last, and counted).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "devices"))

import numpy as np
from benchlib import MODEL, ROOT, Verdict, finish, parser, progress, run, verdict
from edgeml_devices.hardware import answered, measure_profile

from edgeml.bundle import Bundle
from edgeml.device import Profile
from edgeml.graph_cost import graph_cost
from edgeml.layout import WeightType
from edgeml.made import Recipe, make_mixture
from edgeml.manifest import ImageStages, Manifest, Task, load_manifest
from edgeml.predict import Prediction, Routing, pages_of, predict, routing_of
from edgeml.session import open as open_session
from edgeml.store import plan_budget
from edgeml.variants import Wish, choose_variant, with_variant

CAPS = ("100%", "25%", "8%")
RATES = (None, 3, 10)  # of the probed rate: as it is, a third, a tenth; one a cap
MADE = {
    "small": Recipe(layers=6, hidden=384, experts=24, width=256, vocabulary=1024, top_k=4, expert_bias=False),
    "wide": Recipe(layers=8, hidden=512, experts=16, width=1024, vocabulary=1024, skew=0.6, expert_bias=False),
    "gated": Recipe(layers=4, hidden=256, experts=32, width=512, vocabulary=8192, gated=True, expert_type=WeightType.INT8),
}
LEARNED = 8
SECONDS, MOST_ROUNDS = 1.0, 300  # of rounds
BOUNDS = (("latency_s", "latency", 0.15), ("peak_memory_bytes", "peak memory", 0.10), ("page_in_bytes", "bytes read", 0.10))


def texts(bundle: Bundle, task: Task, tokens: int, count: int, seed: int) -> list[str]:
    """Random words of the bundle's tokenizer, one token each."""
    document = json.loads(bundle.read(task.preprocess.tokenizer))
    words = [word for word in document["model"]["vocab"] if word.isalpha() and word.isascii() and word.islower()]
    drawn = np.random.default_rng(seed).choice(len(words), (count, tokens - 2))
    return [" ".join(words[number] for number in row) for row in drawn]


def learned(path: Path, task: Task, given: list[str]) -> Routing:
    with open_session(path, memory="100%", threads=1) as session:
        return routing_of(session.manifest, session.trace(task.name, texts=given))


def slower(profile: Profile, bytes_per_s: float | None) -> Profile:
    """The profile with every read rate at most that."""
    if bytes_per_s is None:
        return profile
    capped = {key: replace(f, value=min(f.value, bytes_per_s), low=min(f.range[0], bytes_per_s), high=min(f.range[1], bytes_per_s))
              for key, f in profile.figures.items() if key.startswith("storage.")}  # fmt: skip
    return replace(profile, figures={**profile.figures, **capped})


def said(
    profile: Profile, bundle: Bundle, manifest: Manifest, task: Task, memory: str, tokens: int, threads: int, routing: Routing | None
) -> Prediction:
    variant = choose_variant(manifest, Wish(), str(bundle.path))
    chosen = next(one for one in with_variant(manifest, variant).tasks if one.name == task.name)
    costs = {stage: graph_cost(bundle.read(page)) for stage, page in pages_of(manifest, chosen).items()}
    budget = plan_budget(bundle, manifest, memory, threads)
    return predict(profile, bundle.pages, manifest, costs, budget, chosen, tokens=tokens, threads=threads, variant=variant,
                   routing=routing)  # fmt: skip


def cases(profile: Profile, path: Path, options: Any) -> Iterator[dict[str, Any]]:
    """Each cap of a bundle, with each count of threads: what was predicted, then what was measured."""
    with Bundle.open(path) as bundle:
        manifest = load_manifest(bundle)
        task = next(task for task in manifest.tasks if task.kind == "classification" and not task.pair)
        on_images = isinstance(task.stages, ImageStages)
        job: dict[str, Any] = {"bundle": str(path), "task": task.name, "iterations": options.rounds, "warmup": 6, "cold": 0, "limits": {}}
        routing = None
        if on_images:
            shape = {key: getattr(task.preprocess, key) for key in ("height", "width", "channels")}
            job["workload"] = {"kind": "random image", **shape}
        else:
            routing = learned(path, task, texts(bundle, task, options.tokens, LEARNED, 1))
            rows = [[text, None] for text in texts(bundle, task, options.tokens, 64, 2)]
            job["workload"] = {"kind": "texts", "rows": len(rows), "texts": rows}
        for memory, share in zip(CAPS[: 1 if on_images else None], RATES, strict=False):
            probed = profile.figures["storage.64k_qd2_bytes_per_s"].value if share else 0
            limit = probed / share if share and options.emulate else None
            for threads in options.threads:
                prediction = said(slower(profile, limit), bundle, manifest, task, memory, options.tokens, threads, routing)
                rounds = max(options.rounds, min(math.ceil(SECONDS / prediction.latency_s.value), MOST_ROUNDS))
                with held(limit, path.parent):
                    settings = {"iterations": rounds, "memory": memory, "threads": threads, "residency": "exact", "variant": None}
                    record = answered(job | settings)
                yield compared(path.stem, memory, limit, prediction, record)


def held(limit: float | None, folder: Path) -> Any:
    from contextlib import nullcontext

    if limit is None:
        return nullcontext()
    from edgeml_devices.emulate import read_limit

    return read_limit(int(limit), folder)


def compared(name: str, memory: str, limit: float | None, prediction: Prediction, record: dict[str, Any]) -> dict[str, Any]:
    rounds = record["rounds"]
    mean = record["tokens"] / rounds / record["tokens_per_s"] if record["tokens_per_s"] else None
    measured = {
        "latency_s": mean if limit else record["latency_s"]["p50"],
        "peak_memory_bytes": record["peak_rss_bytes"],
        "page_in_bytes": (record["page_in_bytes"] or 0) / rounds,
    }
    document = prediction.as_json()
    figures = {
        key: {"predicted": document[key]["value"], "low": document[key]["low"], "high": document[key]["high"], "measured": value,
              "error": document[key]["value"] / value - 1 if value else None}
        for key, value in measured.items()
    }  # fmt: skip
    if figures["page_in_bytes"]["measured"] < (record["slot_bytes"] or 1):
        figures["page_in_bytes"]["error"] = None
    print(
        f"{name:>16} {memory:>5} x {record['threads']} {'' if limit is None else f'{limit / 1e6:.0f} MB/s':>9}  "
        + "  ".join(f"{key} {one['predicted']:.4g} / {one['measured']:.4g}" + ("" if one["error"] is None else f" ({one['error']:+.0%})")
                    for key, one in figures.items()),
        file=sys.stderr,
    )  # fmt: skip
    return {
        "bundle": name, "memory": memory, "threads": record["threads"], "read_rate_limit_bytes_per_s": limit, **figures,
        "page_wait_s": {"predicted": prediction.wait_s, "measured": (record["page_wait_s"] or 0) / rounds},
        "measured_p50_s": record["latency_s"]["p50"],
        "measured_mean_s": mean,
        "measured_p90_s": record["latency_s"]["p90"],
        "rounds": rounds, "terms": document["terms"],
    }  # fmt: skip


def errors(found: list[dict[str, Any]], key: str) -> list[float]:
    return [abs(case[key]["error"]) for case in found if case[key]["error"] is not None]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--bundles", help="bundles to use instead, separated by commas (default: three made ones and those in models/)")
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--threads", default="1", help="threads to compute with, or a list such as 1,2")
    options.add_argument("--emulate", action="store_true", help="also slow the disk down (root, and a kernel that can)")
    options.add_argument("--folder", type=Path, help="where made bundles are written (default: the system's temporary folder)")
    options.add_argument("--made", type=Path, help="a folder with the made bundles of a run before")
    chosen = options.parse_args()
    chosen.threads = [int(count) for count in chosen.threads.split(",")]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        place = Path(temporary)
        if chosen.bundles:
            paths = [Path(name).absolute() for name in chosen.bundles.split(",")]
        else:
            made = {name: (chosen.made or place) / f"{name}.edgeml" for name in MADE}
            for name, path in made.items():
                if not path.exists():
                    make_mixture(path, MADE[name])
            paths = [*made.values(), MODEL, ROOT / "models" / "multi-fashion.edgeml"]
        profile = measure_profile(place)
        tick, found = progress(len(paths), "bundles"), []
        for path in paths:
            found += cases(profile, path, chosen)
            tick(1)
    verdicts: list[Verdict] = []
    for threads in chosen.threads:
        these = [case for case in found if case["threads"] == threads]
        for key, what, bound in BOUNDS:
            off = errors(these, key)
            middle = median(off) if off else None
            about = {"threads": threads, "cases": len(off), "worst": max(off, default=None)}
            holds = None if middle is None else middle <= bound
            of = f"{what}, {threads} thread" + ("s" if threads > 1 else "")
            verdicts.append(verdict(f"median absolute error of {of}", f"<= {bound}", middle, holds, **about))
    inside = [case["latency_s"]["low"] <= case["latency_s"]["measured"] <= case["latency_s"]["high"] for case in found]
    plain = [abs(case["latency_s"]["predicted"] / case["measured_p50_s"] - 1) for case in found]
    figures = {
        "cases": found,
        "median_error_of_latency_with_medians_throughout": median(plain),
        "latencies_inside_their_interval": sum(inside),
        "profile": profile.as_json(),
    }
    return finish("devices-predict", verdicts, figures, chosen.records)


if __name__ == "__main__":
    run(main)
