"""The seam to libedgeml: the only module that imports the C extension. It checks what crosses and does nothing else."""

from __future__ import annotations

from edgeml._native import ffi, lib

__all__ = ["crc32c", "crc32c_name"]


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of a bytes-like object, continuing from `crc` (0 for a new message)."""
    with memoryview(data) as view:
        return int(lib.edgeml_crc32c(crc, ffi.from_buffer(view), view.nbytes))


def crc32c_name() -> str:
    """How the checksum is computed here: `sse4.2`, `armv8` or `table`."""
    return str(ffi.string(lib.edgeml_crc32c_name()).decode("ascii"))
