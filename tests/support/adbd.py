"""A device for the real adb client and server: adb's wire protocol over TCP, its shell service in the second protocol, nothing else.

It proves that our transport works through adb, not that Android behaves so. `cut` is the cable that comes out.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

from sshd import free_port

MAX = 1 << 18
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)


def missing() -> str | None:
    """Why there can be no device here, None where there can."""
    return None if shutil.which("adb") else "needs the adb client"


class Adbd:
    """Listens on `port` of the loopback interface; its shells run on this machine."""

    def __init__(self, features: str = "shell_v2,cmd") -> None:
        self._features = features
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: list[_Connection] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection = _Connection(self._listener.accept()[0], self._features)
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()

    def cut(self) -> None:
        """End every connection at once."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def stop(self) -> None:
        """No device any more."""
        self._listener.close()
        self.cut()


class _Connection:
    def __init__(self, peer: socket.socket, features: str) -> None:
        self._peer, self._features, self._lock = peer, features, threading.Lock()
        self._shells: dict[int, _Shell] = {}

    def serve(self) -> None:
        with suppress(OSError, EOFError):
            while True:
                name, first, second, length = struct.unpack("<4sIII8x", self._exactly(24))
                self._message(name, first, second, self._exactly(length))
        self.close()

    def _message(self, name: bytes, first: int, second: int, data: bytes) -> None:
        if name == b"CNXN":
            banner = f"device::ro.product.name=fake;ro.product.model=Fake;ro.product.device=fake;features={self._features}"
            self.send(b"CNXN", 0x01000001, MAX, banner.encode())
        elif name == b"OPEN":
            service = data.rstrip(b"\0").decode()
            kind, _, command = service.partition(":")
            if not kind.startswith("shell,v2"):
                self.send(b"CLSE", 0, first)
                return
            number = len(self._shells) + 1
            self._shells[number] = _Shell(self, number, first, command)
            self.send(b"OKAY", number, first)
            self._shells[number].start()
        elif name == b"WRTE":
            self._shells[second].take(data)
            self.send(b"OKAY", second, first)
        elif name == b"OKAY":
            self._shells[second].ready.release()
        elif name == b"CLSE" and second in self._shells:
            self._shells[second].hang_up()

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            if not (part := self._peer.recv(count - len(parts))):
                raise EOFError
            parts += part
        return bytes(parts)

    def send(self, name: bytes, first: int, second: int, data: bytes = b"") -> None:
        magic = struct.unpack("<I", name)[0] ^ 0xFFFFFFFF
        with self._lock:
            self._peer.sendall(struct.pack("<4sIIIII", name, first, second, len(data), sum(data) & 0xFFFFFFFF, magic) + data)

    def close(self) -> None:
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()
        for shell in list(self._shells.values()):
            shell.hang_up()


class _Shell:
    """A command and its pipes, in adb's shell protocol: packets of an id, a length and data."""

    def __init__(self, connection: _Connection, number: int, other: int, command: str) -> None:
        self._connection, self._number, self._other = connection, number, other
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
        )
        self._held = b""
        self.ready = threading.Semaphore(1)

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def take(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._held += data
        while len(self._held) >= 5:
            kind, length = struct.unpack("<BI", self._held[:5])
            if len(self._held) < 5 + length:
                return
            payload, self._held = self._held[5 : 5 + length], self._held[5 + length :]
            with suppress(OSError, ValueError):
                if kind == STDIN:
                    self._process.stdin.write(payload)
                elif kind == CLOSE_STDIN:
                    self._process.stdin.close()

    def hang_up(self) -> None:
        """What adbd does when the client has gone: the pipes close, and the session gets SIGHUP."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.close()  # type: ignore[union-attr]
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGHUP)

    def _run(self) -> None:
        streams = [(STDOUT, self._process.stdout), (STDERR, self._process.stderr)]
        pumps = [threading.Thread(target=self._pump, args=pair, daemon=True) for pair in streams]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        with suppress(OSError):
            self._write(EXIT, bytes([self._process.wait() & 0xFF]))
            self._connection.send(b"CLSE", self._number, self._other)

    def _pump(self, kind: int, stream: object) -> None:
        with suppress(OSError, ValueError):
            while data := os.read(stream.fileno(), 1 << 15):  # type: ignore[attr-defined]
                self._write(kind, data)

    def _write(self, kind: int, data: bytes) -> None:
        if not self.ready.acquire(timeout=10):
            raise OSError("the host has gone")
        self._connection.send(b"WRTE", self._number, self._other, struct.pack("<BI", kind, len(data)) + data)


class Adb:
    """adb's own server, on a port of its own with its keys in `folder`; `command` is for EDGEML_ADB."""

    def __init__(self, folder: Path) -> None:
        self._environment = os.environ | {"HOME": str(folder), "TMPDIR": str(folder), "ADB_MDNS": "0"}
        self._port = free_port()
        self.command = f"adb -P {self._port}"

    def call(self, *arguments: str) -> str:
        """Run the client; what it printed."""
        command = [*self.command.split(), *arguments]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False, timeout=30)
        return done.stdout + done.stderr
