"""This machine as its own far side: for tests, and for runs under a device's limits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import IO

__all__ = ["Local"]


class Local:
    """`before` is called in the child before its program starts, as `Emulation.join` wants to be."""

    folder = '"${XDG_CACHE_HOME:-$HOME/.cache}"/edgeml-device'
    python = sys.executable  # which has edgeml; another python3 may not

    def __init__(self, name: str = "local", before: Callable[[], None] | None = None) -> None:
        self.name, self._before = name, before

    def start(self, line: str, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        """A child of this process."""
        return subprocess.Popen(
            ["/bin/sh", "-c", line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            start_new_session=True,
            preexec_fn=self._before,
        )

    def explain(self, code: int, errors: str) -> str:
        """Its last line, for lack of anything between here and there."""
        return f"the worker ended with code {code}" + (f" ({errors.splitlines()[-1]})" if errors else "")

    def close(self) -> None:
        """Nothing is shared."""
