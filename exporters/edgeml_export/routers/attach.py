"""A router put into a bundle that is already written: a page more, and what the manifest says about it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from edgeml.bundle import Bundle, Page
from edgeml.bundle_writer import PageSource, write_bundle
from edgeml.errors import UsageError
from edgeml.layout import PageKind

__all__ = ["attach_bias_router", "attach_group_router", "router_entries"]


def attach_group_router(
    source: str | os.PathLike[str], out: str | os.PathLike[str], graph: bytes, groups: Mapping[str, Sequence[str]], biased: bool
) -> str:
    """Write `out`, the bundle `source` with a router for requests that name no task; returns its identity.

    `graph` is `group_graph`'s, `groups` names each group's tasks in the order of its outputs, `biased` says that it answers a bias.
    Raises `UsageError` where the bundle has a router already.
    """

    def change(manifest: dict[str, Any], page: int) -> None:
        if manifest.get("router") is not None or any(stage["name"] == "router" for stage in manifest["stages"]):
            raise UsageError(f"{source}: it has a router already; attach to the bundle it was made from")
        stage, entry = router_entries(page, groups, biased)
        manifest["stages"].append(stage)
        manifest["router"] = entry

    return _with_page(source, out, graph, change)


def attach_bias_router(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    graph: bytes,
    name: str,
    tasks: Sequence[str],
    inputs: Sequence[str] = ("hidden0", "mask"),
) -> str:
    """Write `out`, the bundle `source` whose `tasks` run the stage `name` as their router; returns its identity.

    `graph` reads `inputs` and answers bias, as `bias_graph`'s does.
    """

    def change(manifest: dict[str, Any], page: int) -> None:
        unknown = sorted(set(tasks) - {task["name"] for task in manifest["tasks"]})
        if unknown:
            raise UsageError(f"{source} has no task '{unknown[0]}' to give the router to")
        manifest["stages"].append({"name": name, "page": page, "inputs": list(inputs), "outputs": ["bias"]})
        for task in manifest["tasks"]:
            if task["name"] in tasks:
                task["stages"]["router"] = name

    return _with_page(source, out, graph, change)


def router_entries(page: int, groups: Mapping[str, Sequence[str]], biased: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stage whose graph is page `page`, and the manifest's `router`."""
    outputs = ["groups", "bias"] if biased else ["groups"]
    stage = {"name": "router", "page": page, "inputs": ["hidden0", "mask"], "outputs": outputs}
    return stage, {"stage": "router", "groups": [{"name": name, "tasks": list(tasks)} for name, tasks in groups.items()]}


def _with_page(
    source: str | os.PathLike[str], out: str | os.PathLike[str], graph: bytes, change: Callable[[dict[str, Any], int], None]
) -> str:
    with Bundle.open(source) as bundle:
        manifest = json.loads(json.dumps(bundle.manifest))
        change(manifest, len(bundle.pages))
        pages = [_source(bundle, page) for page in bundle.pages]
        return write_bundle(out, [*pages, PageSource(PageKind.ONNX, graph)], manifest)


def _source(bundle: Bundle, page: Page) -> PageSource:
    def read() -> Iterator[bytes]:
        yield bundle.read(page.id)

    return PageSource(page.kind, read, page.matrices, page.activation, max(page.count, 1))
