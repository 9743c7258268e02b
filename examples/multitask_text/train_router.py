"""Train the router for requests that name no task: mean-pooled linear routing, and SCAR, on the mixture's frozen `hidden0`.

    python train_router.py --out DIR [--checkpoint mixture.safetensors] [--rows 1500] [--epochs 4]

Fits on training rows, selects on validation rows, reports on test rows, for texts cut where the bundle cuts them and at 256 tokens.
Writes `router.safetensors` (the best by validation, and what it needs to be drawn again) and `router.json` (every figure).
Inputs are embeddings before the trunk, so an epoch takes a minute or two on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import Batch, Corpus
from edgeml_export.encoder import Encoder
from edgeml_export.routers import Buckets, GroupRouter, LinearRouter, ScarRouter, density, plain_norm, save_router
from model import CHECKPOINT, load
from routing import read_groups
from torch import Tensor
from torch.nn import functional as F

BATCH, LONG = 64, 256


@dataclass
class Split:
    """Rows of one split at one length, each with its task and group."""

    corpus: Corpus
    group: np.ndarray

    def batches(self, size: int = 128) -> Iterator[tuple[Batch, Tensor]]:
        for batch in self.corpus.by_length(size):
            yield batch, torch.from_numpy(self.group[batch.row.numpy()])


@dataclass
class Trained:
    """A router and its validation accuracy in each length."""

    name: str
    router: GroupRouter
    accuracy: float
    seconds: float


def splits(groups: dict[str, list[str]], split: str, lengths: Sequence[int], limit: int | None) -> list[Split]:
    """The split once for each length."""
    out = []
    for length in lengths:
        corpus = Corpus(split, limit, length)
        place = {task: number for number, tasks in enumerate(groups.values()) for task in tasks}
        of_task = np.array([place[task.name] for task in corpus.tasks])
        out.append(Split(corpus, of_task[corpus.task]))
    return out


@torch.no_grad()
def hidden0(encoder: Encoder, batch: Batch) -> Tensor:
    """What the bundle's `embed` stage answers, in f32."""
    return encoder.embed(batch.ids, batch.types)


@torch.no_grad()
def predict(router: GroupRouter, encoder: Encoder, split: Split) -> np.ndarray:
    """Logits (rows, groups) in the rows' order."""
    out = np.empty((len(split.group), router.groups), np.float32)
    for batch, _ in split.batches():
        out[batch.row.numpy()] = router.logits(hidden0(encoder, batch), batch.mask).numpy()
    return out


