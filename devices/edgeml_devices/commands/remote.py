"""`edgeml device push / run / bench / eval / profile / serve-stdin / clean --to user@host`: the same commands, on another machine.

A run copies the bundle if it is not there, runs the far side's own `edgeml`, and shows what it says as it says it. It leaves nothing
behind: a bundle that it brought goes with it, unless --keep; one that `push` brought stays. That is the default because a board's flash
is small and a file that nobody remembers is hard to find; whoever measures often pushes first.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import click

import edgeml
from edgeml.bundle import Bundle
from edgeml.commands._options import Function, json_option, notes, printable, progress, quiet_option, records_option
from edgeml.device import Profile
from edgeml.errors import DeviceError, EdgemlError, UsageError
from edgeml.records import append
from edgeml.sizes import format_bytes
from edgeml_devices.commands.probe import measured as measured_here
from edgeml_devices.delivery import Delivery, unpack
from edgeml_devices.expected import expected, sentence
from edgeml_devices.fleet import Outcome, Speaker, on_all, pushed, table
from edgeml_devices.library import find
from edgeml_devices.remote import Copied, Remote, check_wheel, connect

__all__ = ["bench", "clean", "evaluate", "profile", "push", "run", "serve"]

PREDICT = "Beside each row what is predicted for it: a name of edgeml device list, or a file of edgeml device probe."
WHERE = "user@host[:port] or a name of ~/.ssh/config, adb:SERIAL, or local; may be repeated."


def where_options(command: Function) -> Function:
    """The options that say which machines, and how they are reached."""
    for option in (
        click.option(
            "--remote-dir", help="Folder of edgeml's things there (default: ~/.cache/edgeml-device; by adb /data/local/tmp/edgeml)."
        ),
        click.option("--remote-python", help="Python there (default: that of --install, or else python3; of local, this one)."),
        click.option("--to", "places", multiple=True, required=True, metavar="MACHINE", help=WHERE),
    ):
        command = option(command)
    return command


install_option = click.option(
    "--install",
    type=click.Path(path_type=Path),
    metavar="WHEEL",
    help="Put this wheel of the runtime into an environment of its own there.",
)


@click.command("push")
@click.argument("bundle", type=click.Path(), required=False)
@where_options
@install_option
@click.option("--verify", is_flag=True, help="Also run `edgeml verify` there, which loads every graph.")
@quiet_option
@json_option
def push(
    bundle: str | None,
    places: tuple[str, ...],
    remote_python: str | None,
    remote_dir: str | None,
    install: Path | None,
    verify: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Check a machine, install the runtime there if asked, and copy a bundle to stay there.

    A bundle that is there already is not copied; a copy that broke off is resumed. Without a bundle: check, and install.

    Example: edgeml device push model.edgeml --to pi@garden --install edgeml_runtime-0.1.0-cp311-abi3-manylinux_2_17_aarch64.whl
    """
    if verify and bundle is None:
        raise UsageError("--verify is about a bundle: name it")
    far, speaker = _machines(places, remote_python, remote_dir, install is not None), Speaker(len(places) > 1)
    with Bundle.open(bundle) if bundle is not None else nullcontext() as opened:

        def work(remote: Remote, outcome: Outcome) -> int:
            _prepare(remote, outcome, install, speaker, quiet)
            if opened is not None:
                outcome.copied = _copy(remote, opened, True, speaker, quiet)
            try:
                remote.check()
            except DeviceError as error:
                if verify:
                    raise
                notes([str(error)], quiet)
            if opened is None or not verify:
                return 0
            remote.place(opened, opened.path.name)
            return remote.command(["verify", opened.path.name, "--json"], lambda _: None, speaker.err(remote.name))

        outcomes = on_all(far, work)
    return _told(outcomes, as_json, lambda: pushed(outcomes))


@click.command("clean")
@where_options
@json_option
def clean(places: tuple[str, ...], remote_python: str | None, remote_dir: str | None, as_json: bool) -> int:
    """Remove all that edgeml put on a machine: bundles, broken copies, the environment of --install.

    Example: edgeml device clean --to pi@garden
    """

    def work(remote: Remote, outcome: Outcome) -> int:
        outcome.document = {"removed_bytes": remote.clean()}
        return 0

    outcomes = on_all(_machines(places, remote_python, remote_dir), work)
    done = [one for one in outcomes if one.document is not None]
    return _told(outcomes, as_json, lambda: [f"{one.to}: removed {format_bytes((one.document or {})['removed_bytes'])}" for one in done])


