"""Bundles damaged on purpose, for tests that have to find where; with NumPy and the bytes of graphs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeml.bundle import Bundle, PageSource
from edgeml.bundle_writer import write_bundle
from edgeml.graph_cost import fields
from edgeml.layout import Page, PageKind
from edgeml.manifest import load_manifest

Run = Callable[..., dict[str, Any]]
FLOAT, RAW, TYPE = 1, 9, 2


def weights(bundle: Bundle) -> list[Page]:
    """Pages of f32 numbers."""
    return [page for page in bundle.pages if page.kind in (PageKind.EXPERT, PageKind.LINEAR)]


def noisy(bundle: Bundle, page: Page, rng: np.random.Generator, share: float) -> bytes:
    """A page of f32 with noise of this share of its spread."""
    values = np.frombuffer(bundle.read(page.id), np.float32)
    noise = rng.standard_normal(len(values)).astype(np.float32) * values.std() * share
    return np.where(values == 0, values, values + noise).astype(np.float32).tobytes()


def rewrite(source: Path, target: Path, pages: Mapping[int, bytes], change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """A copy with other pages, and a manifest that `change` has edited."""
    with Bundle.open(source) as bundle:
        sources = [PageSource(p.kind, pages.get(p.id, bundle.read(p.id)), p.matrices, p.activation, max(p.count, 1)) for p in bundle.pages]
        manifest = dict(bundle.manifest)
        change(manifest)
        write_bundle(target, sources, manifest)
    return target


def spoiled(model: bytes, share: float, only: str = "") -> bytes:
    """A model with noise of this share of their spread on its float weights, or on those of one name."""
    from edgeml_report.diff_graph import Graph

    rng = np.random.default_rng(2)
    for name, tensor in Graph.parse(model, "model").weights.items():
        raw = next(bytes(value) for number, value in fields(memoryview(tensor)) if number == RAW and isinstance(value, memoryview))
        kind = next(value for number, value in fields(memoryview(tensor)) if number == TYPE)
        if kind == FLOAT and len(raw) > 64 and only in ("", name):
            values = np.frombuffer(raw, np.float32)
            noise = rng.standard_normal(len(values)).astype(np.float32) * values.std() * share
            model = model.replace(raw, (values + noise).tobytes())  # every other byte stays
    return model


def stage_page(path: Path, name: str) -> tuple[int, bytes]:
    with Bundle.open(path) as bundle:
        page = next(stage.page for stage in load_manifest(bundle).stages if stage.name == name)
        return page, bundle.read(page)


def parts_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in found["parts"]}
