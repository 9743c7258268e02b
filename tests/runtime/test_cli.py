"""The command line: one sentence and the right exit code for every fault, and nothing heavy imported for help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgeml.bundle_writer import PageSource, write_bundle
from edgeml.cli import COMMANDS, main
from edgeml.layout import PageKind
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
    assert f"Example: edgeml {name}" in " ".join(output.split())
    assert "--json" in output


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
