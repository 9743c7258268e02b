#!/usr/bin/env python3
"""Channel pruning at equal MACs after equal fine-tuning: ours against Torch-Pruning's, on a two-task network.

    compare.py run    --work DIR [--data ../shared/data/images] [--seeds 1,2,3] [--cuts 0.6,0.8] [--methods ...] [--losses ...]
    compare.py bounds --work DIR [--seeds 1]

One reference per seed (8 epochs), cut by every method to the same share of MACs from the same calibration pictures, fine-tuned for
3 epochs with the same batches, rate and loss; `labels` is cross-entropy alone, `soft` adds the reference's soft targets. `pagcp`
counts MACs and keeps multiples of 8; `pagcp-latency` measures time on onnxruntime, has a target for that too, and keeps multiples
of 16, as wide vectors want. `none` is the control: the reference itself, fine-tuned the same way. A row's drop is the mean
over tasks of the relative change of accuracy on the test split against its reference. Rows are appended to DIR/results.jsonl as they
are done; `run` skips those already there, so that it can be broken off at any time, and run more than once at a time. `bounds` prunes
under bounds on the loss, without fine-tuning. report.py makes the table and the record from DIR.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import benchlib
import network
import peers
import timing
import torch
from edgeml_export.prune import Distillation, Progress, macs_and_parameters, prune
from torch import nn

from edgeml.errors import UsageError
from edgeml.measure import environment

OURS, CONTROL = ("pagcp", "pagcp-latency"), "none"
METHODS = (*OURS, *peers.PEERS, CONTROL)
BOUNDS = (1.05, 1.10, 1.20)
TIME = {0.6: 1 - 1 / 2.5, 0.8: 1 - 1 / 4.6}  # of the float network: what `pagcp-latency` is to remove beside that share of MACs
PARAMETERS = 0.6  # least share of parameters that ours removes
LABELS, SOFT = LOSSES = ("labels", "soft")
Row = dict[str, Any]


def reference(work: Path, data: dict[str, network.Split], seed: int, epochs: int) -> nn.Module:
    """The seed's reference, trained once."""
    net, file = network.Net(), work / f"reference-{seed}.pt"
    if not file.exists():
        torch.manual_seed(seed)
        net = network.Net().to(memory_format=torch.channels_last)
        train(net, data, seed, epochs, 0.1, [])
        _saved(net.state_dict(), file)
    net = network.Net()
    net.load_state_dict(torch.load(file, weights_only=True))
    return net.eval()


def train(net: nn.Module, data: dict[str, network.Split], seed: int, epochs: int, rate: float, answers: list[list[network.Logits]]) -> None:
    """One cycle in place; the same batches for everyone with this seed, and the reference's answers to them as soft targets."""
    lessons = network.shuffled(data["train"], seed)

    def batches(epoch: int) -> list[tuple[Any, ...]]:
        return [(*batch, soft) for batch, soft in zip(lessons(epoch), answers[epoch], strict=True)] if answers else list(lessons(epoch))

    Distillation(
        nn.Identity(),  # its answers are in the batches
        batches,
        epochs=epochs,
        rate=rate,
        soft=0.0,
        labels=1.0,
        objectives=network.objectives() | ({"soft": network.towards_answers} if answers else {}),
        progress=lambda epoch, loss: print(f"  epoch {epoch}: loss {loss:.4f}", file=sys.stderr, flush=True),
    )(net, 1)


def answers(work: Path, dense: nn.Module, data: dict[str, network.Split], seed: int, epochs: int) -> list[list[network.Logits]]:
    """The reference's logits for every batch of fine-tuning: all rows of a seed see the same batches, so they are worked out once."""
    file = work / f"answers-{seed}-{epochs}.pt"
    if not file.exists():
        made = [network.answers(dense, network.shuffled(data["train"], seed)(epoch)) for epoch in range(epochs)]
        _saved(made, file)
    kept: list[list[network.Logits]] = torch.load(file, weights_only=True)
    return kept


def _saved(what: Any, file: Path) -> None:
    scratch = file.with_suffix(f".{os.getpid()}")
    torch.save(what, scratch)
    os.replace(scratch, file)


def cut(work: Path, dense: nn.Module, method: str, share: float, data: dict[str, network.Split], seed: int) -> tuple[nn.Module, float]:
    """A method's network at a share of MACs, made once and kept; and the seconds it took."""
    file = work / f"{method}-{share:g}-{seed}.pt"
    if not file.exists():
        started = time.monotonic()
        if method in OURS:
            by_latency: dict[str, Any] = (
                {"cost": timing.against(dense), "align": 16, "target_cost": TIME[share]} if method == OURS[1] else {}
            )
            result = prune(
                dense,
                network.EXAMPLE,
                network.objectives(),
                network.batches(data["calibration"]),
                target_macs=share,
                target_parameters=PARAMETERS,
                checkpoint=file.with_suffix(".json"),
                progress=_told,
                **by_latency,
            )
            net = result.module
        else:
            net = copy.deepcopy(dense) if method == CONTROL else peers.cut(dense, method, share, data["calibration"])
        _saved({"net": net, "seconds": time.monotonic() - started}, file)
    kept = torch.load(file, weights_only=False)  # written above, by this benchmark
    return kept["net"].eval(), kept["seconds"]


def tuned_file(work: Path, method: str, share: float, loss: str, seed: int) -> Path:
    """Where a row's network lies after fine-tuning."""
    return work / f"{method}-{share:g}-{seed}-{loss}.pt"


