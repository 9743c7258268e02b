"""CRC-32C in NumPy, for installations without the C extension.

A checksum is linear: that of AB is that of A followed by zeros as long as B, plus (exclusive or) that of B. So a message is cut
into lanes that run side by side, one table lookup a byte and step for all of them, and neighbours are joined until one is left.
To follow by zeros is a linear map of 32 bits: its columns, applied to themselves, are the map for twice as many zeros.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["crc32c", "crc32c_rows"]

Words = NDArray[np.uint32]
POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected
LANE_BYTES, MOST_DOUBLINGS = 64, 14  # at most 1 MiB side by side


def crc32c(data: bytes | bytearray | memoryview | NDArray[Any], crc: int = 0) -> int:
    """The checksum of bytes, continuing from `crc` (0 for a new message)."""
    left = np.frombuffer(data, np.uint8)
    state = np.array([crc ^ 0xFFFFFFFF], np.uint32)
    while len(left) >= LANE_BYTES:
        doublings = min((len(left) // LANE_BYTES).bit_length() - 1, MOST_DOUBLINGS)
        lanes, left = left[: LANE_BYTES << doublings].reshape(-1, LANE_BYTES), left[LANE_BYTES << doublings :]
        first = np.zeros(len(lanes), np.uint32)
        first[0] = state[0]
        state = _run(first, lanes)
        for columns in _zeros()[:doublings]:
            state = _apply(columns, state[::2]) ^ state[1::2]
    return int(_run(state, left.reshape(1, -1))[0]) ^ 0xFFFFFFFF


def crc32c_rows(rows: NDArray[np.uint8]) -> Words:
    """The checksum of each row (n, bytes) -> (n,)."""
    return _run(np.full(len(rows), 0xFFFFFFFF, np.uint32), rows) ^ np.uint32(0xFFFFFFFF)


def _run(state: Words, lanes: NDArray[np.uint8]) -> Words:
    """Each state after the bytes of its lane."""
    table = _table()
    for column in np.ascontiguousarray(lanes.T):
        state = table[(state ^ column) & 255] ^ state >> 8
    return state


def _apply(columns: Words, values: Words) -> Words:
    """A linear map, given by what it makes of each bit, applied to each value."""
    out = np.zeros_like(values)
    for bit in range(32):
        out ^= np.where(values >> bit & 1, columns[bit], np.uint32(0))
    return out


@functools.cache
def _table() -> Words:
    table: Words = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1 ^ (table & 1) * np.uint32(POLYNOMIAL)).astype(np.uint32)
    return table


@functools.cache
def _zeros() -> list[Words]:
    """The maps of a lane's zeros, of twice as many, and so on."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    maps = [_run(bits, np.zeros((32, LANE_BYTES), np.uint8))]
    for _ in range(MOST_DOUBLINGS - 1):
        maps.append(_apply(maps[-1], maps[-1]))
    return maps
