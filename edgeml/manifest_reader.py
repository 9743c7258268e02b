"""A JSON object of a manifest, read with care: every accessor checks the type and names the place it found wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from edgeml.errors import BundleError
from edgeml.layout import Page, PageKind

__all__ = ["Reader", "is_number", "unique"]

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

T = TypeVar("T")


class Reader:
    """One JSON object and the place it has in the manifest; every accessor checks the type and names the place."""

    def __init__(self, document: Any, where: str) -> None:
        self.where = where
        if not isinstance(document, Mapping):
            raise self.error("expected an object")
        self.document: Mapping[str, Any] = document

    def error(self, problem: str) -> BundleError:
        return BundleError(f"{self.where}: {problem}")

    def value(self, key: str) -> Any:
        if key not in self.document:
            raise self.error(f"the key '{key}' is missing")
        return self.document[key]

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.value(key)
        if type(value) is not int or not low <= value <= high:
            raise self.error(f"'{key}' must be an integer from {low} to {high}, not {value!r:.40}")
        return value

    def number(self, key: str, low: float, high: float = math.inf) -> float:
        value = self.value(key)
        if not is_number(value) or not low <= value <= high:
            bound = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            raise self.error(f"'{key}' must be a number {bound}, not {value!r:.40}")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        values = self.array(key)
        if len(values) != count or not all(is_number(value) for value in values):
            raise self.error(f"'{key}' must be a list of {count} numbers")
        return tuple(float(value) for value in values)

    def string(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str):
            raise self.error(f"'{key}' must be a string")
        return value

    def name(self, key: str) -> str:
        value = self.string(key)
        if not NAME.fullmatch(value):
            raise self.error(f"'{key}' must have 1 to 64 letters, digits, dots, dashes or underscores, not {value!r:.80}")
        return value

    def choice(self, key: str, *choices: str) -> str:
        value = self.value(key)
        if value not in choices:
            raise self.error(f"'{key}' must be one of {', '.join(choices)}, not {value!r:.40}")
        return str(value)

    def boolean(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.error(f"'{key}' must be true or false")
        return value

    def array(self, key: str) -> list[Any]:
        value = self.value(key)
        if not isinstance(value, list):
            raise self.error(f"'{key}' must be a list")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        values = self.array(key)
        if not all(isinstance(value, str) for value in values):
            raise self.error(f"'{key}' must be a list of strings")
        unique(values, f"{self.where}.{key}")
        return tuple(values)

    def items(self, key: str, optional: bool = False) -> list[Reader]:
        if optional and key not in self.document:
            return []
        return [Reader(item, f"{self.where}.{key}[{number}]") for number, item in enumerate(self.array(key))]

    def mapping(self, key: str, optional: bool = False) -> Mapping[str, Any]:
        if optional and key not in self.document:
            return {}
        return self.child(key).document

    def child(self, key: str) -> Reader:
        return Reader(self.value(key), f"{self.where}.{key}")

    def page(self, key: str, kind: PageKind, pages: Sequence[Page]) -> int:
        number = self.integer(key, 0, (1 << 31) - 1)
        if number >= len(pages) or pages[number].kind != kind:
            raise self.error(f"'{key}' names page {number}, which is no {kind.name.lower()} page of this bundle")
        return number

    def nullable(self, key: str, read: Callable[[str], T]) -> T | None:
        return None if self.value(key) is None else read(key)


def is_number(value: Any) -> bool:
    """Whether it is a finite number and no boolean; integers only as far as a float holds them exactly."""
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 1 << 53)


def unique(names: Sequence[str], where: str) -> None:
    """Raise `BundleError`, which begins with `where`, for a name that occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BundleError(f"{where}: {name!r:.80} occurs twice")
        seen.add(name)
