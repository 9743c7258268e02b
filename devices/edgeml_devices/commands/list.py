"""`edgeml device list`: the devices that are known, and what is known of them."""

from __future__ import annotations

import json

import click

from edgeml.commands._options import json_option
from edgeml.device import FIGURES, Profile
from edgeml.sizes import format_bytes
from edgeml_devices.library import HOST, find, profiles


@click.command("list")
@click.argument("device", required=False)
@json_option
def command(device: str | None, as_json: bool) -> None:
    """The devices that are known; of one of them, every figure with its range and source.

    Example: edgeml device list raspberry-pi-4
    """
    known = list(profiles().values()) if device is None or device == HOST else [find(device, _none)]
    if as_json:
        click.echo(json.dumps({"devices": [profile.as_json() for profile in known]}, allow_nan=False))
    elif device is None or device == HOST:
        click.echo(f"{'device':<24} {'usable':>9} {'cores':>5}  {'read 1 MiB':>11}  measured, assumed; names")
        for profile in known:
            click.echo(_line(profile))
        click.echo(f"{HOST:<24} {'':>9} {'':>5}  {'':>11}  this machine, measured when it is asked for (edgeml device probe)")
    else:
        _details(known[0])


def _none() -> Profile:
    raise AssertionError("the host is not looked up")


def _line(profile: Profile) -> str:
    assumed = sum(figure.assumed for figure in profile.figures.values())
    usable, read = profile.value("memory.usable_bytes"), profile.value("storage.1m_qd1_bytes_per_s")
    cells = "-" if usable is None else format_bytes(int(usable)), f"{profile.value('cpu.cores') or 0:.0f}"
    rate = "-" if read is None else f"{read / 1e6:.0f} MB/s"
    names = f"{profile.title}" + (f" ({', '.join(profile.aliases)})" if profile.aliases else "")
    return f"{profile.name:<24} {cells[0]:>9} {cells[1]:>5}  {rate:>11}  {len(profile.figures) - assumed}, {assumed}; {names}"


def _details(profile: Profile) -> None:
    click.echo(f"{profile.name}: {profile.title}, {profile.architecture}, kernels {profile.kernel_set or 'unknown'}")
    click.echo(f"energy: {profile.energy_sensor or 'no sensor'}")
    for key, (_, _, meaning) in FIGURES.items():
        figure = profile.figures.get(key)
        if figure is None:
            click.echo(f"  {key}: unknown ({meaning})")
            continue
        low, high = figure.range
        spread = f" ({low:.4g} to {high:.4g})" if low < high else ""
        click.echo(f"  {key} = {figure.value:.4g}{spread}: {meaning}; {figure.source}")
    for note in profile.notes:
        click.echo(f"note: {note}")
