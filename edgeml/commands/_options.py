"""What several commands share: their options, progress on a terminal, and text that is safe to print."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

__all__ = ["bundle_argument", "json_option", "notes", "printable", "progress", "quiet_option"]

bundle_argument = click.argument("bundle", type=click.Path())
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress bar and no notes.")


@contextmanager
def progress(length: int, label: str, hidden: bool) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, on a terminal only, without colours; yields a function that takes how much more is done."""
    if hidden or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda _: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield bar.update


def notes(sentences: Sequence[str], quiet: bool = False) -> None:
    """Notes of a session, on standard error."""
    for sentence in () if quiet else sentences:
        click.echo(f"note: {sentence}", err=True)


def printable(text: str) -> str:
    """A text from a file, for a terminal: one line, and nothing that moves the cursor or changes colours."""
    return "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))
