"""What several commands share: their options, progress on a terminal, and text that is safe to print."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = [
    "Number",
    "bundle_argument",
    "json_option",
    "notes",
    "printable",
    "progress",
    "quiet_option",
    "records_option",
    "variant_options",
]

bundle_argument = click.argument("bundle", type=click.Path())
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress bar and no notes.")


class Number(click.FloatRange):
    """A finite number, in a range where one is given; for click, nan is in all of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        return found if math.isfinite(found) else self.fail(f"{value} is no finite number.", param, ctx)


def _records_file(_: click.Context, __: click.Parameter, given: Path | None) -> Path | None:
    from edgeml.records import checked_path

    return None if given is None else checked_path(given)


records_option = click.option(
    "--records",
    "records_file",
    type=click.Path(path_type=Path),
    callback=_records_file,
    help="Append what was measured to this file, one JSON line a record.",
)


Function = TypeVar("Function", bound=Callable[..., Any])


def variant_options(command: Function) -> Function:
    """The options that pick a variant; the command takes them as `variant`, `max_latency`, `max_bytes` and `min_score`."""
    for option in (
        click.option("--min-score", type=float, help="... whose mean score is at least this, from 0 to 1; alone: the cheapest."),
        click.option("--max-bytes", help="... whose graphs take no more than this, say 500KiB."),
        click.option("--max-latency", help="The best variant that was recorded at no more than this, say 20ms."),
        click.option("--variant", help="The variant of this name, of a bundle with variants."),
    ):
        command = option(command)
    return command


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
