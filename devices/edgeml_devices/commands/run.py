"""`edgeml device run`: `edgeml run` or `bench` in a child process under a device's limits, as far as this machine lets us set them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from edgeml.bundle import Bundle
from edgeml.commands._options import bundle_argument, json_option, notes, quiet_option, records_option
from edgeml.device import Profile
from edgeml.errors import DeviceError, UsageError
from edgeml.manifest import load_manifest
from edgeml.measure import environment
from edgeml.records import append
from edgeml_devices.commands.probe import measured
from edgeml_devices.delivery import unpack
from edgeml_devices.emulate import Emulation, Limits, emulated
from edgeml_devices.expected import expected
from edgeml_devices.library import HOST, find

#: Figures whose ratio, this machine's to the device's, says how much slower its processor is; those of a sort count together.
_SCALED = ("kernels.int8_macs_per_s", "kernels.int4_macs_per_s", "graphs.matmul_macs_per_s", "graphs.values_per_s")
_ON_IMAGES = ("graphs.conv_macs_per_s", "graphs.conv_int8_macs_per_s")


@click.command("run", context_settings={"ignore_unknown_options": True})
@bundle_argument
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--device", required=True, help="A name of edgeml device list, or a file of edgeml device probe.")
@click.option("--emulate", is_flag=True, help="Run here, under the device's limits.")
@click.option("--command", "verb", default="bench", show_default=True, type=click.Choice(["run", "bench"]), help="What is run.")
@click.option("--here", type=click.Path(), help="This machine's profile (edgeml device probe -o FILE), to scale by without measuring.")
@records_option
@quiet_option
@json_option
def command(
    bundle: str,
    arguments: tuple[str, ...],
    device: str,
    emulate: bool,
    verb: str,
    here: str | None,
    records_file: Path | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run a bundle in a child process with the device's memory, read rate and cores. The processor's speed is scaled, not emulated.

    What follows the bundle, or --, goes to edgeml bench (or run). Limits that cannot be set here are named, and left out.

    Example: edgeml device run model.edgeml --device raspberry-pi-4 --emulate -- --task banking77 --tokens 64
    """
    if not emulate:
        raise UsageError("say where: --emulate runs here under the device's limits")
    if records_file is not None and verb != "bench":
        raise UsageError("edgeml run writes no records; leave --records out, or --command")
    unpack(verb, [bundle, *arguments], False)  # what is wrong with the question is told before anything is measured
    profile = find(device, lambda: measured(Path.cwd(), quiet))
    with Bundle.open(bundle) as opened:
        load_manifest(opened)
        os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what others have cached would not count for the child
    own = find(here or HOST, lambda: measured(Path.cwd(), quiet)) if verb == "bench" else None
    limits = _limits(profile, Path(bundle).absolute().parent)
    with emulated(limits) as emulation:
        notes([f"held: {line}" for line in emulation.held] + [f"not held: {line}" for line in emulation.not_held], quiet)
        notes(["the processor's speed is scaled, not emulated"], quiet)
        code, output = _run(verb, bundle, arguments, emulation, as_json or verb == "bench", quiet)
        peak = emulation.peak_memory_bytes()
    if verb == "run" and not as_json:
        click.echo(output, nl=False)
    if code:
        return _ended(verb, code, limits)
    document = _document(bundle, profile, own, emulation, peak, json.loads(output) if as_json or verb == "bench" else {})
    if records_file is not None:
        for record in _records(document):
            append(records_file, record)
    if as_json:
        click.echo(json.dumps(document, allow_nan=False))
    elif verb == "bench":
        _print(document)
    return 0


def _limits(profile: Profile, folder: Path) -> Limits:
    rate = max((figure.value for key, figure in profile.figures.items() if key.startswith("storage.")), default=None)
    cores = profile.value("cpu.cores")
    usable = int(profile.need("memory.usable_bytes").value)
    room = int(environment()["memory_bytes"])
    return Limits(min(usable, room), None if rate is None else int(rate), None if cores is None else int(cores), folder)


def _run(verb: str, bundle: str, arguments: tuple[str, ...], emulation: Emulation, as_json: bool, quiet: bool) -> tuple[int, str]:
    """Run the command in the groups; returns its code and what it printed. Its progress and its errors are the user's to see."""
    extra = [option for option, wanted in (("--json", as_json), ("--quiet", quiet)) if wanted and option not in arguments]
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


def _ended(verb: str, code: int, limits: Limits) -> int:
    """The exit code of a command that has told why it ended; raises `DeviceError` for one that was killed."""
    if 0 < code < 128:
        return code
    why = ": most likely it needed more memory than the device has; give --memory, or see edgeml device predict"
    why = why if code in (-9, 137) and limits.memory_bytes is not None else ""
    raise DeviceError(f"edgeml {verb} was killed by signal {-code if code < 0 else code - 128} under these limits{why}")


def _document(
    bundle: str, profile: Profile, own: Profile | None, emulation: Emulation, peak: int | None, said: dict[str, Any]
) -> dict[str, Any]:
    records = said.get("records", [])
    on_images = any("image" in record["workload"]["kind"] for record in records)
    by = None if own is None else scale(own, profile, _ON_IMAGES if on_images else _SCALED)
    document: dict[str, Any] = {
        "device": profile.name,
        "held": emulation.held,
        "not_held": emulation.not_held,
        "group_peak_bytes": peak,
        "scale": None if by is None else by | {"n": None},
        "measured": said,
        "scaled": None,
        "predicted": None,
    }
    if own is not None:
        document["scaled"] = [_scaled(record, by) for record in records]
        with Bundle.open(bundle) as opened:
            document["predicted"] = [expected(opened, profile, record) for record in records]
    return document


def _records(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of kind device: what was measured here under the limits, with them, the scaled latency and the prediction."""
    run = {"profile": document["device"], "emulated": True}
    run |= {key: document[key] for key in ("held", "not_held", "group_peak_bytes", "scale")}
    return [
        record | {"kind": "device", "device_run": run | {"scaled_latency_s": scaled, "predicted": predicted}}
        for record, scaled, predicted in zip(document["measured"]["records"], document["scaled"], document["predicted"], strict=True)
    ]


def scale(own: Profile, device: Profile, keys: Sequence[str] = _SCALED) -> dict[str, float] | None:
    """How many times slower the device computes than this machine: the geometric mean over `keys`, and its range."""
    pairs = [(own.figures[key], device.figures[key]) for key in keys if key in own.figures and key in device.figures]
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
    click.echo(f"  memory   threads   measured p50   {'scaled p50 (range)':<28} predicted (range)")
    for record, scaled, predicted in zip(records, document["scaled"], document["predicted"], strict=True):
        p50 = record["latency_s"]["p50"]
        there = f"{_ms(scaled):<28} " + (f"({predicted['why']})" if predicted["why"] else _ms(predicted["latency_s"]))
        click.echo(f"  {record['memory'] or '-':>6} {record['threads']:>9}   {p50 * 1e3:9.3g} ms   {there}")
    if document["group_peak_bytes"] is not None:
        click.echo(f"  most memory the group held, cached file pages included: {document['group_peak_bytes'] / (1 << 20):.0f} MiB")


def _ms(found: dict[str, Any] | None) -> str:
    return "-" if found is None else f"{found['value'] * 1e3:.3g} ms ({found['low'] * 1e3:.3g} to {found['high'] * 1e3:.3g})"


def _by(scale: dict[str, float] | None) -> str:
    return "nothing (its rates are unknown)" if scale is None else f"{scale['value']:.3g} ({scale['low']:.3g} to {scale['high']:.3g})"
