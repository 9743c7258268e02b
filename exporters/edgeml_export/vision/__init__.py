"""Multi-task CNNs to bundles: one backbone, a head for each task, float and int8, several sizes side by side in one file.

    from edgeml_export.vision import ImageFormat, MultiTaskCNN, VisionModel, VisionTask

The function that `edgeml export file.py:function` calls returns a `VisionModel`; an `.onnx` file needs a recipe that describes
its tasks. As with `edgeml_export`, importing this loads neither torch nor onnx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeml_export.vision.model import MultiTaskCNN, VisionModel
    from edgeml_export.vision.tasks import ImageFormat, VisionTask
    from edgeml_export.vision.tune import Training, fit

__all__ = ["ImageFormat", "MultiTaskCNN", "Training", "VisionModel", "VisionTask", "fit"]

_HOMES = {
    "ImageFormat": "edgeml_export.vision.tasks",
    "MultiTaskCNN": "edgeml_export.vision.model",
    "Training": "edgeml_export.vision.tune",
    "VisionModel": "edgeml_export.vision.model",
    "VisionTask": "edgeml_export.vision.tasks",
    "fit": "edgeml_export.vision.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeml_export.vision' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
