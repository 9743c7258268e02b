"""Write the C source of the extension module `edgeml._native`: `build_ffi.py OUTPUT.c` (called by CMake)."""

from __future__ import annotations

import sys

from cffi import FFI

CDEF = """
uint32_t edgeml_crc32c(uint32_t crc, const void *data, size_t n);
const char *edgeml_crc32c_name(void);
"""


def main() -> None:
    ffi = FFI()
    ffi.cdef(CDEF)
    ffi.set_source("edgeml._native", '#include "edgeml.h"')
    ffi.emit_c_code(sys.argv[1])


if __name__ == "__main__":
    main()
