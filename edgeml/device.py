"""A device profile: what a machine can do, figure by figure, each with its source. Reading and writing the TOML, and its rules.

    schema = 1
    name = "raspberry-pi-4"                  what --device takes: lower case, digits and hyphens
    title = "Raspberry Pi 4 Model B, 4 GB"
    architecture = "aarch64"                 as `uname -m` says
    kernel_set = "neon"                      the kernel set that would run there; left out where it is not known
    aliases = ["pi-4"]                       other names that --device takes
    energy_sensor = "..."                    how energy is read there; left out on boards without a sensor
    date = "2026-01-31"                      of a probe

    [memory]
    usable_bytes = { value = 3.5e9, low = 3.2e9, high = 3.7e9, source = "...", assumed = true }

A figure is a value, if known the range it lies in, and where it comes from; `assumed` marks what nobody measured, and its source
is then the arithmetic. `FIGURES` lists every key with its unit (the end of its name) and the range outside of which it is refused:
a slip of a power of ten should not become a prediction. A figure that is left out is unknown; nothing is made up for it.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeml.errors import DataError, UsageError

__all__ = ["FIGURES", "SCHEMA", "Figure", "Profile", "parse_profile", "read_profile", "write_profile"]

SCHEMA = 1
LONGEST = 1 << 20
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
#: Key -> (least, most, meaning). Rates are those of one core unless they say otherwise.
FIGURES: Mapping[str, tuple[float, float, str]] = {
    "cpu.cores": (1, 1024, "cores that programs may use"),
    "cpu.clock_hz": (1e7, 1e10, "clock under sustained load"),
    "cpu.parallel_share": (0, 1, "how much of another core each further thread gives the kernels"),
    "memory.total_bytes": (1 << 24, 1 << 46, "memory as built in"),
    "memory.usable_bytes": (1 << 24, 1 << 46, "memory that a program finds free on an otherwise idle system"),
    "memory.read_bytes_per_s": (1e7, 1e13, "reading from memory, one core"),
    "memory.read_all_bytes_per_s": (1e7, 1e14, "reading from memory, all cores together"),
    "kernels.int4_macs_per_s": (1e6, 1e14, "our kernels on int4 weights, many tokens: multiply-adds"),
    "kernels.int8_macs_per_s": (1e6, 1e14, "the same on int8 weights"),
    "kernels.f32_macs_per_s": (1e6, 1e14, "the same on f32 weights"),
    "kernels.int4_stream_bytes_per_s": (1e6, 1e13, "our kernels on int4 weights, one token: bytes of weights"),
    "kernels.int8_stream_bytes_per_s": (1e6, 1e13, "the same on int8 weights"),
    "kernels.values_per_s": (1e5, 1e12, "values quantised on their way in, or written on their way out of a kernel"),
    "kernels.activations_per_s": (1e5, 1e12, "values through an activation function (gelu)"),
    "graphs.matmul_macs_per_s": (1e6, 1e14, "onnxruntime's matrix product in f32"),
    "graphs.conv_macs_per_s": (1e6, 1e14, "onnxruntime's 3 x 3 convolution in f32"),
    "graphs.conv_int8_macs_per_s": (1e6, 1e14, "the same in int8"),
    "graphs.values_per_s": (1e5, 1e12, "values through an operator that does little with each"),
    "graphs.node_s": (1e-8, 1e-2, "what an operator costs before it does anything"),
    "process.request_s": (1e-6, 10, "what a request costs before any operator runs"),
    "process.tokens_per_s": (1, 1e9, "tokens of a text through the tokenizer"),
    "process.bytes": (1 << 20, 1 << 34, "memory of a process that has answered with a model of nearly nothing"),
    "process.bytes_per_tokenizer_byte": (0, 1000, "memory for each byte of a tokenizer's page"),
    "process.bytes_per_graph_byte": (0, 100, "memory for each byte of a graph's page"),
    **{
        f"storage.{block}_qd{depth}_bytes_per_s": (1e3, 1e12, f"reading blocks of {said} at random, {depth} at a time")
        for block, said in (("4k", "4 KiB"), ("64k", "64 KiB"), ("1m", "1 MiB"))
        for depth in (1, 2)
    },
}
_TEXTS = ("name", "title", "architecture", "kernel_set", "energy_sensor", "date")
_NEEDED = ("name", "title", "architecture")


@dataclass(frozen=True)
class Figure:
    """A value in the unit that its key ends in, the range it lies in, and where it comes from."""

    value: float
    source: str
    low: float | None = None
    high: float | None = None
    assumed: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest; the value itself where no range is known."""
        return self.value if self.low is None else self.low, self.value if self.high is None else self.high


