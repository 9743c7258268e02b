#!/usr/bin/env python3
"""What the variants of a bundle for images keep and save: int8 against float, the bounds of pruning, one task asked for of several.

    variants.py BUNDLE [BUNDLE ...] [--data DIR] [--rounds 60]

- int8 against the float variant that it was made from, on the test split through the runtime: every classification within 0.5
  points, every mIoU and edge F1 within 1. Bundles that leave float variants out have nothing to compare: see `pairs.toml`.
- A variant pruned to a bound: every task's loss on the calibration images, over that of the unpruned model, is at most the bound
  (as the export measured it on the network it wrote; from the bundle's evidence).
- A request for one task takes less time than a request for all by at least the share of the heads that nobody asked for. Heads are
  timed alone, in onnxruntime with the runtime's settings; one thread, one image, all calls taking turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnxruntime
from benchlib import ROOT, Verdict, finish, parser, progress, run, shared_text, verdict
from numpy.typing import NDArray

from edgeml import metrics
from edgeml.bundle import Bundle
from edgeml.errors import DataError, UsageError
from edgeml.image import encode_images
from edgeml.image_data import ImageRows, find_image_sets
from edgeml.manifest import ImagePreprocess, ImageStages, Manifest, Task, Variant, load_manifest
from edgeml.metrics import Interval, bootstrap
from edgeml.session import Session
from edgeml.session import open as open_session

POINTS = {"classification": 0.5, "segmentation": 1.0, "edge": 1.0}
BURST = 10  # calls of which a round takes the median

Predicted = dict[str, NDArray[Any]]


def labelled(data: Path, manifest: Manifest, limit: int | None) -> tuple[list[Task], ImageRows]:
    """The bundle's tasks and the test rows of their image set. Raises `DataError` where the set is not in the data."""
    tasks = list(manifest.tasks)
    for found in find_image_sets(data):
        if found.name == tasks[0].domain:
            return tasks, found.rows("test", limit)
    raise DataError(f"{data}: there is no image set '{tasks[0].domain}', which the bundle's tasks are on")


def answers(bundle: Path, variant: str, tasks: Sequence[Task], rows: ImageRows) -> Predicted:
    """A variant's label indices of every test image, or pixel."""
    with open_session(bundle, threads=1, variant=variant) as session:
        found = session.run_many([task.name for task in tasks], images=list(rows.images))
    predicted: Predicted = {}
    for task in tasks:
        result = found[task.name]
        if result.maps is None:
            assert result.scores is not None
            predicted[task.name] = result.scores.argmax(1)
        else:
            predicted[task.name] = result.maps if task.kind == "segmentation" else (result.maps >= 0.5).astype(np.uint8)
    return predicted


def score(task: Task, rows: ImageRows, predicted: Predicted, picked: NDArray[np.int64] | slice = slice(None)) -> float:
    labels, said = rows.labels[task.name][picked], predicted[task.name][picked]
    return float(metrics.score(task.metric, labels, said, len(task.labels), task.void))


def kept(bundle: Path, manifest: Manifest, tasks: Sequence[Task], rows: ImageRows, resamples: int) -> tuple[list[Verdict], dict[str, Any]]:
    """Every int8 variant beside its float one."""
    tick = progress(len(manifest.variants), f"{bundle.name}: answers")
    predicted = {}
    for variant in manifest.variants:
        predicted[variant.name] = answers(bundle, variant.name, tasks, rows)
        tick(1)
    verdicts = []
    for variant in manifest.variants:
        whole = f"{variant.name.removesuffix('-int8')}-f32"
        if not variant.quantized or whole not in predicted:
            continue
        for task in tasks:

            def gap(picked: Sequence[NDArray[np.int64]], task: Task = task, pair: tuple[str, str] = (whole, variant.name)) -> float:
                before, after = (score(task, rows, predicted[name], picked[0]) for name in pair)
                return 100 * (before - after)

            drop = bootstrap(gap, [len(rows.images)], 0, resamples)
            name = f"{bundle.stem} {variant.name} {task.name}: points below float"
            verdicts.append(verdict(name, f"<= {POINTS[task.kind]}", drop.value, drop.value <= POINTS[task.kind], drop))
    figures = {name: {task.name: score(task, rows, found) for task in tasks} for name, found in predicted.items()}
    return verdicts, {"images": len(rows.images), "scores": figures}


def bounds(bundle: Path, manifest: Manifest) -> list[Verdict]:
    """The largest loss ratio of every variant that was pruned to a bound."""
    verdicts = []
    for variant in manifest.variants:
        pruned = manifest.evidence.get("variants", {}).get(variant.name, {}).get("prune")
        if variant.bound is None or variant.quantized or not pruned:
            continue
        ratios: Mapping[str, float] = pruned["loss_ratios"]
        worst = max(ratios.values())
        name = f"{bundle.stem} {variant.name}: largest loss ratio of a task"
        verdicts.append(verdict(name, f"<= {variant.bound}", worst, worst <= variant.bound, loss_ratios=dict(ratios)))
    return verdicts


