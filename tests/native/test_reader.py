"""The C reader of bundles: every test of the format that the Python reader passes, and the same verdict on any damaged file.

The tests of `tests/runtime/test_bundle.py` are loaded a second time with the C reader in the place of `Bundle`. What is about
writing is left out. `test_reader_faults.py` does the same with its neighbour.
"""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

from c_reader import ROOT, build, read_by_c

from edgeml.bundle import Bundle, PageKind, PageSource, write_bundle
from edgeml.errors import EdgemlError
from edgeml.layout import Matrix, WeightType, expert_layout, row_bytes
from edgeml.native import crc32c

TESTS = (
    "what_is_written_is_read pages_begin_at_multiples_of_the_alignment_without_holes identity_survives_a_new_manifest missing_file "
    "directory_instead_of_file empty_file foreign_file newer_major_version bad_alignment header_offsets_and_lengths_beyond_the_file "
    "nonzero_header_tail header_bit_flip trailing_bytes abused_index_record abused_expert_record duplicate_keys_in_the_manifest "
    "truncated_at_any_length any_flipped_bit_is_found any_pages_round_trip flipped_bit_in_a_page_is_found_when_it_is_read "
    "truncated_after_opening"
)

_format = read_by_c("test_bundle")
bundle = _format.bundle
globals().update({f"test_{name}": getattr(_format, f"test_{name}") for name in TESTS.split()})


def odd_bundle(path: Path) -> bytes:
    """Every kind of page, among them rows and a tensor."""
    row = struct.pack("<f40b", 0.5, *range(40))
    rows = (row + struct.pack("<I", crc32c(row))) * 2000
    assert len(row) + 4 == row_bytes(WeightType.INT8, 40)
    linear = Matrix(WeightType.INT8, 33, 65, True)
    pages = [
        PageSource(PageKind.JSON, b"{}"),
        _format.expert_page(3),
        PageSource(PageKind.ROWS, rows, (Matrix(WeightType.INT8, 2000, 40),)),
        PageSource(PageKind.TENSOR, bytes(4 * 6 * 7), (Matrix(WeightType.F32, 6, 7),)),
        PageSource(PageKind.LINEAR, bytes(expert_layout([linear])[1]), (linear,)),
        PageSource(PageKind.ONNX, b"o" * 70_000),
    ]
    write_bundle(path, pages, _format.MANIFEST)
    return path.read_bytes()


def damaged(rng: random.Random, whole: bytes, path: Path) -> None:
    """One to three wrong bytes, often in the header or an index record, often with the checksums put right again."""
    path.write_bytes(whole)
    index, length = struct.unpack_from("<QQ", whole, 24)
    for _ in range(rng.randint(1, 3)):
        place = rng.choice([rng.randrange(8, 124), index + rng.randrange(length), rng.randrange(len(whole))])
        value = rng.choice([0, 1, 2, 3, 7, 127, 255, rng.randrange(256)])
        _format.patch(path, place, bytes([value]), reseal=rng.random() < 0.8)
    if rng.random() < 0.1:
        path.write_bytes(path.read_bytes()[: rng.randrange(len(whole))])


def accepted_by_python(path: Path) -> bool:
    try:
        with Bundle.open(path) as bundle:
            list(bundle.verify())
    except EdgemlError as error:
        return "manifest is refused" in str(error)  # what is in the JSON is not the C reader's
    return True


def test_both_readers_agree_on_any_damaged_file_and_no_byte_is_read_out_of_place(tmp_path: Path) -> None:
    """Under the address and undefined-behaviour sanitizers, which end the program at the first fault."""
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = build(tmp_path / "read_bundle", *flags, ROOT / "native" / "tests" / "read_bundle.c")
    whole = odd_bundle(tmp_path / "whole")
    rng = random.Random(7)
    paths = [tmp_path / "whole"] + [tmp_path / f"m{number}" for number in range(400)]
    for path in paths[1:]:
        damaged(rng, whole, path)
    done = subprocess.run([program, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    verdicts = {Path(line.split("\t")[0]): line.split("\t") for line in done.stdout.splitlines()}
    assert verdicts[paths[0]][1] == "0", verdicts[paths[0]]
    for path in paths:
        assert (verdicts[path][1] == "0") == accepted_by_python(path), verdicts[path]
    refused = {fields[2] for fields in verdicts.values() if fields[1] != "0"}
    assert len(refused) > 20  # many rules were met, not one again and again
