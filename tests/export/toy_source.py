"""A two-layer mixture and data for it, made in a second: the source file that the export tests give to `edgeml export`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from edgeml_export import Model, TaskSpec
from edgeml_export.encoder import Encoder, EncoderConfig, MultiTaskModel
from edgeml_export.upcycle import MixtureConfig, MultiTaskMixture, upcycle
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F

from edgeml.preprocess import TextPreprocessor

COLOURS = ("red", "green", "blue")
FILLERS = tuple(f"w{number}" for number in range(40))
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *COLOURS, *FILLERS)
MAX_TOKENS = 16
TASKS = (
    TaskSpec("colour", "vision", COLOURS, "accuracy"),
    TaskSpec("same", "logic", ("no", "yes"), "macro_f1", pair=True),
)
CONFIG = MixtureConfig(shared=32, experts=6, width=32, top_k=2)
ROWS = {"train": 120, "validation": 60, "test": 60}


def tokenizer() -> bytes:
    """A word-level tokenizer with BERT's special tokens."""
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made.to_str().encode()


def rows(task: TaskSpec, split: str) -> list[dict[str, object]]:
    """A text names one colour among fillers; a pair is `yes` when both name the same."""
    rng = np.random.default_rng([list(ROWS).index(split), len(task.name)])
    out: list[dict[str, object]] = []
    for _ in range(ROWS[split]):
        colours = rng.integers(0, 3, 2)
        if task.pair and rng.random() < 0.4:
            colours[1] = colours[0]
        texts = [_text(rng, COLOURS[colour]) for colour in colours]
        if task.pair:
            out.append({"text": texts[0], "text_pair": texts[1], "label": int(colours[0] == colours[1])})
        else:
            out.append({"text": texts[0], "label": int(colours[0])})
    return out


def _text(rng: np.random.Generator, colour: str) -> str:
    words = [FILLERS[index] for index in rng.integers(0, len(FILLERS), rng.integers(2, 6))]
    words.insert(int(rng.integers(0, len(words) + 1)), colour)
    return " ".join(words)


def write_data(root: Path) -> None:
    """A data directory with both tasks."""
    for task in TASKS:
        place = root / task.domain / task.name
        place.mkdir(parents=True)
        document = {"name": task.name, "domain": task.domain, "labels": task.labels, "metric": task.metric, "pair": task.pair}
        (place / "task.json").write_text(json.dumps({**document, "licence": "CC0-1.0"}))
        for split in ROWS:
            (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(task, split)))


def mixture() -> Model:
    """The same model every time: a random encoder, upcycled, its heads fitted to the training rows."""
    torch.manual_seed(0)
    dense = MultiTaskModel(
        Encoder(EncoderConfig(len(WORDS), 64, 2, 2, CONFIG.intermediate, 32)), {task.name: len(task.labels) for task in TASKS}
    )
    dense.encoder.words.weight.data[4:7] *= 3
    made, batches = TextPreprocessor(tokenizer(), MAX_TOKENS), []
    for number, task in enumerate(TASKS):
        drawn = rows(task, "train")
        batch = made.encode([str(row["text"]) for row in drawn], [str(row["text_pair"]) for row in drawn] if task.pair else None)
        ids, mask, types = (torch.from_numpy(value) for value in (batch.ids, batch.mask, batch.types))
        batches.append((ids, mask, types, torch.full((len(ids),), number)))
    module = upcycle(dense.eval(), CONFIG, batches, inside=3).eval()
    for number, task in enumerate(TASKS):
        _fit(module, task, batches[number][:3], number)
    module.task_bias.requires_grad_(False)[-1, :, 0] = 0.5
    return Model(module, TASKS, tokenizer(), MAX_TOKENS, provenance={"source": "random weights", "licence": "Apache-2.0"})


@torch.no_grad()
def _fit(module: MultiTaskMixture, task: TaskSpec, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], number: int) -> None:
    """Least squares of the labels on the pooled states."""
    ids, mask, types = batch
    pooled = module.pooled(ids, mask, types, module.task_bias[number].expand(len(ids), -1, -1))
    target = F.one_hot(torch.tensor([int(str(row["label"])) for row in rows(task, "train")]), len(task.labels)).float()
    x = torch.cat([pooled, torch.ones(len(pooled), 1)], 1)
    solved = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.shape[1]), x.T @ target)
    head = module.heads[task.name]
    head.weight.copy_(8 * solved[:-1].T)
    head.bias.copy_(8 * solved[-1])
