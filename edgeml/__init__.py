"""edgeml: run models larger than the device's memory from one file, and know exactly what was lost.

    import edgeml
    with edgeml.open("m.edgeml", memory="50%") as session:
        print(session.run("banking77", text="I lost my card").labels)

This package is the runtime. It never imports torch; importing it loads nothing heavy: `open` and `Session` are fetched when
first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeml.session import Session, open

__version__ = "0.1.0"
__all__ = ["Session", "__version__", "open"]


def __getattr__(name: str) -> Any:
    if name in ("Session", "open"):
        from edgeml import session

        return getattr(session, name)
    raise AttributeError(f"module 'edgeml' has no attribute {name!r}")
