"""The C reader against the machine: odd files and what `verify` finds, by the tests of `tests/runtime/test_bundle_faults.py`.

What those do to Python itself (faults injected into `os`, the writer) is not the reader's and is left out.
"""

from __future__ import annotations

from c_reader import read_by_c

TESTS = (
    "symbolic_link_is_not_followed pipe_does_not_hang text_mode_transfer_is_named refused_file_leaves_no_descriptor_open "
    "renamed_file_keeps_its_open_reader closed_bundle_says_so page_that_is_not_there padding_that_is_not_zero_is_found_by_verify "
    "row_with_a_wrong_checksum_of_its_own_is_found_by_verify bundle_without_pages"
)

_faults = read_by_c("test_bundle_faults")
bundle = _faults.bundle
globals().update({f"test_{name}": getattr(_faults, f"test_{name}") for name in TESTS.split()})
