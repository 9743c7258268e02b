"""Turn the dense reference into a mixture of experts and distil the one into the other.

    python train_mixture.py --dense work/dense --out work/mixture [--steps 1300] [--resume]

Targets are the dense model's class probabilities and mean-pooled states on the training rows, computed once. A part of
the rows is run with only the task's own half of the experts (by running usage): the mask that `--residency masked` uses.
No row is ever run with random or without routed experts, and nothing balances the load.

Attention, norms, the shared experts and the heads stay as they were in the dense model: where they may learn, they learn to do
without the routed experts. Measured: with all of them learning, the loss from masking every routed expert fell in 1,500 steps from
10 points to 3; with only the heads learning, slowly, random halves cost 2.2 points of score where they cost 3.5 or more without.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from corpus import Batch, Corpus, source_directory
from edgeml_export.encoder import MultiTaskModel, load_bert
from edgeml_export.upcycle import MixtureConfig, MultiTaskMixture, upcycle
from torch import Tensor
from torch.nn import functional as F
from train_dense import class_weights

CONFIG = MixtureConfig(shared=64, experts=23, width=64, top_k=6)
INSIDE = 6  # experts of a site that start as a task's own
EMBED_SHARE = 0.06  # of the rows serve the sentence vector
MASKED_SHARE = 0.35  # of the rows run with their task's half of the experts
OUTSIDE = -4.0
RATE = 5e-4  # of the routed experts


def classes(corpus: Corpus) -> dict[str, int]:
    return {task.name: len(task.labels) for task in corpus.tasks}


def load_dense(path: Path, corpus: Corpus) -> MultiTaskModel:
    """The dense reference from its checkpoint."""
    model = MultiTaskModel(load_bert(source_directory()), classes(corpus))
    model.load_state_dict(torch.load(path / "model.pt")["model"])
    return model.eval()


@torch.no_grad()
def teach(dense: MultiTaskModel, corpus: Corpus) -> dict[str, Tensor]:
    """The dense model's logits (rows, most classes; padded with -inf) and mean-pooled states (rows, d)."""
    width = max(classes(corpus).values())
    logits = torch.full((len(corpus.ids), width), float("-inf"))
    pooled = torch.empty(len(corpus.ids), dense.encoder.config.hidden)
    for batch in corpus.by_length(64):
        pooled[batch.row] = dense.pooled(batch.ids, batch.mask, batch.types)
        for number in batch.task.unique().tolist():
            rows = batch.row[batch.task == number]
            out = dense.heads[corpus.tasks[number].name](pooled[rows])
            logits[rows, : out.shape[1]] = out
    return {"logits": logits, "pooled": pooled}


def calibration(corpus: Corpus, per_task: int = 48) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The first rows of every task's training split."""
    out = []
    for number in range(len(corpus.tasks)):
        batch = corpus.batch((corpus.task == number).nonzero()[0][:per_task])
        out.append((batch.ids, batch.mask, batch.types, batch.task))
    return out


def used_mask(usage: Tensor, share: float) -> Tensor:
    """usage (tasks, sites, E) -> 0 for the most used `share` of each site's experts, -inf for the rest."""
    kept = usage.argsort(dim=-1, descending=True, stable=True)[..., : int(usage.shape[-1] * share)]
    return torch.full_like(usage, float("-inf")).scatter_(-1, kept, 0.0)


def step_loss(
    model: MultiTaskMixture, corpus: Corpus, batch: Batch, pooled: Tensor, task: Tensor, targets: dict[str, Tensor], weights: list[Tensor]
) -> Tensor:
    """Distillation: KL to the reference, a little cross-entropy, the pooled state, and the sentence vector."""
    count = len(corpus.tasks)
    loss = pooled.new_zeros(())
    for number in task.unique().tolist():
        rows = task == number
        if number == count:
            loss = loss + 4 * (1 - (model.vector(pooled[rows]) * targets["original"][batch.row[rows]]).sum(-1)).sum()
            continue
        logits = model.heads[corpus.tasks[number].name](pooled[rows])
        teacher = targets["logits"][batch.row[rows], : logits.shape[1]]
        loss = loss + F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
        loss = loss + 0.2 * F.cross_entropy(logits, batch.label[rows], weights[number], reduction="sum")
        target = targets["pooled"][batch.row[rows]]
        loss = loss + 2 * ((pooled[rows] - target).square().mean(-1) / target.square().mean(-1)).sum()
    return loss / len(task)


@torch.no_grad()
def accuracies(model: MultiTaskMixture, corpus: Corpus, mask: Tensor | None = None) -> dict[str, float]:
    """Plain accuracy per task under an optional mask (tasks, sites, E); for the log only."""
    model.eval()
    right, total = torch.zeros(len(corpus.tasks)), torch.zeros(len(corpus.tasks))
    for batch in corpus.by_length(64):
        bias = model.task_bias[batch.task] if mask is None else model.task_bias[batch.task] + mask[batch.task]
        pooled = model.pooled(batch.ids, batch.mask, batch.types, bias)
        for number in batch.task.unique().tolist():
            rows = batch.task == number
            logits = model.heads[corpus.tasks[number].name](pooled[rows])
            right[number] += (logits.argmax(-1) == batch.label[rows]).sum()
            total[number] += int(rows.sum())
    return {task.name: round(float(right[i] / total[i]), 4) for i, task in enumerate(corpus.tasks)}


