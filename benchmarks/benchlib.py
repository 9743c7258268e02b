"""What every benchmark shares: its options, progress on standard error, verdicts, and the record that is committed.

A record says what was run, on what, and for each bound whether it holds. It holds figures only: no text of any data set, and
of paths only what lies inside the repository.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import edgeml
from edgeml.errors import EdgemlError
from edgeml.measure import environment
from edgeml.metrics import Interval

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).parent / "records"
MODEL = ROOT / "models" / "multitask-text.edgeml"
SCHEMA = 1
LIBRARIES = ("numpy", "torch", "tokenizers", "onnx")

Verdict = dict[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's own text, with the option every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--records", type=Path, default=RECORDS, help="folder the record is written to (default: benchmarks/records)")
    return made


def shared_text() -> Path:
    """The shared data's text folder, from EDGEML_SHARED (default: ../shared beside the repository)."""
    return Path(os.environ.get("EDGEML_SHARED", ROOT.parent / "shared")) / "data" / "text"


def numbers(text: str) -> list[int]:
    """An option such as 32,64,128."""
    return [int(part) for part in text.split(",")]


def progress(total: int, label: str) -> Callable[[int], None]:
    """A function to be called with the number of steps done since the last call; writes a line every tenth of the way."""
    done, started = 0, time.monotonic()

    def step(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if total and (10 * done) // total > (10 * before) // total:
            print(f"{label}: {done} of {total}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    return step


def verdict(name: str, bound: str, measured: float | None, holds: bool | None, interval: Interval | None = None, **about: Any) -> Verdict:
    """One bound: what was demanded, what was measured. `holds` is None where it could not be measured (`about` says why)."""
    found: Verdict = {"name": name, "bound": bound, "measured": measured}
    if interval is not None:
        found["interval"] = [interval.low, interval.high]
        found["n"] = interval.n
    return found | {"holds": None if holds is None else bool(holds)} | about


def finish(name: str, verdicts: Sequence[Verdict], figures: dict[str, Any], folder: Path) -> int:
    """Write the record, print the verdicts, and return the exit code: 1 if a bound is broken."""
    device = environment()
    date = time.strftime("%Y-%m-%d", time.gmtime())
    record = {
        "schema": SCHEMA,
        "benchmark": name,
        "date": date,
        "command": [_portable(argument) for argument in sys.argv],
        "tool_version": edgeml.__version__,
        "environment": device | {"libraries": {library: _version(library) for library in LIBRARIES}},
        "load_average": list(os.getloadavg()),
        "verdicts": list(verdicts),
        "figures": figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{_slug(device['cpu'] or device['board'] or device['architecture'])}-{date}.json"
    path.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n", "utf-8")
    for entry in verdicts:
        print(_line(entry))
    print(f"record: {path}")
    return 1 if any(entry["holds"] is False for entry in verdicts) else 0


def run(main: Callable[[], int]) -> None:
    """Run a benchmark as a script: a known fault is one sentence and its exit code."""
    try:
        code = main()
    except EdgemlError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _line(entry: Verdict) -> str:
    word = {True: "holds ", False: "BROKEN", None: "undecided"}[entry["holds"]]
    measured = "-" if entry["measured"] is None else f"{entry['measured']:.4g}"
    low, high = entry.get("interval", (None, None))
    between = "" if low is None else f" (95 %: {low:.4g} to {high:.4g})"
    return f"{word}  {entry['name']}: {measured}{between}, must be {entry['bound']}"


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, and what is not finite as null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _portable(argument: str) -> str:
    """An argument without the machine's own folders."""
    place, _, function = argument.partition(":")
    path = Path(place)
    if path.exists() and path.resolve().is_relative_to(ROOT):
        place = str(path.resolve().relative_to(ROOT))
    elif path.is_absolute():
        place = f".../{path.name}"
    return f"{place}:{function}" if function else place


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
