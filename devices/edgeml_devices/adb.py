"""Phones and boards behind the `adb` client: by USB, or by network once `adb connect` was told.

A device needs adb's second shell protocol (Android 7 and newer), which keeps bytes as they are and output apart from errors; the worker
does the rest, so `adb push` is not used. Android itself has no Python: name one with --remote-python (docs/phones.md has programs
without Python). EDGEML_ADB is the command, such as `adb -P 5038`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from typing import IO

from edgeml.errors import UsageError
from edgeml_devices import transport

__all__ = ["Adb"]


class Adb:
    """`serial` as `adb devices` prints it; without one, the only device there is. Raises `UsageError` for what is no serial number."""

    folder = "/data/local/tmp/edgeml"  # what the shell user may write on every Android
    python = "python3"

    def __init__(self, serial: str = "") -> None:
        if serial and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:\[\]-]*", serial):
            raise UsageError(f"'{serial}' is no serial number of a device; `adb devices` lists them")
        self.name = f"adb:{serial}" if serial else "adb"
        self._command = shlex.split(os.environ.get("EDGEML_ADB", "")) or ["adb"]
        self._serial = ["-s", serial] if serial else []

    def start(self, line: str, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        """Through the shell protocol, without a terminal."""
        transport.need(self._command[0], "Android's platform tools (Debian: adb)", "EDGEML_ADB")
        return transport.start([*self._command, *self._serial, "shell", "-T", f"exec sh -c {shlex.quote(line)}"], errors)

    def explain(self, code: int, errors: str) -> str:
        """By what the client says."""
        if "unauthorized" in errors:
            return "the device does not trust this computer yet; unlock it and accept the question on its screen"
        if "offline" in errors:
            return "the device is offline; take the cable out and in again, or `adb reconnect`"
        if "more than one device" in errors:
            return "there are several devices; name one as adb:SERIAL (`adb devices` lists them)"
        if "no devices" in errors or ("not found" in errors and "device" in errors):
            return "no such device; is it plugged in with USB debugging on? `adb devices` lists them, `adb connect` adds one by network"
        if "only supports allocating a pty" in errors:
            return "its adb is too old: Android 7 or newer is needed"
        said = errors.strip().splitlines()
        return f"no connection ({said[-1].strip() if said else f'adb ended with code {code}'})"

    def close(self) -> None:
        """Nothing is shared but adb's own server, which stays as its users expect."""
