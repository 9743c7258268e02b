"""What a command needs on the device: its arguments as they read there, and the files that have to travel with it.

The runtime's own command parses the arguments here first, so a wrong option is told before anything is connected or copied; bundles and
files that options name are then replaced by their places in the folder of the run. What an option leaves out is decided on the device.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from click.core import ParameterSource

from edgeml.cli import COMMANDS
from edgeml.commands._bench_compare import parse_other
from edgeml.errors import DataError, UsageError
from edgeml.workload import load_workload

__all__ = ["Delivery", "runtime_command", "unpack"]

BUNDLES = ("bundle", "reference")
SENT = ("source", "images", "data", "from_predictions")
FETCHED = {("run", "output"), ("profile", "trace")}
BOTH = ("predictions",)  # taken along if it is there, brought back in any case
KEPT = ("state", "learn")  # what a machine learns stays on it, and a run leaves nothing there


@dataclass
class Delivery:
    """`arguments` begin with the verb. `bundles` and `sent`: what is here, and its place there; a Path of `-` is standard input."""

    arguments: list[str]
    bundles: list[tuple[Path, str]] = field(default_factory=list)
    sent: list[tuple[Path, str]] = field(default_factory=list)
    fetched: list[tuple[str, Path]] = field(default_factory=list)
    records: bool = False
    json: bool = False

    def as_here(self, text: str) -> str:
        """What the far side says, with the names that files have here."""
        for source, place in self.sent:
            if str(source) != "-":
                text = text.replace(place, str(source))
        return text

    def _bundle(self, path: str) -> str:
        for known, place in self.bundles:
            if known == Path(path):
                return place
        name = Path(path).name
        taken = name.startswith("-") or any(place == name for _, place in self.bundles)
        place = f"bundle{len(self.bundles) + 1}/{name}" if taken else name
        self.bundles.append((Path(path), place))
        return place

    def _file(self, path: str) -> str:
        if path != "-" and not Path(path).exists():
            raise DataError(f"{path}: no such file or folder")
        if Path(path).is_dir() and not any(inner.is_file() for inner in Path(path).rglob("*")):
            raise DataError(f"{path}: there is no file in it")
        place = f"in{len(self.sent) + 1}/{'standard-input' if path == '-' else Path(os.path.abspath(path)).name}"
        self.sent.append((Path(path), place))
        return place

    def _workload(self, path: str) -> str:
        """A workload with the inputs that it names, which lie beside it."""
        file, place = Path(path), self._file(path)
        folder = os.path.abspath(file.parent)
        for named in dict.fromkeys(name for kind in load_workload(file).mix for name in (kind.input, *kind.images) if name is not None):
            inside = os.path.relpath(named, folder)
            if inside.startswith(".."):
                raise DataError(f"{path}: {named} does not lie in its folder, so it cannot travel with it; put it there")
            if not named.is_file():
                raise DataError(f"{path}: {named}: no such file")
            self.sent.append((named, f"{Path(place).parent}/{inside}"))
        return place

    def _other(self, value: str) -> str:
        """What --compare names: another bundle with settings, or records."""
        path, comma, settings = value.partition(",")
        return (self._file(path) if parse_other(value).records else self._bundle(path)) + comma + settings

    def _result(self, path: str) -> str:
        if not Path(path).absolute().parent.is_dir():
            raise DataError(f"{path}: there is no folder to write it into; make it first")
        place = f"out{len(self.fetched) + 1}-{Path(path).name}"
        self.fetched.append((place, Path(path)))
        return place

    def _travel(self, verb: str, name: str, value: str, free: bool) -> str:
        if name in BUNDLES:
            return self._bundle(value)
        if name in SENT:
            return self._file(value)
        if name in ("workload", "compare"):
            return self._workload(value) if name == "workload" else self._other(value)
        if free and (verb, name) in FETCHED:
            return self._result(value)
        if name in BOTH:
            place = self._result(value)
            if Path(value).exists():
                self.sent.append((Path(value), place))
            return place
        if name == "also":
            first, comma, rest = value.partition(",")
            label, equals, path = first.partition("=")
            return f"{label}={self._bundle(path.strip())}{comma}{rest}" if equals and path.strip() else value
        return value


def runtime_command(verb: str) -> click.Command:
    """The runtime's command of that name. Raises `UsageError` where this edgeml has none."""
    if verb not in COMMANDS:
        raise UsageError(f"this edgeml has no command {verb}")
    command: click.Command = importlib.import_module(COMMANDS[verb][0]).command
    return command


def unpack(verb: str, given: Sequence[str], several: bool) -> Delivery:
    """Parse a command's arguments and pack its files. `several`: it goes to more than one device, so it may not write one file here.

    Raises click's `UsageError` for what the command does not know, ours for what cannot travel, `DataError` for files that are not there.
    """
    command = runtime_command(verb)
    context = command.make_context(f"edgeml device {verb}", list(given))
    names = {parameter.name for parameter in command.params}
    found = Delivery([verb], records="records_file" in names, json="as_json" in names)
    for parameter in command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE and name != "records_file":
            if name in KEPT:
                raise UsageError(f"{max(parameter.opts, key=len)} keeps what is learned, and a run there leaves nothing behind; learn here")
            found.arguments += _spelled(found, verb, parameter, context.params[name])
    if several and found.fetched:
        raise UsageError(f"{found.fetched[0][1]} would be written by several devices; name one device, or leave it out")
    return found


def _spelled(found: Delivery, verb: str, parameter: click.Parameter, value: object) -> Iterator[str]:
    """A parameter as it is written on the command line there."""
    free = not isinstance(parameter.type, click.Choice)
    option = max(parameter.opts, key=len)
    if isinstance(parameter, click.Option) and parameter.is_flag:
        yield from [option] if value else parameter.secondary_opts[:1]
        return
    for one in value if isinstance(value, tuple | list) else [value]:
        text = found._travel(verb, parameter.name or "", str(one), free)
        if isinstance(parameter, click.Argument):
            yield text
        else:
            yield f"{option}={text}"
