"""Batches of token ids: arrays checked, a window cut, several joined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import DataError, UsageError
from edgeml.preprocess import TextBatch

__all__ = ["BATCH_ROWS", "BATCH_TOKENS", "batches", "checked_arrays", "joined"]

#: A batch ends at either, padding included; one row is always allowed. Twice the tokens take longer for each: they leave the cache.
BATCH_ROWS = 32
BATCH_TOKENS = 512


def batches(window: TextBatch) -> Iterator[tuple[NDArray[np.intp], TextBatch]]:
    """Cut a window into batches of similar length, the longest first, with the rows each came from."""
    real = window.mask != 0
    lengths = np.where(real.any(-1), real.shape[-1] - real[:, ::-1].argmax(-1), 1) if real.size else np.zeros(0, np.intp)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        rows = order[start : start + max(1, min(BATCH_ROWS, BATCH_TOKENS // longest))]
        start += len(rows)
        yield rows, window.rows(rows, longest)


def checked_arrays(arrays: Mapping[str, NDArray[Any]]) -> TextBatch:
    unknown = sorted(set(arrays) - {"ids", "types", "mask"})
    if unknown or "ids" not in arrays:
        raise UsageError("arrays holds ids, and if wanted types and mask" + (f", not {unknown[0]!r:.40}" if unknown else ""))
    ids = np.asarray(arrays["ids"])
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or 0 in ids.shape:
        raise DataError(f"ids must be whole numbers of shape (rows, tokens), not {ids.dtype} {ids.shape}")
    types = np.asarray(arrays.get("types", np.zeros_like(ids)))
    mask = np.asarray(arrays.get("mask", np.ones_like(ids)))
    if types.shape != ids.shape or mask.shape != ids.shape:
        raise DataError(f"types {types.shape} and mask {mask.shape} must have the shape of ids, {ids.shape}")
    return TextBatch(ids.astype(np.int64), types.astype(np.int64), mask.astype(np.float32), (False,) * len(ids))


def joined(batches: Sequence[TextBatch]) -> TextBatch:
    """Several batches as one, padded to the longest. All of them have a bias, or none has."""
    if len(batches) == 1:
        return batches[0]
    rows, longest = sum(len(batch.ids) for batch in batches), max(batch.ids.shape[1] for batch in batches)
    shape = (rows, longest)
    ids, types, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    start = 0
    for batch in batches:
        part = np.s_[start : start + len(batch.ids), : batch.ids.shape[1]]
        ids[part], types[part], mask[part] = batch.ids, batch.types, batch.mask
        start += len(batch.ids)
    biases = [batch.bias for batch in batches if batch.bias is not None]
    bias = np.concatenate(biases) if biases else None
    return TextBatch(ids, types, mask, tuple(flag for batch in batches for flag in batch.truncated), bias)
