"""Machines behind the system's own ssh, so that the user's configuration, keys, agents and jump hosts all count.

One connection is made and shared (a control socket in a private temporary folder), no password is asked for, nothing is forwarded,
and a host key is never accepted: an unknown or another key is a sentence that says what to do. No scp and no sftp: bytes go through the
worker, which resumes and checks them, and small boards have no sftp server. EDGEML_SSH is the command, such as `ssh -F FILE`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from typing import IO

from edgeml.errors import UsageError
from edgeml_devices import transport

__all__ = ["Ssh"]

#: Host: a name, an alias of ~/.ssh/config, or an address. It may not look like an option.
_PLACE = re.compile(r"(?:ssh://)?((?:[^\s@:/-][^\s@:/]*@)?)(\[[0-9A-Fa-f:.%a-z]+\]|[^\s@:/\[\]-][^\s@:/\[\]]*)(?::([0-9]{1,5}))?/?")
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ControlMaster": "auto",
    "ControlPersist": "20",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "LogLevel": "ERROR",
}


class Ssh:
    """`place` is `user@host`, `host`, `user@host:port` or `ssh://user@host:port`. Raises `UsageError` for anything else."""

    folder = '"${XDG_CACHE_HOME:-$HOME/.cache}"/edgeml-device'
    python = "python3"

    def __init__(self, place: str) -> None:
        found = _PLACE.fullmatch(place)
        if found is None or not 0 < int(found[3] or 22) < 65536:
            raise UsageError(f"'{place}' is no machine: give user@host, user@host:port, adb:SERIAL or local")
        host = found[2].strip("[]")
        self.name, self._host = place, found[1] + host
        self._known = f"[{host}]:{found[3]}" if found[3] else host  # as it stands in known_hosts
        self._by_hand = f"ssh -p {found[3]} {self._host}" if found[3] else f"ssh {self._host}"
        self._command = shlex.split(os.environ.get("EDGEML_SSH", "")) or ["ssh"]
        self._command += [part for key, value in OPTIONS.items() for part in ("-o", f"{key}={value}")]
        self._command += ["-T", "-e", "none", *(("-p", found[3]) if found[3] else ())]
        self._sockets: str | None = None

    def start(self, line: str, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        """Through the login shell there, whichever it is: it only has to start `sh`."""
        transport.need(self._command[0], "OpenSSH's client (Debian: openssh-client)", "EDGEML_SSH")
        if self._sockets is None:  # a socket's path has room for about 100 characters
            self._sockets = tempfile.mkdtemp(prefix="edgeml-", dir="/tmp" if len(tempfile.gettempdir()) > 60 else None)
            self._command += ["-o", f"ControlPath={self._sockets}/s"]
        return transport.start([*self._command, "--", self._host, f"exec sh -c {shlex.quote(line)}"], errors)

    def explain(self, code: int, errors: str) -> str:
        """By what ssh says, in the words of OpenSSH's client, which are not translated."""
        if "HOST IDENTIFICATION HAS CHANGED" in errors:
            return (
                "its host key is not the one that is known: it was set up anew, or somebody sits in between; "
                f"only if you know why, forget the old key with `ssh-keygen -R {self._known}` and connect once by hand"
            )
        if "Host key verification failed" in errors:
            return f"its host key is not known here; connect once by hand with `{self._by_hand}`, compare the fingerprint and accept it"
        if "Permission denied" in errors or "Too many authentication failures" in errors:
            return f"it does not let us in, and no password is asked for; set up a key with `ssh-copy-id` so that `{self._by_hand}` works"
        if "Could not resolve hostname" in errors:
            return "there is no machine of that name; check it, or give its address"
        said = errors.strip().splitlines()
        last = said[-1].strip() if said else f"ssh ended with code {code}"
        if any(word in last for word in ("refused", "timed out", "No route", "unreachable")):
            return f"it cannot be reached ({last}); is it on, in this network, and running an ssh server?"
        return f"no connection ({last})"

    def close(self) -> None:
        """End the shared connection and remove its socket."""
        if self._sockets is None:
            return
        if os.path.exists(f"{self._sockets}/s"):
            with suppress(subprocess.TimeoutExpired):
                command = [*self._command, "-O", "exit", "--", self._host]
                subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=10)
        shutil.rmtree(self._sockets, ignore_errors=True)
