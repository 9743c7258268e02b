"""Every error a user can meet, in one tree. The class says whose fault it is, the message says what, where, and what to try.

    EdgemlError
    |-- QualityRefused      1   a quality or latency gate said no
    |-- UsageError          2   the caller asked for something that cannot be
    |   |-- BudgetError     2   the memory budget is below the floor
    |   `-- MissingExtra    2   an optional dependency is not installed
    |-- InputError          3   a file or a text is not what it should be
    |   |-- BundleError     3   the bundle breaks a rule of the format
    |   `-- DataError       3   a data file or an input row breaks its rules
    |-- NotAnswered         4   a submitted request was refused, cancelled or too late; nothing is wrong with it
    `-- DeviceError         4   the machine failed us
        `-- PageError       4   a page could not be read, or its checksum is wrong

The number is the exit code of the command line.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "BundleError",
    "DataError",
    "DeviceError",
    "EdgemlError",
    "InputError",
    "MissingExtra",
    "NotAnswered",
    "PageError",
    "QualityRefused",
    "UsageError",
]


class EdgemlError(Exception):
    """Base of all errors raised on purpose; its text is fit for a user."""

    exit_code = 4


class QualityRefused(EdgemlError):
    """A gate in a recipe or on the command line was not met."""

    exit_code = 1


class UsageError(EdgemlError):
    """An argument is wrong or does not fit the bundle."""

    exit_code = 2


class BudgetError(UsageError):
    """The memory budget is below what the bundle needs to run at all."""


class MissingExtra(UsageError):
    """An optional dependency is missing; the message carries the install line."""

    def __init__(self, what: str, extra: str) -> None:
        room = {"export": "./exporters", "devices": "./devices", "report": "./reports"}.get(extra)
        source = f" (from a checkout: pip install {room})" if room else ""
        super().__init__(f"{what} needs the extra '{extra}': pip install 'edgeml-runtime[{extra}]'{source}")


class InputError(EdgemlError):
    """A file or an input has the wrong content."""

    exit_code = 3


class BundleError(InputError):
    """The bundle breaks a rule of the format."""


class DataError(InputError):
    """A data file or an input row breaks its rules."""


class NotAnswered(EdgemlError):
    """A submitted request was refused, cancelled or too late."""


class DeviceError(EdgemlError):
    """Reading, writing or running failed on this machine."""


class PageError(DeviceError):
    """A page could not be read or does not match its checksum."""
