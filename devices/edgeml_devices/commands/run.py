"""`edgeml device run`: `edgeml run` or `bench` in a child process under a device's limits, as far as this machine lets us set them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from edgeml.bundle import Bundle
from edgeml.commands._options import bundle_argument, json_option, notes, quiet_option
from edgeml.device import Profile
from edgeml.errors import DeviceError, EdgemlError, UsageError
from edgeml.manifest import load_manifest
from edgeml.measure import environment
from edgeml_devices.commands.probe import measured
from edgeml_devices.emulate import Emulation, Limits, emulated
from edgeml_devices.library import find

#: Figures whose ratio, this machine's to the device's, says how much slower its processor is; those of a sort count together.
_SCALED = ("kernels.int8_macs_per_s", "kernels.int4_macs_per_s", "graphs.matmul_macs_per_s", "graphs.values_per_s")


@click.command("run", context_settings={"ignore_unknown_options": True})
@bundle_argument
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--device", required=True, help="A name of edgeml device list, or a file of edgeml device probe.")
@click.option("--emulate", is_flag=True, help="Run here, under the device's limits.")
@click.option("--command", "verb", default="bench", show_default=True, type=click.Choice(["run", "bench"]), help="What is run.")
@click.option("--here", type=click.Path(), help="This machine's profile (edgeml device probe -o FILE), to scale by without measuring.")
@quiet_option
@json_option
def command(
    bundle: str, arguments: tuple[str, ...], device: str, emulate: bool, verb: str, here: str | None, quiet: bool, as_json: bool
) -> None:
    """Run a bundle in a child process with the device's memory, read rate and cores. The processor's speed is scaled, not emulated.

    What follows the bundle, or --, goes to edgeml bench (or run). Limits that cannot be set here are named, and left out.

    Example: edgeml device run model.edgeml --device raspberry-pi-4 --emulate -- --task banking77 --tokens 64
    """
    if not emulate:
        raise UsageError("say where: --emulate runs here under the device's limits")
    profile = find(device, lambda: measured(Path.cwd(), quiet))
    with Bundle.open(bundle) as opened:
        load_manifest(opened)
        os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what others have cached would not count for the child
    own = None
    if verb == "bench":
        own = find(here, lambda: measured(Path.cwd(), quiet)) if here is not None else measured(Path.cwd(), quiet)
    limits = _limits(profile, Path(bundle).absolute().parent)
    with emulated(limits) as emulation:
        notes([f"held: {line}" for line in emulation.held] + [f"not held: {line}" for line in emulation.not_held], quiet)
        notes(["the processor's speed is scaled, not emulated"], quiet)
        code, output = _run(verb, bundle, arguments, emulation, as_json or verb == "bench")
        peak = emulation.peak_memory_bytes()
    if verb == "run" and not as_json:
        click.echo(output, nl=False)
    if code:
        error = EdgemlError(f"edgeml {verb} ended with code {code} under these limits" + _killed(code, limits))
        error.exit_code = code if 0 < code < 128 else 4
        raise error
    document = _document(profile, own, emulation, peak, json.loads(output) if as_json or verb == "bench" else {})
    if as_json:
        click.echo(json.dumps(document, allow_nan=False))
    elif verb == "bench":
        _print(document)


def _limits(profile: Profile, folder: Path) -> Limits:
    rate = max((figure.value for key, figure in profile.figures.items() if key.startswith("storage.")), default=None)
    cores = profile.value("cpu.cores")
    usable = int(profile.need("memory.usable_bytes").value)
    room = int(environment()["memory_bytes"])
    return Limits(min(usable, room), None if rate is None else int(rate), None if cores is None else int(cores), folder)


def _run(verb: str, bundle: str, arguments: tuple[str, ...], emulation: Emulation, as_json: bool) -> tuple[int, str]:
    """Run the command in the groups; returns its code and what it printed. Its progress and its errors are the user's to see."""
    extra = ["--json"] if as_json and "--json" not in arguments else []
    line = [sys.executable, "-P", "-m", "edgeml.cli", verb, os.path.abspath(bundle), *arguments, *extra]
    paths = os.pathsep.join(dict.fromkeys([*_homes(), *filter(None, [os.environ.get("PYTHONPATH")])]))
    with tempfile.TemporaryFile() as out:
        try:
            child = subprocess.Popen(line, stdout=out, env=os.environ | {"PYTHONPATH": paths}, preexec_fn=emulation.join)
        except (OSError, subprocess.SubprocessError) as error:
            raise DeviceError(f"the child cannot enter its limits ({error})") from None
        try:
            code = child.wait()
        finally:
            child.kill()
            child.wait()
        out.seek(0)
        return code, out.read().decode("utf-8", "replace")


