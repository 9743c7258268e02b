"""The bundle: what is written is what is read, and every abuse of the format is refused with one sentence."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeml.bundle import Bundle, replace_manifest
from edgeml.bundle_writer import PageSource, write_bundle
from edgeml.errors import BundleError, DeviceError, EdgemlError, PageError, UsageError
from edgeml.layout import Activation, Matrix, PageKind, WeightType, expert_layout, matrix_bytes
from edgeml.native import crc32c

MANIFEST = {"format": 1, "producer": {"name": "edgeml-runtime", "version": "0"}, "stages": [], "sites": [], "tasks": []}


def expert_page(count: int = 2, seed: int = 0) -> PageSource:
    matrices = (Matrix(WeightType.INT4, 40, 70, True), Matrix(WeightType.INT4, 70, 40, False))
    stride = expert_layout(matrices)[1]
    data = bytes((seed + i) % 251 for i in range(stride * count))
    return PageSource(PageKind.EXPERT, data, matrices, Activation.GELU, count)


def sample(path: Path) -> str:
    pages = [PageSource(PageKind.JSON, b"{}"), expert_page(), PageSource(PageKind.TOKENIZER, b"t" * 5000)]
    return write_bundle(path, pages, MANIFEST)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "m.edgeml"
    sample(path)
    return path


def patch(path: Path, offset: int, data: bytes, reseal: bool = True) -> None:
    """Overwrite bytes; `reseal` recomputes the header's hashes and CRC so that only the rule under test is broken."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    if reseal:
        index, index_length = struct.unpack_from("<QQ", content, 24)
        manifest, manifest_length = struct.unpack_from("<QQ", content, 72)
        if index + index_length <= len(content) and manifest + manifest_length <= len(content):
            content[40:72] = hashlib.sha256(content[index : index + index_length]).digest()
            content[88:120] = hashlib.sha256(content[manifest : manifest + manifest_length]).digest()
        content[120:124] = struct.pack("<I", crc32c(bytes(content[:120])))
    path.write_bytes(content)


def index_offset(path: Path) -> int:
    return int(struct.unpack_from("<Q", path.read_bytes(), 24)[0])


def refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(BundleError, match=match) as caught:
        Bundle.open(path)
    assert "\n" not in str(caught.value)


def test_what_is_written_is_read(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        assert [page.kind for page in opened.pages] == [PageKind.JSON, PageKind.EXPERT, PageKind.TOKENIZER]
        assert opened.read(2) == b"t" * 5000
        assert opened.pages[1].count == 2
        assert opened.pages[1].matrices[0] == Matrix(WeightType.INT4, 40, 70, True)
        assert opened.manifest == MANIFEST
        assert list(opened.verify())[-1] == bundle.stat().st_size


def test_pages_begin_at_multiples_of_the_alignment_without_holes(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        end = 4096
        for page in opened.pages:
            assert page.offset == -(-end // 4096) * 4096
            end = page.offset + page.length


def test_writing_twice_gives_equal_bytes(tmp_path: Path) -> None:
    assert sample(tmp_path / "a") == sample(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_streamed_pages_equal_whole_ones(tmp_path: Path) -> None:
    whole = bytes(range(256)) * 40
    write_bundle(tmp_path / "a", [PageSource(PageKind.ONNX, whole)], MANIFEST)
    write_bundle(tmp_path / "b", [PageSource(PageKind.ONNX, lambda: (whole[i : i + 100] for i in range(0, len(whole), 100)))], MANIFEST)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_identity_survives_a_new_manifest(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        before = opened.id
    replace_manifest(bundle, MANIFEST | {"evidence": {"note": "measured"}})
    with Bundle.open(bundle) as opened:
        assert opened.id == before
        assert opened.manifest["evidence"] == {"note": "measured"}
        list(opened.verify())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EdgemlError, match="no such file"):
        Bundle.open(tmp_path / "absent.edgeml")


def test_directory_instead_of_file(tmp_path: Path) -> None:
    with pytest.raises(EdgemlError):
        Bundle.open(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b"")
    refused(tmp_path / "e")


def test_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"GGUF" + bytes(9000))
    refused(tmp_path / "f", "not an edgeml bundle|magic")


def test_newer_major_version(bundle: Path) -> None:
    patch(bundle, 8, struct.pack("<I", 2))
    refused(bundle, "version")


@pytest.mark.parametrize("alignment", [0, 1, 3000, 5000, 1 << 30])
def test_bad_alignment(bundle: Path, alignment: int) -> None:
    patch(bundle, 12, struct.pack("<I", alignment))
    refused(bundle)


@pytest.mark.parametrize("field", [16, 24, 32, 72, 80])
@pytest.mark.parametrize("value", [0, 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_header_offsets_and_lengths_beyond_the_file(bundle: Path, field: int, value: int) -> None:
    """Refused before anything is allocated, whatever the sums wrap to."""
    patch(bundle, field, struct.pack("<Q", value))
    refused(bundle)


def test_nonzero_header_tail(bundle: Path) -> None:
    """A second format could hide there."""
    patch(bundle, 2000, b"x")
    refused(bundle)


def test_header_bit_flip(bundle: Path) -> None:
    patch(bundle, 100, b"\xff", reseal=False)
    refused(bundle)


def test_trailing_bytes(bundle: Path) -> None:
    with bundle.open("ab") as file:
        file.write(b"PK")
    refused(bundle)


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, struct.pack("<I", 7)),  # id is not the position
        (4, struct.pack("<H", 6)),  # a kind nobody knows
        (4, struct.pack("<H", 999)),
        (6, b"\x01"),  # reserved field set
        (8, struct.pack("<Q", 12288)),  # a hole, or an overlap with the next page
        (8, struct.pack("<Q", 4097)),  # not aligned
        (16, struct.pack("<Q", 0)),
        (16, struct.pack("<Q", 1 << 63)),
        (28, b"\x01"),
        (64, struct.pack("<I", 1)),  # an activation on a JSON page
        (80, b"\x03"),  # a matrix on a JSON page
    ],
)
def test_abused_index_record(bundle: Path, offset: int, data: bytes) -> None:
    patch(bundle, index_offset(bundle) + offset, data)
    refused(bundle)


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (64, struct.pack("<I", 77)),  # unknown activation
        (68, struct.pack("<I", 0)),
        (68, struct.pack("<I", 3)),  # count x stride is not the length
        (72, struct.pack("<Q", 64)),
        (80, b"\x09"),  # unknown type
        (81, b"\x02"),  # a bias that is neither there nor absent
        (84, struct.pack("<I", 0)),
        (84, struct.pack("<I", 0xFFFFFFFF)),
        (88, struct.pack("<I", 1 << 25)),
        (84, struct.pack("<I", 41)),  # does not fit the other matrix
    ],
)
def test_abused_expert_record(bundle: Path, offset: int, data: bytes) -> None:
    patch(bundle, index_offset(bundle) + 128 + offset, data)
    refused(bundle)


