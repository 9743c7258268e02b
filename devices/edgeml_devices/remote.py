"""A machine with a worker on it: the host's side of `worker.py`, over any transport.

    with Remote(connect("pi@garden")) as far:
        far.open()
        far.send_bundle(bundle, keep=True)
        far.place(bundle, "m.edgeml")
        code = far.command(["bench", "m.edgeml"], out=print, err=print)

Every failure is one `EdgemlError` that begins with the machine's name. A connection that breaks is noticed: by the transport, or because
nothing, not even the answer to a ping, came for a minute. What had been copied until then is kept there and resumed the next time.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import queue
import shlex
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import edgeml
from edgeml.bundle import Bundle
from edgeml.errors import DataError, DeviceError, EdgemlError, InputError
from edgeml_devices import worker
from edgeml_devices.adb import Adb
from edgeml_devices.local import Local
from edgeml_devices.ssh import Ssh
from edgeml_devices.transport import Transport

__all__ = ["Copied", "Remote", "check_wheel", "connect", "start_line"]

PING_S = 10.0
CHUNK = 1 << 18
LONGEST = 1 << 26  # of a message's line
NOISE = 1 << 16  # what a login shell may print before the worker's first word

#: Makes an environment with a wheel in it; the one before it stays until the new one works. Started as `python -m`, it may be moved.
INSTALL = """
import os, shutil, subprocess, sys
root, wheel = sys.argv[1:]
python = os.path.abspath("venv/bin/python")
for command in (
    [sys.executable, "-m", "venv", "venv"],
    [python, "-m", "pip", "install", "--disable-pip-version-check", wheel],
    [python, "-P", "-c", "import edgeml.cli"],
):
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        sys.exit(1)
shutil.rmtree(root + "/venv", ignore_errors=True)
os.rename("venv", root + "/venv")
"""

Message = dict[str, Any]
Text = Callable[[str], None]


def _nothing(_: Any) -> None:
    pass


def connect(place: str) -> Transport:
    """The way to `user@host[:port]` or an alias of ssh, `adb` or `adb:SERIAL`, or `local`. Raises `UsageError` for what is none."""
    kind, _, rest = place.partition(":")
    if kind == "adb":
        return Adb(rest)
    return Local() if place == "local" else Ssh(place)


def start_line(transport: Transport, python: str | None, folder: str | None, length: int, own_first: bool = False) -> str:
    """The shell line that starts the worker, whose `length` bytes of text follow on standard input.

    Without `python`, or with `own_first`, that of the environment which `install` made there, and only where there is none `python`, or
    the transport's own. `folder` may begin with ~/.
    """
    place = transport.folder
    if folder is not None:
        place = '"$HOME"/' + shlex.quote(folder[2:]) if folder.startswith("~/") else shlex.quote(folder)
    find = f"p={shlex.quote(python or transport.python)}"
    if python is None or own_first:
        find = f'[ -x "$r/venv/bin/python" ] && p="$r/venv/bin/python" || {find}'
    old = 'sys.version_info<(3,11)and sys.exit("edgeml-python %d.%d"%sys.version_info[:2])'
    code = f'import sys;s=sys.stdin.buffer.read({length});{old};exec(compile(s,"edgeml-worker","exec"))'
    return f'r={place}; {find}; exec "$p" -c \'{code}\' "$r"'


@dataclass(frozen=True)
class Copied:
    """What became of a bundle: `bytes` sent (0: it was there), `resumed_bytes` that an earlier copy had brought, in `seconds`."""

    bytes: int
    resumed_bytes: int
    seconds: float

    def __add__(self, other: Copied) -> Copied:
        return Copied(self.bytes + other.bytes, self.resumed_bytes + other.resumed_bytes, self.seconds + other.seconds)


class Remote:
    """The worker on one machine. Used by one thread, except for `abort`, which any thread may call to end it at once."""

    def __init__(self, transport: Transport, python: str | None = None, folder: str | None = None, own_first: bool = False) -> None:
        self.name = transport.name
        self.facts: Mapping[str, Any] = {}
        self._transport, self._python, self._folder, self._own_first = transport, python, folder, own_first
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._doing = ""
        self._closed = threading.Event()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- the connection ----

    def open(self) -> Mapping[str, Any]:
        """Start the worker there. Returns its `facts`: edgeml (None: absent), why, python, platform, free_bytes, root."""
        text = Path(worker.__file__).read_bytes()
        self._doing = "connecting"
        self._closed.clear()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (until `_end`)
        self._inbox = queue.SimpleQueue()
        line = start_line(self._transport, self._python, self._folder, len(text), self._own_first)
        self._process = self._transport.start(line, self._errors)
        threading.Thread(target=self._listen, args=(self._process, self._inbox), daemon=True).start()
        threading.Thread(target=self._ping, args=(self._process,), daemon=True).start()
        self._write(text)
        self.facts = self._next()
        return self.facts

    def check(self) -> None:
        """Raise `DeviceError` unless the same edgeml is there as here."""
        there, here = self.facts["edgeml"], edgeml.__version__
        if there is None:
            missing = str(self.facts["why"]).startswith("ModuleNotFoundError: No module named 'edgeml'")
            state = "edgeml-runtime is not installed there" if missing else f"edgeml-runtime does not start there ({self.facts['why']})"
            raise DeviceError(f"{self.name}: {state}; give --install WHEEL, or name the Python that has it with --remote-python")
        if there != here:
            raise DeviceError(f"{self.name}: edgeml-runtime {there} is there and {here} is here; give --install with the wheel of {here}")

    def close(self) -> None:
        """End the worker, which then tidies up, and the connection."""
        self._end(5)
        self._transport.close()

    def abort(self) -> None:
        """End it now: whoever waits for it gets a `DeviceError`, and the worker notices by itself."""
        self._closed.set()
        if self._process is not None:
            self._process.terminate()  # a worker on this machine tidies up first

    def _end(self, patience_s: float) -> None:
        self._closed.set()
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with suppress(OSError), self._lock:
                process.stdin.close()
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._errors is not None:
            self._errors.close()

    def _listen(self, process: subprocess.Popen[bytes], inbox: queue.SimpleQueue[Message | None]) -> None:
        """Messages from the worker, None at the end; whatever a login shell prints first is passed over."""
        assert isinstance(process.stdout, io.FileIO)
        mark, noise = worker.MARK.encode(), 0
        with suppress(OSError, ValueError, TypeError, RecursionError), io.BufferedReader(process.stdout, CHUNK) as source:
            while line := source.readline(LONGEST):
                if mark:
                    at = line.find(mark)
                    noise += len(line)
                    if noise > NOISE:
                        inbox.put({"fault": "what came was no worker's word; its login must not print so much"})
                        return
                    if at < 0:
                        continue
                    line, mark = line[at + len(mark) :], b""
                message = json.loads(line)
                if "bytes" in message:
                    message["data"] = source.read(message["bytes"])
                inbox.put(message)
        inbox.put(None)

    def _ping(self, process: subprocess.Popen[bytes]) -> None:
        with suppress(OSError, EdgemlError):
            while not self._closed.wait(PING_S) and process is self._process:
                self._send({"do": "ping"})

    def _send(self, message: Message, data: bytes = b"") -> None:
        self._write(json.dumps(message).encode() + b"\n" + data)

    def _write(self, data: bytes) -> None:
        process = self._process
        if process is None or process.stdin is None:
            raise DeviceError(f"{self.name}: there is no connection")
        view = memoryview(data)
        try:
            with self._lock:
                while view:
                    view = view[os.write(process.stdin.fileno(), view) :]
        except (OSError, ValueError):
            raise self._broken() from None

    def _next(self, wait: bool = True) -> Message:
        """The worker's next word that is no answer to a ping; with `wait` False {} where there is none. Raises its faults."""
        while True:
            try:
                message = self._inbox.get(wait, worker.SILENCE_S)
            except queue.Empty:
                if not wait:
                    return {}
                raise DeviceError(f"{self.name}: nothing was heard for {worker.SILENCE_S:.0f} s while {self._doing}") from None
            if message is None:
                raise self._broken()
            if "fault" in message:
                raise DeviceError(f"{self.name}: {message['fault']}")
            if "pong" not in message:
                return message

    def _ask(self, message: Message) -> Message:
        self._send(message)
        return self._next()

    def _broken(self) -> DeviceError:
        """Why there is no word any more."""
        process, errors = self._process, self._errors
        if process is None or errors is None or self._closed.is_set():
            return DeviceError(f"{self.name}: the connection was closed while {self._doing}")
        try:
            code = process.wait(5)
        except subprocess.TimeoutExpired:
            code = -1
        errors.seek(0)
        said = errors.read()[-8000:].decode("utf-8", "replace").strip()
        last = said.splitlines()[-1] if said else ""
        if "edgeml-python" in last:
            return DeviceError(f"{self.name}: Python {last.split()[-1]} is there, and edgeml needs 3.11; name another with --remote-python")
        if code in (126, 127) and not self.facts:
            python = self._python or self._transport.python
            return DeviceError(f"{self.name}: there is no {python} that can be started; name Python 3.11 or newer with --remote-python")
        if "Traceback" in said:
            return DeviceError(f"{self.name}: the worker failed while {self._doing} ({last})")
        if not self.facts:
            return DeviceError(f"{self.name}: {self._transport.explain(code, said)}")
        kept = "; what had arrived is kept there, and the same command goes on from it" if self._doing.startswith("copying") else ""
        return DeviceError(f"{self.name}: the connection broke while {self._doing}{kept}")

    # ---- files ----

    def send_bundle(self, bundle: Bundle, keep: bool, step: Callable[[int], None] = _nothing) -> Copied:
        """Copy an open bundle unless it is there already, going on where an earlier copy broke off if that was of the same bytes.

        `keep`: it stays when the worker ends. `step` is called with the bytes that are settled, in all the bundle's length. Beside the
        identity the whole header decides, so a bundle whose evidence is newer counts as another. SHA-256 is compared at both ends.
        """
        started, length, sha = time.monotonic(), bundle.header.file_length, hashlib.sha256()
        self._doing = f"copying {bundle.path.name}"
        head = os.pread(bundle.fd, worker.HEAD_BYTES, 0)
        reply = self._ask({"do": "offer", "id": bundle.id, "length": length, "head": base64.b64encode(head).decode()})
        if "there" in reply:
            step(length)
            return Copied(0, 0, time.monotonic() - started)
        done = 0
        while done < reply["have"] and (data := os.pread(bundle.fd, min(CHUNK, reply["have"] - done), done)):
            sha.update(data)
            done += len(data)
        if sha.hexdigest() != reply["sha256"]:
            done, sha = 0, hashlib.sha256()
        resumed = done
        step(done)
        self._send({"do": "rest", "offset": done})
        while data := os.pread(bundle.fd, min(CHUNK, length - done), done):
            sha.update(data)
            done += len(data)
            self._send({"do": "data", "bytes": len(data)}, data)
            step(len(data))
            self._next(wait=False)
        if done < length:
            raise DataError(f"{bundle.path}: it was cut while it was copied")
        self._ask({"do": "commit", "sha256": sha.hexdigest(), "keep": keep})
        return Copied(length - resumed, resumed, time.monotonic() - started)

    def place(self, bundle: Bundle, path: str) -> None:
        """Let a bundle that is there appear in the folder of this run, under a relative path."""
        self._ask({"do": "place", "id": bundle.id, "name": path})

    def send_file(self, source: Path, path: str) -> None:
        """Copy a file, or a folder with all that is in it, to a relative path in the folder of this run. Raises `DataError`."""
        self._doing = f"sending {source.name}"
        if source.is_dir():
            for inner in sorted(source.rglob("*")):
                if inner.is_file():
                    self.send_file(inner, f"{path}/{inner.relative_to(source).as_posix()}")
            return
        try:
            with source.open("rb") as file:
                data = file.read(CHUNK)
                self.send_data(data, path)
                while data := file.read(CHUNK):
                    self.send_data(data, path)
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error.strerror}); nothing was run") from None

    def send_data(self, data: bytes, path: str) -> None:
        """Add to a file in the folder of this run. A fault there is told by what comes next."""
        self._send({"do": "file", "path": path, "bytes": len(data)}, data)
        self._next(wait=False)

    def fetch(self, path: str, target: Path) -> None:
        """Bring a file from the folder of this run; `target` is replaced whole or not at all."""
        self._doing = f"fetching {target.name}"
        self._send({"do": "fetch", "path": path})
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                last = False
                while not last:
                    message = self._next()
                    file.write(message["data"])
                    last = message["last"]
            os.replace(partial, target)
        except OSError as error:
            raise DeviceError(f"{target}: cannot be written ({error.strerror})") from None
        finally:
            partial.unlink(missing_ok=True)

    def clean(self) -> int:
        """Remove all bundles, parts and the environment that were put there; returns the bytes."""
        return int(self._ask({"do": "clean"})["cleaned"])

    # ---- commands ----

    def command(
        self,
        arguments: list[str],
        out: Text,
        err: Text,
        record: Callable[[Message], None] | None = None,
        columns: int | None = None,
        source: Iterable[str] = (),
    ) -> int:
        """Run an `edgeml` command there, in the folder of this run, and follow it; returns its exit code.

        `record` takes the records it measures, as they come; None asks for none. `columns`: the width of the terminal that its
        progress is for, None if there is no terminal. `source`: its standard input, which a thread of its own reads.
        """
        self._doing = f"running edgeml {arguments[0]}"
        self._send({"do": "start", "arguments": arguments, "records": record is not None, "columns": columns})
        threading.Thread(target=self._feed, args=(source,), daemon=True).start()
        code = self._follow(out, err, record or _nothing)
        if code < 0:
            why = ", most likely because it ran out of memory; try a smaller --memory" if code == -9 else ""
            raise DeviceError(f"{self.name}: edgeml {arguments[0]} was killed there by signal {-code}{why}")
        return code

    def _feed(self, source: Iterable[str]) -> None:
        with suppress(EdgemlError):  # whoever follows the command will hear of it
            for text in source:
                self._send({"do": "in", "text": text})
            self._send({"do": "end"})

    def install(self, wheel: Path, err: Text) -> None:
        """Put the runtime's wheel into an environment in the worker's folder, and start again with it. Raises `EdgemlError`."""
        check_wheel(wheel, self.facts, self.name)
        self.send_file(wheel, wheel.name)
        self._doing = f"installing {wheel.name}"
        self._send({"do": "start", "code": INSTALL, "arguments": [str(self.facts["root"]), wheel.name]})
        heard: list[str] = []

        def hear(text: str) -> None:
            heard.append(text)
            err(text)

        if self._follow(err, hear, _nothing):
            said = "".join(heard).strip().splitlines()
            raise DeviceError(f"{self.name}: {wheel.name} could not be installed there" + (f" ({said[-1][:300]})" if said else ""))
        self._end(5)
        self._python, self.facts = None, {}
        self.open()

    def _follow(self, out: Text, err: Text, record: Callable[[Message], None]) -> int:
        while True:
            match self._next():
                case {"out": text}:
                    out(text)
                case {"err": text}:
                    err(text)
                case {"record": measured}:
                    record(measured)
                case {"exit": code}:
                    return int(code)


def check_wheel(wheel: Path, facts: Mapping[str, Any], name: str) -> None:
    """Raise `InputError` unless the file is a wheel of this version of the runtime, for the machine there."""
    parts = wheel.name.removesuffix(".whl").split("-")
    if not wheel.name.endswith(".whl") or len(parts) < 5 or parts[0] != "edgeml_runtime":
        raise InputError(f"{wheel}: this is no wheel of edgeml-runtime; its name begins with edgeml_runtime- and ends with .whl")
    if not wheel.is_file():
        raise InputError(f"{wheel}: no such file; `make wheels` builds them")
    if parts[1] != edgeml.__version__:
        raise InputError(f"{wheel.name}: this is version {parts[1]}, and {edgeml.__version__} is here; both sides must be the same")
    machine = str(facts["platform"]).partition("-")[2].rpartition("-")[2]
    if not any(tag == "any" or tag.endswith("_" + machine.replace("-", "_")) for tag in parts[-1].split(".")):
        raise InputError(f"{wheel.name}: built for {parts[-1]}, and {name} is {machine}; give the wheel for {machine}")
    if not zipfile.is_zipfile(wheel):
        raise InputError(f"{wheel}: the file is damaged; copy or build it again")
