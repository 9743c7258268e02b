"""The parent's side of `bench_worker`: starts one, follows it, and turns its end into a sentence whatever it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from edgeml.errors import DeviceError, EdgemlError

__all__ = ["Worker"]


class Worker(AbstractContextManager["Worker"]):
    """A child process with a job. `step` is called with the number of rounds done since the last call."""

    def __init__(self, job: Mapping[str, Any], step: Callable[[int], None] = lambda _: None) -> None:
        self._job, self._step = job, step
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "edgeml.commands.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self._write(job)

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        for stream in (self._child.stdin, self._child.stdout, self._log):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        self._child.wait()

    def ready(self) -> float:
        """Wait until it has opened and warmed up; returns the seconds of a round, 0 where that says nothing. Raises its error."""
        return float(self._heard()["ready"])

    def turn(self, number: int, rounds: int, lead: bool, processor: int | None = None) -> list[float]:
        """The latencies of a turn, computed on this processor where one is named. Raises its error."""
        self._write({"turn": number, "rounds": rounds, "lead": lead, "processor": processor})
        found: list[float] = self._heard()["latency_s"]
        return found

    def record(self) -> dict[str, Any]:
        """What it measured, once it has ended. Raises its error."""
        with suppress(BrokenPipeError):
            self._child.stdin.close()  # type: ignore[union-attr]
        found: dict[str, Any] = self._heard()["record"]
        self._child.wait()
        return found

    def _write(self, message: Mapping[str, Any]) -> None:
        with suppress(BrokenPipeError):  # what there is to say about that is heard
            self._child.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
            self._child.stdin.flush()  # type: ignore[union-attr]

    def _heard(self) -> dict[str, Any]:
        """Its next word that is no tick."""
        for line in self._child.stdout:  # type: ignore[union-attr]
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                error = EdgemlError(message["error"])
                error.exit_code = int(message["exit_code"])
                raise error
            if "tick" not in message:
                return message
            self._step(message["tick"])
        raise DeviceError(self._ended(self._child.wait()))

    def _ended(self, code: int) -> str:
        what = f"the measurement with memory {self._job['memory'] or 'auto'} and residency {self._job['residency']}"
        if code == -signal.SIGKILL:
            return f"{what} was killed, most likely because the machine ran out of memory; try a smaller --memory"
        if code < 0:
            return f"{what} crashed ({signal.Signals(-code).name})"
        self._log.seek(0)
        said = self._log.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        return f"{what} failed" + (f": {said[-1][:300]}" if said else "")
