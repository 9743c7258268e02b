"""`edgeml verify`: every checksum of a bundle."""

from __future__ import annotations

import json
import os
import sys

import click

from edgeml.bundle import Bundle
from edgeml.manifest import load_manifest
from edgeml.sizes import format_bytes


@click.command("verify")
@click.argument("bundle", type=click.Path())
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(bundle: str, quiet: bool, as_json: bool) -> None:
    """Check every byte of a bundle against its checksums.

    Example: edgeml verify model.edgeml
    """
    with Bundle.open(bundle) as opened:
        load_manifest(opened)
        length = opened.header.file_length
        hidden = quiet or as_json or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
        with click.progressbar(length=length, label="verifying", file=sys.stderr, hidden=hidden) as bar:
            done = 0
            for position in opened.verify():
                bar.update(position - done)
                done = position
        document = {"bundle_id": opened.id, "pages": len(opened.pages), "bytes": length, "intact": True}
    if as_json:
        click.echo(json.dumps(document))
    else:
        click.echo(f"{bundle}: intact, {document['pages']} pages, {format_bytes(length)}, id {opened.id[:16]}")
