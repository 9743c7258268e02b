"""The far side of a remote run: a process that receives files, starts `edgeml` commands and streams what they say.

The text of this file is what is sent: the far side's Python reads it from standard input and runs it (`remote.start_line`). So
both sides speak one version of the protocol whatever is installed there, and a machine without edgeml can be given it. Hence the
standard library alone, and nothing of edgeml imported but its version.

Each message is a JSON object on a line, in both directions; one with `bytes` is followed by so many raw bytes. From the host:

    {"do": "ping"}                                              -> {"pong": true}
    {"do": "offer", "id", "length", "head": base64}             -> {"there": true} or {"have": bytes, "sha256": of these}
    {"do": "rest", "offset"}, {"do": "data", "bytes"}...        the bundle from there on
    {"do": "commit", "sha256", "keep": bool}                    -> {"committed": true}
    {"do": "place", "id", "name"}                               -> {"placed": true}: the bundle, in this run's folder
    {"do": "file", "path", "bytes"}...                          adds to a file of this run's folder
    {"do": "start", "arguments": [...], "records", "columns"}   -> {"out"}, {"err"}, {"record"}..., at last {"exit"}; of `edgeml`, or
                                                                   of `code`, a text of Python
    {"do": "in", "text"}, {"do": "end"}                         the command's standard input
    {"do": "fetch", "path"}                                     -> {"bytes", "last": bool}... of a file of this run's folder
    {"do": "clean"}                                             -> {"cleaned": bytes}

Any of them may be answered {"fault": sentence}. In its folder: `bundles/ID.edgeml` and, of a copy that broke off,
`bundles/ID.part`; `venv/`, what `remote.install` made; `run-*/`, one for each worker. When the connection ends, and when nothing has been
heard for a minute, the worker stops what it started, removes its run folder and each bundle that came without `keep`, and ends. A
part is kept for a week so that the copy can be resumed; what a killed worker left is removed by the next.
"""

from __future__ import annotations

import base64
import codecs
import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import pty
import queue
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import termios
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

MARK = "edgeml-worker "
SILENCE_S = 60.0
PART_AGE_S = 7 * 86400.0
RESERVE_BYTES = 1 << 20  # left free on the far side's disk
CHUNK = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HEAD_BYTES = 4096  # a bundle's header: it holds the checksums of index and manifest

Message = dict[str, Any]


class Fault(Exception):
    """Something a user can meet, as one sentence."""


