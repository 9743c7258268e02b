"""How fast this machine reads a bundle's pages: a short measurement, past the system's cache where the file system allows it."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeml.errors import DeviceError

__all__ = ["ReadRate", "read_rate"]

BLOCK = 4096
SECONDS = 1.0
MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class ReadRate:
    """What was read and how long it took; `direct` says whether the reads went past the system's cache."""

    bytes_per_s: float
    read_bytes: int
    reads: int
    duration_s: float
    direct: bool

    def as_json(self) -> dict[str, Any]:
        """The form that `--json` promises."""
        return asdict(self)


def read_rate(fd: int, extents: Sequence[tuple[int, int]], where: str, seconds: float = SECONDS) -> ReadRate:
    """Read the extents (offset, length) of an open file one after another in a random order, again and again, for `seconds`.

    Offsets are multiples of 4096, as pages' are; lengths are rounded up to that. Raises `DeviceError` when a read fails.
    """
    file, direct = _reopened(fd)
    order = list(extents)
    random.Random(0).shuffle(order)
    longest = max((-(-length // BLOCK) * BLOCK for _, length in order), default=BLOCK)
    done = reads = 0
    try:
        with mmap.mmap(-1, longest) as memory:  # anonymous memory begins at a page, as direct reads demand
            started = time.perf_counter()
            while order and done < MOST_BYTES and time.perf_counter() - started < seconds:
                offset, length = order[reads % len(order)]
                with memoryview(memory) as buffer, buffer[: -(-length // BLOCK) * BLOCK] as part:
                    done += os.preadv(file, [part], offset)
                reads += 1
            duration = time.perf_counter() - started
    except OSError as error:
        raise DeviceError(f"{where}: cannot be read ({error.strerror})") from None
    finally:
        os.close(file)
    return ReadRate(done / max(duration, 1e-9), done, reads, duration, direct)


def _reopened(fd: int) -> tuple[int, bool]:
    """A descriptor of its own for the same file: direct, or an ordinary one whose cached pages were dropped."""
    path = f"/proc/self/fd/{fd}"
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC), True
    except OSError:
        file = os.dup(fd)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return file, False
