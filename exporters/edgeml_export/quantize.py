"""How weights are stored, and the scales of 4-bit ones.

Experts take most of the bytes and stand 4 bits; attention runs for every token and keeps 8; routers, norms and heads are small
and decide, so they stay f32 and inside the graphs.

The largest value of a block need not be representable: the scale with the least squared error usually clips it, and a scale of
the other sign gives the longer side of -8 .. 7 to the block's largest value. `best_scales` tries both signs over a grid and then
solves for the scale once more with the levels held fixed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import UsageError
from edgeml.kernels import ScaleRule, largest, quantize_tiles
from edgeml.layout import WeightType

__all__ = ["TYPES", "QuantizePlan", "best_scales"]

TYPES = {"f32": WeightType.F32, "int8": WeightType.INT8, "int4": WeightType.INT4}
GRID = np.linspace(0.74, 1.04, 11, dtype=np.float32)


@dataclass(frozen=True)
class QuantizePlan:
    """Types of the routed experts, the shared one, the dense matrices and the word table; `scales` is `best` or `largest`."""

    experts: str = "int4"
    shared: str = "int4"
    dense: str = "int8"
    embeddings: str = "int8"
    scales: str = "best"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            choices = {"scales": ("best", "largest"), "embeddings": ("int8", "f32")}.get(name, tuple(TYPES))
            if value not in choices:
                raise UsageError(f"quantize: '{name}' must be one of {', '.join(choices)}, not {value!r}")

    @property
    def rule(self) -> ScaleRule:
        """How the scale of a row's block is chosen."""
        return best_scales if self.scales == "best" else largest

    def override(self, experts: str | None, dense: str | None) -> QuantizePlan:
        """The plan with the command line's choices: `experts` sets routed and shared ones, `dense` f32 the word table too."""
        rows = self.embeddings if dense is None else ("f32" if dense == "f32" else "int8")
        return QuantizePlan(experts or self.experts, experts or self.shared, dense or self.dense, rows, self.scales)


def best_scales(tiles: NDArray[np.float32], type: WeightType) -> NDArray[np.float16]:
    """The scale of least squared error for each row of tiles (..., 16, 32): (..., 16). Only 4 bits gain by a search."""
    best = largest(tiles, type)
    if type != WeightType.INT4:
        return best
    least = _error(tiles, best, type)
    peak = np.take_along_axis(tiles, np.abs(tiles).argmax(-1)[..., None], -1)[..., 0]
    for share in GRID:
        for candidate in (peak * (share / np.float32(7)), peak * (share / np.float32(-8))):
            best, least = _better(tiles, candidate, best, least, type)
    levels = quantize_tiles(tiles, best, type)
    power = np.square(levels).sum(-1)
    solved = np.divide((tiles * levels).sum(-1), power, out=np.zeros_like(peak), where=power > 0)
    return _better(tiles, solved, best, least, type)[0]


def _better(
    tiles: NDArray[np.float32], scale: NDArray[np.float32], best: NDArray[np.float16], least: NDArray[np.float32], type: WeightType
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    """Per row, the candidate where it is better than the best so far."""
    candidate = scale.astype(np.float16)
    error = _error(tiles, candidate, type)
    wins = error < least
    return np.where(wins, candidate, best), np.where(wins, error, least)


def _error(tiles: NDArray[np.float32], scale: NDArray[np.float16], type: WeightType) -> NDArray[np.float32]:
    stored = quantize_tiles(tiles, scale, type) * scale.astype(np.float32)[..., None]
    error: NDArray[np.float32] = np.square(tiles - stored).sum(-1)
    return error
