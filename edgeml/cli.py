"""The `edgeml` command: finds the module of a command, and turns every error into one sentence and an exit code.

Commands are loaded when they are asked for, so `edgeml --help` imports neither NumPy nor onnxruntime nor torch. Those of the
runtime stand in `COMMANDS`; other rooms add theirs through entry points of the group `edgeml.commands`, `name = "module:command"`.
A command whose distribution or optional dependencies are missing says so when it is used.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points

import click

import edgeml
from edgeml.errors import EdgemlError, MissingExtra

__all__ = ["main"]

#: command -> (module that holds it as `command`, its line in `edgeml --help`)
COMMANDS = {
    "bench": ("edgeml.commands.bench", "Measure latency, page traffic and memory, a row for each setting."),
    "eval": ("edgeml.commands.eval", "Scores on labelled data, task by task, alone or against a reference."),
    "inspect": ("edgeml.commands.inspect", "What is inside a bundle: stages, sites, tasks, bytes, evidence."),
    "profile": ("edgeml.commands.profile", "Where the time of requests goes, and a timeline of it."),
    "routing": ("edgeml.commands.routing", "How predictable the choice of experts is, what a cache makes of it, and advice."),
    "run": ("edgeml.commands.run", "Answer texts or images with the tasks of a bundle."),
    "serve-stdin": ("edgeml.commands.serve", "Answer requests as JSON lines, for a parent process in any language."),
    "verify": ("edgeml.commands.verify", "Check every byte of a bundle, and that every graph loads."),
}
GROUP = "edgeml.commands"
#: Commands of other rooms: their extra, and their line in `edgeml --help`, which shows them installed or not.
ROOMS = {
    "diff": ("report", "Which part of a bundle lost the quality that a reference has."),
    "device": ("devices", "Boards and phones: profiles, prediction, runs on a device."),
    "doctor": ("devices", "Check this machine, and whether a model fits it and how fast it should be."),
    "export": ("export", "Turn a torch model into a bundle."),
    "report": ("report", "Records on one page: how fast, how large, how much worse, where, how sure."),
}
#: Optional dependency -> the extra that installs it.
EXTRAS = {"onnx": "export", "safetensors": "export", "torch": "export"}


class _Lazy(click.Group):
    """A group whose commands are imported when first used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS | ROOMS | _others())

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            command: click.Command = importlib.import_module(COMMANDS[name][0]).command
            return command
        found = _others().get(name)
        if found is None:
            if name in ROOMS:
                raise MissingExtra(f"edgeml {name}", ROOMS[name][0])
            return None
        loaded: click.Command = found.load()
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        others = {name: f"A command of {point.module.split('.')[0]}." for name, point in _others().items()}
        known = {name: line for name, (_, line) in (COMMANDS | ROOMS).items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted((others | known).items()))


def _others() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in COMMANDS}


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgeml.__version__, prog_name="edgeml")
def group() -> None:
    """Run models that are larger than the device's memory, and know what was lost.

    Example: edgeml inspect model.edgeml
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 refused by a gate, 2 usage, 3 bad input, 4 device, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character is no reason to fail
    try:
        result = group.main(given or ["--help"], prog_name="edgeml", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if os.environ.get("EDGEML_DEBUG", "") not in ("", "0") and not isinstance(error, click.ClickException | click.Abort | SystemExit):
            raise
        return _explain(error)


def _explain(error: BaseException) -> int:
    """Say what went wrong in a sentence on standard error; returns the exit code."""
    if _interrupted(error):
        return _say("interrupted", 130)
    match error:
        case click.UsageError():
            path = error.ctx.command_path if error.ctx is not None else "edgeml"
            return _say(f"{error.format_message().rstrip('.')}; see {path} --help", error.exit_code)
        case click.ClickException():
            return _say(error.format_message(), error.exit_code)
        case EdgemlError():
            return _say(str(error), error.exit_code)
        case ModuleNotFoundError() if (name := (error.name or "").split(".")[0]) in EXTRAS:
            return _explain(MissingExtra(f"this command ({name})", EXTRAS[name]))
        case BrokenPipeError() | SystemExit():  # click turns the former into the latter; nothing else here exits
            return _mute(0)
        case OSError():
            _mute(4)
            return _say(f"{error.filename or 'standard output'}: {error.strerror or error}", 4)
        case MemoryError():
            return _say("this machine has not enough free memory for that; try a smaller --memory", 4)
    return _say(f"a fault in edgeml itself: {type(error).__name__}: {error}; set EDGEML_DEBUG=1 for the traceback and report it", 4)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is at the bottom of it: a library that is stopped while it loads may raise an error of its own."""
    while error is not None and not isinstance(error, click.Abort | KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _mute(code: int) -> int:
    """Standard output cannot be written, as when `| head` has gone: Python would complain once more when it flushes at exit."""
    with suppress(AttributeError, OSError):  # closed already, or not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _say(sentence: str, code: int) -> int:
    line = "".join(char if char.isprintable() else "?" for char in " ".join(sentence.split()))  # it may quote a file
    print(f"edgeml: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
