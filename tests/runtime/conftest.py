"""A made mixture that the runtime's tests share, and ways to spoil a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

from edgeml.bundle import Bundle, PageSource, write_bundle
from edgeml.made import make_mixture

TEXTS = ("Will it rain tomorrow?", "a warm and sunny day by the sea", "fog", "no, that was a very bad film: zzz 42")


class Rebuild(Protocol):
    """Writes a copy of the toy with other page contents, and a manifest that `change` has edited in place."""

    def __call__(self, pages: Mapping[int, bytes] = ..., change: Callable[[dict[str, Any]], None] = ...) -> Path: ...


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 8 routed experts; tasks weather, mood and vector. Nobody writes to it."""
    path = tmp_path_factory.mktemp("shared") / "toy.edgeml"
    make_mixture(path)
    return path


@pytest.fixture
def rebuild(toy: Path, tmp_path: Path) -> Rebuild:
    def build(pages: Mapping[int, bytes] = {}, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
        with Bundle.open(toy) as bundle:
            sources = [
                PageSource(page.kind, pages.get(page.id, bundle.read(page.id)), page.matrices, page.activation, max(page.count, 1))
                for page in bundle.pages
            ]
            manifest = dict(bundle.manifest)
        change(manifest)
        path = tmp_path / "rebuilt.edgeml"
        write_bundle(path, sources, manifest)
        return path

    return build


@pytest.fixture
def flipped(toy: Path, tmp_path: Path) -> Callable[[int], Path]:
    """A copy of the toy with one bit of a page flipped."""

    def flip(page: int) -> Path:
        with Bundle.open(toy) as bundle:
            place = bundle.pages[page].offset + bundle.pages[page].length // 2
        content = bytearray(toy.read_bytes())
        content[place] ^= 1
        path = tmp_path / "flipped.edgeml"
        path.write_bytes(content)
        return path

    return flip


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EDGEML_THREADS", "EDGEML_MEMORY", "EDGEML_STATE", "EDGEML_DEBUG"):
        monkeypatch.delenv(name, raising=False)