def row(work: Path, data: dict[str, network.Split], seed: int, method: str, share: float, loss: str, options: argparse.Namespace) -> Row:
    """Cut, fine-tune, measure."""
    dense = reference(work, data, seed, options.epochs)
    net, seconds = cut(work, dense, method, share, data, seed)
    raw, whole = network.scores(net, data["test"]), network.scores(dense, data["test"])
    tuned = copy.deepcopy(net).to(memory_format=torch.channels_last)
    soft = answers(work, dense, data, seed, options.tune_epochs) if loss == SOFT else []
    train(tuned, data, seed, options.tune_epochs, options.rate, soft)
    _saved(copy.deepcopy(tuned).to(memory_format=torch.contiguous_format), tuned_file(work, method, share, loss, seed))
    before, after = macs_and_parameters(dense, network.EXAMPLE), macs_and_parameters(tuned, network.EXAMPLE)
    test = network.scores(tuned, data["test"])
    return {
        "macs_removed": 1 - after[0] / before[0],
        "parameters_removed": 1 - after[1] / before[1],
        "macs": after[0],
        "parameters": after[1],
        "reference": {"digest": network.digest(dense), "test": whole},
        "cut_s": seconds,
        "raw": raw,
        "raw_drop": network.drop(raw, whole),
        "test": test,
        "validation": network.scores(tuned, data["validation"]),
        "drop": network.drop(test, whole),
        "channels": {name: layer.out_channels for name, layer in tuned.named_modules() if isinstance(layer, nn.Conv2d)},
    }


def wanted(options: argparse.Namespace) -> Iterator[Row]:
    """The keys of all rows, in the order in which they tell most soonest."""
    for seed in options.seeds:
        for share in options.cuts:
            for loss in options.losses:
                for method in options.methods:
                    yield {"seed": seed, "cut": 0.0 if method == CONTROL else share, "loss": loss, "method": method}


def rows(work: Path) -> list[Row]:
    """What is measured so far; a line that was cut off is dropped."""
    file = work / "results.jsonl"
    found = []
    for line in file.read_text("utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def run(options: argparse.Namespace) -> int:
    """Measure what is not measured yet."""
    data = network.load(options.data)
    done = {key(one) for one in rows(options.work)}
    for one in wanted(options):
        if key(one) in done:
            continue
        done.add(key(one))
        settings = {"epochs": options.epochs, "tune_epochs": options.tune_epochs, "rate": options.rate}
        found = row(options.work, data, one["seed"], one["method"], one["cut"], one["loss"], options)
        measured = one | found | {"settings": settings, "cpu": environment()["cpu"]}
        with open(options.work / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(measured) + "\n")
        print(f"{one}: MACs -{measured['macs_removed']:.1%}, raw {measured['raw_drop']:+.2f}, drop {measured['drop']:+.2f}", flush=True)
    return 0


def key(one: Row) -> tuple[Any, ...]:
    return one["seed"], one["cut"], one["loss"], one["method"]


def bounds(options: argparse.Namespace) -> int:
    """Cut under each bound, without fine-tuning, and measure every task's loss on the calibration pictures again."""
    data = network.load(options.data)
    pictures = network.batches(data["calibration"])
    for seed in options.seeds:
        dense = reference(options.work, data, seed, options.epochs)
        for bound in BOUNDS:
            file = options.work / f"bound-{bound:g}-{seed}.json"
            if file.exists():
                continue
            keep = file.with_suffix(".steps")
            result = prune(dense, network.EXAMPLE, network.objectives(), pictures, bound=bound, checkpoint=keep, progress=_told)
            before, after = (network.losses(net, pictures) for net in (dense, result.module))
            ratios = {task: after[task] / before[task] for task in network.TASKS}
            found = {"seed": seed, "bound": bound, "ratios": ratios, "macs_removed": result.macs_removed}
            file.write_text(json.dumps(found | {"parameters_removed": result.parameters_removed}), "utf-8")
            print(f"bound {bound}: {ratios}, MACs -{result.macs_removed:.1%}", flush=True)
    return 0


def _told(event: Progress) -> None:
    print(f"  {event.cut.group} {event.cut.channels} -> {len(event.cut.keep)}, loss x{event.cut.growth:.4f}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    made = benchlib.parser(__doc__)
    made.add_argument("what", choices=["run", "bounds"])
    made.add_argument("--work", type=Path, required=True, help="folder for references, cut networks and results.jsonl")
    made.add_argument("--data", type=Path, default=benchlib.shared_text().parent / "images", help="folder that holds multi_fashion_mnist")
    made.add_argument("--seeds", type=benchlib.numbers, default=[1, 2, 3])
    made.add_argument("--cuts", type=lambda text: [float(part) for part in text.split(",")], default=[0.6, 0.8])
    made.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS), help=",".join(METHODS))
    made.add_argument("--losses", type=lambda text: text.split(","), default=list(LOSSES), help=",".join(LOSSES))
    made.add_argument("--epochs", type=int, default=8, help="of the reference's training")
    made.add_argument("--tune-epochs", type=int, default=3)
    made.add_argument("--rate", type=float, default=0.03, help="highest rate of fine-tuning")
    made.add_argument("--threads", type=int, default=2)
    return made


def main() -> int:
    options = _parser().parse_args()
    for name in {*options.methods} - {*METHODS} | {*options.losses} - {*LOSSES}:
        raise UsageError(f"there is no method or loss '{name}'; methods: {', '.join(METHODS)}; losses: {', '.join(LOSSES)}")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    return run(options) if options.what == "run" else bounds(options)


if __name__ == "__main__":
    benchlib.run(main)
