"""`edgeml doctor`: checks this machine, and says before any work whether a model fits, how fast it should be, and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from edgeml.bundle import Bundle
from edgeml.commands._options import json_option, printable, progress, quiet_option
from edgeml.device import Profile, read_profile
from edgeml.errors import BundleError
from edgeml.manifest import load_manifest
from edgeml.sizes import format_bytes
from edgeml_devices.fit import fit_bundle, fit_folder, read_folder
from edgeml_devices.fit_print import print_fit, print_folder
from edgeml_devices.hardware import STEPS, describe, measure_profile, read_rates

QUICK_S = 0.15  # of reading for each block size and depth, where only the machine is looked at


@click.command("doctor")
@click.argument("model", type=click.Path(), required=False)
@click.option("--task", help="The task to predict (default: the bundle's first).")
@click.option("--memory", help="Memory for weights: 64MiB, 25%, auto (default: what this machine can spare).")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of the text that is predicted.")
@click.option("--threads", type=click.IntRange(1, 256), help="Threads to compute with (default: all processors).")
@click.option("--residency", default="exact", show_default=True, type=click.Choice(["exact", "masked"]), help="How experts are held.")
@click.option("--profile", "profile_file", type=click.Path(), help="Use this profile (edgeml device probe -o FILE) instead of measuring.")
@click.option("--folder", type=click.Path(), help="Where models are to lie; its disk is measured (default: the model's, or this folder).")
@quiet_option
@json_option
def command(
    model: str | None,
    task: str | None,
    memory: str | None,
    tokens: int,
    threads: int | None,
    residency: str,
    profile_file: str | None,
    folder: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check this machine; given a bundle, or a folder of safetensors, say whether it fits and how fast it should be.

    Measuring writes 64 MiB into the folder, for some seconds, and takes under a minute.

    Example: edgeml doctor model.edgeml --memory 25%
    """
    target = None if model is None else Path(model)
    if target is not None and not target.exists():
        raise BundleError(f"{target}: no such file or folder; check the path")
    is_folder = target is not None and (target.is_dir() or target.suffix == ".safetensors")
    counted = read_folder(target) if target is not None and is_folder else None
    opened = Bundle.open(target) if target is not None and not is_folder else None
    try:
        manifest = None if opened is None else load_manifest(opened)
        place = Path(folder) if folder is not None else _place(target)
        machine = describe(place)
        document: dict[str, Any] = {"machine": machine, "checks": checks(machine)}
        if target is None:
            rates = read_rates(place, QUICK_S)
            document["read_bytes_per_s"] = {f"{block}_qd{depth}": sorted(values)[1] for (block, depth), values in rates.items()} or None
            _report(document, None, as_json)
            return
        profile = read_profile(profile_file) if profile_file is not None else _measured(place, quiet)
        if counted is not None:
            document["model"] = fit_folder(counted, profile, machine["disk_free_bytes"])
            _report(document, lambda: print_folder(document["model"], target.name or str(target), profile.title), as_json)
        elif opened is not None and manifest is not None:
            options: dict[str, Any] = {"task": task, "memory": memory, "tokens": tokens, "threads": threads, "residency": residency}
            found = fit_bundle(opened, manifest, profile, **options)
            document["model"] = found.as_json(profile)
            _report(document, lambda: print_fit(found, profile, target.name), as_json)
    finally:
        if opened is not None:
            opened.close()


def checks(machine: dict[str, Any]) -> list[dict[str, Any]]:
    """What is good and what is not about a machine, a sentence each; `good` is null where it cannot be told."""
    hot, found = machine["throttling"], []

    def say(name: str, good: bool | None, sentence: str) -> None:
        found.append({"name": name, "good": good, "said": sentence})

    kernels = machine["kernels"]
    slow = {"numpy": "NumPy in the place of the C extension: slow, though right; install the wheel for this kind of machine"}
    only = slow.get(kernels[-1], "plain C only: slow, though right")
    say("kernels", len(kernels) > 1, f"{kernels[-1]}, of {', '.join(kernels)}" if len(kernels) > 1 else only)
    runtime = machine["onnxruntime"]
    say("onnxruntime", runtime is not None, f"version {runtime}" if runtime else "is not installed: no graph can run")
    say("checksums", machine["checksum"] not in ("table", "numpy"), f"by {machine['checksum']}")
    spare = machine["available_bytes"]
    say(
        "memory",
        spare > 256 << 20,
        f"{format_bytes(spare)} free of {format_bytes(machine['memory_bytes'])}, limits included",
    )
    say("disk", machine["disk_free_bytes"] > 64 << 20, f"{format_bytes(machine['disk_free_bytes'])} free")
    direct = machine["direct_reads"]
    say(
        "direct reads",
        direct,
        "pages come in past the cache" if direct else "not on this file system: pages also fill the cache",
    )
    busy = machine["load_average"] / machine["processors"]
    say(
        "load",
        busy < 0.5,
        f"{machine['load_average']:.1f} for {machine['processors']} processors" + ("" if busy < 0.5 else ": figures will be low"),
    )
    celsius, events = hot["celsius"], hot["throttle_events"]
    cool = None if celsius is None and events is None else (celsius or 0) < 80 and not events
    heat = "no temperature is told" if celsius is None else f"{celsius:.0f} degrees C"
    say("throttling", cool, heat + (f", slowed down {events} times since boot" if events else ""))
    governor = hot["governor"]
    say("governor", None if governor is None else governor != "powersave", governor or "the clock is not the system's to tell")
    say("energy", None if machine["energy_sensor"] is None else True, machine["energy_sensor"] or "no sensor: energy stays unmeasured")
    return found


def _place(target: Path | None) -> Path:
    if target is None:
        return Path.cwd()
    place = target if target.is_dir() else target.absolute().parent
    return place if os.access(place, os.W_OK) else Path.cwd()


def _measured(place: Path, quiet: bool) -> Profile:
    with progress(len(STEPS), "measuring this machine", quiet) as step:
        return measure_profile(place, tick=lambda _: step(1))


def _report(document: dict[str, Any], rest: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(document, allow_nan=False))
        return
    machine = document["machine"]
    name = printable(machine["board"] or machine["cpu"] or machine["architecture"])
    click.echo(f"{name}, Linux {machine['kernel']}, Python {machine['python']}")
    for check in document["checks"]:
        mark = {True: "good", False: "poor", None: "-"}[check["good"]]
        click.echo(f"  {mark:<5}{check['name']}: {printable(check['said'])}")
    rates = document.get("read_bytes_per_s")
    if rates:
        blocks = {"4k": "4 KiB", "64k": "64 KiB", "1m": "1 MiB"}
        said = ", ".join(f"{said} {rates[f'{block}_qd2'] / 1e6:.3g} MB/s" for block, said in blocks.items())
        click.echo(f"  reading at random, two at a time: {said}")
    if rest is not None:
        click.echo("")
        rest()
