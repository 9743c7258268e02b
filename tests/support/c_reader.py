"""The C reader of bundles behind the interface of the Python one, so that the same tests can be run on both."""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import pytest

from edgeml.errors import BundleError, DeviceError, PageError, UsageError
from edgeml.layout import Activation, Matrix, Page, PageKind, WeightType
from edgeml.strict_json import StrictJsonError, decode_object

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "native" / name for name in ("reader/bundle.c", "reader/sha256.c", "src/crc32c.c")]
INCLUDE = ROOT / "native" / "include"


class _Fault(ctypes.Structure):
    _fields_ = (
        ("status", ctypes.c_int),
        ("error", ctypes.c_int),
        ("page", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("sentence", ctypes.c_char_p),
    )


class _Matrix(ctypes.Structure):
    _fields_ = (("type", ctypes.c_uint8), ("has_bias", ctypes.c_uint8), ("rows", ctypes.c_uint32), ("cols", ctypes.c_uint32))


class _Page(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("offset", "length", "stride")),
        *((name, ctypes.c_uint32) for name in ("kind", "crc32c", "activation", "count", "matrix_count")),
        ("matrices", _Matrix * 3),
        ("sha256", ctypes.c_uint8 * 32),
    )


def build(out: Path, *flags: str | Path) -> Path:
    """The reader and what else is named, compiled to `out` with the system's compiler; skips where there is none."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is here", allow_module_level=True)
    command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}", "-pthread", *flags, *SOURCES, "-o", out]
    subprocess.run([str(part) for part in command], check=True)
    return out


def read_by_c(name: str) -> ModuleType:
    """The test module of that name in tests/runtime, loaded anew with the C reader as its `Bundle`."""
    spec = importlib.util.spec_from_file_location(f"c_{name}", ROOT / "tests" / "runtime" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _library()  # skips here where there is no compiler
    module.Bundle = CBundle  # type: ignore[attr-defined]
    return module


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled reader. Its functions that return pointers are declared."""
    with tempfile.TemporaryDirectory() as place:
        lib = ctypes.CDLL(str(build(Path(place) / "reader.so", "-O1", "-shared", "-fPIC")))
    for name in ("manifest", "id", "index"):
        getattr(lib, f"edgeml_bundle_{name}").restype = ctypes.c_void_p
    return lib


class CBundle:
    """The part of `edgeml.bundle.Bundle` that tests of the format use."""

    def __init__(self, path: Path, handle: ctypes.c_void_p) -> None:
        self.path, self._handle = path, handle
        count = ctypes.c_size_t()
        manifest = ctypes.string_at(_library().edgeml_bundle_manifest(handle, ctypes.byref(count)), count.value)
        self.id = ctypes.string_at(_library().edgeml_bundle_id(handle), 32).hex()
        self.pages = tuple(self._page(number) for number in range(_library().edgeml_bundle_page_count(handle)))
        try:
            self.manifest = decode_object(manifest)  # the manifest is the host's
        except StrictJsonError as error:
            self.close()
            raise BundleError(f"{path}: the manifest is refused: {error}") from None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Any:
        handle, fault = ctypes.c_void_p(), _Fault()
        if _library().edgeml_bundle_open(os.fsencode(path), ctypes.byref(handle), ctypes.byref(fault)):
            raise _error(Path(path), fault)
        return cls(Path(path), handle)

    def _page(self, number: int) -> Page:
        page = _Page()
        assert _library().edgeml_bundle_get_page(self._handle, number, ctypes.byref(page)) == 0
        matrices = tuple(Matrix(WeightType(m.type), m.rows, m.cols, bool(m.has_bias)) for m in page.matrices[: page.matrix_count])
        kind, activation = PageKind(page.kind), Activation(page.activation)
        sha256 = bytes(page.sha256)
        return Page(number, kind, page.offset, page.length, page.crc32c, sha256, activation, page.count, page.stride, matrices)

    def read(self, number: int) -> bytes:
        if not self._handle:
            raise UsageError(f"{self.path}: the bundle is closed")
        if not 0 <= number < len(self.pages):
            raise UsageError(f"{self.path}: there is no page {number}")
        data, fault = ctypes.create_string_buffer(self.pages[number].length), _Fault()
        if _library().edgeml_bundle_read(self._handle, number, data, ctypes.byref(fault)):
            raise PageError(str(_error(self.path, fault)))
        return data.raw

    def verify(self) -> list[int]:
        fault = _Fault()
        if _library().edgeml_bundle_verify(self._handle, ctypes.byref(fault)):
            raise _error(self.path, fault)
        return [self.path.stat().st_size]

    def close(self) -> None:
        _library().edgeml_bundle_close(self._handle)
        self._handle = ctypes.c_void_p()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _error(path: Path, fault: _Fault) -> Exception:
    text = ctypes.create_string_buffer(300)
    _library().edgeml_bundle_fault_text(ctypes.byref(fault), text, 300)
    sentence = f"{path}: {text.value.decode()}"
    if fault.status == 2:
        assert fault.error in errno.errorcode
        return DeviceError(sentence)
    return BundleError(sentence)