def fit(router: GroupRouter, features: Callable[[Batch], Tensor], parts: Sequence[Split], epochs: float, rate: float, seed: int) -> float:
    """Train in place on batches drawn from `parts` in turn; returns the seconds it took."""
    started = time.perf_counter()
    size = sum(len(part.group) for part in parts) / len(parts)
    steps = int(epochs * size / BATCH)
    schedules = [part.corpus.schedule(steps // len(parts), BATCH, seed + number) for number, part in enumerate(parts)]
    weights = [parameter for parameter in router.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(weights, rate, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 2), pct_start=0.1)
    for step in range(sum(map(len, schedules))):
        part, rows = parts[step % len(parts)], schedules[step % len(parts)][step // len(parts)]
        batch = part.corpus.batch(rows)
        loss = F.cross_entropy(router.logits(features(batch), batch.mask), torch.from_numpy(part.group[rows]), label_smoothing=0.02)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        plan.step()
        if step % 200 == 0:
            print(f"  step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    return time.perf_counter() - started


def calibrated(encoder: Encoder, part: Split, groups: int, clusters: int, rows: int, seed: int) -> Buckets:
    """Centroids and prototypes from the tokens of `rows` training rows; frozen from here on."""
    chosen = np.random.default_rng(seed).permutation(len(part.group))[:rows]
    batch = part.corpus.batch(chosen)
    real = batch.mask > 0
    x = plain_norm(hidden0(encoder, batch))[real]
    group = torch.from_numpy(part.group[chosen])[:, None].expand(real.shape)[real]
    return Buckets.fitted(x, group, clusters, groups, seed=seed)


def fitting(groups: dict[str, list[str]], corpus: Corpus) -> np.ndarray:
    """(2, groups) bool: groups that have a task on single texts, on pairs: a request's form is known to whoever sends it."""
    pair = {task.name: task.pair for task in corpus.tasks}
    return np.array([[any(pair[task] == form for task in tasks) for tasks in groups.values()] for form in (False, True)])


def report(logits: np.ndarray, split: Split, groups: dict[str, list[str]]) -> dict[str, Any]:
    """Accuracy over all requests, the mean over groups, both per group and per task, and who is taken for whom."""
    corpus, names = split.corpus, list(groups)
    form = np.array([task.pair for task in corpus.tasks]).astype(int)[corpus.task]
    chosen = np.where(fitting(groups, corpus)[form], logits, -np.inf).argmax(-1)
    right = chosen == split.group
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (split.group, chosen), 1)
    mistaken = [
        {"group": names[a], "taken_for": names[b], "requests": int(confusion[a, b])}
        for a, b in zip(*np.nonzero(confusion), strict=True)
        if a != b
    ]
    per_group = {name: round(float(right[split.group == g].mean()), 4) for g, name in enumerate(names)}
    return {
        "accuracy": round(float(right.mean()), 4),
        "accuracy_form_unknown": round(float((logits.argmax(-1) == split.group).mean()), 4),
        "mean_over_groups": round(float(np.mean(list(per_group.values()))), 4),
        "requests": len(right),
        "tokens": _by_length(corpus.length, right),
        "groups": per_group,
        "tasks": {task.name: round(float(right[corpus.task == t].mean()), 4) for t, task in enumerate(corpus.tasks)},
        "confusion": confusion.tolist(),
        "mistaken": sorted(mistaken, key=lambda entry: -entry["requests"]),
    }


def _by_length(length: np.ndarray, right: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy of short and long requests, as long as they are after cutting."""
    out = {}
    for low, high in ((1, 16), (17, 32), (33, 64), (65, 96), (97, LONG)):
        rows = (length >= low) & (length <= high)
        if rows.any():
            out[f"{low}-{high}"] = {"requests": int(rows.sum()), "accuracy": round(float(right[rows].mean()), 4)}
    return out


def candidates(hidden: int, groups: int, queries: int, buckets: Buckets) -> dict[str, Callable[[], GroupRouter]]:
    """What validation chooses among, the baseline first."""
    return {
        "linear": lambda: LinearRouter(hidden, groups),
        "scar_top4_no_attention": lambda: ScarRouter(hidden, groups, queries, top=4),
        "scar_top16_no_attention": lambda: ScarRouter(hidden, groups, queries, top=16),
        "scar_top4": lambda: ScarRouter(hidden, groups, queries, top=4, buckets=buckets),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--rows", type=int, default=1500, help="training rows a task")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--clusters", type=int, default=32)
    parser.add_argument("--only", nargs="*", help="names of candidates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    model = load(options.checkpoint)
    module, groups = model.module, read_groups()
    encoder, lengths = module.encoder, (model.max_tokens, LONG)
    train = splits(groups, "train", lengths, options.rows)
    validation = splits(groups, "validation", lengths, None)
    buckets = calibrated(encoder, train[0], len(groups), options.clusters, 2000, options.seed)
    queries = len(module.sites()) * module.config.experts
    trained: list[Trained] = []
    for name, build in candidates(encoder.config.hidden, len(groups), queries, buckets).items():
        if options.only and name not in options.only:
            continue
        torch.manual_seed(options.seed)
        router = build()
        print(name, flush=True)
        seconds = fit(router, lambda batch: hidden0(encoder, batch), train, options.epochs, options.rate, options.seed)
        scores = [report(predict(router, encoder, part), part, groups)["accuracy"] for part in validation]
        print(f"{name}: validation {scores}, {seconds:.0f} s", flush=True)
        trained.append(Trained(name, router, float(np.mean(scores)), seconds))

    test = splits(groups, "test", lengths, None)
    figures: dict[str, Any] = {"groups": groups, "lengths": lengths, "options": {**vars(options), "out": None, "checkpoint": None}}
    figures["density"] = _density(buckets, encoder, test)
    for entry in trained:
        by_length = {
            str(length): report(predict(entry.router, encoder, part), part, groups) for length, part in zip(lengths, test, strict=True)
        }
        parameters = sum(parameter.numel() for parameter in entry.router.parameters())
        figures[entry.name] = {"validation": entry.accuracy, "seconds": round(entry.seconds), "parameters": parameters, "test": by_length}
        print(entry.name, {length: (value["accuracy"], value["mean_over_groups"]) for length, value in by_length.items()}, flush=True)
        save_router(options.out / f"{entry.name}.safetensors", entry.router, list(groups))
    best = max(trained, key=lambda entry: entry.accuracy)
    figures["chosen"] = best.name
    save_router(options.out / "router.safetensors", best.router, list(groups))
    (options.out / "router.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


@torch.no_grad()
def _density(buckets: Buckets, encoder: Encoder, parts: Sequence[Split]) -> dict[str, float]:
    """Share of token pairs that SCAR's attention looks at, over the first batches of each length."""
    out = {}
    for part in parts:
        values = []
        for batch, _ in part.batches(64):
            if len(values) % 8 == 0 or batch.mask.shape[1] >= 64:
                values.append(density(buckets.allowed(plain_norm(hidden0(encoder, batch)), batch.mask), batch.mask))
        out[str(part.corpus.max_tokens)] = round(float(np.mean(values)), 4)
    return out


if __name__ == "__main__":
    main()
