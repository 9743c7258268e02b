"""Weight tiles and the NumPy oracles of the native kernels: slow, plain, and written from the format alone.

A matrix of R outputs and K inputs is padded with zeros to multiples of 16 rows and 32 columns and cut into tiles of 16 x 32,
row blocks first. An integer tile holds, for each group of four columns, 64 bytes: four consecutive columns of row 0, of row 1,
... of row 15, so that one dot-product instruction against four activations serves sixteen rows without a horizontal sum.

    int8  544 bytes: 8 groups of 64 values stored + 128, then 16 scales (float16)
    int4  288 bytes: 4 x 64 bytes, low nibble group g, high nibble group g + 4, stored + 8; then 16 scales (float16)
    f32  2048 bytes: for each column the 16 rows

Activations are quantized per row and block of 32: scale = max|x| / 127, rounded half to even. A block's integer sum is exact;
the float steps are `acc = acc + float(sum) * (weight scale * activation scale)` in ascending order of blocks, product and sum
rounded separately. Whoever follows these steps gets the same bits on every processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import UsageError
from edgeml.layout import Activation, Matrix, WeightType, expert_layout, matrix_bytes
from edgeml.native import crc32c

__all__ = [
    "ScaleRule",
    "activate",
    "expert",
    "largest",
    "linear",
    "matmul",
    "pack_expert",
    "pack_linear",
    "pack_matrix",
    "pack_rows",
    "quantize_rows",
    "quantize_tiles",
    "unpack_matrix",
]

Floats = NDArray[np.float32]
ROWS, COLS, GROUP = 16, 32, 4
_LEVELS = {WeightType.INT8: 127, WeightType.INT4: 7}
_LOWEST = {WeightType.INT8: -127, WeightType.INT4: -8}
_BIAS = {WeightType.INT8: 128, WeightType.INT4: 8}


#: From tiles (R / 16, K / 32, 16, 32) to the scale of each row and block, (R / 16, K / 32, 16).
ScaleRule = Callable[[Floats, WeightType], NDArray[np.float16]]


def largest(tiles: Floats, type: WeightType) -> NDArray[np.float16]:
    """The scale at which a row's largest value in the block is the last level."""
    scale: NDArray[np.float16] = (np.abs(tiles).max(-1) / np.float32(_LEVELS[type])).astype(np.float16)
    return scale


def quantize_tiles(tiles: Floats, scale: NDArray[np.float16], type: WeightType) -> Floats:
    """The levels, as float32, nearest to tiles (..., 16, 32) at a scale (..., 16); a scale may be negative."""
    wide = scale.astype(np.float32)[..., None]
    values = np.divide(tiles, wide, out=np.zeros_like(tiles), where=wide != 0)
    return np.clip(np.rint(values), _LOWEST[type], _LEVELS[type])