@dataclass(frozen=True)
class Profile:
    """A device. `figures` by key of `FIGURES`; what is unknown is not among them."""

    name: str
    title: str
    architecture: str
    figures: Mapping[str, Figure]
    kernel_set: str | None = None
    energy_sensor: str | None = None
    date: str | None = None
    aliases: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def value(self, key: str) -> float | None:
        """A figure's value, None where it is unknown."""
        figure = self.figures.get(key)
        return None if figure is None else figure.value

    def need(self, key: str) -> Figure:
        """A figure that cannot be done without. Raises `UsageError`."""
        if key not in self.figures:
            raise UsageError(f"the profile '{self.name}' does not say {key} ({FIGURES[key][2]}); run edgeml device probe on that device")
        return self.figures[key]

    def as_json(self) -> dict[str, Any]:
        """The document that --json prints; unknown figures are null."""
        texts = {key: getattr(self, key) for key in _TEXTS}
        return texts | {"aliases": list(self.aliases), "notes": list(self.notes), "figures": {key: self._figure(key) for key in FIGURES}}

    def _figure(self, key: str) -> dict[str, Any] | None:
        found = self.figures.get(key)
        return None if found is None else {**vars(found)}


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """The profile in a TOML file. Raises `DataError` naming file, key and range."""
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); edgeml device probe -o FILE.toml writes a profile") from None
    if len(data) > LONGEST:
        raise DataError(f"{path}: longer than any profile is; this is another kind of file")
    return parse_profile(data, str(path))


def parse_profile(data: bytes, where: str) -> Profile:
    """The profile that a TOML document describes; `where` is named in errors. Raises `DataError`."""
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{where}: not TOML ({' '.join(str(error).split())})") from None
    if document.pop("schema", None) != SCHEMA:
        raise DataError(f"{where}: a device profile begins with 'schema = {SCHEMA}'")
    texts, lists = _described(document, where)
    figures = {}
    for section, table in document.items():
        if not isinstance(table, dict):
            raise DataError(f"{where}: unknown key '{section}'")
        for key, given in table.items():
            full = f"{section}.{key}"
            if full not in FIGURES:
                raise DataError(f"{where}: unknown key '{full}'; known are {', '.join(FIGURES)}")
            figures[full] = _figure(full, given, where)
    return Profile(**texts, **lists, figures=figures)


def _described(document: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the keys that are no figures out of the document."""
    texts: dict[str, Any] = {}
    for key in _TEXTS:
        if key in document:
            texts[key] = _text(document.pop(key), f"{where}: '{key}'")
        elif key in _NEEDED:
            raise DataError(f"{where}: the key '{key}' is missing")
    lists: dict[str, Any] = {key: _texts(document.pop(key, []), f"{where}: '{key}'") for key in ("aliases", "notes")}
    for name in (texts["name"], *lists["aliases"]):
        if not NAME.fullmatch(name):
            raise DataError(f"{where}: a device's name has lower-case letters, digits and hyphens, not {name!r:.60}")
    return texts, lists


def write_profile(profile: Profile) -> bytes:
    """The TOML document of a profile, keys in the order of `FIGURES`."""
    lines = [f"schema = {SCHEMA}"]
    lines += [f"{key} = {_quoted(getattr(profile, key))}" for key in _TEXTS if getattr(profile, key) is not None]
    lines += [f"{key} = [{', '.join(map(_quoted, getattr(profile, key)))}]" for key in ("aliases", "notes") if getattr(profile, key)]
    section = ""
    for key in FIGURES:
        if key in profile.figures:
            if section != key.split(".")[0]:
                section = key.split(".")[0]
                lines += ["", f"[{section}]"]
            lines.append(f"{key.split('.')[1]} = {{ {', '.join(_parts(profile.figures[key]))} }}")
    return ("\n".join(lines) + "\n").encode("utf-8")


def _parts(figure: Figure) -> Iterator[str]:
    for name in ("value", "low", "high"):
        number = getattr(figure, name)
        if number is not None:
            yield f"{name} = {number:.0f}" if float(number).is_integer() and abs(number) < 1e15 else f"{name} = {number:.6g}"
    yield f"source = {_quoted(figure.source)}"
    if figure.assumed:
        yield "assumed = true"


def _figure(key: str, given: Any, where: str) -> Figure:
    place = f"{where}: '{key}'"
    if not isinstance(given, dict) or not {"value", "source"} <= set(given) <= {"value", "low", "high", "source", "assumed"}:
        raise DataError(f"{place} must be {{ value = NUMBER, source = TEXT }}, and may have low, high and assumed")
    least, most, meaning = FIGURES[key]
    numbers = {}
    for name in ("value", "low", "high"):
        number = given.get(name)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or not least <= number <= most:
            raise DataError(f"{place}: {name} is {number!r:.40}, must be a number from {least:.4g} to {most:.4g} ({meaning})")
        numbers[name] = float(number)
    if not numbers.get("low", -math.inf) <= numbers["value"] <= numbers.get("high", math.inf):
        raise DataError(f"{place}: the value {given['value']!r} lies outside its own range of low to high")
    if not isinstance(given.get("assumed", False), bool):
        raise DataError(f"{place}: assumed is true or false")
    return Figure(source=_text(given["source"], f"{place}: source"), assumed=given.get("assumed", False), **numbers)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 1000:
        raise DataError(f"{what} must be one line of text")
    return value


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise DataError(f"{what} must be a list of texts")
    return tuple(_text(item, what) for item in value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # TOML's basic strings are JSON's, for text without control characters
