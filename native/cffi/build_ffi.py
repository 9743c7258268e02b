"""Write the C source of the extension module `edgeml._native`: `build_ffi.py OUTPUT.c` (called by CMake).

What Python sees is read from the public header, so the two cannot drift apart.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cffi import FFI

HEADER = Path(__file__).parents[1] / "include" / "edgeml.h"


def declarations(header: str) -> str:
    """The header's declarations in the plain C that cffi reads: no comments, no preprocessor, the status list written out."""
    statuses = re.findall(r"X\((\w+), (\d+), \"", header)
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.DOTALL)
    text = re.sub(r"#(?:.*\\\n)*.*\n", "", text)
    listed = ", ".join(f"EDGEML_{name} = {number}" for name, number in statuses)
    return text.replace("EDGEML_STATUS_MAP(X)", listed)


def main() -> None:
    ffi = FFI()
    ffi.cdef(declarations(HEADER.read_text("utf-8")))
    ffi.set_source("edgeml._native", '#include "edgeml.h"')
    ffi.emit_c_code(sys.argv[1])


if __name__ == "__main__":
    main()
