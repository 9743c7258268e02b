"""The bundle against the machine: odd files, full disks, second writers and processes that die at the worst moment."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgeml.bundle import Bundle, Matrix, PageKind, PageSource, WeightType, replace_manifest, row_bytes, write_bundle
from edgeml.errors import BundleError, DeviceError, EdgemlError, PageError, UsageError
from edgeml.layout import MAX_MANIFEST_BYTES, encode_header
from edgeml.native import crc32c

MANIFEST = {"format": 1}

#: Writes 64 KiB pieces for ever under the name argv[1]: somebody has to stop it.
ENDLESS_WRITER = """
import itertools, sys
from edgeml.bundle import PageKind, PageSource, write_bundle
try:
    write_bundle(sys.argv[1], [PageSource(PageKind.ONNX, lambda: (b"x" * 65536 for _ in itertools.count()))], {"format": 1})
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "m.edgeml"
    write_bundle(path, [PageSource(PageKind.JSON, b"{}"), PageSource(PageKind.TOKENIZER, b"t" * 5000)], MANIFEST)
    return path


def part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


@contextmanager
def endless_writer(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is known to be in the middle of a page; killed at the end whatever happens."""
    child = subprocess.Popen([sys.executable, "-P", "-c", ENDLESS_WRITER, str(path)])
    try:
        while not (part_of(path).exists() and part_of(path).stat().st_size > 65536):
            assert child.poll() is None, "the writer ended by itself"
        yield child
    finally:
        child.kill()
        child.wait()


# --- opening -----------------------------------------------------------------------------------------------------------


def test_symbolic_link_is_not_followed(bundle: Path, tmp_path: Path) -> None:
    """Refused: what a link points to can be swapped between two looks at it."""
    link = tmp_path / "link.edgeml"
    link.symlink_to(bundle)
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(link)


def test_pipe_does_not_hang(tmp_path: Path) -> None:
    """Refused at once, although nobody will ever write into it."""
    os.mkfifo(tmp_path / "pipe.edgeml")
    with pytest.raises(BundleError, match="not a regular file"):
        Bundle.open(tmp_path / "pipe.edgeml")


def test_null_byte_in_the_name() -> None:
    with pytest.raises(BundleError, match="not a file name"):
        Bundle.open("m\0.edgeml")


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, BundleError), (errno.ENOENT, BundleError), (errno.EIO, DeviceError), (errno.EMFILE, DeviceError)]
)
def test_failed_open_is_the_right_error(bundle: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[EdgemlError]) -> None:
    """Whose fault it is decides the exit code: a wrong or unreadable file is 3, a failing medium is 4."""

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("edgeml.bundle.os.open", refuse)
    with pytest.raises(kind, match=str(bundle)):
        Bundle.open(bundle)


def test_text_mode_transfer_is_named(bundle: Path) -> None:
    bundle.write_bytes(bundle.read_bytes().replace(b"\r\n", b"\n"))
    with pytest.raises(BundleError, match="binary mode"):
        Bundle.open(bundle)


def test_refused_file_leaves_no_descriptor_open(bundle: Path) -> None:
    bundle.write_bytes(b"EDGEML\r\n" + bytes(5000))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(BundleError):
            Bundle.open(bundle)
    assert len(os.listdir("/proc/self/fd")) == before


def test_renamed_file_keeps_its_open_reader(bundle: Path) -> None:
    """Writers replace, they do not overwrite: who has the old file open keeps reading the old file."""
    with Bundle.open(bundle) as old:
        write_bundle(bundle, [PageSource(PageKind.JSON, b"[]")], MANIFEST)
        assert old.read(1) == b"t" * 5000
    with Bundle.open(bundle) as new:
        assert new.read(0) == b"[]"


def test_closed_bundle_says_so(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.close()
    opened.close()
    with pytest.raises(UsageError, match="closed"):
        opened.read(0)


def test_page_that_is_not_there(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        for number in (-1, 2):
            with pytest.raises(UsageError, match="no page"):
                opened.read(number)


def test_read_error_of_a_page_names_page_and_offset(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with Bundle.open(bundle) as opened:
        monkeypatch.setattr("edgeml.bundle.os.pread", fail)
        with pytest.raises(PageError, match=r"page 1 \(tokenizer\) at offset 8192: .*Input/output error"):
            opened.read(1)


def test_short_reads_are_joined(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may return less than was asked for (signals, 2 GiB limit); that is no fault."""
    pread = os.pread
    monkeypatch.setattr("edgeml.bundle.os.pread", lambda fd, length, offset: pread(fd, min(length, 1000), offset))
    with Bundle.open(bundle) as opened:
        assert opened.read(1) == b"t" * 5000


# --- what only `verify` looks at ---------------------------------------------------------------------------------------


def test_padding_that_is_not_zero_is_found_by_verify(bundle: Path) -> None:
    """Padding is nobody's page: bytes hidden there would travel unseen."""
    with bundle.open("r+b") as file:
        file.seek(4096 + 100)
        file.write(b"hidden")
    with Bundle.open(bundle) as opened, pytest.raises(BundleError, match="padding"):
        list(opened.verify())


def test_row_with_a_wrong_checksum_of_its_own_is_found_by_verify(tmp_path: Path) -> None:
    """The page's checksums cover what the writer wrote; a row is later read alone, so its own must be right as well."""
    row = struct.pack("<f4b", 0.5, 1, 2, 3, 4)
    good, bad = row + struct.pack("<I", crc32c(row)), row + struct.pack("<I", 1)
    assert len(good) == row_bytes(WeightType.INT8, 4)
    write_bundle(tmp_path / "m", [PageSource(PageKind.ROWS, good * 5 + bad, (Matrix(WeightType.INT8, 6, 4),))], MANIFEST)
    with Bundle.open(tmp_path / "m") as opened, pytest.raises(BundleError, match="row 5"):
        list(opened.verify())


def test_verify_counts_up_to_the_file_length(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        steps = list(opened.verify())
        assert steps == sorted(steps)
        assert steps[-1] == bundle.stat().st_size


def test_bundle_without_pages(tmp_path: Path) -> None:
    write_bundle(tmp_path / "m", [], MANIFEST)
    with Bundle.open(tmp_path / "m") as opened:
        assert opened.pages == ()
        assert list(opened.verify())


# --- writing -----------------------------------------------------------------------------------------------------------


def test_killed_writers_leave_the_old_file_and_the_next_one_cleans_up(bundle: Path) -> None:
    """kill -9 in mid-page, again and again: the old bytes stay, and the remains are taken over rather than piled up."""
    before = bundle.read_bytes()
    for _ in range(3):
        with endless_writer(bundle) as child:
            child.kill()
            child.wait()
            assert bundle.read_bytes() == before
            assert sorted(bundle.parent.iterdir()) == [part_of(bundle), bundle]
            part_of(bundle).write_bytes(b"")  # so that the next round waits for its own writer
    write_bundle(bundle, [PageSource(PageKind.JSON, b"[]")], MANIFEST)
    assert list(bundle.parent.iterdir()) == [bundle]
    with Bundle.open(bundle) as opened:
        assert opened.read(0) == b"[]"


def test_interrupted_writer_leaves_the_old_file_and_no_litter(bundle: Path) -> None:
    before = bundle.read_bytes()
    with endless_writer(bundle) as child:
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=30) == 130
    assert bundle.read_bytes() == before
    assert list(bundle.parent.iterdir()) == [bundle]


def test_second_writer_is_refused(bundle: Path) -> None:
    """Two writers of one name would mix their pages; the second gets a sentence and the first goes on."""
    with endless_writer(bundle) as child:
        with pytest.raises(UsageError, match="another process is writing"):
            write_bundle(bundle, [], MANIFEST)
        assert child.poll() is None
        assert part_of(bundle).exists()


def test_writer_that_lost_the_race_for_the_lock_starts_over(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and lock the other writer may rename its file into place; writing on would destroy the finished bundle."""
    finished = bundle.read_bytes()
    rival = bundle.with_name("rival")
    part_of(rival).write_bytes(finished)
    lock = fcntl.flock
    calls: list[int] = []

    def lock_late(fd: int, operation: int) -> None:
        if not calls:
            part_of(rival).rename(rival)
        calls.append(fd)
        lock(fd, operation)

    monkeypatch.setattr("edgeml.bundle_writer.fcntl.flock", lock_late)
    held = os.open(part_of(rival), os.O_RDONLY)  # keeps the finished file's bytes in view after its name is replaced
    try:
        write_bundle(rival, [], MANIFEST)
        assert len(calls) == 2
        assert os.pread(held, len(finished) + 1, 0) == finished
    finally:
        os.close(held)


def test_hard_link_in_the_way_is_not_written_through(bundle: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    part_of(bundle).hardlink_to(victim)
    with pytest.raises(UsageError, match="in the way"):
        write_bundle(bundle, [], MANIFEST)
    assert victim.read_bytes() == b"precious"


def test_symbolic_link_in_the_way_is_not_written_through(bundle: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    part_of(bundle).symlink_to(victim)
    with pytest.raises(EdgemlError):
        write_bundle(bundle, [], MANIFEST)
    assert victim.read_bytes() == b"precious"


#: A new manifest is written front to back, so it has no `pwrite`; and its reader opens the file first.
STEPS = [("write_bundle", step) for step in ("open", "write", "pwrite", "fsync", "rename")]
STEPS += [("replace_manifest", step) for step in ("write", "fsync", "rename")]


@pytest.mark.parametrize(("writer", "step"), STEPS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_fault_in_any_step_leaves_the_old_file(bundle: Path, monkeypatch: pytest.MonkeyPatch, writer: str, step: str, number: int) -> None:
    before = bundle.read_bytes()

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    def write() -> None:
        if writer == "write_bundle":
            write_bundle(bundle, [PageSource(PageKind.JSON, b"[]")], MANIFEST)
        else:
            replace_manifest(bundle, {"format": 1, "x": 1})

    monkeypatch.setattr(f"edgeml.bundle_writer.os.{step}", fail)
    with pytest.raises(DeviceError, match="nothing was changed"):
        write()
    monkeypatch.undo()
    assert bundle.read_bytes() == before
    assert list(bundle.parent.iterdir()) == [bundle]


def test_error_of_the_producer_passes_untouched(bundle: Path) -> None:
    """A page's source that fails to read its own input must not be reported as a full disk."""

    def pages() -> Iterator[bytes]:
        yield b"first"
        raise FileNotFoundError(errno.ENOENT, "No such file", "weights.bin")

    with pytest.raises(FileNotFoundError, match=r"weights\.bin"):
        write_bundle(bundle, [PageSource(PageKind.ONNX, pages)], MANIFEST)
    assert list(bundle.parent.iterdir()) == [bundle]


@pytest.mark.parametrize("name", ["", "no/such/folder/m.edgeml", "n" * 300])
def test_name_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        write_bundle(tmp_path / name, [], MANIFEST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alignment", [0, -4096, 2048, 4097, 1 << 21])
def test_alignment_that_is_refused(tmp_path: Path, alignment: int) -> None:
    with pytest.raises(UsageError, match="power of two"):
        write_bundle(tmp_path / "m", [], MANIFEST, alignment)


def test_manifest_above_its_cap_is_not_written(tmp_path: Path, bundle: Path) -> None:
    huge = {"format": 1, "x": "y" * MAX_MANIFEST_BYTES}
    before = bundle.read_bytes()
    with pytest.raises(UsageError, match="above the limit"):
        write_bundle(tmp_path / "m", [], huge)
    with pytest.raises(UsageError, match="above the limit"):
        replace_manifest(bundle, huge)
    assert bundle.read_bytes() == before


def test_new_manifest_keeps_every_page(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        old, identity = [opened.read(page.id) for page in opened.pages], opened.id
    for manifest in ({"format": 1, "evidence": {"long": "x" * 10_000}}, {"format": 1}):
        replace_manifest(bundle, manifest)
        with Bundle.open(bundle) as opened:
            assert (opened.manifest, opened.id) == (manifest, identity)
            assert [opened.read(page.id) for page in opened.pages] == old
            assert encode_header(opened.header) == bundle.read_bytes()[:4096]
