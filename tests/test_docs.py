"""Documentation that cannot drift: every command is in the README, and the commands it shows are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from edgeml.bundle_writer import PageSource, write_bundle
from edgeml.cli import COMMANDS, main
from edgeml.layout import PageKind

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
MANIFEST = {"format": 1, "producer": {"name": "edgeml-runtime", "version": "0"}, "stages": [], "sites": [], "tasks": []}


def shown() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("edgeml ")]


def test_every_command_is_in_the_readme() -> None:
    for name in COMMANDS:
        assert f"`edgeml {name}" in README, name


def test_the_readme_never_installs_somebody_elses_package() -> None:
    assert not re.search(r"pip install edgeml(?!-runtime)", README)


def test_the_readme_shows_commands() -> None:
    assert shown()


@pytest.mark.parametrize("line", shown())
def test_commands_in_the_readme_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bundle(tmp_path / "model.edgeml", [PageSource(PageKind.JSON, b"{}")], MANIFEST)
    assert main(shlex.split(line)[1:]) == 0


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"\bmake ([a-z][a-z-]*)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
