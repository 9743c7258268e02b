"""What is known about a written bundle, measured as a device would run it: in a process where torch cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeml.bundle import Bundle
from edgeml.data import Row
from edgeml.errors import DataError, DeviceError, EdgemlError, InputError, UsageError
from edgeml_export.model import Model
from edgeml_export.reference import Reference, Tick

if TYPE_CHECKING:
    from edgeml_export.passes import View

__all__ = ["CHOICES", "INPUTS", "agreement", "evaluate", "measured_sizes", "run_apart"]

MAC_TOKENS = 64
INPUTS, CHOICES = "inputs.npz", "choices.npz"

#: Run a module as a program, in a process that cannot import what a device does not have.
APART = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("onnx", "safetensors", "torch"):
            raise ModuleNotFoundError(f"{name} is not for the device", name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

_ERRORS: Mapping[int, type[EdgemlError]] = {2: UsageError, 3: InputError}


def run_apart(module: str, arguments: Sequence[str], show: bool = False) -> str:
    """Run `python -m module` without torch and return what it printed. With `show`, its progress goes to our standard error.

    Raises what its exit code means, with its last line.
    """
    command = [sys.executable, "-P", "-c", APART, module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=None if show else subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return done.stdout
    if done.returncode in (-2, 130):
        raise KeyboardInterrupt
    lines = [line for line in (done.stderr or "").splitlines() if line.strip()]
    said = lines[-1].removeprefix("edgeml: ") if lines else f"it ended with {done.returncode}"
    raise _ERRORS.get(done.returncode, DeviceError)(f"measuring the written bundle failed: {said}")


def evaluate(
    bundle: Path,
    view: View,
    limit: int | None,
    show: bool,
    experts_kept: float | None = None,
    memory: str = "100%",
    residency: str = "exact",
) -> dict[str, dict[str, Any]]:
    """`edgeml eval` on a split: per task domain, metric, n, chance, score; in [0, 1]."""
    arguments = ["eval", str(bundle), "--data", str(view.root), "--split", view.split, "--json"]
    arguments += ["--tasks", ",".join(f"{task.domain}/{task.name}" for task in view.tasks)]
    arguments += [] if limit is None else ["--limit", str(limit)]
    held = ["--memory", memory, "--residency", residency]
    arguments += held if experts_kept is None else ["--experts-kept", f"{experts_kept:.6f}"]
    arguments += [] if show else ["--quiet"]
    document = json.loads(run_apart("edgeml.cli", arguments, show))
    found: dict[str, dict[str, Any]] = document["tasks"]
    missing = [task.name for task in view.tasks if task.name not in found]
    if missing:
        raise DataError(f"the written bundle was not measured on task '{missing[0]}'")
    return found


def agreement(model: Model, bundle: Path, rows: Mapping[str, Sequence[Row]], folder: Path, tick: Tick) -> float:
    """Share of the torch module's choices (token, site, expert) that the bundle makes too, each running by itself."""
    reference, inputs, chosen = Reference(model), dict[str, Any](), dict[str, Any]()
    pairs = {task.name: task.pair for task in model.tasks}
    for task, some in rows.items():
        for number, batch in enumerate(reference.batches(some, pairs[task])):
            place = f"{number}.{task}"
            inputs |= {f"ids.{place}": batch.ids, f"types.{place}": batch.types, f"mask.{place}": batch.mask}
            chosen[place] = reference.choices(task, batch)
            tick(len(batch.rows))
    asked, answered = folder / INPUTS, folder / CHOICES
    np.savez(asked, allow_pickle=False, **inputs)
    run_apart("edgeml_export.trace", [str(bundle), str(asked), str(answered)])
    both = total = 0
    with np.load(answered) as found:
        for place, before in chosen.items():
            after = found[place]
            total += int(before.sum())
            both += int((np.take_along_axis(before, np.maximum(after, 0), -1) & (after >= 0)).sum())
    return both / max(total, 1)


def measured_sizes(model: Model, bundle: Path) -> dict[str, Any]:
    """Multiply-adds of one text of 64 tokens without its head, parameters, and bytes; reference: f32, all experts.

    The bundle's bytes are those before the manifest, which this evidence is a part of.
    """
    encoder, mixture = model.module.encoder.config, model.module.config
    around = 4 * encoder.hidden**2 + encoder.hidden * mixture.experts + 2 * MAC_TOKENS * encoder.hidden
    neurons = {"reference": mixture.intermediate, "bundle": mixture.shared + mixture.top_k * mixture.width}
    macs = {name: MAC_TOKENS * encoder.layers * (around + 2 * encoder.hidden * count) for name, count in neurons.items()}
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    kept = parameters - (encoder.positions - model.max_tokens) * encoder.hidden
    with Bundle.open(bundle) as opened:
        length = opened.header.manifest_offset
    return {
        "macs": {**macs, "tokens": MAC_TOKENS},
        "parameters": {"reference": parameters, "bundle": kept},
        "bytes": {"reference": 4 * parameters, "bundle": length},
    }
