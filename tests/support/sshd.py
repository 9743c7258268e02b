"""A real sshd on the loopback interface for tests: own port, keys and known hosts, all in one folder; nothing of the user's is read."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SSHD = shutil.which("sshd") or next((str(p) for p in (Path("/usr/sbin/sshd"),) if p.exists()), None)


def missing() -> str | None:
    """Why there can be no server here, None where there can."""
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        return "needs openssh-server and openssh-client"
    if os.getuid() != 0 and not os.access(SSHD, os.X_OK):
        return "sshd may not be started"
    return None


def packages() -> str:
    """Where the edgeml that runs here comes from, installed or not, for PYTHONPATH."""
    found = [importlib.util.find_spec(name) for name in ("edgeml", "edgeml_devices", "edgeml_report")]
    return ":".join(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in found if spec is not None and spec.origin))


def far_python(folder: Path) -> Path:
    """A Python that has the edgeml which runs here, as a far side would: a script, because a login there does not take our environment."""
    script = folder / "far-python"
    paths = packages()
    script.write_text(f'#!/bin/sh\nPYTHONPATH={paths} OMP_NUM_THREADS=1 exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Sshd:
    """The server and what a client needs: `ssh` is the command for EDGEML_SSH, `to` the address for --to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.to = f"127.0.0.1:{self.port}"
        for name in ("host", "user", "other"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True, capture_output=True)
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        self.know("host")
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder}/user\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile none\n"
        )
        self.ssh = f"ssh -F {folder}/ssh_config"
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {folder}/host\nPidFile none\nAuthorizedKeysFile {folder}/authorized_keys\n"
            "StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nPermitRootLogin yes\nLogLevel ERROR\n"
        )
        self._server: subprocess.Popen[bytes] | None = None

    def know(self, key: str | None) -> None:
        """Make the client expect this host key; None: no key at all."""
        line = "" if key is None else f"[127.0.0.1]:{self.port} {(self.folder / f'{key}.pub').read_text()}"
        (self.folder / "known_hosts").write_text(line)

    def start(self) -> None:
        """Listen, and wait until it does. Raises `OSError` when it will not."""
        assert SSHD is not None
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        command = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        self._server = subprocess.Popen(command, stderr=subprocess.PIPE)
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._server.poll() is not None:
                break
            time.sleep(0.02)
        assert self._server.stderr is not None
        raise OSError(f"sshd did not start: {self._server.stderr.read().decode()}")

    def connections(self) -> list[int]:
        """Processes of the server that hold a connection."""
        assert self._server is not None
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self._server.pid)], capture_output=True, text=True, check=False)
        return [int(line) for line in found.stdout.split()]

    def cut(self) -> None:
        """Kill every connection as a pulled cable would end it, and leave the server listening."""
        for pid in self.connections():
            with suppress(ProcessLookupError):
                os.kill(pid, 9)

    def stop(self) -> None:
        """End the server and its connections."""
        if self._server is None:
            return
        self.cut()
        self._server.kill()
        self._server.communicate()
        self._server = None
