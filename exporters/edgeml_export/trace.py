"""Which experts a written bundle chooses: `python -m edgeml_export.trace BUNDLE INPUTS.npz OUTPUTS.npz`.

Runs in a process where torch cannot be imported, as a device would. Inputs: for batch i of task TASK `ids.i.TASK` (int64),
`types.i.TASK` and `mask.i.TASK` (B, T). Outputs: `i.TASK`, the choices at real tokens (sites, tokens, k) int64.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeml import native
from edgeml.bundle import Bundle
from edgeml.manifest import Manifest, Site, load_manifest

__all__ = ["Tracer", "main"]

Tensors = dict[str, NDArray[Any]]


class Tracer:
    """An open bundle whose stages are run one by one, every expert resident."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.manifest: Manifest = load_manifest(bundle)
        self._stages = {stage.name: stage for stage in self.manifest.stages}
        sites = [_native_site(site) for site in self.manifest.sites]
        slots = len({expert.page for site in self.manifest.sites for expert in site.experts})
        self._context = native.Context(bundle.fd, bundle.index_bytes, sites, slots=slots)
        self._sessions: dict[str, Any] = {}

    def run(self, names: tuple[str, ...], inputs: Mapping[str, NDArray[Any]]) -> Tensors:
        """Run stages in order, each on the inputs and what came before; returns everything."""
        tensors = dict(inputs)
        with self._context.request():
            for name in names:
                stage = self._stages[name]
                given = {key: tensors[key] for key in stage.inputs}
                tensors |= zip(stage.outputs, self._session(name).run(list(stage.outputs), given), strict=True)
        return tensors

    def close(self) -> None:
        """Release graphs and weights; the bundle stays open."""
        self._sessions.clear()
        self._context.close()

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = 1
            options.add_session_config_entry("edgeml.context", self._context.handle)
            options.register_custom_ops_library(native.LIBRARY_PATH)
            graph = self.bundle.read(self._stages[name].page)
            self._sessions[name] = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return self._sessions[name]


def _native_site(site: Site) -> native.Site:
    experts, shared = ([(expert.page, expert.sub) for expert in group] for group in (site.experts, site.shared))
    return native.Site(experts=experts, shared=shared, hidden=site.hidden, top_k=site.top_k)


def main(bundle: str, inputs: str, outputs: str) -> None:
    """Trace every batch of `inputs` (.npz) and write the choices to `outputs` (.npz)."""
    out: Tensors = {}
    with Bundle.open(bundle) as opened, np.load(inputs) as batches:
        tracer = Tracer(opened)
        for key in batches.files:
            kind, _, place = key.partition(".")
            if kind == "ids":
                task = place.partition(".")[2]
                tensors = {name: batches[f"{name}.{place}"] for name in ("ids", "types", "mask")}
                answer = tracer.run(("embed", f"router_{task}", "trunk_ids"), tensors)
                real = tensors["mask"] > 0
                out[place] = np.stack([answer[f"ids_{site}"][real] for site in range(len(tracer.manifest.sites))])
        tracer.close()
    np.savez(outputs, allow_pickle=False, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