def _verb(name: str, says: str, example: str) -> click.Command:
    """A command that passes its arguments on to the runtime's command of that name, there."""

    @click.command(name, context_settings={"ignore_unknown_options": True}, short_help=says, help=_help(name, says, example))
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="BUNDLE [OPTIONS OF THE COMMAND]...")
    @where_options
    @install_option
    @click.option("--keep", is_flag=True, help="Leave the bundle there (default: what this brought is removed; see push).")
    @records_option
    @quiet_option
    @json_option
    def command(places: tuple[str, ...], remote_python: str | None, remote_dir: str | None, **options: Any) -> int:
        return deliver(name, far=_machines(places, remote_python, remote_dir, options["install"] is not None), **options)

    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name == "records_file":
            parameter.hidden = name in ("run", "serve-stdin")  # which have none, and say so
    if name == "bench":
        command.params.insert(1, click.Option(["--predict"], metavar="DEVICE", help=PREDICT))
    return command


def _help(name: str, says: str, example: str) -> str:
    return f"""{says}

    All options of `edgeml {name}` may be given; files they name travel along. Several machines work at once and fill one table.

    Example: {example}
    """


bench = _verb("bench", "Measure on a device.", "edgeml device bench model.edgeml --to pi4 --to pi5 --task mood --memory 25%,100%")
evaluate = _verb("eval", "Scores of a device's own answers.", "edgeml device eval model.edgeml --to pi@garden --data data/text --limit 100")
profile = _verb("profile", "Where time goes on a device.", "edgeml device profile model.edgeml --to pi@garden --task mood --trace t.json")
serve = _verb("serve-stdin", "Answer JSON lines on a device.", "edgeml device serve-stdin model.edgeml --to pi@garden < requests.jsonl")
answer = _verb("run", "Answer on a device.", 'edgeml device run model.edgeml --to pi@garden --task mood --text "what a day"')


class _Run(click.Command):
    """`run` is two commands: with --to it answers there, with --device and --emulate here, under that device's limits."""

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        there, here = (any(argument == name or argument.startswith(f"{name}=") for argument in args) for name in ("--to", "--device"))
        if there and here:
            raise UsageError("--to answers on another machine, --device under a device's limits here: give one of them")
        if there:
            return answer.make_context(info_name, args, parent, **extra)
        if here:
            emulated: click.Command = importlib.import_module("edgeml_devices.commands.run").command
            return emulated.make_context(info_name, args, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command("run", cls=_Run)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="BUNDLE [OPTIONS]...")
def run(arguments: tuple[str, ...]) -> None:
    """Answer on a device, or measure here under its limits.

    \b
    --to MACHINE               answers there; the options are those of `edgeml run`: see edgeml device run --to x --help
    --device NAME --emulate    measures here, under its limits: see edgeml device run --device x --help

    Example: edgeml device run model.edgeml --to pi@garden --task mood --text "what a day"
    """
    raise UsageError("say where: --to MACHINE, or --device NAME --emulate")