def pack_matrix(weights: Floats, type: WeightType, rule: ScaleRule = largest) -> bytes:
    """Quantize and tile a matrix (R, K). Raises `UsageError` for values that are not finite."""
    tiles = _tile(_finite(weights))
    if type == WeightType.F32:
        return np.ascontiguousarray(tiles.transpose(0, 1, 3, 2)).tobytes()
    scale = rule(tiles, type)
    stored = (quantize_tiles(tiles, scale, type) + _BIAS[type]).astype(np.uint8)
    groups = stored.reshape(*stored.shape[:3], COLS // GROUP, GROUP).transpose(0, 1, 3, 2, 4).reshape(*stored.shape[:2], COLS // GROUP, -1)
    if type == WeightType.INT4:
        groups = (groups[:, :, :4] | groups[:, :, 4:] << 4).astype(np.uint8)
    flat = groups.reshape(*groups.shape[:2], -1)
    return np.concatenate([flat, np.ascontiguousarray(scale).view(np.uint8)], axis=-1).tobytes()


def unpack_matrix(data: bytes, type: WeightType, rows: int, cols: int) -> Floats:
    """The float32 values (rows, cols) that a packed matrix stands for."""
    if type == WeightType.F32:
        blocks = _blocks(rows, cols)
        tiles = np.frombuffer(data, "<f4").reshape(*blocks, COLS, ROWS).transpose(0, 1, 3, 2)
        return _untile(tiles, rows, cols)
    values, scale = _stored(data, type, rows, cols)
    return _untile(values.astype(np.float32) * scale[..., None], rows, cols)


def quantize_rows(x: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Activations (N, K) -> values (N, K32) int8 and scales (N, K32 / 32) float32; a block that is not finite gets a NaN scale."""
    count, width = x.shape
    blocks = np.zeros((count, -(-width // COLS), COLS), np.float32)
    blocks.reshape(count, blocks.shape[1] * COLS)[:, :width] = x
    largest = np.abs(blocks).max(-1)
    finite = np.isfinite(largest)
    scale = np.where(finite, largest / np.float32(127), np.float32(np.nan)).astype(np.float32)
    usable = finite & (largest > 0)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=usable)
    inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))  # 127 / a subnormal overflows: such a block counts as zero
    clean = np.where(finite[..., None], blocks, np.float32(0))
    values = np.clip(np.rint(clean * inverse[..., None]), -127, 127).astype(np.int8)
    return values.reshape(count, values.shape[1] * COLS), scale


def matmul(data: bytes, matrix: Matrix, x: Floats, bias: Floats | None = None) -> Floats:
    """A packed matrix times activations (N, K) -> (N, R), in the format's order of steps."""
    if x.ndim != 2 or x.shape[1] != matrix.cols:
        raise UsageError(f"the matrix takes {matrix.cols} inputs a row, not {x.shape}")
    padded = _blocks(matrix.rows, matrix.cols)[0] * ROWS
    out = np.zeros((len(x), padded), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        if matrix.type == WeightType.F32:
            weights = unpack_matrix(data, matrix.type, matrix.rows, matrix.cols)
            for k in range(matrix.cols):
                out[:, : matrix.rows] += weights[None, :, k] * x[:, k : k + 1]
        else:
            values, scale = _stored(data, matrix.type, matrix.rows, matrix.cols)
            q, a = quantize_rows(x)
            q = q.reshape(len(x), q.shape[1] // COLS, COLS)
            for block in range(q.shape[1]):
                weights = values[:, block].reshape(-1, COLS).astype(np.float32)
                total = q[:, block].astype(np.float32) @ weights.T  # exact in any order: whole numbers, all sums below 2^24
                out += total * (scale[:, block].reshape(1, -1) * a[:, block : block + 1])
    result = out[:, : matrix.rows]
    return result if bias is None else result + bias


def activate(kind: Activation, x: Floats) -> Floats:
    """An activation function, in double precision and rounded once: the native ones keep within 2e-7 of it."""
    wide = x.astype(np.float64)
    if kind == Activation.RELU:
        return np.maximum(x, np.float32(0))  # keeps NaN
    if kind == Activation.SILU:
        damped: NDArray[np.float64] = wide / (1 + np.exp(-np.clip(wide, -700, 700)))
        return damped.astype(np.float32)
    if kind == Activation.GELU:
        return (0.5 * wide * (1 + _erf(wide / np.sqrt(2)))).astype(np.float32)
    return x


def pack_linear(weights: Floats, bias: Floats | None, type: WeightType, rule: ScaleRule = largest) -> tuple[bytes, tuple[Matrix, ...]]:
    """A linear page's bytes and descriptor; weights (R, K), bias (R,)."""
    return pack_expert([(weights, bias)], type, rule)


def pack_expert(
    parts: Sequence[tuple[Floats, Floats | None]], type: WeightType, rule: ScaleRule = largest
) -> tuple[bytes, tuple[Matrix, ...]]:
    """One expert's bytes and descriptors: up, down; or up, gate, down. Each part is weights (R, K) and a bias (R,) or None."""
    matrices = tuple(Matrix(type, weights.shape[0], weights.shape[1], bias is not None) for weights, bias in parts)
    offsets, stride = expert_layout(matrices)
    out = bytearray(stride)
    for (weights, bias), (tiles, place) in zip(parts, offsets, strict=True):
        packed = pack_matrix(weights, type, rule)
        out[tiles : tiles + len(packed)] = packed
        if bias is not None and place is not None:
            raw = _finite(bias).astype("<f4").tobytes()
            out[place : place + len(raw)] = raw
    return bytes(out), matrices


def pack_rows(table: Floats, type: WeightType) -> bytes:
    """An embedding table (rows, cols), each row with its own scale (int8) and CRC-32C."""
    _finite(table)
    out = []
    for row in table.astype(np.float32):
        body = row.astype("<f4").tobytes()
        if type == WeightType.INT8:
            scale = np.float32(np.abs(row).max() / np.float32(127))
            values = np.rint(row / scale) if scale > 0 else np.zeros_like(row)
            body = scale.astype("<f4").tobytes() + np.clip(values, -127, 127).astype(np.int8).tobytes()
        out.append(body + crc32c(body).to_bytes(4, "little"))
    return b"".join(out)


def linear(data: bytes, matrices: Sequence[Matrix], x: Floats) -> Floats:
    """A linear page applied to (N, K) -> (N, R)."""
    return _part(data, matrices, 0, x)


def expert(data: bytes, matrices: Sequence[Matrix], activation: Activation, x: Floats) -> Floats:
    """One expert applied to (N, d) -> (N, d): `down(act(up x))`, or gated `down(act(gate x) * up x)`."""
    hidden = _part(data, matrices, 0, x)
    hidden = activate(activation, hidden) if len(matrices) == 2 else activate(activation, _part(data, matrices, 1, x)) * hidden
    return _part(data, matrices, len(matrices) - 1, hidden)


def _part(data: bytes, matrices: Sequence[Matrix], number: int, x: Floats) -> Floats:
    matrix = matrices[number]
    tiles, place = expert_layout(matrices)[0][number]
    bias = None if place is None else np.frombuffer(data, "<f4", matrix.rows, place)
    return matmul(data[tiles : tiles + matrix_bytes(matrix.type, matrix.rows, matrix.cols)], matrix, x, bias)


def _blocks(rows: int, cols: int) -> tuple[int, int]:
    return -(-rows // ROWS), -(-cols // COLS)


def _tile(weights: Floats) -> Floats:
    rows, cols = weights.shape
    high, wide = _blocks(rows, cols)
    padded = np.zeros((high * ROWS, wide * COLS), np.float32)
    padded[:rows, :cols] = weights
    return padded.reshape(high, ROWS, wide, COLS).transpose(0, 2, 1, 3)


def _untile(tiles: Floats, rows: int, cols: int) -> Floats:
    high, wide = tiles.shape[:2]
    return np.ascontiguousarray(tiles.transpose(0, 2, 1, 3).reshape(high * ROWS, wide * COLS)[:rows, :cols])


def _stored(data: bytes, type: WeightType, rows: int, cols: int) -> tuple[NDArray[np.int16], Floats]:
    """Integer values (high, wide, 16, 32) and scales (high, wide, 16) of a packed matrix."""
    high, wide = _blocks(rows, cols)
    raw = np.frombuffer(data, np.uint8).reshape(high, wide, -1)
    scale = np.ascontiguousarray(raw[:, :, -2 * ROWS :]).view("<f2").astype(np.float32)
    groups = raw[:, :, : -2 * ROWS].reshape(high, wide, -1, ROWS * GROUP)
    if type == WeightType.INT4:
        groups = np.concatenate([groups & 15, groups >> 4], axis=2)
    values = groups.reshape(high, wide, COLS // GROUP, ROWS, GROUP).transpose(0, 1, 3, 2, 4).reshape(high, wide, ROWS, COLS)
    return values.astype(np.int16) - np.int16(_BIAS[type]), scale


def _finite(values: Floats) -> Floats:
    if not np.isfinite(values).all():
        raise UsageError("weights must be finite: the model holds NaN or infinity; look at its training")
    return values


def _erf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """erf by its Maclaurin series below 3 and Lentz's continued fraction for erfc above (Abramowitz & Stegun 7.1.5, 7.1.14)."""
    small, large = np.clip(np.abs(x), 0, 3), np.clip(np.abs(x), 3, 30)
    term, total = small.copy(), small.copy()
    for n in range(1, 60):
        term = -term * small * small / n
        total += term / (2 * n + 1)
    fraction = large.copy()
    for n in range(60, 0, -1):
        fraction = large + n / 2 / fraction
    tail = 1 - np.exp(-large * large) / (np.sqrt(np.pi) * fraction)
    value: NDArray[np.float64] = np.sign(x) * np.where(np.abs(x) < 3, 2 / np.sqrt(np.pi) * total, tail)
    return value
