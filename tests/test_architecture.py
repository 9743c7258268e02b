"""Rooms and arrows: who may import whom, how long a file may be, and what `__all__` promises."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Modules of edgeml in layers; a module imports only from layers before its own, or its own where the second entry allows it.
LAYERS: list[set[str]] = [
    {"checksum", "errors"},
    {"compare", "device", "disk", "graph_bytes", "graph_cost", "indices", "native", "scheduler_events", "sizes", "strict_json", "workload"},
    {"energy", "graph_split", "layout", "perfetto", "scheduler_requests"},
    {"bundle_writer", "manifest_reader", "scheduler"},
    {"bundle", "data", "image_data", "made_cnn", "manifest_groups", "policy", "metrics", "scar"},
    {"domains", "kernels", "locality", "manifest", "predict_pages", "replay"},
    {"numpy_context", "predictions", "resident"},
    {"image", "made", "preprocess", "result", "router", "routing", "sidecar", "tasks", "trace", "variants"},
    {"batching", "serving", "store"},
    {"graph", "predict", "residency"},
    {"autoroute", "image_requests", "submission"},
    {"session"},
    {"evaluate", "measure", "transfer"},
    {"profile", "records"},
    {"commands"},
    {"cli"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

#: The only modules that may import these.
ONLY_IN = {
    "onnxruntime": {"graph"},
    "click": {"cli", "commands"},
    "edgeml._native": {"native"},
    "tokenizers": {"preprocess"},
    "PIL": {"image"},
}
NEVER_IN_RUNTIME = {"torch", "onnx", "edgeml_export", "edgeml_devices", "edgeml_report", "safetensors"}
EXPORT_MAY = {
    "errors",
    "native",
    "layout",
    "bundle",
    "bundle_writer",
    "data",
    "image",
    "image_data",
    "manifest",
    "kernels",
    "metrics",
    "preprocess",
    "sizes",
}
#: What fits an export to a device may use the prediction of it.
FIT_MAY = EXPORT_MAY | {"device", "graph_cost", "predict", "resident", "store", "variants"}


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"edgeml.{alias.name}" for alias in node.names if not alias.name.startswith("__")}  # the version is everybody's
            names |= {node.module} if node.module != "edgeml" else modules
    return names


def module(file: Path) -> str:
    return file.relative_to(ROOT / "edgeml").parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", python_files("edgeml"), ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows_inside_the_runtime(file: Path) -> None:
    own = module(file)
    if own == "__init__":
        return
    assert own in LAYER, f"{own} has no layer: add it to LAYERS"
    for name in imports(file):
        top = name.split(".")[0]
        assert top not in NEVER_IN_RUNTIME, f"{file} imports {name}"
        for library, allowed in ONLY_IN.items():
            if name == library or name.startswith(library + "."):
                assert own in allowed, f"{file} imports {name}"
        if name.startswith("edgeml.") and name != "edgeml._native":
            other = name.split(".")[1]
            # `graph.check_stages` opens a store; both are the shell around one native context.
            if LAYER.get(other, 99) >= LAYER[own] and not (own == other == "commands"):
                raise AssertionError(f"{file} imports {name}, which is not to its left")


@pytest.mark.parametrize("file", python_files("exporters"), ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows_from_the_exporters(file: Path) -> None:
    fits = file.name.startswith("fit")
    for name in imports(file):
        if name.startswith("edgeml."):
            assert name.split(".")[1] in (FIT_MAY if fits else EXPORT_MAY), f"{file} imports {name}"
        # The profiles of boards are a room beside: only where a device is named are they looked up, and there they may be missing.
        assert not name.startswith("edgeml_devices") or file.name == "fit.py", f"{file} imports {name}"


@pytest.mark.parametrize("file", [*python_files("devices"), *python_files("reports")], ids=lambda file: str(file.relative_to(ROOT)))
def test_arrows_from_the_rooms_beside_the_runtime(file: Path) -> None:
    """They know the runtime, never the exporters nor torch, and not each other."""
    own = file.relative_to(ROOT).parts[1]
    for name in imports(file):
        top = name.split(".")[0]
        assert top not in NEVER_IN_RUNTIME - {own}, f"{file} imports {name}"


def sources() -> list[Path]:
    rooms = ("edgeml", "exporters", "devices", "reports", "native", "tests", "examples", "benchmarks")
    return [file for room in rooms for file in sorted((ROOT / room).rglob("*")) if file.suffix in (".py", ".c", ".h")]


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_stay_short(file: Path) -> None:
    limit = 500 if file.suffix == ".py" else 600
    assert len(file.read_text("utf-8").splitlines()) <= limit


@pytest.mark.parametrize("file", python_files("edgeml"), ids=lambda file: str(file.relative_to(ROOT)))
def test_all_names_what_is_there(file: Path) -> None:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    loaded = importlib.import_module(name)
    exported = getattr(loaded, "__all__", [])
    assert sorted(exported) == sorted(set(exported))
    for item in exported:
        assert hasattr(loaded, item), f"{name}.__all__ has {item}"
