"""`edgeml export`: a torch model becomes a bundle. Loads torch only when it is asked to work."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from edgeml.sizes import format_bytes

__all__ = ["command"]

TYPES = click.Choice(["int4", "int8", "f32"])


@click.command("export")
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(), help="The bundle to write.")
@click.option("--recipe", type=click.Path(), help="Passes and limits, a TOML file (default: quantize and record usage, no limits).")
@click.option("--data", type=click.Path(), help="DOMAIN/TASK/{train,validation,test}.jsonl.gz with a task.json.")
@click.option("--experts", type=TYPES, help="How expert weights are stored, instead of the recipe's choice.")
@click.option("--dense", type=TYPES, help="How the other large weights are stored, instead of the recipe's choice.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(
    source: str, output: str, recipe: str | None, data: str | None, experts: str | None, dense: str | None, quiet: bool, as_json: bool
) -> None:
    """Turn a torch model into a bundle, measure the bundle, and refuse it when it breaks a limit of the recipe.

    SOURCE is file.py:function, where the function returns an edgeml_export.Model.

    Example: edgeml export model.py:mixture -o model.edgeml --recipe recipe.toml --data data/text
    """
    from edgeml_export.pipeline import export

    show = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    with _interruptible():
        evidence = export(source, output, recipe, data, experts, dense, _bar if show else None, show)
    if as_json:
        click.echo(json.dumps({"bundle": output, "evidence": evidence}, allow_nan=False))
        return
    size = evidence["bytes"]
    click.echo(f"{output}: {format_bytes(size['bundle'])}, was {format_bytes(size['reference'])}")
    for name, task in evidence.get("tasks", {}).items():
        difference = 100 * (task["score"] - task["reference_score"])
        click.echo(f"  {name:<28} {task['metric']:<9} {100 * task['score']:5.1f} ({difference:+.1f}) on {task['n']} rows")
    if "mean_score" in evidence:
        difference = 100 * (evidence["mean_score"] - evidence["mean_reference_score"])
        click.echo(f"  {'mean':<28} {'':<9} {100 * evidence['mean_score']:5.1f} ({difference:+.1f})")


@contextmanager
def _bar(label: str, length: int) -> Iterator[Callable[[int], None]]:
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield bar.update


@contextmanager
def _interruptible() -> Iterator[None]:
    """A polite kill is an interruption: what is half done is taken away first."""

    def interrupt(_number: int, _frame: FrameType | None) -> Any:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
