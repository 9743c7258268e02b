"""`edgeml verify`: every checksum of a bundle, and whether its graphs load."""

from __future__ import annotations

import json

import click

from edgeml.bundle import Bundle
from edgeml.commands._options import bundle_argument, json_option, progress, quiet_option
from edgeml.graph import check_stages
from edgeml.manifest import load_manifest
from edgeml.sizes import format_bytes


@click.command("verify")
@bundle_argument
@quiet_option
@json_option
def command(bundle: str, quiet: bool, as_json: bool) -> None:
    """Check every byte of a bundle against its checksums, then that every graph loads.

    Example: edgeml verify model.edgeml
    """
    with Bundle.open(bundle) as opened:
        manifest = load_manifest(opened)
        length = opened.header.file_length
        with progress(length, "verifying", quiet) as step:
            done = 0
            for position in opened.verify():
                step(position - done)
                done = position
        with progress(len(manifest.stages), "loading graphs", quiet) as step:
            for _ in check_stages(opened, manifest):
                step(1)
        document = {"bundle_id": opened.id, "pages": len(opened.pages), "bytes": length, "stages": len(manifest.stages), "intact": True}
    if as_json:
        click.echo(json.dumps(document))
        return
    counts = f"{document['pages']} pages, {document['stages']} graphs, {format_bytes(length)}"
    click.echo(f"{bundle}: intact, {counts}, id {opened.id[:16]}")