def _homes() -> list[str]:
    import edgeml

    return [str(Path(edgeml.__file__).parents[1])]


def _killed(code: int, limits: Limits) -> str:
    if code not in (-9, 137) or limits.memory_bytes is None:
        return ""
    return ": it was killed, most likely because it needed more memory than the device has; give --memory, or see edgeml device predict"


def _document(profile: Profile, own: Profile | None, emulation: Emulation, peak: int | None, said: dict[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = {
        "device": profile.name,
        "held": emulation.held,
        "not_held": emulation.not_held,
        "group_peak_bytes": peak,
        "scale": None if own is None else scale(own, profile),
        "measured": said,
        "scaled": None,
    }
    if own is not None:
        document["scaled"] = [_scaled(record, document["scale"]) for record in said.get("records", [])]
    return document


def scale(own: Profile, device: Profile) -> dict[str, float] | None:
    """How many times slower the device computes than this machine: the geometric mean over `_SCALED`, and its range."""
    pairs = [(own.figures[key], device.figures[key]) for key in _SCALED if key in own.figures and key in device.figures]
    if not pairs:
        return None

    def mean(ratios: list[float]) -> float:
        product = 1.0
        for ratio in ratios:
            product *= ratio
        return float(product ** (1 / len(ratios)))

    return {
        "value": mean([a.value / b.value for a, b in pairs]),
        "low": mean([a.range[0] / b.range[1] for a, b in pairs]),
        "high": mean([a.range[1] / b.range[0] for a, b in pairs]),
    }


def _scaled(record: dict[str, Any], by: dict[str, float] | None) -> dict[str, Any] | None:
    """The latency with its computing scaled, and its waits for pages as measured."""
    total = record["latency_s"]["p50"]
    if by is None or total is None:
        return None
    wait = min((record.get("page_wait_s") or 0.0) / max(record["rounds"], 1), total)
    return {end: wait + (total - wait) * by[end] for end in ("value", "low", "high")} | {"n": None}


def _print(document: dict[str, Any]) -> None:
    records = document["measured"]["records"]
    click.echo(f"{records[0]['bundle']} under the limits of {document['device']}; processor scaled by {_by(document['scale'])}")
    click.echo("  memory   threads   measured p50   scaled p50 (range)")
    for record, scaled in zip(records, document["scaled"], strict=True):
        p50 = record["latency_s"]["p50"]
        there = "-" if scaled is None else f"{scaled['value'] * 1e3:.3g} ms ({scaled['low'] * 1e3:.3g} to {scaled['high'] * 1e3:.3g})"
        click.echo(f"  {record['memory']:>6} {record['threads']:>9}   {p50 * 1e3:9.3g} ms   {there}")
    if document["group_peak_bytes"] is not None:
        click.echo(f"  most memory the group held, cached file pages included: {document['group_peak_bytes'] / (1 << 20):.0f} MiB")


def _by(scale: dict[str, float] | None) -> str:
    return "nothing (its rates are unknown)" if scale is None else f"{scale['value']:.3g} ({scale['low']:.3g} to {scale['high']:.3g})"
