"""JSON without its loopholes: one meaning per document, bounded depth, the same bytes for the same content.

Python's reader keeps the last of two equal keys and accepts NaN; two readers of one bundle could then disagree about it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

__all__ = ["MAX_DEPTH", "StrictJsonError", "decode_object", "encode_object"]

MAX_DEPTH = 32

# Strings are matched whole so that brackets inside them do not count; possessive, and with an optional end, so that
# no input makes the scan take more than one pass.
_STRINGS_AND_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


class StrictJsonError(ValueError):
    """The document breaks a rule; the text says which."""


def decode_object(data: bytes) -> dict[str, Any]:
    """Parse a UTF-8 JSON object. Duplicate keys, NaN, Infinity and more than 32 levels raise `StrictJsonError`."""
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"not JSON ({error.msg} at character {error.pos})") from None
    except StrictJsonError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise StrictJsonError(str(error)) from None
    if not isinstance(document, dict):
        raise StrictJsonError("not a JSON object")
    return document


def encode_object(document: Mapping[str, Any]) -> bytes:
    """The canonical bytes of a JSON object: sorted keys, no spaces, UTF-8. Raises `StrictJsonError` for what JSON cannot say."""
    try:
        text = json.dumps(dict(document), sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        data = text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise StrictJsonError(str(error)) from None
    # Keys such as 1 and "1" collide only once written: what cannot be read back must not be written.
    decode_object(data)
    return data


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the recursive parser meets it."""
    depth = 0
    for match in _STRINGS_AND_BRACKETS.finditer(text):
        if match[0] in ("[", "{"):
            depth += 1
            if depth > MAX_DEPTH:
                raise StrictJsonError(f"more than {MAX_DEPTH} levels deep")
        elif match[0] in ("]", "}"):
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJsonError(f"the key {key!r} occurs twice in one object")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise StrictJsonError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise StrictJsonError(f"{text} is too large for a number")
    return value
