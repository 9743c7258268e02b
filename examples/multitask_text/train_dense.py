"""Fine-tune the dense reference on all tasks at once.

    python train_dense.py --out work/dense [--steps 3600] [--resume]

The embeddings stay frozen. Heads start from a linear probe on the untouched encoder. The sentence-vector head is
trained to keep the untouched encoder's vectors. The seed fixes the schedule; a checkpoint is written every 250 steps.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from corpus import Batch, Corpus, source_directory
from edgeml_export.encoder import MultiTaskModel, load_bert
from torch import Tensor
from torch.nn import functional as F

EMBED_WEIGHT = 0.2  # of the sentence vector's loss beside the tasks' cross-entropy


def class_weights(corpus: Corpus) -> list[Tensor]:
    """Per task, the loss weight of each class: 1, or frequency^-0.5 (mean 1 over rows) where macro-F1 is the metric."""
    weights = []
    for number, task in enumerate(corpus.tasks):
        counts = torch.bincount(torch.from_numpy(corpus.label[corpus.task == number]), minlength=len(task.labels)).float()
        raw = counts.clamp(min=1).rsqrt() if task.metric == "macro_f1" else torch.ones_like(counts)
        weights.append(raw * counts.sum() / (raw * counts).sum())
    return weights


@torch.no_grad()
def original_vectors(model: MultiTaskModel, corpus: Corpus) -> Tensor:
    """Mean-pooled state of every row under the untouched encoder, (rows, d)."""
    model.eval()
    out = torch.empty(len(corpus.ids), model.encoder.config.hidden)
    for batch in corpus.by_length(64):
        out[batch.row] = model.pooled(batch.ids, batch.mask, batch.types)
    return out


def probe(features: Tensor, labels: Tensor, classes: int, weight: Tensor, steps: int = 300) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by full-batch Adam on frozen features; returns weight (classes, d) and bias."""
    scale = features.std()
    x = features / scale
    w = torch.zeros(classes, x.shape[1], requires_grad=True)
    b = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.Adam([w, b], lr=0.05, weight_decay=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(x @ w.T + b, labels, weight).backward()
        optimizer.step()
    return w.detach() / scale, b.detach()


def task_loss(model: MultiTaskModel, corpus: Corpus, batch: Batch, pooled: Tensor, weights: list[Tensor]) -> Tensor:
    """Cross-entropy summed over the rows of every task in the batch, divided by the rows."""
    loss = pooled.new_zeros(())
    for number in batch.task.unique().tolist():
        rows = batch.task == number
        logits = model.heads[corpus.tasks[number].name](F.dropout(pooled[rows], 0.1, model.training))
        loss = loss + F.cross_entropy(logits, batch.label[rows], weights[number], reduction="sum")
    return loss / len(batch.row)


@torch.no_grad()
def accuracies(model: MultiTaskModel, corpus: Corpus) -> dict[str, float]:
    """Plain accuracy per task, for the log only; the reported scores come from `edgeml eval`."""
    model.eval()
    right = torch.zeros(len(corpus.tasks))
    total = torch.zeros(len(corpus.tasks))
    for batch in corpus.by_length(64):
        pooled = model.pooled(batch.ids, batch.mask, batch.types)
        for number in batch.task.unique().tolist():
            rows = batch.task == number
            logits = model.heads[corpus.tasks[number].name](pooled[rows])
            right[number] += (logits.argmax(-1) == batch.label[rows]).sum()
            total[number] += int(rows.sum())
    return {task.name: round(float(right[i] / total[i]), 4) for i, task in enumerate(corpus.tasks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=2.5e-4)
    parser.add_argument("--head-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    train, validation = Corpus("train"), Corpus("validation", 150)
    model = MultiTaskModel(load_bert(source_directory()), {task.name: len(task.labels) for task in train.tasks})
    weights = class_weights(train)
    cache = arguments.out / "original.pt"
    if not cache.exists():
        torch.save(original_vectors(model, train), cache)
    original = torch.load(cache)
    for number, task in enumerate(train.tasks):
        rows = torch.from_numpy(train.task == number)
        w, b = probe(original[rows], torch.from_numpy(train.label)[rows], len(task.labels), weights[number])
        model.heads[task.name].weight.data, model.heads[task.name].bias.data = w, b
    original = F.normalize(original, dim=-1)

    for table in (model.encoder.words, model.encoder.positions, model.encoder.types):
        table.requires_grad_(False)
    heads = [*model.heads.parameters(), *model.embed_head.parameters()]
    body = [p for p in model.encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": arguments.rate}, {"params": heads, "lr": arguments.head_rate}], weight_decay=0.01, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [arguments.rate, arguments.head_rate], arguments.steps + 1, pct_start=0.06, anneal_strategy="cos"
    )
    first = 0
    checkpoint = arguments.out / "checkpoint.pt"
    if arguments.resume and checkpoint.exists():
        state = torch.load(checkpoint)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    batches = train.schedule(arguments.steps, arguments.batch, arguments.seed)
    started, running = time.time(), 0.0
    for step in range(first, arguments.steps):
        model.train()
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        batch = train.batch(batches[step])
        pooled = model.pooled(batch.ids, batch.mask, batch.types)
        loss = task_loss(model, train, batch, pooled, weights)
        kept = 1 - (model.vector(pooled) * original[batch.row]).sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + EMBED_WEIGHT * kept).backward()
        torch.nn.utils.clip_grad_norm_(body, 1.0)
        optimizer.step()
        schedule.step()
        running = 0.98 * running + 0.02 * float(loss.detach())
        if (step + 1) % 50 == 0:
            done = step + 1 - first
            pace = (time.time() - started) / done
            print(f"step {step + 1} loss {running / (1 - 0.98**done):.3f} vector {float(kept):.4f} {pace:.2f} s/step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == arguments.steps:
            state = {"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
        if (step + 1) % 1500 == 0 or step + 1 == arguments.steps:
            scores = accuracies(model, validation)
            print(json.dumps({"step": step + 1, "mean": round(sum(scores.values()) / len(scores), 4), **scores}), flush=True)
    torch.save({"model": model.state_dict()}, arguments.out / "model.pt")
    print(f"done in {(time.time() - started) / 3600:.2f} h", flush=True)


if __name__ == "__main__":
    main()
