"""The aarch64 wheel under emulation, with the real aarch64 onnxruntime, NumPy and tokenizers: what it computes is what we compute.

An emulated processor refuses every instruction that its model does not have, so a wrong choice of kernels ends a run with a
signal. Speed is not measured: an emulator has none.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qemu

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "models" / "multitask-text.edgeml"
GUEST = Path(__file__).with_name("guest.py")
#: Zero 2 W and 3; 4; 5. The first two have no dot-product instructions.
PROCESSORS = {"cortex-a53": ["scalar", "neon"], "cortex-a72": ["scalar", "neon"], "cortex-a76": ["scalar", "neon", "neon-dotprod"]}
#: Our kernels give the same bits everywhere. onnxruntime's differ in the last bits of a float, which can turn the rounding of an
#: activation or a choice between two experts that weigh the same; a score may then move this far, a label not.
CLOSE = 0.03


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, as an installation would lay them out."""
    reason = qemu.missing()
    if reason is None and qemu.wheel() is None:
        reason = "dist/ has no aarch64 wheel of this source (make wheels)"
    if reason is None and not BUNDLE.exists():
        reason = f"{BUNDLE.name} is not here"
    if reason is not None:
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("wheel")
    wheel = qemu.wheel()
    assert wheel is not None
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


@pytest.fixture(scope="module")
def here(unpacked: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-P", str(GUEST), str(BUNDLE)], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("cpu", PROCESSORS)
def test_the_wheel_computes_there_what_is_computed_here(cpu: str, unpacked: Path, here: dict[str, Any]) -> None:
    interpreter = qemu.python()
    assert interpreter is not None
    done = qemu.run(cpu, interpreter, "-S", GUEST, BUNDLE, path=(unpacked,))
    assert done.returncode == 0, f"{done.returncode} (negative: a signal; -4 is an illegal instruction)\n{done.stderr[-2000:]}"
    there = json.loads(done.stdout)
    assert there["kernels"] == PROCESSORS[cpu]
    assert there["answers"]["backend"] == PROCESSORS[cpu][-1]
    assert there["checksum"] == "armv8"
    assert there["crc32c"] == here["crc32c"]
    for isa in there["kernels"]:
        assert there["matrices"][isa] == here["matrices"]["scalar"]
    assert there["operators"] == here["operators"]
    assert there["answers"]["labels"] == here["answers"]["labels"]
    for task, scores in here["answers"]["scores"].items():
        np.testing.assert_allclose(there["answers"]["scores"][task], scores, atol=CLOSE)
