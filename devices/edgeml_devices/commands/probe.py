"""`edgeml device probe`: measure this machine and write its profile."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgeml.bundle_writer import write_file
from edgeml.commands._options import json_option, notes, progress, quiet_option
from edgeml.device import NAME, Profile, write_profile
from edgeml.errors import UsageError
from edgeml_devices.hardware import STEPS, measure_profile

__all__ = ["command", "measured"]


@click.command("probe")
@click.option("-o", "--output", type=click.Path(), help="Write the profile to this TOML file (default: standard output).")
@click.option("--name", default="host", show_default=True, help="What the profile is called.")
@click.option("--folder", type=click.Path(path_type=Path), help="The disk to measure: 64 MiB are written for a while (default: here).")
@quiet_option
@json_option
def command(output: str | None, name: str, folder: Path | None, quiet: bool, as_json: bool) -> None:
    """Measure kernels, graphs, memory, reading and processes of this machine, in under a minute.

    Example: edgeml device probe -o board.toml
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"a device's name has lower-case letters, digits and hyphens, not {name!r:.60}")
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise UsageError(f"{output}: there is no such folder to write into; make it first")
    profile = measured(folder or Path.cwd(), quiet, name)
    if output is not None:
        write_file(Path(output), [write_profile(profile)])
        notes([f"the profile is in {output}"], quiet)
    if as_json:
        click.echo(json.dumps(profile.as_json(), allow_nan=False))
    elif output is None:
        click.echo(write_profile(profile).decode(), nl=False)


def measured(folder: Path, quiet: bool, name: str = "host") -> Profile:
    """This machine's profile, with a bar on a terminal."""
    with progress(len(STEPS), "measuring this machine", quiet) as step:
        return measure_profile(folder, name, lambda _: step(1))
