"""`edgeml export`: a torch model becomes a bundle. Loads torch only when it is asked to work."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from edgeml.bundle_writer import interruptible
from edgeml.sizes import format_bytes

__all__ = ["command"]

TYPES = click.Choice(["int4", "int8", "f32"])


@click.command("export")
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(), help="The bundle to write.")
@click.option("--recipe", type=click.Path(), help="Passes, variants and limits, a TOML file (default: quantize, no limits).")
@click.option(
    "--data", type=click.Path(), help="DOMAIN/TASK/{train,validation,test}.jsonl.gz with a task.json; or SET/*.npz with an image.json."
)
@click.option("--experts", type=TYPES, help="How expert weights are stored, instead of the recipe's choice.")
@click.option("--dense", type=TYPES, help="How the other large weights are stored, instead of the recipe's choice.")
@click.option("--split-at", multiple=True, help="Of an ONNX file: a tensor where the backbone ends; may be repeated.")
@click.option("--work", type=click.Path(), help="A folder where pruning keeps its decisions: the same command goes on from there.")
@click.option("--device", help="Fit it to this device: a name of edgeml device list, a profile's .toml file, or host.")
@click.option("--max-latency", help="... so that a request is predicted to take no longer there, say 100ms.")
@click.option("--max-memory", help="... so that the process is predicted to need no more there, say 512MiB (default: what is usable).")
@click.option("--tokens", type=click.IntRange(1), help="... for a text of so many tokens (default: 64, or as many as the model reads).")
@click.option("--confident", is_flag=True, help="... the whole predicted range must keep to the limits, not its middle alone.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(
    source: str,
    output: str,
    recipe: str | None,
    data: str | None,
    experts: str | None,
    dense: str | None,
    split_at: tuple[str, ...],
    work: str | None,
    device: str | None,
    max_latency: str | None,
    max_memory: str | None,
    tokens: int | None,
    confident: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Turn a torch model into a bundle, measure the bundle, and refuse it when it breaks a limit of the recipe.

    SOURCE is file.py:function, where the function returns an edgeml_export.Model or an edgeml_export.vision.VisionModel; or an
    .onnx file of a CNN, whose recipe then describes its tasks.

    With --device, bits, residency or variant are picked: candidates are predicted under the device's profile, what loses least first, and
    the first that keeps to the limits (and to the recipe's) is written. When nothing fits, it says what would. The bits that a recipe
    names are not held then; --experts and --dense hold them.

    Example: edgeml export model.py:mixture -o model.edgeml --recipe recipe.toml --data data/text

    Example: edgeml export model.py:mixture -o pi.edgeml --data data/text --device raspberry-pi-4 --max-latency 100ms --max-memory 512MiB
    """
    from edgeml_export.fit import read_target
    from edgeml_export.fit_print import fit_lines
    from edgeml_export.fit_tried import NothingFits

    target = read_target(device, max_latency, max_memory, tokens, confident, quiet)
    from edgeml_export.pipeline import export  # torch, only after what can be wrong without it

    show = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    try:
        with interruptible():
            evidence = export(source, output, recipe, data, experts, dense, _bar if show else None, show, split_at, work, target)
    except NothingFits as refused:
        if as_json:
            click.echo(json.dumps({"bundle": None, "fit": refused.document}, allow_nan=False))
        else:
            click.echo("\n".join(fit_lines(refused.document)))
        raise
    if as_json:
        click.echo(json.dumps({"bundle": output, "evidence": evidence}, allow_nan=False))
        return
    for line in fit_lines(evidence["fit"]) if "fit" in evidence else []:
        click.echo(line)
    for line in _found(output, evidence):
        click.echo(line)
    if "fit" in evidence:
        click.echo(evidence["fit"]["said"])


def _found(output: str, evidence: dict[str, Any]) -> Iterator[str]:
    """Size, scores and variants of what was written, and what was left out."""
    size = evidence["bytes"]
    yield f"{output}: {format_bytes(size['bundle'])}, was {format_bytes(size['reference'])}"
    what = "images" if "variants" in evidence else "rows"
    if evidence.get("fit", {}).get("run", {}).get("residency") == "masked":
        yield "with nothing masked, on the test split:"
    for name, task in evidence.get("tasks", {}).items():
        difference = 100 * (task["score"] - task["reference_score"])
        yield f"  {name:<28} {task['metric']:<9} {100 * task['score']:5.1f} ({difference:+.1f}) on {task['n']} {what}"
    if "mean_score" in evidence:
        difference = 100 * (evidence["mean_score"] - evidence["mean_reference_score"])
        yield f"  {'mean':<28} {'':<9} {100 * evidence['mean_score']:5.1f} ({difference:+.1f})"
    for name, variant in evidence.get("variants", {}).items():
        yield f"  {name:<28} {_variant(variant)}"
    for left in evidence.get("dropped", []):
        yield f"  left out: {left['name']} ({left['reason']})"


def _variant(variant: dict[str, Any]) -> str:
    """Size, work, time and score of a variant, as far as they are known."""
    parts = [format_bytes(variant["bytes"]), f"{variant['macs'] / 1e6:.1f} M MACs", f"{1e3 * variant['latency_s']['p50']:.2f} ms"]
    if "mean_score" in variant:
        parts.append(f"mean {100 * variant['mean_score']:.1f}")
    return ", ".join(parts)


@contextmanager
def _bar(label: str, length: int) -> Iterator[Callable[[int], None]]:
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield bar.update
