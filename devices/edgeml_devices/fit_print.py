"""A prediction in words: the figures, the sum they come from, and what was assumed."""

from __future__ import annotations

from typing import Any

import click

from edgeml.commands._options import printable
from edgeml.device import Profile
from edgeml.predict import Interval
from edgeml.sizes import format_bytes
from edgeml_devices.fit import Fit

__all__ = ["print_fit", "print_folder"]


def print_fit(fit: Fit, profile: Profile, name: str) -> None:
    """The prediction of a bundle, with its arithmetic."""
    found = fit.prediction
    what = f"{fit.tokens} tokens" if fit.tokens is not None else "one image"
    threads = "1 thread" if fit.threads == 1 else f"{fit.threads} threads"
    click.echo(f"{name} on {printable(profile.title)}: task {fit.task}, {what}, {threads}, residency {fit.residency}, predicted")
    click.echo(f"  latency      {_interval(found.latency_s, 1e3, 'ms')}")
    usable = format_bytes(int(profile.need("memory.usable_bytes").value))
    click.echo(f"  peak memory  {_interval(found.peak_memory_bytes, 1 / (1 << 20), 'MiB')} of {usable} usable")
    click.echo(f"  pages read   {_interval(found.page_in_bytes, 1 / (1 << 20), 'MiB')} a request")
    click.echo(f"  fits         {'yes' if fit.fits else 'no'}: {fit.advice}")
    click.echo("time, the sum of:")
    for term in found.terms:
        click.echo(f"  {term.seconds * 1e3:9.3f} ms  {term.name}: {printable(term.said)}")
    click.echo("memory, the sum of:")
    for part, count in found.memory_terms.items():
        click.echo(f"  {format_bytes(int(count)):>12}  {part}")
    for note in found.notes:
        click.echo(f"note: {printable(note)}")
    if found.assumed:
        click.echo(f"assumed, not measured ({len(found.assumed)} figures; edgeml device probe on the device measures them):")
        for key, figure in found.assumed.items():
            low, high = figure.range
            click.echo(f"  {key} = {figure.value:.3g} ({low:.3g} to {high:.3g}): {printable(figure.source).removeprefix('assumed: ')}")
    else:
        click.echo("every figure that went in was measured")


def print_folder(document: dict[str, Any], name: str, title: str) -> None:
    """What a model's folder would take."""
    routed = document["routed_parameters"]
    experts = f", {routed / 1e6:.4g} million of them in experts" if routed else ""
    click.echo(f"{name}: {document['parameters'] / 1e6:.4g} million weights{experts}, {format_bytes(document['bytes'])} as stored")
    click.echo(f"on {printable(title)}, which can spare {format_bytes(document['spare_bytes'])} for weights:")
    for row in document["widths"]:
        where = "fits" if row["fits_memory"] else "does not fit in memory"
        disk = "" if row["fits_disk"] is not False else ", nor on this disk"
        least = f"at least {row['least_s_per_token'] * 1e3:.3g} ms a token to read its active weights from memory"
        click.echo(f"  {row['weights']:<8} {format_bytes(row['bytes']):>9}  {where}{disk}; {least}")
    click.echo(document["advice"])


def _interval(found: Interval, scale: float, unit: str) -> str:
    return f"{found.value * scale:.3g} {unit} ({found.low * scale:.3g} to {found.high * scale:.3g})"
