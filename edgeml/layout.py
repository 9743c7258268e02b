"""The bundle's fixed-width structures: header, index records, and how matrices lie inside a page.

`bundle.py` holds the format text. Here are only pure functions on bytes and numbers, used by reader, writer and kernels
alike: a record is checked by the same code when it is written and when it is read. Nothing here touches a file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from edgeml.errors import BundleError, UsageError
from edgeml.native import crc32c

__all__ = [
    "DEFAULT_ALIGNMENT",
    "HEADER_BYTES",
    "MAGIC",
    "MAJOR_VERSION",
    "MAX_MANIFEST_BYTES",
    "MAX_PAGES",
    "RECORD_BYTES",
    "Activation",
    "Header",
    "Matrix",
    "Page",
    "PageKind",
    "WeightType",
    "align_up",
    "check_alignment",
    "decode_header",
    "decode_index",
    "encode_header",
    "encode_record",
    "expert_layout",
    "matrix_bytes",
    "row_bytes",
]

MAGIC = b"EDGEML\r\n"
MAJOR_VERSION = 1
HEADER_BYTES = 4096
RECORD_BYTES = 128
DEFAULT_ALIGNMENT = 4096
MAX_ALIGNMENT = 1 << 20
MAX_FILE_BYTES = 1 << 46
MAX_PAGES = 1_000_000
MAX_MANIFEST_BYTES = 64 << 20
MAX_DIMENSION = 1 << 24
MAX_EXPERTS_PER_PAGE = 65536

TILE_ROWS, TILE_COLS, PART_ALIGNMENT = 16, 32, 64

_HEADER = struct.Struct("<8sIIQQQ32sQQ32s")  # 120 bytes; their CRC-32C follows
_RECORD = struct.Struct("<IHHQQII32sIIQ")  # 80 bytes; three descriptors follow
_MATRIX = struct.Struct("<BBHIII")
_MATRICES_PER_PAGE = 3


class PageKind(IntEnum):
    """What a page holds."""

    ONNX = 1
    EXPERT = 2
    LINEAR = 3
    ROWS = 4
    TENSOR = 5
    TOKENIZER = 7
    JSON = 8


class WeightType(IntEnum):
    """How a matrix's values are stored; 0 marks an absent matrix in a record."""

    F32 = 1
    INT8 = 2
    INT4 = 3


class Activation(IntEnum):
    """The function between an expert's matrices; gelu is the one with erf."""

    NONE = 0
    GELU = 1
    RELU = 2
    SILU = 3


