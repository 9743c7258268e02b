"""Pages and manifest of a vision bundle: a page for each different graph, stages for each variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx

import edgeml
from edgeml.bundle import PageSource
from edgeml.layout import PageKind
from edgeml_export.vision.tasks import ImageFormat, VisionTask
from edgeml_export.vision.variants import Candidate

__all__ = ["assemble"]


def assemble(
    tasks: Sequence[VisionTask],
    image: ImageFormat,
    found: Sequence[Candidate],
    chances: Mapping[str, float],
    cpu: str | None,
    provenance: Mapping[str, Any],
) -> tuple[list[PageSource], dict[str, Any]]:
    """All pages and the manifest, without evidence; the first variant is what the tasks themselves name."""
    pages = _Pages()
    variants = [_variant(pages, candidate, place, tasks, cpu) for place, candidate in enumerate(found)]
    manifest = {
        "format": 1,
        "producer": {"name": "edgeml-runtime", "version": edgeml.__version__},
        "model": {"family": "cnn"},
        "stages": pages.stages,
        "sites": [],
        "tasks": [_task(task, image, chances.get(task.name), variants[0]["stages"][task.name]) for task in tasks],
        "usage": {},
        "variants": variants,
        "evidence": {},
        "provenance": dict(provenance),
    }
    return pages.sources, manifest


class _Pages:
    """Graphs and stages so far. Equal graphs, such as a head that no variant changes, are one page."""

    def __init__(self) -> None:
        self.sources: list[PageSource] = []
        self.stages: list[dict[str, Any]] = []
        self._numbers: dict[bytes, int] = {}

    def stage(self, name: str, graph: bytes) -> str:
        if graph not in self._numbers:
            self._numbers[graph] = len(self.sources)
            self.sources.append(PageSource(PageKind.ONNX, graph))
        made = onnx.load_from_string(graph).graph
        ends = {key: [value.name for value in part] for key, part in (("inputs", made.input), ("outputs", made.output))}
        self.stages.append({"name": name, "page": self._numbers[graph], **ends})
        return name


def _variant(pages: _Pages, candidate: Candidate, place: int, tasks: Sequence[VisionTask], cpu: str | None) -> dict[str, Any]:
    suffix = f".{candidate.name}" if place else ""
    backbone = pages.stage(f"backbone{suffix}", candidate.stages.backbone)
    heads = {task.name: pages.stage(f"head_{task.name}{suffix}", candidate.stages.heads[task.name]) for task in tasks}
    return {
        "name": candidate.name,
        "stages": {name: {"backbone": backbone, "head": head} for name, head in heads.items()},
        "bytes": candidate.size,
        "macs": candidate.macs,
        "parameters": candidate.parameters,
        "bound": candidate.bound,
        "quantized": candidate.quantized,
        "latency_s": {"p50": candidate.latency, "cpu": cpu},
        "scores": dict(candidate.scores),
    }


def _task(task: VisionTask, image: ImageFormat, chance: float | None, stages: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": task.name,
        "domain": task.domain,
        "kind": task.kind,
        "labels": list(task.labels),
        "metric": task.metric,
        "void": task.void,
        "chance": chance,
        "stages": dict(stages),
        "preprocess": image.as_json(),
    }
