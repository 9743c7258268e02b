"""The torch module on data: what the bundle is measured against, and which experts each task uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeml import metrics
from edgeml.data import Row
from edgeml.preprocess import TextPreprocessor
from edgeml_export.model import Model

__all__ = ["Batch", "Reference", "Tick"]

BATCH = 32

#: Called with the number of rows done since the last call.
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Batch:
    """Rows of one length or near it. ids, types (B, T) int64; mask (B, T) float32; `rows` their places in the input."""

    ids: NDArray[np.int64]
    types: NDArray[np.int64]
    mask: NDArray[np.float32]
    rows: NDArray[np.int64]


class Reference:
    """A model's torch module, in f32 and without masks."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._tokenizer = TextPreprocessor(model.tokenizer, model.max_tokens)
        self.names = [task.name for task in model.tasks] + ([model.embedding] if model.embedding is not None else [])

    def batches(self, rows: Sequence[Row], pair: bool, size: int = BATCH) -> Iterator[Batch]:
        """Tokenized rows, shortest first."""
        whole = self._tokenizer.encode([row.text for row in rows], [row.pair for row in rows] if pair else None)
        lengths = whole.mask.sum(-1).astype(np.int64)
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), size):
            part = order[start : start + size]
            width = int(lengths[part].max())
            yield Batch(whole.ids[part, :width], whole.types[part, :width], whole.mask[part, :width], part)

    @torch.no_grad()
    def predict(self, task: str, rows: Sequence[Row], tick: Tick) -> NDArray[np.int64]:
        """The predicted label of each row."""
        number = self.names.index(task)
        out = np.zeros(len(rows), np.int64)
        for batch in self.batches(rows, self.model.tasks[number].pair):
            scores = self.model.module.heads[task](self._pooled(task, batch))
            out[batch.rows] = scores.argmax(-1).numpy()
            tick(len(batch.rows))
        return out

    def score(self, task: str, rows: Sequence[Row], tick: Tick) -> float:
        """The task's own metric on labelled rows, in [0, 1]."""
        metric = self.model.tasks[self.names.index(task)].metric
        return metrics.score(metric, np.array([row.label for row in rows]), self.predict(task, rows, tick))

    @torch.no_grad()
    def usage(self, task: str, rows: Sequence[Row], pair: bool, tick: Tick) -> list[list[float]]:
        """Mean combine weight of each expert per real token, 1 in sum per site; six digits, so that noise is not recorded."""
        sites = self.model.module.sites()
        total = np.zeros((len(sites), self.model.module.config.experts))
        for batch in self.batches(rows, pair):
            self._pooled(task, batch)
            for site, part in enumerate(sites):
                if part.chosen is not None:
                    total[site] += (part.chosen.numpy() * batch.mask[..., None]).sum((0, 1), dtype=np.float64)
            tick(len(batch.rows))
        share = total / np.maximum(total.sum(-1, keepdims=True), 1e-12)
        return [[round(float(value), 6) for value in row] for row in share]

    @torch.no_grad()
    def choices(self, task: str, batch: Batch) -> NDArray[np.bool_]:
        """Which experts each real token chooses at each site: (sites, tokens, E)."""
        self._pooled(task, batch)
        real = batch.mask > 0
        return np.stack([part.chosen.numpy()[real] > 0 for part in self.model.module.sites() if part.chosen is not None])

    def _pooled(self, task: str, batch: Batch) -> Tensor:
        module, number = self.model.module, self.names.index(task)
        row = -1 if task == self.model.embedding else number
        bias = module.task_bias[row].expand(len(batch.ids), -1, -1)
        return module.pooled(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask), torch.from_numpy(batch.types), bias)
