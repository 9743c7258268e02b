"""What a way to another machine has to offer: to start a program there, with its standard input, output and errors on pipes.

Everything else (copies, commands, records) goes through the one program that is started, the worker, so a new transport is this one
function and a way to explain why it failed. `local.py`, `ssh.py` and `adb.py` are the three there are; `remote.connect` chooses.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import IO, Protocol

from edgeml.errors import DeviceError

__all__ = ["Transport", "need", "start"]


class Transport(Protocol):
    """A machine that programs can be started on. `name` is how its user called it, `folder` where the worker's things go by default.

    `folder` is text of a POSIX shell there, quoted as far as it must be. `python` is tried where the user names none.
    """

    name: str
    folder: str
    python: str

    def start(self, line: str, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        """Run a line of POSIX shell there. `errors` takes what it, and what leads there, write to standard error.

        Raises `DeviceError` when the program that leads there is not installed here.
        """
        ...

    def explain(self, code: int, errors: str) -> str:
        """Why the program never said a word: the rest of a sentence that begins with `name`. `code` and `errors` are what it left."""
        ...

    def close(self) -> None:
        """Give up what is shared by several starts."""
        ...


def need(program: str, package: str, variable: str) -> None:
    """Raise `DeviceError` unless `program` is here."""
    if shutil.which(program) is None:
        raise DeviceError(f"{program} is not installed here; install {package}, or say where it is with {variable}")


def start(command: list[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """A child on pipes, out of reach of the terminal's Ctrl-C: whoever started it ends it, once it is done with it."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0, start_new_session=True)