def deliver(
    verb: str,
    arguments: Sequence[str],
    far: Sequence[Remote],
    install: Path | None = None,
    keep: bool = False,
    records_file: Path | None = None,
    predict: str | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> int:
    """Run a command of the runtime on every machine of `far`, with its files; returns the worst exit code.

    One machine's output is shown as it comes; several ones' as one table. `predict` names the profile whose prediction goes into every
    record. Raises `EdgemlError` of what is wrong here, or with the one machine.
    """
    several = len(far) > 1
    packed = unpack(verb, arguments, several)
    if verb == "serve-stdin" and several:
        raise UsageError("serve-stdin answers from one device; name one")
    if records_file is not None and not packed.records:
        raise UsageError(f"edgeml {verb} writes no records; bench, eval and profile do")
    profile = None if predict is None else find(predict, lambda: measured_here(Path.cwd(), quiet))
    packed.arguments += ["--quiet"] if quiet else []
    shown = not (several or as_json) or not packed.json  # as the command itself shows it
    packed.arguments += [] if shown else ["--json"]
    with ExitStack() as stack:
        bundles = [(stack.enter_context(Bundle.open(source)), place) for source, place in packed.bundles]
        job = _Job(packed, bundles, install, keep, records_file, profile, quiet, shown, Speaker(several))
        outcomes = on_all(far, job.work)
    return _told(outcomes, as_json and packed.json, lambda: [*(() if shown else table(verb, outcomes)), *_predicted(outcomes)])


def _predicted(outcomes: Sequence[Outcome]) -> Iterable[str]:
    """A line for each record that has a prediction, in the order of the rows."""
    for outcome in outcomes:
        for record in outcome.records:
            if "device_run" in record:
                memory = f", {record['memory']}" if record.get("memory") else ""
                yield printable(f"{outcome.to}{memory}: {sentence(record['device_run']['predicted'])}")


class _Job:
    """What `deliver` does on each machine."""

    def __init__(
        self,
        packed: Delivery,
        bundles: Sequence[tuple[Bundle, str]],
        install: Path | None,
        keep: bool,
        records_file: Path | None,
        profile: Profile | None,
        quiet: bool,
        shown: bool,
        speaker: Speaker,
    ) -> None:
        self._packed, self._bundles, self._install, self._keep = packed, bundles, install, keep
        self._records_file, self._profile, self._quiet, self._shown, self._speaker = records_file, profile, quiet, shown, speaker
        self._writing = threading.Lock()
        self._given = sys.stdin.buffer.read() if any(str(source) == "-" for source, _ in packed.sent) else b""
        self._columns = shutil.get_terminal_size().columns if sys.stderr.isatty() and not speaker.several else None

    def work(self, remote: Remote, outcome: Outcome) -> int:
        """Install, copy, run, bring back what it wrote."""
        _prepare(remote, outcome, self._install, self._speaker, self._quiet)
        remote.check()
        for bundle, place in self._bundles:
            copied = _copy(remote, bundle, self._keep, self._speaker, self._quiet)
            outcome.copied = copied if outcome.copied is None else outcome.copied + copied
            remote.place(bundle, place)
        for source, place in self._packed.sent:
            if str(source) == "-":
                remote.send_data(self._given, place)
            else:
                remote.send_file(source, place)
        code = self._run(remote, outcome)
        for place, target in self._packed.fetched if code == 0 else ():
            remote.fetch(place, target)
        return code

    def _run(self, remote: Remote, outcome: Outcome) -> int:
        def record(measured: dict[str, Any]) -> None:
            outcome.records.append(measured | {"to": remote.name} | self._beside(measured))
            if self._records_file is not None:
                with self._writing:
                    append(self._records_file, outcome.records[-1])

        said: list[str] = []
        asked = self._speaker.several or self._records_file is not None or self._profile is not None
        wanted = record if self._packed.records and asked else None
        source = sys.stdin if self._packed.arguments[0] == "serve-stdin" else ()
        out = (lambda text: click.echo(text, nl=False)) if self._shown else said.append
        say = self._speaker.err(remote.name)
        code = remote.command(self._packed.arguments, out, lambda text: say(self._packed.as_here(text)), wanted, self._columns, source)
        if text := "".join(said).strip():
            try:
                outcome.document = json.loads(text)
            except ValueError:
                raise DeviceError(f"{remote.name}: edgeml {self._packed.arguments[0]} printed no document there: {text[:100]}") from None
        return code

    def _beside(self, measured: dict[str, Any]) -> dict[str, Any]:
        """What is predicted for a record, where that is asked for and its bundle is here."""
        bundle = next((bundle for bundle, _ in self._bundles if bundle.id == measured.get("bundle_id")), None)
        if self._profile is None or bundle is None:
            return {}
        return {"device_run": {"predicted": expected(bundle, self._profile, measured)}}


def _machines(places: Sequence[str], python: str | None, folder: str | None, own_first: bool = False) -> list[Remote]:
    if len(set(places)) < len(places):
        raise UsageError("a machine is named twice with --to")
    return [Remote(connect(place), python, folder, own_first) for place in places]


def _prepare(remote: Remote, outcome: Outcome, install: Path | None, speaker: Speaker, quiet: bool) -> None:
    """Install the runtime if asked, unless the same version runs there already."""
    if install is None:
        return
    check_wheel(install, remote.facts, remote.name)
    if remote.facts["edgeml"] != edgeml.__version__:
        remote.install(install, (lambda _: None) if quiet else speaker.err(remote.name))
        outcome.facts = remote.facts


def _copy(remote: Remote, bundle: Bundle, keep: bool, speaker: Speaker, quiet: bool) -> Copied:
    """Copy with a bar, which only a single machine has; several tell when they are done."""
    with progress(bundle.header.file_length, f"copying to {remote.name}", quiet or speaker.several) as step:
        copied = remote.send_bundle(bundle, keep, step)
    if speaker.several and not quiet and copied.bytes:
        speaker.err(remote.name)(f"copied {format_bytes(copied.bytes)} in {copied.seconds:.1f} s\n")
    return copied


def _told(outcomes: Sequence[Outcome], as_json: bool, lines: Callable[[], Iterable[str]]) -> int:
    """Print what came of it; returns the worst exit code. A single machine's fault is raised, for the command line to tell."""
    faults = [outcome for outcome in outcomes if outcome.error is not None]
    if len(outcomes) == 1 and faults:
        error = EdgemlError(faults[0].error)
        error.exit_code = faults[0].exit_code
        raise error
    if as_json:
        click.echo(json.dumps({"devices": [outcome.as_json() for outcome in outcomes]}, allow_nan=False))
    else:
        for line in lines():
            click.echo(line)
    for outcome in faults:
        click.echo(f"edgeml: {printable(outcome.error or '')}", err=True)
    return max(outcome.exit_code for outcome in outcomes)
