"""`edgeml device predict`: how fast a bundle will be on a device, in how much memory, with the arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgeml.bundle import Bundle
from edgeml.commands._options import bundle_argument, json_option, quiet_option
from edgeml.manifest import load_manifest
from edgeml.variants import Wish
from edgeml_devices.commands.probe import measured
from edgeml_devices.fit import fit_bundle
from edgeml_devices.fit_print import print_fit
from edgeml_devices.library import find


@click.command("predict")
@bundle_argument
@click.option("--device", required=True, help="A name of edgeml device list, a file of edgeml device probe, or host.")
@click.option("--task", help="The task to predict (default: the bundle's first).")
@click.option("--memory", help="Memory for weights: 64MiB, 25%, auto (default: what the device can spare).")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of the text.")
@click.option("--threads", type=click.IntRange(1, 256), help="Threads to compute with (default: the device's cores).")
@click.option("--residency", default="exact", show_default=True, type=click.Choice(["exact", "masked"]), help="How experts are held.")
@click.option("--variant", help="The variant of this name, of a bundle with variants.")
@quiet_option
@json_option
def command(
    bundle: str,
    device: str,
    task: str | None,
    memory: str | None,
    tokens: int,
    threads: int | None,
    residency: str,
    variant: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Latency, peak memory and page traffic of a bundle on a device, each with its range, and every rate that was assumed.

    Example: edgeml device predict model.edgeml --device raspberry-pi-4 --tokens 64
    """
    with Bundle.open(bundle) as opened:
        manifest = load_manifest(opened)
        profile = find(device, lambda: measured(Path.cwd(), quiet))
        wish = Wish(variant=variant)
        found = fit_bundle(
            opened, manifest, profile, task=task, memory=memory, tokens=tokens, threads=threads, residency=residency, wish=wish
        )
    if as_json:
        click.echo(json.dumps({"bundle": Path(bundle).name, **found.as_json(profile)}, allow_nan=False))
    else:
        print_fit(found, profile, Path(bundle).name)