def freeze_shared(model: MultiTaskMixture) -> None:
    """Let no gradient reach the shared neurons, which lie first in the same tensors as the routed ones."""
    keep = torch.cat([torch.zeros(CONFIG.shared), torch.ones(CONFIG.intermediate - CONFIG.shared)])
    for site in model.sites():
        site.up.weight.register_hook(lambda gradient: gradient * keep[:, None])
        site.up.bias.register_hook(lambda gradient: gradient * keep)
        site.down.weight.register_hook(lambda gradient: gradient * keep)


def report(model: MultiTaskMixture, corpus: Corpus, usage: Tensor, step: int) -> None:
    """Print the mean accuracy with all experts, the used half and quarter, a random half and none."""
    generator = torch.Generator().manual_seed(7)
    variants = {
        "all": None,
        "half": used_mask(usage, 0.5),
        "quarter": used_mask(usage, 0.25),
        "random half": used_mask(torch.rand(usage.shape, generator=generator), 0.5),
        "none": torch.full_like(usage, float("-inf")),
    }
    line: dict[str, object] = {"step": step}
    for name, mask in variants.items():
        scores = accuracies(model, corpus, mask)
        line[name] = round(sum(scores.values()) / len(scores), 4)
        if name == "all":
            line["tasks"] = scores
    ordered = usage[:-1].sort(dim=-1, descending=True).values
    line["half_share"] = round(float(ordered[..., : ordered.shape[-1] // 2].sum(-1).div(ordered.sum(-1)).mean()), 3)
    line["dead"] = int((usage.sum(0) / usage.sum(0).sum(-1, keepdim=True) < 0.002).sum())
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    train, validation = Corpus("train"), Corpus("validation", 100)
    dense = load_dense(arguments.dense, train)
    weights = class_weights(train)
    cache = arguments.out / "targets.pt"
    if not cache.exists():
        torch.save(teach(dense, train), cache)
    targets = torch.load(cache)
    targets["original"] = F.normalize(torch.load(arguments.dense / "original.pt"), dim=-1)
    model = upcycle(dense, CONFIG, calibration(train), arguments.seed, INSIDE, OUTSIDE)
    count = len(train.tasks)
    usage = torch.softmax(model.task_bias.detach(), -1)
    report(model, validation, usage, 0)

    model.requires_grad_(False)
    fast = [p for name, p in model.named_parameters() if name.startswith("embed_head") or ".router." in name]
    slow = [p for site in model.sites() for p in (site.up.weight, site.up.bias, site.down.weight)]
    for parameter in (*fast, *slow, model.task_bias):
        parameter.requires_grad_(True)
    freeze_shared(model)
    groups = [
        {"params": slow, "lr": RATE, "weight_decay": 0.0},
        {"params": fast, "lr": 1e-3},
        {"params": [model.task_bias], "lr": 1e-2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [RATE, 1e-3, 1e-2], arguments.steps + 1, pct_start=0.05)
    first, checkpoint = 0, arguments.out / "checkpoint.pt"
    if arguments.resume and checkpoint.exists():
        state = torch.load(checkpoint)
        first, usage = state["step"], state["usage"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    batches = train.schedule(arguments.steps, arguments.batch, arguments.seed + 100)
    started, running = time.time(), 0.0
    for step in range(first, arguments.steps):
        model.train()
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        batch = train.batch(batches[step])
        task = torch.where(torch.rand(len(batch.task)) < EMBED_SHARE, torch.tensor(count), batch.task)
        masked = torch.rand(len(task)) < MASKED_SHARE
        bias = model.task_bias[task] + torch.where(masked[:, None, None], used_mask(usage, 0.5)[task], torch.tensor(0.0))
        pooled = model.pooled(batch.ids, batch.mask, batch.types, bias)
        loss = step_loss(model, train, batch, pooled, task, targets, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(slow, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            chosen = torch.stack([(part.chosen * batch.mask[..., None]).sum(1) for part in model.sites()], 1)  # type: ignore[operator]
            for number in task[~masked].unique().tolist():
                seen = chosen[(task == number) & ~masked].sum(0)
                usage[number] = 0.97 * usage[number] + 0.03 * seen / seen.sum(-1, keepdim=True)
        running = 0.98 * running + 0.02 * float(loss.detach())
        if (step + 1) % 50 == 0:
            done = step + 1 - first
            print(f"step {step + 1} loss {running / (1 - 0.98**done):.3f} {(time.time() - started) / done:.2f} s/step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == arguments.steps:
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "usage": usage,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
        if (step + 1) % 500 == 0 or step + 1 == arguments.steps:
            report(model, validation, usage, step + 1)
    torch.save({"model": model.state_dict(), "usage": usage}, arguments.out / "model.pt")
    print(f"done in {(time.time() - started) / 3600:.2f} h", flush=True)


if __name__ == "__main__":
    main()
