"""The one place an export writes to: a hidden folder beside the output, and the rename that makes the candidate the output.

Everything is written in `.NAME.export`, which this process holds a lock on. The candidate is measured there and takes the output's
name by one rename at the very end; whatever happens before (a broken limit, a full disk, Ctrl-C) takes the folder away and leaves
an earlier file as it was. What a killed export left behind is cleared by the next.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeml.bundle import Bundle, replace_manifest
from edgeml.errors import DeviceError, UsageError
from edgeml_export.evidence import CHOICES, INPUTS

__all__ = ["FILES", "folder", "publish"]

#: What may lie in the hidden folder; the first is the candidate.
FILES = ("candidate.edgeml", CHOICES, INPUTS)


def publish(candidate: Path, target: Path, evidence: Mapping[str, Any]) -> None:
    """Put the evidence into the manifest and give the candidate its name."""
    with Bundle.open(candidate) as opened:
        manifest = {**opened.manifest, "evidence": evidence}
    replace_manifest(candidate, manifest)
    with _reporting(target):
        os.rename(candidate, target)
        fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot sync a directory; the rename itself stands
                raise
        finally:
            os.close(fd)


@contextmanager
def folder(target: Path) -> Iterator[Path]:
    """The hidden folder of an export to `target`: empty, locked, and gone afterwards."""
    if target.is_dir():
        raise UsageError(f"{target}: this is a directory; name a file to write")
    place = target.with_name(f".{target.name}.export")
    with _reporting(target):
        fd = _lock(place)
    try:
        with _reporting(target):
            _clear(place)
        try:
            yield place
        except OSError as error:
            raise DeviceError(f"{target}: the export failed ({error.strerror or error}); nothing was changed") from error
        finally:
            _clear(place)
            place.rmdir()
    finally:
        os.close(fd)


def _lock(place: Path) -> int:
    """Make and lock the folder. The caller owns the descriptor; closing it gives up the lock."""
    while True:
        place.mkdir(exist_ok=True)
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if place.exists() and os.path.samestat(os.fstat(fd), place.stat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise UsageError(f"{place}: another process is exporting to this file; wait for it to finish") from None
        os.close(fd)  # its last owner took it away between our two calls


def _clear(place: Path) -> None:
    """Remove what an export leaves; anything else there is not ours to touch."""
    for left in place.iterdir():
        if left.name.lstrip(".").removesuffix(".part") not in FILES:
            raise UsageError(f"{left}: this is in the way and is not left by an export; move it")
        left.unlink()


@contextmanager
def _reporting(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise UsageError(f"{target}: cannot be written there ({error.strerror}); choose a folder that exists") from error
        raise DeviceError(f"{target}: cannot be written ({error.strerror}); nothing was changed") from error