def head_calls(bundle: Bundle, manifest: Manifest, variant: Variant, task: Task, image: NDArray[Any]) -> dict[str, Callable[[], Any]]:
    """Every head of a variant alone, on the features of one image."""
    assert isinstance(task.preprocess, ImagePreprocess)
    pages = {stage.name: stage.page for stage in manifest.stages}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def opened(stage: str) -> Any:
        return onnxruntime.InferenceSession(bundle.read(pages[stage]), options, providers=["CPUExecutionProvider"])

    calls: dict[str, Callable[[], Any]] = {}
    for name, stages in variant.stages.items():
        backbone, head = opened(stages.backbone), opened(stages.head)
        names = [value.name for value in backbone.get_outputs()]
        features = dict(zip(names, backbone.run(None, {"image": encode_images([image], task.preprocess)}), strict=True))
        given = {value.name: features[value.name] for value in head.get_inputs()}
        calls[name] = lambda head=head, given=given: head.run(None, given)  # type: ignore[misc]
    return calls


def timed(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, NDArray[np.float64]]:
    """Seconds of each call by round, the median of a burst; calls take turns, in another order each round."""
    found = {name: np.empty(rounds) for name in calls}
    rng, names = np.random.default_rng(0), list(calls)
    for number in range(rounds):
        for name in rng.permutation(names):
            times = []
            for _ in range(BURST + 1):
                start = time.perf_counter()
                calls[name]()
                times.append(time.perf_counter() - start)
            found[name][number] = np.median(times[1:])
    return found


def saved(
    path: Path, manifest: Manifest, variant: Variant, tasks: Sequence[Task], image: NDArray[Any], rounds: int
) -> tuple[list[Verdict], dict[str, Any]]:
    """One task asked for, against all of them, and the other heads alone."""
    names = [task.name for task in tasks]
    with Bundle.open(path) as bundle, open_session(path, threads=1, variant=variant.name) as session:
        calls = {"all": asked(session, names, image)}
        calls |= {f"only {name}": asked(session, [name], image) for name in names}
        calls |= {f"head {name}": call for name, call in head_calls(bundle, manifest, variant, tasks[0], image).items()}
        seconds = timed(calls, rounds)
    verdicts = []
    for name in names:
        heads = np.sum([seconds[f"head {other}"] for other in names if other != name], axis=0)
        share = float(np.median(heads / seconds["all"]))
        less = saving(seconds["all"], seconds[f"only {name}"], rounds)
        title = f"{path.stem} {variant.name}: share of time saved where only {name} is asked for"
        verdicts.append(verdict(title, f">= {share:.3f}, the other heads' share", less.value, less.value >= share, less))
    return verdicts, {name: {"p50_s": float(np.median(times)), "p90_s": float(np.percentile(times, 90))} for name, times in seconds.items()}


def asked(session: Session, names: list[str], image: NDArray[Any]) -> Callable[[], Any]:
    return lambda: session.run_many(names, images=[image])


def saving(whole: NDArray[np.float64], one: NDArray[np.float64], rounds: int) -> Interval:
    """The share of a whole request that one task's takes less."""
    return bootstrap(lambda picked: float(np.median(1 - one[picked[0]] / whole[picked[0]])), [rounds], 0)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("bundles", nargs="*", type=Path, default=[ROOT / "models" / "multi-fashion.edgeml"], metavar="BUNDLE")
    options.add_argument("--data", type=Path, default=shared_text().parent, help="folder with images/NAME (default: the shared data)")
    options.add_argument("--rounds", type=int, default=60, help="rounds of timing; 0: none")
    options.add_argument("--limit", type=int, help="at most this many test images")
    options.add_argument("--resamples", type=int, default=200, help="of the bootstrap over images")
    chosen = options.parse_args()
    verdicts, figures = list[Verdict](), dict[str, Any]()
    for path in chosen.bundles:
        with Bundle.open(path) as bundle:
            manifest, identity = load_manifest(bundle), bundle.id
        if not manifest.variants or not all(isinstance(task.stages, ImageStages) for task in manifest.tasks):
            raise UsageError(f"{path}: this is no bundle of variants for images")
        tasks, rows = labelled(chosen.data, manifest, chosen.limit)
        found, quality = kept(path, manifest, tasks, rows, chosen.resamples)
        verdicts += found + bounds(path, manifest)
        times = {}
        for variant in manifest.variants if chosen.rounds and len(tasks) > 1 else ():
            more, times[variant.name] = saved(path, manifest, variant, tasks, rows.images[0], chosen.rounds)
            verdicts += more
        figures[path.stem] = {"bundle_id": identity, **quality, "seconds": times}
    if not verdicts:
        raise UsageError("there is nothing to measure: no pair of float and int8, no bound, and no time was asked for")
    return finish("vision-variants", verdicts, figures, chosen.records)


if __name__ == "__main__":
    run(main)
