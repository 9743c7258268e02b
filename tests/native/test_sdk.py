"""The script behind `make native-sdk`, as far as it goes without compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "cross" / "native_sdk.py"


def test_a_folder_that_holds_no_ndk_is_one_sentence_before_anything_is_made(tmp_path: Path) -> None:
    environment = {**os.environ, "ANDROID_NDK_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "ANDROID_NDK_HOME" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