class Worker:
    """Reads messages from `source` until it ends, answers on `sink`. `root` is the folder that everything is in."""

    def __init__(self, source: IO[bytes], sink: IO[bytes], root: Path) -> None:
        self._source, self._sink, self._root = source, sink, root
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        self._part: _Part | None = None
        self._fault: Fault | None = None
        self._passing: set[Path] = set()
        self._child: _Child | None = None
        self._run: Path | None = None

    def serve(self) -> None:
        """Until the host has gone; then `close`."""
        try:
            self._settle()
        except (Fault, OSError) as error:
            told = "" if isinstance(error, Fault) else "; name another folder with --remote-dir"
            self.say({"hello": 1, "fault": _sentence(error, self._root) + told}, MARK)
            return
        self.say({"hello": 1} | facts(self._root), MARK)
        threading.Thread(target=self._watch, daemon=True).start()
        while (message := self._read()) is not None:
            self._heard = time.monotonic()
            try:
                self._handle(message)
            except (Fault, OSError) as error:
                self._fault = error if isinstance(error, Fault) else Fault(_sentence(error, self._root))
                self.say({"fault": str(self._fault)})

    def close(self) -> None:
        """Stop the command and remove what is not to stay."""
        if self._child is not None:
            self._child.stop()
        if self._part is not None:
            self._part.close()
        for path in self._passing:
            path.unlink(missing_ok=True)
        if self._run is None:
            return  # the folder was not fit to be used: it is not ours
        shutil.rmtree(self._run, ignore_errors=True)
        for folder in (self._root / "bundles", self._root):  # only if nothing is in them
            with suppress(OSError):
                folder.rmdir()

    def say(self, message: Message, mark: str = "", data: bytes = b"") -> None:
        """One message to the host; ends the process when the host has gone."""
        line = mark + json.dumps(message) + "\n"
        try:
            with self._lock:
                self._sink.write(line.encode() + data)
                self._sink.flush()
        except (OSError, ValueError):
            self.close()
            os._exit(4)

    def _settle(self) -> None:
        """Make the folders, ours alone, and remove what earlier workers left."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._root.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022 or not self._root.is_dir() or self._root.is_symlink():
            raise Fault(f"{self._root} can be written by others than this user; name another folder with --remote-dir")
        (self._root / "bundles").mkdir(mode=0o700, exist_ok=True)
        for left in self._root.glob("run-*"):
            with suppress(OSError):
                lock = _lock(left / "lock")
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
        for left in (self._root / "bundles").glob("*.part"):
            if time.time() - left.stat().st_mtime > PART_AGE_S:
                left.unlink()
        self._run = Path(tempfile.mkdtemp(prefix="run-", dir=self._root))
        _lock(self._run / "lock")  # until this process ends

    def _watch(self) -> None:
        while time.monotonic() - self._heard < SILENCE_S:
            time.sleep(SILENCE_S / 20)
        self.close()
        os._exit(4)

    def _read(self) -> Message | None:
        try:
            line = self._source.readline()
            if not line.endswith(b"\n"):
                return None
            message: Message = json.loads(line)
            if "bytes" in message:
                message["data"] = self._source.read(message["bytes"])
                if len(message["data"]) != message["bytes"]:
                    return None
        except (OSError, ValueError):
            return None
        return message

    def _handle(self, message: Message) -> None:
        do = message.pop("do")
        if do in ("file", "data") and self._fault is not None:
            return  # told already, and more of it is on the way
        if do not in ("ping", "file", "data"):
            self._fault = None
        getattr(self, "_do_" + do)(**message)

    def _do_ping(self) -> None:
        self.say({"pong": True})

    # ---- bundles ----

    def _bundle(self, name: str) -> Path:
        return self._root / "bundles" / (_plain(name) + ".edgeml")

    def _do_offer(self, id: str, length: int, head: str) -> None:
        path = self._bundle(id)
        with suppress(FileNotFoundError), path.open("rb") as file:
            if file.read(HEAD_BYTES) == base64.b64decode(head) and os.fstat(file.fileno()).st_size == length:
                self.say({"there": True})
                return
        if self._part is not None:
            self._part.close()
        self._part = _Part(path.with_suffix(".part"), length)
        self.say({"have": self._part.have, "sha256": self._part.sha.hexdigest()})

    def _do_rest(self, offset: int) -> None:
        self._receiving().begin(offset)

    def _do_data(self, bytes: int, data: bytes) -> None:
        try:
            self._receiving().write(data)
        except OSError as error:
            part, self._part = self._receiving(), None
            if error.errno in FULL:  # a part that fills the disk is of no use
                part.path.unlink()
            part.close()
            raise Fault(_sentence(error, part.path)) from None

    def _do_commit(self, sha256: str, keep: bool) -> None:
        part, self._part = self._receiving(), None
        path = part.finish(sha256)
        if not keep:
            self._passing.add(path)
        self.say({"committed": True})

    def _receiving(self) -> _Part:
        if self._part is None:
            raise Fault("no bundle is being copied")
        return self._part

    def _do_place(self, id: str, name: str) -> None:
        """A hard link under the bundle's own name: it stays while this run needs it, and records name the bundle as its user does."""
        target = self._inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(self._bundle(id), target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EXDEV, errno.EMLINK):
                raise
            shutil.copyfile(self._bundle(id), target)
        self.say({"placed": True})

    # ---- this run's folder ----

    def _inside(self, path: str) -> Path:
        assert self._run is not None
        parts = Path(path).parts
        if not parts or Path(path).is_absolute() or ".." in parts:
            raise Fault(f"{path} is no file of a run")
        return self._run.joinpath("files", *parts)

    def _do_file(self, path: str, bytes: int, data: bytes) -> None:
        place = self._inside(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("ab") as file:
            file.write(data)

    def _do_fetch(self, path: str) -> None:
        with self._inside(path).open("rb") as file:
            while True:
                data = file.read(CHUNK)
                self.say({"bytes": len(data), "last": len(data) < CHUNK}, data=data)
                if len(data) < CHUNK:
                    return

    def _do_clean(self) -> None:
        gone = [*(self._root / "bundles").iterdir(), self._root / "venv"]
        files = [file for place in gone for file in (place, *place.rglob("*")) if file.is_file() and not file.is_symlink()]
        size = sum(file.stat().st_size for file in files)
        for place in gone:
            shutil.rmtree(place, ignore_errors=True)
            place.unlink(missing_ok=True)
        self.say({"cleaned": size})

    # ---- commands ----

    def _do_start(self, arguments: list[str], records: bool = False, columns: int | None = None, code: str = "") -> None:
        if self._child is not None and self._child.running:
            raise Fault("a command is running already")
        folder = self._inside("records").parent
        folder.mkdir(parents=True, exist_ok=True)
        program = ["-c", code] if code else ["-P", "-m", "edgeml.cli"]
        more = ["--records", str(folder / "records")] if records else []
        command = [sys.executable, *program, *arguments, *more]
        self._child = _Child(self, command, folder, folder / "records" if records else None, columns)

    def _do_in(self, text: str) -> None:
        if self._child is not None:
            self._child.feed(text.encode("utf-8", "surrogateescape"))

    def _do_end(self) -> None:
        if self._child is not None:
            self._child.feed(None)


class _Part:
    """A bundle on its way in: a file that only this worker writes, its checksum so far, and its length in the end."""

    def __init__(self, path: Path, length: int) -> None:
        self.path, self._length, self.sha = path, length, hashlib.sha256()
        path.parent.mkdir(exist_ok=True)
        try:
            self._fd = _lock(path)
        except BlockingIOError:
            raise Fault("another copy of this bundle is under way there, or broke off within the last minute; try again then") from None
        try:
            self.have = self._hashed()
            free, coming = free_bytes(path.parent), length - self.have
            if coming + RESERVE_BYTES > free:
                if not self.have:
                    path.unlink()
                room = f"{path.parent} has {free / (1 << 20):.1f} MiB free, and {coming / (1 << 20):.1f} MiB are to come"
                raise Fault(f"the disk there is full: {room}; free some, or name another folder with --remote-dir")
        except BaseException:
            os.close(self._fd)
            raise

    def _hashed(self) -> int:
        """Read what an earlier copy left; returns its length."""
        done = 0
        while done < self._length and (data := os.pread(self._fd, min(CHUNK, self._length - done), done)):
            self.sha.update(data)
            done += len(data)
        return done

    def begin(self, offset: int) -> None:
        """Go on after what is there, or from the start."""
        if offset != self.have:
            self.have, self.sha = 0, hashlib.sha256()
        os.ftruncate(self._fd, self.have)
        os.lseek(self._fd, self.have, os.SEEK_SET)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self.sha.update(data)

    def finish(self, sha256: str) -> Path:
        """Compare, and give the file its name. What is not what was sent is removed."""
        try:
            if self.sha.hexdigest() != sha256:
                self.path.unlink()
                raise Fault("what arrived is not what was sent (its checksum is wrong), and was removed; try again")
            os.fsync(self._fd)
            path = self.path.with_suffix(".edgeml")
            os.rename(self.path, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        finally:
            self.close()
        return path

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._fd)


class _Child:
    """A command in a process group of its own, what it says on the way to the host. `columns` gives it a terminal for its progress."""

    def __init__(self, worker: Worker, command: list[str], folder: Path, records: Path | None, columns: int | None) -> None:
        self._worker, self._records, self._sent = worker, records, 0
        self._input: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        ours, theirs = os.pipe() if columns is None else pty.openpty()
        if columns is not None:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self.running = True
        pumps = [self._thread(self._pump, self._process.stdout, "out"), self._thread(self._pump, io.BufferedReader(io.FileIO(ours)), "err")]
        self._thread(self._write)
        self._thread(self._follow, pumps)

    @staticmethod
    def _thread(target: Any, *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        return thread

    def feed(self, data: bytes | None) -> None:
        """More standard input; None is its end."""
        self._input.put(data)

    def stop(self) -> None:
        """Kill the command and all it started."""
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _write(self) -> None:
        sink = self._process.stdin
        assert sink is not None
        with suppress(OSError), sink:
            while (data := self._input.get()) is not None:
                sink.write(data)
                sink.flush()

    def _pump(self, source: io.BufferedReader, name: str) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in two pieces
        while True:
            try:
                data = source.read1(1 << 16)
            except OSError:  # a terminal whose other end is closed
                data = b""
            if text := decoder.decode(data, not data):
                self._worker.say({name: text})
            if not data:
                return

    def _follow(self, pumps: list[threading.Thread]) -> None:
        """Pass records on as they are written; then the end."""
        while True:
            try:
                code: int | None = self._process.wait(0.2 if self._records else None)
            except subprocess.TimeoutExpired:
                code = None
            self._pass_records()
            if code is not None:
                for pump in pumps:
                    pump.join(5)  # a grandchild may hold them open
                self._input.put(None)
                self.running = False
                self._worker.say({"exit": code})
                return

    def _pass_records(self) -> None:
        if self._records is None:
            return
        with suppress(FileNotFoundError), self._records.open("rb") as file:
            file.seek(self._sent)
            for line in file:
                if line.endswith(b"\n"):
                    self._sent += len(line)
                    self._worker.say({"record": json.loads(line)})


def facts(root: Path) -> Message:
    """What the host decides by: version of edgeml (None: not there, `why`), Python, machine, free disk."""
    try:
        import edgeml

        version, why = edgeml.__version__, None
    except Exception as error:
        version, why = None, f"{type(error).__name__}: {error}"
    return {
        "edgeml": version,
        "why": why,
        "python": platform.python_version(),
        "platform": sysconfig.get_platform(),  # of this Python, which on a 64-bit kernel may be a 32-bit one
        "free_bytes": free_bytes(root),
        "root": str(root),
    }


def free_bytes(folder: Path) -> int:
    """What this user may still write there."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _lock(path: Path) -> int:
    """Open for this process alone. Raises `BlockingIOError` when another has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _plain(name: str) -> str:
    if not name.isalnum():
        raise Fault(f"{name!r} is no bundle's identity")
    return name


def _sentence(error: Exception, place: Path) -> str:
    if isinstance(error, OSError):
        if error.errno in FULL:
            return "the disk there is full; nothing of it was kept; free some, or name another folder with --remote-dir"
        return f"{error.filename or place}: {error.strerror or error}"
    return str(error)


def main() -> None:
    """Serve this process's standard input and output; signals that end a session end it tidily."""
    worker = Worker(sys.stdin.buffer, sys.stdout.buffer, Path(sys.argv[1]))
    ends = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)

    def stop(*_: Any) -> None:
        """All of it here: what a signal raised could come out between two lines below, and nothing would be tidied up."""
        for number in ends:  # once: tidying up is not to be interrupted
            signal.signal(number, signal.SIG_IGN)
        worker.close()
        os._exit(0)  # threads that read a command's last words hold up nothing

    for number in ends:
        signal.signal(number, stop)
    try:
        worker.serve()
    except Exception:
        traceback.print_exc()
    finally:
        stop()


if __name__ == "__main__":
    sys.path[:] = [place for place in sys.path if place]  # never what lies in the current folder
    main()
