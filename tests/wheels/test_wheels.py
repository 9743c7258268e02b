"""What `make wheels` made: small enough, tagged for old systems, and the pure one answers without any extension.

Skipped where dist/ has no wheels of the source as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import qemu

from edgeml import native

BINARY = {machine: f"edgeml_runtime-*-cp311-abi3-manylinux2014_{machine}.manylinux_2_17_{machine}.whl" for machine in ("x86_64", "aarch64")}
PATTERNS = {**BINARY, "pure": "edgeml_runtime-*-py3-none-any.whl"}
#: Bytes of a wheel, and of what it installs. Boards have slow links and small cards; AVX2 and AVX-512 take more room than NEON.
LIMITS = {"x86_64": (400_000, 1 << 20), "aarch64": (400_000, 1_000_000), "pure": (400_000, 1_000_000)}
BUNDLE = qemu.ROOT / "models" / "multitask-text.edgeml"


@pytest.fixture(params=PATTERNS)
def wheel(request: pytest.FixtureRequest) -> Path:
    found = qemu.wheel(PATTERNS[request.param])
    if found is None:
        pytest.skip("dist/ has no such wheel of this source (make wheels)")
    return found


def unpack(wheel: Path, place: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def test_it_is_small(wheel: Path) -> None:
    """Installed: without what Python compiles."""
    limits = next(LIMITS[name] for name, pattern in PATTERNS.items() if wheel.match(pattern))
    with zipfile.ZipFile(wheel) as archive:
        installed = sum(entry.file_size for entry in archive.infolist())
    assert wheel.stat().st_size < limits[0]
    assert installed < limits[1]


def test_it_holds_the_runtime_and_one_extension_or_none(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    libraries = [name for name in names if ".so" in name]
    assert libraries == ([] if wheel.name.endswith("any.whl") else ["edgeml/_native.abi3.so"])
    assert {name.split("/")[0].split("-")[0] for name in names} == {"edgeml", "edgeml_runtime"}


@pytest.mark.parametrize("name", ["pure", "x86_64"])
def test_it_answers_and_the_record_says_what_ran(name: str, tmp_path: Path) -> None:
    wheel = qemu.wheel(PATTERNS[name])
    if wheel is None or not BUNDLE.exists() or (name == "x86_64" and os.uname().machine != name):
        pytest.skip("dist/ has no such wheel of this source for this machine (make wheels), or the bundle is not here")
    environment = {**os.environ, "PYTHONPATH": str(unpack(wheel, tmp_path)), "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["--task", "banking77", "--iterations", "2", "--memory", "50%", "--json", "--quiet"]
    command = [sys.executable, "-P", "-m", "edgeml.cli", "bench", str(BUNDLE), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["records"][0]["backend"] == ("numpy" if name == "pure" else native.backends()[-1])
