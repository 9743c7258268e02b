"""edgeml: run models larger than the device's memory from one file, and know exactly what was lost.

This package is the runtime. It never imports torch; importing it loads nothing heavy.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
