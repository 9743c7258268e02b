#!/usr/bin/env python3
"""What the runtime costs before it does anything: importing it, asking for help, downloading it.

    startup.py [--repeats 15] [--wheel FILE]

- `import edgeml` adds under 30 ms to importing numpy and onnxruntime: measured inside a child process, median; and as the difference of
  whole processes with and without it, interleaved. The package fetches its session only when asked; what the import costs together
  with that is among the figures.
- `edgeml --help` loads neither onnxruntime nor torch.
- The wheel of the runtime is under 400 kB (without --wheel it is built, which takes a compiler and a minute).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from benchlib import ROOT, Verdict, finish, parser, progress, run, verdict

from edgeml.errors import DeviceError
from edgeml.metrics import bootstrap

ADDED_MS, WHEEL_BYTES = 30.0, 400_000
HEAVY = ("onnxruntime", "torch")

BASE = "import numpy, onnxruntime"
#: Prints the milliseconds that the import took, then those of fetching what `edgeml.open` needs.
ADDED = """
import time, numpy, onnxruntime
before = time.perf_counter()
import edgeml
imported = time.perf_counter()
edgeml.open
print(1e3 * (imported - before), 1e3 * (time.perf_counter() - imported))
"""
HELP = """
import contextlib, io, sys
from edgeml.cli import main
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    main(["--help"])
assert "Usage" in shown.getvalue()
print(*sys.modules)
"""


def child(code: str, environment: dict[str, str]) -> tuple[float, str]:
    """Run code in a fresh interpreter; returns milliseconds and what it printed."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeviceError(f"a child process failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    return 1e3 * (time.perf_counter() - started), done.stdout


def imports(repeats: int, environment: dict[str, str]) -> tuple[list[Verdict], dict[str, Any]]:
    """With and without edgeml in turn; the first pair of processes is left out."""
    tick = progress(repeats + 1, "imports")
    base, whole, inside, opening = [], [], [], []
    for number in range(repeats + 1):
        without, _ = child(BASE, environment)
        both, said = child(ADDED.replace("edgeml.open\n", "pass\n"), environment)
        opened = child(ADDED, environment)[1]
        if number:
            base.append(without)
            whole.append(both)
            inside.append(float(said.split()[0]))
            opening.append(sum(map(float, opened.split())))
        tick(1)
    pairs = np.array([base, whole])
    added = bootstrap(lambda rows: float(np.median(pairs[1][rows[0]]) - np.median(pairs[0][rows[0]])), [repeats], 0)
    median, opened_ms = statistics.median(inside), statistics.median(opening)
    verdicts = [
        verdict("milliseconds of `import edgeml` after numpy and onnxruntime", f"< {ADDED_MS}", median, median < ADDED_MS),
        verdict("milliseconds it adds to a whole process", f"< {ADDED_MS}", added.value, added.value < ADDED_MS, added),
    ]
    figures = {
        "repeats": repeats,
        "base_process_ms": statistics.median(base),
        "process_with_edgeml_ms": statistics.median(whole),
        "import_ms": {"median": median, "max": max(inside)},
        "import_and_open_ms": {"median": opened_ms, "max": max(opening)},
    }
    return verdicts, figures


def help_loads(environment: dict[str, str]) -> Verdict:
    modules = set(child(HELP, environment)[1].split())
    loaded = [name for name in HEAVY if name in modules]
    return verdict("heavy modules that `edgeml --help` loads", "0", len(loaded), not loaded, loaded=loaded, modules=len(modules))


def wheel_size(wheel: Path | None) -> Verdict:
    """The size of a wheel that is given or built."""
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            print("building the wheel ...", file=sys.stderr)
            command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, str(ROOT)]
            if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
                raise DeviceError("pip could not build the wheel; what it said is above")
            (wheel,) = Path(folder).glob("*.whl")
        size = wheel.stat().st_size
        return verdict("bytes of the wheel", f"< {WHEEL_BYTES}", size, size < WHEEL_BYTES, wheel=wheel.name)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--wheel", type=Path, help="a wheel that is there already, instead of building one")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as compiled:
        # Everything is compiled once, as an installation would, and nothing is left in the tree.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = compiled
        verdicts, figures = imports(chosen.repeats, environment)
        verdicts.append(help_loads(environment))
    verdicts.append(wheel_size(chosen.wheel))
    return finish("startup", verdicts, figures, chosen.records)


if __name__ == "__main__":
    run(main)
