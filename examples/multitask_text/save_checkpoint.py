"""Turn a training run into the committed checkpoint: f16, without the embeddings that training left alone, with test scores.

    python save_checkpoint.py --mixture work/mixture --dense work/dense [--out mixture.safetensors]

Scores are of the weights as they are stored, computed in f32. Tensors that f16 cannot hold are refused.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from corpus import Corpus, source_directory
from edgeml_export import TaskSpec
from edgeml_export.encoder import MultiTaskModel, load_bert
from edgeml_export.upcycle import MultiTaskMixture
from model import CHECKPOINT, FROZEN, METADATA, USAGE
from safetensors.torch import save_file
from torch import Tensor
from train_mixture import CONFIG, classes, load_dense

from edgeml import metrics


@torch.no_grad()
def scores(model: MultiTaskModel, corpus: Corpus, label: str) -> dict[str, float]:
    """Each task's own metric on the corpus."""
    model.eval()
    predicted = torch.zeros(len(corpus.ids), dtype=torch.long)
    for number, batch in enumerate(corpus.by_length(64)):
        bias = model.task_bias[batch.task] if isinstance(model, MultiTaskMixture) else None
        pooled = model.pooled(batch.ids, batch.mask, batch.types, bias)
        for task in batch.task.unique().tolist():
            rows = batch.task == task
            predicted[batch.row[rows]] = model.heads[corpus.tasks[task].name](pooled[rows]).argmax(-1)
        if number % 50 == 0:
            print(f"{label}: {64 * number} of {len(corpus.ids)} rows", flush=True)
    found = {}
    for number, task in enumerate(corpus.tasks):
        rows = corpus.task == number
        found[task.name] = metrics.score(task.metric, corpus.label[rows], predicted.numpy()[rows])
    return found


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors in f16."""
    stored = {name: value.half().contiguous() for name, value in state.items() if name not in FROZEN}
    lost = [name for name, value in stored.items() if not value.isfinite().all()]
    if lost:
        raise SystemExit(f"f16 cannot hold {lost[0]}")
    return stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixture", type=Path, required=True)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args()
    test = Corpus("test")
    trained = torch.load(arguments.mixture / "model.pt")
    stored = halved(trained["model"])
    module = MultiTaskMixture(load_bert(source_directory()), classes(test), CONFIG)
    module.load_state_dict({name: value.float() for name, value in stored.items()}, strict=False)
    about = {
        "config": asdict(CONFIG),
        "tasks": [asdict(TaskSpec.of(task)) for task in test.tasks],
        "max_tokens": test.max_tokens,
        "mixture_scores": scores(module, test, "mixture"),
        "dense_scores": scores(load_dense(arguments.dense, test), test, "dense"),
    }
    for name in ("dense_scores", "mixture_scores"):
        print(f"{name}: mean {sum(about[name].values()) / len(test.tasks):.4f}", json.dumps(about[name]))
    save_file({**stored, USAGE: trained["usage"].float()}, arguments.out, {METADATA: json.dumps(about, sort_keys=True)})
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
