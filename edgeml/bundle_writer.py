"""Writing a bundle: streamed, deterministic, and whole or not at all.

The new file grows under a sibling name, `.NAME.part`, and takes its place with one rename after it has reached the disk. The
sibling is locked while it is written: a second writer is refused, and what a killed writer left behind is taken over by the next.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeml.errors import BundleError, DeviceError, UsageError
from edgeml.layout import (
    DEFAULT_ALIGNMENT,
    HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_PAGES,
    Activation,
    Header,
    Matrix,
    Page,
    PageKind,
    align_up,
    check_alignment,
    check_shape,
    encode_header,
    encode_record,
    expert_layout,
    row_bytes,
)
from edgeml.native import crc32c
from edgeml.strict_json import StrictJsonError, encode_object

__all__ = ["PageSource", "encode_manifest", "interruptible", "write_bundle", "write_file"]

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class PageSource:
    """What becomes a page: its bytes, or a function that yields them in pieces (called once) when they need not fit in memory.

    `matrices`, `activation` and `count` describe weights (see the format); other kinds leave them alone.
    """

    kind: PageKind
    data: bytes | Callable[[], Iterable[bytes]]
    matrices: tuple[Matrix, ...] = ()
    activation: Activation = Activation.NONE
    count: int = 1


def write_bundle(
    path: str | os.PathLike[str],
    pages: Sequence[PageSource],
    manifest: Manifest | Callable[[list[Page]], Manifest],
    alignment: int = DEFAULT_ALIGNMENT,
) -> str:
    """Write a bundle and return its identity. Equal input gives equal bytes; a failure leaves an earlier file as it was.

    `manifest` may be a function of the written pages. Raises `UsageError` for input the format does not allow (nothing a reader
    would refuse is written), `DeviceError` when the disk is full or fails.
    """
    check_alignment(alignment)
    if len(pages) > MAX_PAGES:
        raise UsageError(f"{len(pages)} pages are more than the limit of {MAX_PAGES}")
    place = Path(path)
    with _replacing(place) as out:
        out.write(bytes(alignment))
        written: list[Page] = []
        for source in pages:
            written.append(_write_page(out, len(written), source))
            out.write(bytes(align_up(out.position, alignment) - out.position))
        document = encode_manifest(manifest(written) if callable(manifest) else manifest)
        index_offset = out.position
        index = b"".join(encode_record(page) for page in written)
        out.write(index)
        manifest_offset = out.position
        out.write(document)
        index_sha256 = hashlib.sha256(index).digest()
        header = Header(
            alignment,
            out.position,
            index_offset,
            len(index),
            index_sha256,
            manifest_offset,
            len(document),
            hashlib.sha256(document).digest(),
        )
        out.write_header(encode_header(header))
    return index_sha256.hex()


def write_file(path: Path, pieces: Iterable[bytes]) -> None:
    """Replace `path` by the concatenated pieces, whole or not at all. Raises `DeviceError` when the disk is full or fails."""
    with _replacing(path) as out:
        for piece in pieces:
            out.write(piece)


class _Output:
    """The file being written; `position` in bytes from its start."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd
        self.position = 0

    def write(self, data: bytes) -> None:
        view = memoryview(data).cast("B")
        self.position += len(view)
        with _reporting(self._path):
            while view:
                view = view[os.write(self._fd, view) :]

    def write_header(self, data: bytes) -> None:
        with _reporting(self._path):
            if os.pwrite(self._fd, data, 0) != HEADER_BYTES:
                raise OSError(errno.EIO, "the header was written in part")

    def sync(self) -> None:
        with _reporting(self._path):
            os.fsync(self._fd)


def _write_page(out: _Output, number: int, source: PageSource) -> Page:
    offset, crc, sha = out.position, 0, hashlib.sha256()
    for piece in source.data() if callable(source.data) else (source.data,):
        crc = crc32c(piece, crc)
        sha.update(piece)
        out.write(piece)
    count, stride = _count_and_stride(source)
    length = out.position - offset
    page = Page(
        number,
        PageKind(source.kind),
        offset,
        length,
        crc,
        sha.digest(),
        Activation(source.activation),
        count,
        stride,
        tuple(source.matrices),
    )
    try:
        if not length:
            raise BundleError(f"page {number}: it is empty")
        check_shape(page)
    except BundleError as error:
        raise UsageError(f"this cannot be written: {error}") from None
    return page


def _count_and_stride(source: PageSource) -> tuple[int, int]:
    if source.kind in (PageKind.EXPERT, PageKind.LINEAR):
        return source.count, expert_layout(source.matrices)[1]
    if source.kind == PageKind.ROWS and source.matrices:
        return 1, row_bytes(source.matrices[0].type, source.matrices[0].cols)
    return 0, 0


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's canonical bytes. Raises `UsageError` for what JSON cannot say and above the limit."""
    try:
        document = encode_object(manifest)
    except StrictJsonError as error:
        raise UsageError(f"the manifest cannot be written: {error}") from None
    if len(document) > MAX_MANIFEST_BYTES:
        raise UsageError(f"a manifest of {len(document)} bytes is above the limit of {MAX_MANIFEST_BYTES}")
    return document


@contextmanager
def _replacing(path: Path) -> Iterator[_Output]:
    """Yield an output that becomes `path` when the block ends well, and vanishes when it does not (Ctrl-C included)."""
    part = path.with_name(f".{path.name}.part")
    with _reporting(path):
        if path.is_dir():
            raise UsageError(f"{path}: this is a directory; name a file to write")
        fd = _lock_part(part)
    try:
        out = _Output(path, fd)
        yield out
        out.sync()
        with _reporting(path):
            os.rename(part, path)
    except BaseException:
        with suppress(OSError):
            if _is_named(fd, part):
                os.unlink(part)
        raise
    finally:
        os.close(fd)
    with _reporting(path):
        _sync_directory(path.parent)


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turn an `OSError` of our own file operations into a sentence; errors of whoever produces the pages pass untouched."""
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from error


def _lock_part(part: Path) -> int:
    """Open and lock the sibling, empty. The caller owns the descriptor; closing it gives up the lock."""
    while True:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{part}: another process is writing this bundle; wait for it to finish") from None
            ours = os.fstat(fd)
            if not stat.S_ISREG(ours.st_mode) or ours.st_nlink > 1:
                raise UsageError(f"{part}: this is in the way and is not an unfinished bundle; remove it")
            # Between open and lock the previous writer may have renamed this very file to its final name.
            if _is_named(fd, part):
                os.ftruncate(fd, 0)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_named(fd: int, path: Path) -> bool:
    ours = os.fstat(fd)
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (named.st_ino, named.st_dev) == (ours.st_ino, ours.st_dev)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a directory; the rename itself stands
            raise
    finally:
        os.close(fd)


def _write_error(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR):
        return UsageError(f"{path}: cannot be written there ({error.strerror}); choose a folder that exists")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DeviceError(f"{path}: no room to write it ({error.strerror}); free some space, nothing was changed")
    return DeviceError(f"{path}: cannot be written ({error.strerror}); nothing was changed")


@contextmanager
def interruptible() -> Iterator[None]:
    """In the main thread: a polite kill and a lost terminal are interruptions too, so that what is half done is taken away first."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
