"""The `edgeml` command: finds the module of a command, and turns every error into one sentence and an exit code.

Commands are loaded when they are asked for, so `edgeml --help` imports neither NumPy nor onnxruntime nor torch. A module
that is not there yet is not in the table: what is not built is absent from `--help`.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from edgeml.errors import EdgemlError

__all__ = ["main"]

#: command -> (module that holds it as `command`, its line in `edgeml --help`)
COMMANDS = {
    "inspect": ("edgeml.commands.inspect", "What is inside a bundle: stages, sites, tasks, bytes, evidence."),
    "verify": ("edgeml.commands.verify", "Check every byte of a bundle against its checksums."),
}


class _Lazy(click.Group):
    """A group whose commands are imported when first used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgeml-runtime", prog_name="edgeml")
def group() -> None:
    """Run models that are larger than the device's memory, and know what was lost.

    Example: edgeml inspect model.edgeml
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 refused by a gate, 2 usage, 3 bad input, 4 device, 130 interrupted."""
    debug = os.environ.get("EDGEML_DEBUG", "") not in ("", "0")
    try:
        result = group.main(arguments, prog_name="edgeml", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return _say("interrupted", 130)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except EdgemlError as error:
        if debug:
            raise
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:
        # The reader went away, as `| head` does. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _say("this machine has not enough free memory for that; try a smaller --memory", 4)
    except Exception as error:
        if debug:
            raise
        return _say(f"a fault in edgeml itself: {type(error).__name__}: {error}; set EDGEML_DEBUG=1 for the traceback and report it", 4)


def _say(sentence: str, code: int) -> int:
    print(f"edgeml: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
