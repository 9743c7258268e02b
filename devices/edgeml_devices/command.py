"""`edgeml device`: a group whose subcommands are imported when first used."""

from __future__ import annotations

import importlib

import click

__all__ = ["command"]

#: Subcommand -> (module that holds it as `command`, or as what follows a colon; its line in --help).
COMMANDS = {
    "bench": ("edgeml_devices.commands.remote:bench", "Measure a bundle on another machine, or on several."),
    "clean": ("edgeml_devices.commands.remote:clean", "Remove all that edgeml put on a machine."),
    "eval": ("edgeml_devices.commands.remote:evaluate", "Scores of another machine's own answers."),
    "list": ("edgeml_devices.commands.list", "The devices that are known, and what is known of them."),
    "predict": ("edgeml_devices.commands.predict", "How fast a bundle will be on a device, with the arithmetic."),
    "probe": ("edgeml_devices.commands.probe", "Measure this machine and write its profile."),
    "profile": ("edgeml_devices.commands.remote:profile", "Where the time goes on another machine."),
    "push": ("edgeml_devices.commands.remote:push", "Check a machine, install the runtime there, copy a bundle."),
    "run": ("edgeml_devices.commands.remote:run", "Answer on another machine, or measure here under a device's limits."),
    "serve-stdin": ("edgeml_devices.commands.remote:serve", "Answer JSON lines on another machine."),
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        found: click.Command = getattr(importlib.import_module(module), attribute or "command")
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted((name, line) for name, (_, line) in COMMANDS.items()))


@click.group("device", cls=_Lazy)
def command() -> None:
    """Boards and phones: what they can do, how fast a bundle will be there, and runs under their limits.

    Example: edgeml device predict model.edgeml --device raspberry-pi-4
    """
