"""Far sides for tests of every transport: how to reach one, how to break the connection, what is left there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeml_devices.remote import Remote


class Far:
    """A machine to try things on. `arguments` are what a command line needs, `cut` breaks what is connected, `root` is its folder."""

    def __init__(
        self, to: str, python: Path, root: Path, cut: Callable[[], None] | None, ready: Callable[[], object] = lambda: None
    ) -> None:
        self.to, self.python, self.root, self._cut, self._ready = to, python, root, cut, ready
        self._last: Remote | None = None

    @property
    def arguments(self) -> list[str]:
        return ["--to", self.to, "--remote-python", str(self.python), "--remote-dir", str(self.root)]

    def remote(self) -> Remote:
        """A new connection, not open yet."""
        from edgeml_devices.remote import Remote, connect

        self._ready()
        self._last = Remote(connect(self.to), str(self.python), str(self.root))
        return self._last

    def cut(self) -> None:
        """Break the connection as it would break by itself: nobody says goodbye."""
        if self._cut is not None:
            self._cut()
        elif self._last is not None and self._last._process is not None:
            self._last._process.kill()

    def left(self) -> list[str]:
        """Files that are still there once the worker has noticed, relative to its folder."""
        for _ in range(200):
            if not any(self.root.glob("run-*")):
                break
            time.sleep(0.05)
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())


def alive(pid: int) -> bool:
    """Whether a process still runs; waits a little for it to end."""
    for _ in range(200):
        with suppress(OSError, IndexError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return False
    return os.path.exists(f"/proc/{pid}")
