"""An aarch64 Linux on another processor: `python qemu.py` makes it in build/aarch64, `run` runs programs in it.

qemu emulates one program at a time and translates its system calls, so neither root nor a virtual machine is needed: the folder
holds a C library, a CPython and the runtime's dependencies from wheels, all of them the real aarch64 ones, and nothing of it is
installed. Needs Debian's apt (with its mirror's arm64 packages), dpkg and pip; tests skip where it was not made. What a guest
starts would run on the host's processor, so guests start nothing.

A trap: onnxruntime's CPU detection reads /proc/cpuinfo, and crashes on the host's; qemu looks under its root first, so an ARM one
is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "aarch64"
SITE = PLACE / "site"
QEMU = "qemu-aarch64-static"
#: Python, and what wheels link against besides it.
PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
#: Where the sources of what is compiled lie.
C_SOURCES = ("native/src", "native/include", "native/reader", "native/cffi", "examples/c")
#: Of these glibc versions a wheel may ask for.
GLIBC = range(17, 37)
CPUINFO = """processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm crc32 cpuid
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: 0xd08
CPU revision	: 3
"""
APT = """Dir::State "{place}/state";
Dir::State::status "{place}/state/status";
Dir::Cache "{place}/cache";
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Sandbox::User "root";
"""


def python() -> Path | None:
    """The guest's interpreter, if it was made."""
    return next(iter(sorted((PLACE / "root" / "usr" / "bin").glob("python3.[0-9]*"))), None)


def wheel(pattern: str = "edgeml_runtime-*_aarch64.whl") -> Path | None:
    """A wheel that `make wheels` made of the source as it is now, if there is one."""
    return next((path for path in (ROOT / "dist").glob(pattern) if is_newer(path, "edgeml", *C_SOURCES)), None)


def is_newer(made: Path, *folders: str) -> bool:
    """Whether a file is there and no source in these folders was changed since it was made."""
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".c", ".h")]
    return made.exists() and made.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


def missing() -> str | None:
    """Why nothing can be run, or None."""
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed (Debian, Ubuntu: apt-get install qemu-user-static)"
    if python() is None or not SITE.exists():
        return "there is no emulated aarch64 system (make wheels, then python tests/support/qemu.py)"
    return None


def run(cpu: str, *command: str | Path, path: tuple[Path, ...] = (), timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a program of the guest on an emulated processor; `path` is Python's, the dependencies come after it."""
    environment = {
        "PATH": "/usr/bin",
        "PYTHONPATH": os.pathsep.join(map(str, (*path, SITE))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LD_LIBRARY_PATH": "",
        "HOME": "/nonexistent",
    }
    line = [QEMU, "-cpu", cpu, "-L", str(PLACE / "root"), *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=timeout_s, env={**os.environ, **environment})


def make() -> None:
    """Make the folder anew. Raises `CalledProcessError` where a step fails."""
    given = next((ROOT / "dist").glob("edgeml_runtime-*_aarch64.whl"), None)
    if given is None:
        sys.exit("edgeml: dist/ has no aarch64 wheel; run make wheels first")
    shutil.rmtree(PLACE, ignore_errors=True)
    (PLACE / "root" / "proc").mkdir(parents=True)
    (PLACE / "root" / "proc" / "cpuinfo").write_text(CPUINFO)
    with tempfile.TemporaryDirectory() as scratch:
        _unpack_packages(Path(scratch))
    _install_wheels(given)


def _unpack_packages(scratch: Path) -> None:
    """Download what Python needs with an apt that has nothing installed and a state of its own, and unpack it."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "state" / "status").touch()
    (scratch / "apt.conf").write_text(APT.format(place=scratch))
    environment = {**os.environ, "APT_CONFIG": str(scratch / "apt.conf"), "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "-qq", "update"], check=True, env=environment)
    options = ["-qq", "-y", "--no-install-recommends", "--download-only"]
    subprocess.run(["apt-get", *options, "install", *PACKAGES], check=True, env=environment, stdout=subprocess.DEVNULL)
    for package in sorted((scratch / "cache" / "archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(PLACE / "root")], check=True)


def _install_wheels(given: Path) -> None:
    """Install our wheel with all its dependencies, from wheels only: what a board does, which needs no compiler either."""
    interpreter = python()
    assert interpreter is not None, "the packages hold no Python"
    version = interpreter.name.removeprefix("python")
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC] + ["--platform=manylinux2014_aarch64"]
    which = ["--only-binary=:all:", "--implementation=cp", f"--python-version={version}", *platforms]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--target", str(SITE)]
    subprocess.run([*command, *which, str(given)], check=True)


if __name__ == "__main__":
    make()
