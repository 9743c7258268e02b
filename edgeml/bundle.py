"""The bundle: one `.edgeml` file, written once, opened by one descriptor. THE FORMAT, version 1, all numbers little-endian:

Header, bytes [0, 4096): [0, 8) the magic "EDGEML" CR LF (a text-mode transfer breaks it visibly); u32 at 8 major version;
u32 at 12 alignment, a power of two in [4096, 2^20]; u64 at 16 file length, 24 index offset, 32 index length; [40, 72) SHA-256
of the index; u64 at 72 manifest offset, 80 manifest length; [88, 120) SHA-256 of the manifest; u32 at 120 the CRC-32C of
[0, 120); the rest zero. Magic, major version and CRC keep their places in every version; a reader MUST refuse other majors.
Pages: page 0 begins at `alignment`, page i + 1 at the next multiple of it from the end of page i; none is empty; the padding is
zero. The index begins at the next multiple after the last page (at `alignment` if there is none), the manifest where the index
ends, and the file ends where the manifest ends: no holes and no trailing bytes, so that no second format can hide in the file.
Index: at most 1,000,000 records of 128 bytes, one per page: u32 at 0 id, MUST equal its position (one name per page); u16 at 4
kind: 1 onnx, 2 expert, 3 linear, 4 rows, 5 tensor, 7 tokenizer, 8 json, others MUST be refused; u64 at 8 offset, 16 length; u32 at 24
CRC-32C of the length bytes; [32, 64) their SHA-256; u32 at 64 activation: 0 none, 1 gelu (erf), 2 relu, 3 silu; u32 at 68 count;
u64 at 72 stride; at 80, 96, 112 matrices {u8 type: 0 absent, 1 f32, 2 int8, 3 int4; u8 has bias; u16 0; u32 rows; u32 cols; u32 0},
sides in [1, 2^24]. All else, and every field a kind does not use, MUST be zero: free bytes would be a place to hide things.
- onnx, tokenizer, json: raw bytes. tensor: matrix 0 is f32 rows x cols without bias, the page its values row by row.
- expert: count in [1, 65536] experts of one shape, stride apart, length = count x stride. Two matrices: up (width, hidden) and
  down (hidden, width), y = down(act(up x)); or three: up, gate (as up), down, y = down(act(gate x) * up x).
- linear: one matrix (outputs, inputs), laid out as an expert: count 1, stride = length. Activation 0.
- rows: one matrix, int8 or f32, no bias. A row is an f32 scale and cols int8 values, or cols f32 values; then the CRC-32C of
  that as u32, because rows are read one by one. count 1, stride = bytes of a row, length = rows x stride.
Expert layout: for each matrix its tiles, then if it has a bias `rows` f32 values padded with zeros to a multiple of 16; every part
begins at a multiple of 64 from the expert's start (a cache line), and stride is the size rounded up to 64. Tiles: rows padded to
16 (R) and cols to 32 (K), R/16 x K/32 tiles, for each block of 16 rows all blocks of 32 columns; q(r, k) within the tile:
- int8, 544 bytes: vectors g = 0..7 of 64 bytes, byte 4r + j = q(r, 4g + j) + 128, then 16 f16 scales, one per row.
- int4, 288 bytes: vectors g = 0..3, byte 4r + j = (q(r, 4g + j) + 8) | (q(r, 4g + 16 + j) + 8) << 4, then 16 f16 scales.
- f32, 2048 bytes: for k = 0..31 the 16 rows' values. A weight is scale x q; padding has q = 0, padded rows have scale 0.
Manifest: a UTF-8 JSON object of at most 64 MiB and 32 levels. Duplicate keys and NaN MUST be refused: two readers would differ.
Caps: file at most 2^46 bytes. A reader MUST check all of this but page contents at open, before it allocates from a length, and
with arithmetic that cannot wrap; so no later access can fail for a format reason. It MUST check a page's CRC whenever the page comes
in. It MUST open the file once and keep the descriptor, not following a link: a path can be swapped between check and use.
A bundle's identity is the SHA-256 of its index: it covers every page, and does not change with the evidence in the manifest.
A writer MUST be deterministic (no times, no names of machines) and MUST replace a file whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeml.bundle_writer import PageSource, encode_manifest, write_bundle, write_file
from edgeml.errors import BundleError, DeviceError, PageError, UsageError
from edgeml.layout import (
    HEADER_BYTES,
    Activation,
    Header,
    Matrix,
    Page,
    PageKind,
    WeightType,
    decode_header,
    decode_index,
    encode_header,
    expert_layout,
    matrix_bytes,
    row_bytes,
)
from edgeml.native import crc32c
from edgeml.strict_json import StrictJsonError, decode_object

__all__ = [
    "Activation",
    "Bundle",
    "Matrix",
    "Page",
    "PageKind",
    "PageSource",
    "WeightType",
    "expert_layout",
    "matrix_bytes",
    "replace_manifest",
    "row_bytes",
    "write_bundle",
]

_CHUNK = 1 << 20


class Bundle:
    """An open, validated bundle. Its accessors cannot fail for a format reason. Safe for several threads.

    `pages` the index, `manifest` the raw JSON object (typed view: `edgeml.manifest.load_manifest`), `index_bytes` the raw index,
    `fd` the descriptor (owned by the bundle, valid until `close`), `id` its identity, 64 hexadecimal digits.
    """

    def __init__(self, path: Path, fd: int, header: Header, index: bytes, pages: tuple[Page, ...], manifest: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self.index_bytes = index
        self.pages = pages
        self.manifest = manifest
        self.id = header.index_sha256.hex()
        self._fd = fd
        self._closer = weakref.finalize(self, os.close, fd)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open and validate everything but page contents. Raises `BundleError`; `DeviceError` when the medium fails."""
        place = Path(path)
        fd = _open_regular(place)
        try:
            try:
                return cls(place, fd, *_read_tables(fd))
            except BundleError as error:
                raise BundleError(f"{place}: {error}") from None
            except OSError as error:
                raise DeviceError(f"{place}: reading failed ({error.strerror}); check the medium") from error
        except BaseException:
            os.close(fd)
            raise

    @property
    def fd(self) -> int:
        """The open descriptor. Raises `UsageError` after `close`."""
        if not self._closer.alive:
            raise UsageError(f"{self.path}: the bundle is closed")
        return self._fd

    def close(self) -> None:
        """Close the descriptor; closing twice does nothing."""
        self._closer()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def read(self, page_id: int) -> bytes:
        """A page's bytes, checked against its CRC. Raises `PageError` after one retry past the cache, `UsageError` for no such page."""
        if not 0 <= page_id < len(self.pages):
            raise UsageError(f"{self.path}: there is no page {page_id}; it has {len(self.pages)}")
        page = self.pages[page_id]
        for _ in range(2):
            data = self._pread(page, page.offset, page.length)
            if crc32c(data) == page.crc32c:
                return data
            os.posix_fadvise(self.fd, page.offset, page.length, os.POSIX_FADV_DONTNEED)
        raise PageError(f"{self._where(page)}: its checksum is wrong; copy the bundle again")

    def verify(self) -> Iterator[int]:
        """Check every page's SHA-256 and CRC, each row's CRC, and that all padding is zero; yields the bytes done so far.

        Raises `BundleError` naming the first fault, `PageError` when reading fails.
        """
        end = HEADER_BYTES
        for page in self.pages:
            self._check_padding(end, page.offset)
            yield page.offset
            yield from self._verify_page(page)
            end = page.offset + page.length
        self._check_padding(end, self.header.index_offset)
        yield self.header.file_length

    def _verify_page(self, page: Page) -> Iterator[int]:
        crc, sha = 0, hashlib.sha256()
        is_rows = page.kind == PageKind.ROWS
        step = page.stride * max(1, _CHUNK // page.stride) if is_rows else _CHUNK
        for start in range(0, page.length, step):
            data = self._pread(page, page.offset + start, min(step, page.length - start))
            crc = crc32c(data, crc)
            sha.update(data)
            if is_rows:
                self._verify_rows(page, data, start // page.stride)
            yield page.offset + start + len(data)
        if crc != page.crc32c or sha.digest() != page.sha256:
            raise BundleError(f"{self._where(page)}: its checksum is wrong; copy the bundle again")

    def _verify_rows(self, page: Page, data: bytes, first: int) -> None:
        view = memoryview(data)
        for start in range(0, len(data), page.stride):
            end = start + page.stride
            if crc32c(view[start : end - 4]) != int.from_bytes(view[end - 4 : end], "little"):
                raise BundleError(f"{self._where(page)}: the checksum of row {first + start // page.stride} is wrong")

    def _check_padding(self, start: int, end: int) -> None:
        if start < end and any(_pread_all(self.fd, start, end - start)):
            raise BundleError(f"{self.path}: the padding from {start} to {end} is not zero")

    def _pread(self, page: Page, offset: int, length: int) -> bytes:
        try:
            return _pread_all(self.fd, offset, length)
        except BundleError as error:
            raise PageError(f"{self._where(page)}: {error}") from None
        except OSError as error:
            raise PageError(f"{self._where(page)}: reading failed ({error.strerror}); check the medium") from error

    def _where(self, page: Page) -> str:
        return f"{self.path}: page {page.id} ({page.kind.name.lower()}) at offset {page.offset}"


def replace_manifest(path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
    """Write the same pages and index with a new manifest, atomically: the identity stays. Raises as `Bundle.open` and `write_bundle`."""
    document = encode_manifest(manifest)
    with Bundle.open(path) as bundle:
        old = bundle.header
        new = Header(
            old.alignment,
            old.manifest_offset + len(document),
            old.index_offset,
            old.index_length,
            old.index_sha256,
            old.manifest_offset,
            len(document),
            hashlib.sha256(document).digest(),
        )

        def pieces() -> Iterator[bytes]:
            yield encode_header(new)
            for start in range(HEADER_BYTES, old.index_offset, _CHUNK):
                yield _pread_all(bundle.fd, start, min(_CHUNK, old.index_offset - start))
            yield bundle.index_bytes
            yield document

        write_file(bundle.path, pieces())


def _open_regular(path: Path) -> int:
    """Open without following a link and without waiting on a pipe; the caller owns the descriptor."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as error:
        raise BundleError(f"{str(path)!r} is not a file name ({error})") from None
    except OSError as error:
        raise _open_error(path, error) from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise BundleError(f"{path}: this is {what}; a bundle is one .edgeml file")
    return fd


def _open_error(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return BundleError(f"{path}: no such file; check the path of the bundle")
    if error.errno in (errno.EACCES, errno.EPERM):
        return BundleError(f"{path}: no permission to read it; check its owner and mode")
    if error.errno == errno.ELOOP:
        return BundleError(f"{path}: this is a symbolic link, which could be swapped unnoticed; give the file it points to")
    if error.errno in (errno.ENAMETOOLONG, errno.ENXIO):
        return BundleError(f"{path}: cannot be opened ({error.strerror})")
    return DeviceError(f"{path}: cannot be opened ({error.strerror}); check the medium")


def _read_tables(fd: int) -> tuple[Header, bytes, tuple[Page, ...], dict[str, Any]]:
    size = os.fstat(fd).st_size
    if size == 0:
        raise BundleError("the file is empty; copy or export it again")
    header = decode_header(_pread_all(fd, 0, min(size, HEADER_BYTES)))
    if size < header.file_length:
        raise BundleError(f"truncated: {size} of {header.file_length} bytes are there; copy the file again")
    if size > header.file_length:
        raise BundleError(f"{size - header.file_length} bytes follow the bundle's end at {header.file_length}; copy the file again")
    index = _pread_all(fd, header.index_offset, header.index_length)
    if hashlib.sha256(index).digest() != header.index_sha256:
        raise BundleError("the index is damaged (its checksum is wrong); copy the file again")
    pages = decode_index(index, header.alignment, header.index_offset)
    document = _pread_all(fd, header.manifest_offset, header.manifest_length)
    if hashlib.sha256(document).digest() != header.manifest_sha256:
        raise BundleError("the manifest is damaged (its checksum is wrong); copy the file again")
    try:
        return header, index, pages, decode_object(document)
    except StrictJsonError as error:
        raise BundleError(f"the manifest is refused: {error}") from None


def _pread_all(fd: int, offset: int, length: int) -> bytes:
    """Exactly `length` bytes; `BundleError` when the file ends before (it was cut after it was opened)."""
    first = os.pread(fd, length, offset)
    if len(first) == length:
        return first
    parts = [first]
    done = len(first)
    while parts[-1] and done < length:  # one call returns at most 2 GiB, and signals can shorten it
        parts.append(os.pread(fd, length - done, offset + done))
        done += len(parts[-1])
    if done < length:
        raise BundleError(f"the file now ends at {offset + done}, {length - done} bytes too early: it was cut after it was opened")
    return b"".join(parts)
