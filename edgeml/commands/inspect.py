"""`edgeml inspect`: what is inside a bundle."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from edgeml.bundle import Bundle
from edgeml.commands._options import printable
from edgeml.layout import PageKind
from edgeml.manifest import ImagePreprocess, Manifest, Task, Variant, load_manifest
from edgeml.sizes import format_bytes


def describe(bundle: Bundle, manifest: Manifest) -> dict[str, Any]:
    """The document that `--json` prints (architecture: what --json promises)."""
    kinds: dict[str, int] = {}
    for page in bundle.pages:
        name = PageKind(page.kind).name.lower()
        kinds[name] = kinds.get(name, 0) + page.length
    routed = {ref.page for site in manifest.sites for ref in site.experts}
    return {
        "format": 1,
        "bundle_id": bundle.id,
        "producer": dict(manifest.producer),
        "model": dict(manifest.model),
        "tasks": [
            {
                "name": task.name,
                "domain": task.domain,
                "kind": task.kind,
                "pair": task.pair,
                "labels": len(task.labels),
                "metric": task.metric,
                "chance": task.chance,
                "void": task.void,
                "input": _input(task),
            }
            for task in manifest.tasks
        ],
        "stages": [
            {"name": s.name, "bytes": bundle.pages[s.page].length, "inputs": list(s.inputs), "outputs": list(s.outputs)}
            for s in manifest.stages
        ],
        "experts": {
            "sites": len(manifest.sites),
            "routed": sum(len(site.experts) for site in manifest.sites),
            "shared": sum(len(site.shared) for site in manifest.sites),
            "top_k": [site.top_k for site in manifest.sites],
            "bytes": sum(bundle.pages[page].length for page in routed),
        },
        "bytes": kinds,
        "variants": [_variant(variant) for variant in manifest.variants],
        "router": None if manifest.router is None else asdict(manifest.router),
        "evidence": dict(manifest.evidence),
        "provenance": dict(manifest.provenance),
    }


def _input(task: Task) -> dict[str, Any]:
    given = task.preprocess
    if isinstance(given, ImagePreprocess):
        return {"kind": "image", "height": given.height, "width": given.width, "channels": given.channels}
    return {"kind": "text", "max_tokens": given.max_tokens}


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "name": variant.name,
        "bytes": variant.bytes,
        "macs": variant.macs,
        "parameters": variant.parameters,
        "bound": variant.bound,
        "quantized": variant.quantized,
        "latency_s": None if variant.latency_s is None else {"p50": variant.latency_s, "cpu": variant.latency_cpu},
        "score": variant.score,
        "scores": dict(variant.scores),
    }


@click.command("inspect")
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(bundle: str, as_json: bool) -> None:
    """What is inside a bundle: stages, sites, tasks, bytes, evidence.

    Example: edgeml inspect model.edgeml
    """
    with Bundle.open(bundle) as opened:
        document = describe(opened, load_manifest(opened))
    if as_json:
        click.echo(json.dumps(document, allow_nan=False))
        return
    experts = document["experts"]
    click.echo(f"{bundle}: {format_bytes(sum(document['bytes'].values()))} in {len(opened.pages)} pages, id {document['bundle_id'][:16]}")
    for kind, count in sorted(document["bytes"].items(), key=lambda item: -item[1]):
        click.echo(f"  {kind:<10} {format_bytes(count):>10}")
    if experts["sites"]:
        per_token = "/".join(str(k) for k in sorted(set(experts["top_k"])))
        counts = f"{experts['routed']} routed at {experts['sites']} sites, {experts['shared']} shared"
        click.echo(f"experts: {counts}, {per_token} per token, {format_bytes(experts['bytes'])}")
    click.echo("stages: " + (", ".join(stage["name"] for stage in document["stages"]) or "none"))
    if document["router"] is not None:
        groups = document["router"]["groups"]
        click.echo(f"router: a request may name no task; {len(groups)} groups: {', '.join(group['name'] for group in groups)}")
    fit = document["evidence"].get("fit")
    if isinstance(fit, dict):
        click.echo(f"fitted to {printable(str(fit.get('said')))}")
    for task in document["tasks"]:
        what = "pairs" if task["pair"] else "texts"
        if task["input"]["kind"] == "image":
            what = f"images of {task['input']['width']} x {task['input']['height']} x {task['input']['channels']}"
        score = document["evidence"].get("tasks", {}).get(task["name"], {}).get("score")
        measured = "" if score is None else f", {task['metric']} {score:.3f}"
        click.echo(f"task {task['name']} ({task['domain']}): {task['kind']} of {what}, {task['labels']} labels{measured}")
    for variant in document["variants"]:
        click.echo(_variant_line(variant))


def _variant_line(variant: dict[str, Any]) -> str:
    score = "score unmeasured" if variant["score"] is None else f"mean score {variant['score']:.3f}"
    bound = "" if variant["bound"] is None else f"pruned to a bound of {variant['bound']:g}, "
    latency = ""
    if variant["latency_s"] is not None:
        latency = f", {variant['latency_s']['p50'] * 1e3:.3g} ms on {printable(variant['latency_s']['cpu'] or 'an unnamed processor')}"
    kind = "int8" if variant["quantized"] else "float"
    size = f"{format_bytes(variant['bytes'])}, {variant['macs'] / 1e6:.3g} million MACs"
    return f"variant {variant['name']}: {kind}, {bound}{size}{latency}, {score}"
