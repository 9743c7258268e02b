"""The command line: one sentence and the right exit code for every fault, and nothing heavy imported for help."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from edgeml import __version__
from edgeml.bundle import Bundle
from edgeml.bundle_writer import PageSource, write_bundle
from edgeml.cli import COMMANDS, main
from edgeml.layout import PageKind
from edgeml.manifest import load_manifest
from edgeml.sizes import format_bytes, parse_memory

MANIFEST = {"format": 1, "producer": {"name": "edgeml-runtime", "version": "0"}, "stages": [], "sites": [], "tasks": []}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "m.edgeml"
    write_bundle(path, [PageSource(PageKind.JSON, b"{}" * 3000)], MANIFEST)
    return path


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from edgeml.cli import main
main(["--help"])
print([name for name in ("numpy", "onnxruntime", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    output = capsys.readouterr().out
    assert re.search(rf"Examples?: (echo '.*' \| )?edgeml {name}", " ".join(output.split()))
    assert "--json" in output


def test_without_arguments_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    output = capsys.readouterr().out
    for name, (_, line) in COMMANDS.items():
        assert name in output
        assert line.split(",")[0].split(":")[0] in " ".join(output.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"edgeml, version {__version__}\n"


def test_verify_loads_every_graph(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(toy)]) == 0
    assert " graphs, " in capsys.readouterr().out
    assert main(["verify", str(toy), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    with Bundle.open(toy) as opened:
        assert (document["intact"], document["stages"]) == (True, len(load_manifest(opened).stages))


def test_verify_names_a_graph_that_does_not_load(toy: Path, rebuild: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with Bundle.open(toy) as opened:
        page = next(stage.page for stage in load_manifest(opened).stages if stage.name == "trunk")
    assert main(["verify", str(rebuild({page: b"no graph"}))]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "stage 'trunk'" in error


def test_inspect_and_verify_answer_in_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == {"json": 6000}
    assert main(["verify", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["intact"] is True


def test_inspect_and_verify_answer_in_words(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle)]) == 0
    assert main(["verify", str(bundle)]) == 0
    assert "intact" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["inspect", "absent.edgeml"], 3),
        (["inspect", "/"], 3),
        (["verify", "foreign"], 3),
        (["inspect"], 2),
        (["nonsense"], 2),
        (["inspect", "a", "--nonsense"], 2),
    ],
)
def test_faults_are_sentences(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("foreign").write_bytes(b"\x7fELF" + bytes(5000))
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error
    assert "Traceback" not in error


def test_flipped_bit_is_reported_by_verify(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(bundle.read_bytes())
    content[4096 + 9] ^= 1
    bundle.write_bytes(content)
    assert main(["verify", str(bundle)]) == 3
    assert "page 0" in capsys.readouterr().err


def test_unexpected_faults_are_sentences_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(COMMANDS, "inspect", ("edgeml.no_such_module", ""))
    assert main(["inspect", "x"]) == 4
    assert "EDGEML_DEBUG" in capsys.readouterr().err


# ---- commands of other rooms ----


def plugin(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, body: str) -> None:
    (folder / f"{name}_room.py").write_text(body)
    monkeypatch.syspath_prepend(str(folder))
    point = EntryPoint(name, f"{name}_room:command", "edgeml.commands")
    monkeypatch.setattr("edgeml.cli.entry_points", lambda group: [point] if group == "edgeml.commands" else [])


def test_commands_of_other_rooms_are_listed_unimported_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin(monkeypatch, tmp_path, "fly", "import click\n@click.command()\ndef command():\n    click.echo('flies')\n")
    assert main(["--help"]) == 0
    assert "A command of fly_room." in capsys.readouterr().out
    assert "fly_room" not in sys.modules
    assert main(["fly"]) == 0
    assert capsys.readouterr().out == "flies\n"


@pytest.mark.parametrize("module", ["torch", "onnx.helper"])
@pytest.mark.parametrize("where", ["import", "call"])
def test_a_missing_extra_is_a_sentence_with_the_install_line(
    module: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = f"raise ModuleNotFoundError('gone', name={module!r})"
    body = f"import click\n{fault if where == 'import' else ''}\n@click.command()\ndef command():\n    {fault}\n"
    plugin(monkeypatch, tmp_path, "export", body)
    monkeypatch.delitem(sys.modules, "export_room", raising=False)
    assert main(["--help"]) == 0
    assert "Turn a torch model into a bundle." in capsys.readouterr().out
    assert main(["export"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'edgeml-runtime[export]'" in error


# ---- the terminal ----


def edgeml(*arguments: str, **settings: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-P", "-m", "edgeml.cli", *arguments], stderr=subprocess.PIPE, **settings)


def test_a_reader_that_goes_away_is_no_error(toy: Path) -> None:
    rows = b'{"text": "rain"}\n' * 20_000
    with edgeml("run", str(toy), "--task", "mood", "--input", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        feeder = threading.Thread(target=_feed, args=(process, rows))
        feeder.start()
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"mood\t")
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        feeder.join()
        assert process.wait(60) == 0


def _feed(process: subprocess.Popen[bytes], rows: bytes) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(rows)


def test_a_full_disk_is_a_sentence(toy: Path) -> None:
    with Path("/dev/full").open("wb") as full, edgeml("inspect", str(toy), stdout=full) as process:
        error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 4
    assert error == "edgeml: standard output: No space left on device\n"


def test_a_terminal_that_lacks_a_character(rebuild: Any) -> None:
    def snow(manifest: dict[str, Any]) -> None:
        next(task for task in manifest["tasks"] if task["name"] == "mood")["labels"] = ["good \u2603", "bad \u2603"]

    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    path = str(rebuild(change=snow))
    with edgeml("run", path, "--task", "mood", "--text", "rain", stdout=subprocess.PIPE, env=environment) as process:
        out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, b"")
    assert b"\\u2603" in out


def test_interrupting_a_run_that_waits(toy: Path) -> None:
    with edgeml("run", str(toy), "--task", "mood", "--input", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while b"onnxruntime" not in maps.read_bytes():  # past the imports, in the command
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert process.stderr.read().decode().split() == ["edgeml:", "interrupted"]


def test_an_interruption_that_a_library_covers_up_is_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def covered(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr("edgeml.bundle.Bundle.open", covered)
    assert main(["inspect", "m.edgeml"]) == 130
    assert capsys.readouterr().err == "edgeml: interrupted\n"


def test_progress_is_shown_on_a_terminal_only(toy: Path) -> None:
    shown = {name: _on_a_terminal(toy, *arguments) for name, arguments in {"bar": (), "quiet": ("--quiet",)}.items()}
    assert "verifying" in shown["bar"]
    assert shown["quiet"] == ""
    assert _on_a_terminal(toy, TERM="dumb") == ""


def _on_a_terminal(toy: Path, *arguments: str, **environment: str) -> str:
    leader, follower = pty.openpty()
    command = [sys.executable, "-P", "-m", "edgeml.cli", "verify", str(toy), *arguments]
    done = subprocess.run(command, stderr=follower, stdout=subprocess.PIPE, env=os.environ | {"TERM": "xterm"} | environment)
    os.close(follower)
    assert done.returncode == 0
    written = b""
    with suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(leader, 4096):
            written += part
    os.close(leader)
    return written.decode()


def test_interruption_exits_130(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeml.bundle.Bundle.open", interrupt)
    assert main(["inspect", str(bundle)]) == 130


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("64MiB", "bytes", 64 << 20), ("1.5GB", "bytes", 1_500_000_000), ("50%", "percent", 50), ("auto", "auto", 0), (4096, "bytes", 4096)],
)
def test_sizes_as_people_write_them(text: int | str, kind: str, value: float) -> None:
    size = parse_memory(text)
    assert (size.kind, size.value) == (kind, value)


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e400", "101%", "5 parsecs", "nan", "1" * 400])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(Exception, match=" "):
        parse_memory(text)


def test_bytes_are_printed_in_binary_units() -> None:
    assert [format_bytes(n) for n in (0, 500, 1536, 1 << 30)] == ["0 B", "500 B", "1.5 KiB", "1.0 GiB"]
