"""The toy model, its data and its graphs, made once for all export tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).parent / "toy_source.py"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without the extra `export` these tests are skipped as a whole."""
    try:
        import onnx  # noqa: F401
        import torch  # noqa: F401
    except ImportError:
        return True
    return None


@pytest.fixture(scope="session")
def source() -> str:
    return f"{SOURCE}:mixture"


@pytest.fixture(scope="session")
def model(source: str) -> Any:
    from edgeml_export.model import load_source

    return load_source(source)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    root = tmp_path_factory.mktemp("data")
    sys.modules["edgeml_source_toy_source"].write_data(root)  # loaded by `model`
    return root


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The module `oracle.py` beside this file."""
    spec = importlib.util.spec_from_file_location("edgeml_test_oracle", SOURCE.with_name("oracle.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def vision_source() -> str:
    return f"{SOURCE.with_name('vision_source.py')}:model"


@pytest.fixture(scope="session")
def vision(vision_source: str) -> Any:
    from edgeml_export.model import load_source

    return load_source(vision_source)


@pytest.fixture(scope="session")
def vision_stages(vision: Any) -> Any:
    from edgeml_export.vision.graphs import stage_graphs

    return stage_graphs(vision)


@pytest.fixture(scope="session")
def vision_data(tmp_path_factory: pytest.TempPathFactory, vision: Any) -> Path:
    root: Path = sys.modules["edgeml_source_vision_source"].write_data(tmp_path_factory.mktemp("images"))  # loaded by `vision`
    return root