_TILE_BYTES = {WeightType.F32: 2048, WeightType.INT8: 544, WeightType.INT4: 288}
_KINDS, _TYPES, _ACTIVATIONS = frozenset(PageKind), frozenset(WeightType), frozenset(Activation)
_RAW_KINDS = (PageKind.ONNX, PageKind.TOKENIZER, PageKind.JSON)
_ROW_OVERHEAD = {WeightType.INT8: 8, WeightType.F32: 4}  # scale and CRC, or CRC alone


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of `rows` outputs x `cols` inputs; `bias` says whether `rows` float32 values follow it."""

    type: WeightType
    rows: int
    cols: int
    bias: bool = False


@dataclass(frozen=True)
class Page:
    """One index record. `offset` and `length` in bytes; `stride` in bytes from one expert (or row) to the next."""

    id: int
    kind: PageKind
    offset: int
    length: int
    crc32c: int
    sha256: bytes
    activation: Activation = Activation.NONE
    count: int = 0
    stride: int = 0
    matrices: tuple[Matrix, ...] = ()


@dataclass(frozen=True)
class Header:
    """The header's fields; offsets and lengths in bytes."""

    alignment: int
    file_length: int
    index_offset: int
    index_length: int
    index_sha256: bytes
    manifest_offset: int
    manifest_length: int
    manifest_sha256: bytes


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` (a power of two) that is not below `value`."""
    return (value + alignment - 1) & ~(alignment - 1)


def check_alignment(alignment: int) -> None:
    """Raise `UsageError` unless `alignment` is a power of two from 4096 to 1 MiB."""
    if not HEADER_BYTES <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise UsageError(f"the alignment must be a power of two from {HEADER_BYTES} to {MAX_ALIGNMENT}, not {alignment}")


def matrix_bytes(type: WeightType, rows: int, cols: int) -> int:
    """Bytes of a matrix in tiles of 16 x 32, padding included, without its bias."""
    return (align_up(rows, TILE_ROWS) // TILE_ROWS) * (align_up(cols, TILE_COLS) // TILE_COLS) * _TILE_BYTES[WeightType(type)]


def row_bytes(type: WeightType, cols: int) -> int:
    """Bytes of one row of a `rows` page: its values, an int8 row's float32 scale before them, the CRC-32C after them."""
    if type not in _ROW_OVERHEAD:
        raise UsageError("rows are stored as int8 or f32")
    return (cols if type == WeightType.INT8 else 4 * cols) + _ROW_OVERHEAD[WeightType(type)]


def expert_layout(matrices: Sequence[Matrix]) -> tuple[tuple[tuple[int, int | None], ...], int]:
    """Where the parts of one expert (or linear) lie: `((tiles, bias or None) per matrix, stride)`, bytes from its start.

    Every part begins at a multiple of 64; a bias is `rows` float32 values padded to a multiple of 16 values.
    """
    parts: list[tuple[int, int | None]] = []
    position = 0
    for matrix in matrices:
        tiles, bias = position, None
        position = align_up(tiles + matrix_bytes(matrix.type, matrix.rows, matrix.cols), PART_ALIGNMENT)
        if matrix.bias:
            bias = position
            position += 4 * align_up(matrix.rows, TILE_ROWS)
        parts.append((tiles, bias))
    return tuple(parts), position


def encode_header(header: Header) -> bytes:
    """The 4096 bytes of a header, its CRC included."""
    fields = _HEADER.pack(
        MAGIC,
        MAJOR_VERSION,
        header.alignment,
        header.file_length,
        header.index_offset,
        header.index_length,
        header.index_sha256,
        header.manifest_offset,
        header.manifest_length,
        header.manifest_sha256,
    )
    return (fields + struct.pack("<I", crc32c(fields))).ljust(HEADER_BYTES, b"\0")


def decode_header(data: bytes) -> Header:
    """Check everything a header says about itself (not whether the file agrees). Raises `BundleError`.

    Magic, major version and CRC keep their places in every future version, so that a newer file is told from a damaged one.
    """
    fields = data[: _HEADER.size]
    if data[:8] != MAGIC[: len(data)]:
        if data.startswith(b"EDGEML\n"):
            raise BundleError("its line ends were converted on the way; transfer it again in binary mode")
        raise BundleError("this is not an edgeml bundle (the first 8 bytes are not the format's)")
    if len(data) < HEADER_BYTES:
        raise BundleError(f"truncated: {len(data)} bytes are fewer than the header's {HEADER_BYTES}; copy the file again")
    if crc32c(fields) != int.from_bytes(data[_HEADER.size : _HEADER.size + 4], "little"):
        raise BundleError("the header is damaged (its checksum is wrong); copy the file again")
    _, major, *numbers = _HEADER.unpack(fields)
    if major != MAJOR_VERSION:
        advice = "install a newer edgeml-runtime" if major > MAJOR_VERSION else "export it again"
        raise BundleError(f"format version {major}, and this edgeml reads version {MAJOR_VERSION}; {advice}")
    if any(data[_HEADER.size + 4 :]):
        raise BundleError("the unused part of the header is not zero")
    header = Header(*numbers)
    try:
        check_alignment(header.alignment)
    except UsageError as error:
        raise BundleError(f"header: {error}") from None
    _check_extents(header)
    return header


def _check_extents(header: Header) -> None:
    if header.file_length > MAX_FILE_BYTES:
        raise BundleError(f"header: a file length of {header.file_length} is above the limit of {MAX_FILE_BYTES}")
    if header.index_length % RECORD_BYTES or header.index_length > MAX_PAGES * RECORD_BYTES:
        raise BundleError(f"header: an index of {header.index_length} bytes is not a whole number of at most {MAX_PAGES} records")
    if not 2 <= header.manifest_length <= MAX_MANIFEST_BYTES:
        raise BundleError(f"header: a manifest of {header.manifest_length} bytes; it must have 2 to {MAX_MANIFEST_BYTES}")
    if header.index_offset < header.alignment or header.index_offset % header.alignment:
        raise BundleError(f"header: the index begins at {header.index_offset}, which is no page boundary")
    if header.manifest_offset != header.index_offset + header.index_length:
        raise BundleError("header: the manifest does not begin where the index ends")
    if header.file_length != header.manifest_offset + header.manifest_length:
        raise BundleError("header: the file does not end where the manifest ends")


def encode_record(page: Page) -> bytes:
    """The 128 bytes of an index record."""
    head = _RECORD.pack(
        page.id, page.kind, 0, page.offset, page.length, page.crc32c, 0, page.sha256, page.activation, page.count, page.stride
    )
    tail = b"".join(_MATRIX.pack(m.type, m.bias, 0, m.rows, m.cols, 0) for m in page.matrices)
    return (head + tail).ljust(RECORD_BYTES, b"\0")


def decode_index(data: bytes, alignment: int, index_offset: int) -> tuple[Page, ...]:
    """Decode and check every record: ids in order, pages gap-free in order, shapes x type = bytes. Raises `BundleError`."""
    pages = []
    expected = alignment
    for number in range(len(data) // RECORD_BYTES):
        page = _decode_record(data[number * RECORD_BYTES : (number + 1) * RECORD_BYTES], number)
        if page.offset != expected:
            raise BundleError(f"page {number}: begins at {page.offset}, expected {expected} (pages follow each other without holes)")
        if page.offset + page.length > index_offset:
            raise BundleError(f"page {number}: {page.length} bytes from {page.offset} reach past the pages' end at {index_offset}")
        pages.append(page)
        expected = align_up(page.offset + page.length, alignment)
    if expected != index_offset:
        raise BundleError(f"the pages end at {expected}, but the index begins at {index_offset}")
    return tuple(pages)


def _decode_record(record: bytes, number: int) -> Page:
    id, kind, zero_a, offset, length, crc, zero_b, sha256, activation, count, stride = _RECORD.unpack_from(record)
    where = f"page {number}"
    if id != number:
        raise BundleError(f"{where}: its record carries the id {id}")
    if zero_a or zero_b:
        raise BundleError(f"{where}: a reserved field is not zero")
    if kind not in _KINDS:
        raise BundleError(f"{where}: unknown page kind {kind}")
    if activation not in _ACTIVATIONS:
        raise BundleError(f"{where}: unknown activation {activation}")
    if length < 1:
        raise BundleError(f"{where}: it is empty")
    matrices = _decode_matrices(record, where)
    page = Page(id, PageKind(kind), offset, length, crc, sha256, Activation(activation), count, stride, matrices)
    check_shape(page)
    return page


def _decode_matrices(record: bytes, where: str) -> tuple[Matrix, ...]:
    matrices: list[Matrix] = []
    for number in range(_MATRICES_PER_PAGE):
        type, bias, zero_a, rows, cols, zero_b = _MATRIX.unpack_from(record, _RECORD.size + number * _MATRIX.size)
        if type == 0:
            if bias or zero_a or rows or cols or zero_b:
                raise BundleError(f"{where}: matrix {number} is absent but has fields that are not zero")
            continue
        if len(matrices) != number:
            raise BundleError(f"{where}: matrix {number} follows an absent one")
        if type not in _TYPES:
            raise BundleError(f"{where}: matrix {number} has the unknown type {type}")
        if bias > 1 or zero_a or zero_b:
            raise BundleError(f"{where}: matrix {number} has a field outside its range")
        matrices.append(Matrix(WeightType(type), rows, cols, bool(bias)))
    return tuple(matrices)


def check_shape(page: Page) -> None:
    """Raise `BundleError` unless kind, matrices, count, stride and length agree with each other."""
    where = f"page {page.id} ({page.kind.name.lower()})"
    for matrix in page.matrices:
        if not (1 <= matrix.rows <= MAX_DIMENSION and 1 <= matrix.cols <= MAX_DIMENSION):
            raise BundleError(f"{where}: a matrix of {matrix.rows} x {matrix.cols}; each side must be 1 to {MAX_DIMENSION}")
    problem = _shape_problem(page)
    if problem:
        raise BundleError(f"{where}: {problem}")


def _shape_problem(page: Page) -> str | None:
    if page.kind != PageKind.EXPERT and page.activation != Activation.NONE:
        return "only experts have an activation"
    if page.kind in _RAW_KINDS:
        return "this kind has no matrices, count or stride" if page.matrices or page.count or page.stride else None
    if page.kind != PageKind.EXPERT and len(page.matrices) != 1:
        return f"this kind has one matrix, not {len(page.matrices)}"
    count, stride = _expected_counts(page)
    if page.kind == PageKind.EXPERT:
        problem = _expert_problem(page)
        if problem:
            return problem
    if page.kind == PageKind.TENSOR and (page.matrices[0].type != WeightType.F32 or page.matrices[0].bias):
        return "a tensor is f32 without a bias"
    if page.kind == PageKind.ROWS and (page.matrices[0].type not in _ROW_OVERHEAD or page.matrices[0].bias):
        return "rows are int8 or f32 without a bias"
    if (page.count, page.stride) != (count, stride):
        return f"count {page.count} and stride {page.stride}, where its matrices give {count} and {stride}"
    expected = _expected_length(page)
    return None if page.length == expected else f"{page.length} bytes, where its matrices give {expected}"


def _expert_problem(page: Page) -> str | None:
    if not 1 <= page.count <= MAX_EXPERTS_PER_PAGE:
        return f"{page.count} experts; a page holds 1 to {MAX_EXPERTS_PER_PAGE}"
    if len(page.matrices) not in (2, 3):
        return f"an expert has 2 or 3 matrices, not {len(page.matrices)}"
    up, down = page.matrices[0], page.matrices[-1]
    shapes = [(matrix.rows, matrix.cols) for matrix in page.matrices]
    if shapes[:-1] != [(up.rows, up.cols)] * (len(shapes) - 1) or (down.rows, down.cols) != (up.cols, up.rows):
        return f"shapes {shapes} are not up, (gate,) down with down turned round"
    return None


def _expected_counts(page: Page) -> tuple[int, int]:
    if page.kind == PageKind.TENSOR:
        return 0, 0
    if page.kind == PageKind.ROWS:
        matrix = page.matrices[0]
        return 1, row_bytes(matrix.type, matrix.cols) if matrix.type in _ROW_OVERHEAD else 0
    _, stride = expert_layout(page.matrices)
    return (page.count if page.kind == PageKind.EXPERT else 1), stride


def _expected_length(page: Page) -> int:
    if page.kind == PageKind.TENSOR:
        return 4 * page.matrices[0].rows * page.matrices[0].cols
    if page.kind == PageKind.ROWS:
        return page.matrices[0].rows * page.stride
    return page.count * page.stride
