"""What a machine computes, as one JSON document: `guest.py BUNDLE`. The same script runs here and under emulation.

Inputs are whole numbers over a power of two: the same bits on every processor, whatever its random generators do with them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgeml
from edgeml import kernels, native
from edgeml.bundle import Bundle, PageKind, WeightType
from edgeml.store import open_context

TEXTS = [
    "I lost my card yesterday, what can I do?",
    "What a lovely day, and the film was wonderful.",
    "Will it rain tomorrow morning?",
    "x",
    "The committee met on Tuesday to discuss the budget of the coming year, and nobody could agree on anything at all.",
]


def values(*shape: int, seed: int) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).integers(-512, 512, shape) / 256).astype(np.float32)


def digest(*arrays: NDArray[Any]) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def matrices(isa: str) -> dict[str, str]:
    """Every weight type and activation, for counts that fill and do not fill a group of tokens."""
    found = {}
    for type in WeightType:
        tiles = kernels.pack_matrix(values(40, 100, seed=1), type)
        bias = values(40, seed=2)
        x = values(11, 100, seed=3)
        outputs = [native.apply_matrix(isa, type, tiles, 40, 100, x[:count], bias) for count in (1, 2, 3, 4, 7, 8, 11)]
        found[type.name] = digest(*outputs)
    for activation in range(4):
        found[f"activation {activation}"] = digest(native.apply_activation(isa, activation, values(333, seed=4)))
    return found


def operators(path: str, isa: str) -> dict[str, str]:
    """The bundle's own weights: rows, a dense layer, and experts under a budget that makes them move."""
    with Bundle.open(path) as bundle:
        context, manifest, _ = open_context(bundle, memory="25%", threads=2, isa=isa)
        try:
            pages = {kind: next((page for page in bundle.pages if page.kind == kind), None) for kind in (PageKind.ROWS, PageKind.LINEAR)}
            found = {}
            if rows := pages[PageKind.ROWS]:
                found["rows"] = digest(context.embed_rows(rows.id, np.arange(0, rows.matrices[0].rows, 97)))
            if dense := pages[PageKind.LINEAR]:
                found["linear"] = digest(context.linear(dense.id, values(9, dense.matrices[0].cols, seed=5)))
            for number, site in enumerate(manifest.sites):
                ids = np.random.default_rng(number).integers(-1, len(site.experts), (12, site.top_k))
                weights = np.abs(values(12, site.top_k, seed=6))
                found[site.name] = digest(context.experts(number, values(12, site.hidden, seed=7), ids, weights))
            return found
        finally:
            context.close()


def answers(path: str) -> dict[str, Any]:
    with edgeml.open(path, memory="50%", threads=1) as session:
        tasks = [task for task in session.manifest.tasks if task.labels and not task.pair][:3]
        results = {task.name: session.run(task.name, texts=TEXTS) for task in tasks}
        return {
            "backend": session.backend,
            "labels": {name: result.labels for name, result in results.items()},
            "scores": {name: np.round(result.scores.astype(np.float64), 9).tolist() for name, result in results.items()},
        }


def main() -> None:
    path = sys.argv[1]
    sets = native.backends()
    document = {
        "kernels": sets,
        "checksum": native.crc32c_name(),
        "crc32c": native.crc32c(bytes(range(256)) * 60),
        "matrices": {isa: matrices(isa) for isa in sets},
        "operators": operators(path, sets[-1]),
        "answers": answers(path),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
