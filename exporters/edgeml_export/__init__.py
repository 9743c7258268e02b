"""The export side of edgeml: torch models become bundles. Needs the extra `export`.

    import edgeml_export
    evidence = edgeml_export.export("model.py:mixture", "m.edgeml", recipe="recipe.toml", data="data/text")

Importing it loads neither torch nor onnx: names are fetched when first used, so that `edgeml export --help` stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeml_export.model import Model, TaskSpec
    from edgeml_export.pipeline import export

__all__ = ["Model", "TaskSpec", "export"]

_HOMES = {"Model": "edgeml_export.model", "TaskSpec": "edgeml_export.model", "export": "edgeml_export.pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeml_export' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
