"""`benchmarks/scheduling/stream.py` on a toy: it runs in seconds and writes a record with every figure that it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from edgeml.made import make_mixture

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scheduling" / "stream.py"


def test_the_stream_on_a_toy(tmp_path: Path) -> None:
    make_mixture(tmp_path / "toy.edgeml")
    options = ["--bundle", "toy.edgeml", "--text", "toy.edgeml", "--rounds", "2", "--requests", "8", "--depth", "4", "--threads", "1"]
    command = [sys.executable, str(SCRIPT), *options, "--records", "records"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 1), done.stderr
    (file,) = (tmp_path / "records").glob("scheduling-stream-*.json")
    record = json.loads(file.read_text("utf-8"))
    assert len(record["verdicts"]) == 5
    assert all(verdict["holds"] in (True, False) for verdict in record["verdicts"])
    for arm in ("stream", "halves", "joined", "text_model"):
        assert set(record["figures"][arm]) == {"baseline", "scheduler", "baseline at a rate", "scheduler at a rate"}
        assert all(side["requests"] == 16 for side in record["figures"][arm].values())
    assert str(tmp_path) not in file.read_text("utf-8")