def test_duplicate_keys_in_the_manifest(bundle: Path) -> None:
    """Two readers would see two manifests."""
    content = bundle.read_bytes()
    place = content.rindex(b'"sites"')
    patch(bundle, place, b'"tasks"')
    refused(bundle)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 1 << 20))
def test_truncated_at_any_length(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "m"
    sample(path)
    content = path.read_bytes()
    path.write_bytes(content[: length % len(content)])
    refused(path)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 1 << 30), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("flip") / "m"
    sample(path)
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises((BundleError, PageError)), Bundle.open(path) as opened:
        list(opened.verify())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=9000), max_size=6), st.sampled_from([4096, 8192, 65536]))
def test_any_pages_round_trip(tmp_path_factory: pytest.TempPathFactory, pages: list[bytes], alignment: int) -> None:
    path = tmp_path_factory.mktemp("trip") / "m"
    write_bundle(path, [PageSource(PageKind.ONNX, data) for data in pages], MANIFEST, alignment)
    with Bundle.open(path) as opened:
        assert [opened.read(i) for i in range(len(pages))] == pages
        list(opened.verify())


def test_flipped_bit_in_a_page_is_found_when_it_is_read(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        offset = opened.pages[2].offset
    patch(bundle, offset + 17, b"X", reseal=False)
    with Bundle.open(bundle) as opened, pytest.raises(PageError, match="page 2"):
        opened.read(2)


def test_truncated_after_opening(bundle: Path) -> None:
    with Bundle.open(bundle) as opened:
        os.truncate(bundle, 5000)
        with pytest.raises(PageError):
            opened.read(2)


def test_writer_refuses_what_the_reader_would(tmp_path: Path) -> None:
    wrong = PageSource(PageKind.EXPERT, b"short", expert_page().matrices, Activation.GELU, 1)
    with pytest.raises(UsageError):
        write_bundle(tmp_path / "m", [wrong], MANIFEST)
    assert list(tmp_path.iterdir()) == []


def test_failure_while_writing_leaves_the_old_file(bundle: Path) -> None:
    before = bundle.read_bytes()

    def broken() -> list[bytes]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(bundle, [PageSource(PageKind.ONNX, broken)], MANIFEST)
    assert bundle.read_bytes() == before
    assert list(bundle.parent.iterdir()) == [bundle]


WRITER = f"""
import sys
from edgeml.bundle_writer import PageSource, write_bundle
from edgeml.layout import PageKind
write_bundle(sys.argv[1], [PageSource(PageKind.ONNX, lambda: (b"x" * 65536 for _ in range(int(sys.argv[2]))))], {MANIFEST})
"""


def test_full_disk_is_one_sentence_and_leaves_the_old_file(bundle: Path) -> None:
    before = bundle.read_bytes()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    code = (
        WRITER.replace("write_bundle(sys", "from edgeml.errors import DeviceError\ntry:\n    write_bundle(sys")
        + "except DeviceError as e:\n    print(e); sys.exit(4)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(bundle), "64"], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == DeviceError.exit_code, done.stderr
    assert done.stdout.count("\n") == 1
    assert bundle.read_bytes() == before
    assert list(bundle.parent.iterdir()) == [bundle]


def test_killed_writer_leaves_the_old_file(bundle: Path) -> None:
    before = bundle.read_bytes()
    for delay in (0.25, 0.35):
        child = subprocess.Popen([sys.executable, "-P", "-c", WRITER, str(bundle), "1000000"])
        time.sleep(delay)
        child.kill()
        child.wait()
        assert bundle.read_bytes() == before


def test_tile_sizes() -> None:
    assert matrix_bytes(WeightType.INT4, 16, 32) == 288
    assert matrix_bytes(WeightType.INT8, 17, 33) == 4 * 544
    assert matrix_bytes(WeightType.F32, 1, 1) == 2048
