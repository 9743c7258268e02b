"""What the installed distributions promise: their commands start, they are of one version, and a board gets the runtime alone."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

import click
import pytest

import edgeml
from edgeml.cli import ROOMS, group
from edgeml.errors import MissingExtra

DISTRIBUTIONS = {"edgeml-runtime": "edgeml", "edgeml-export": "export", "edgeml-devices": "device", "edgeml-report": "report"}


@pytest.mark.parametrize(("name", "command"), DISTRIBUTIONS.items())
def test_every_entry_point_can_be_loaded(name: str, command: str) -> None:
    """A name in pyproject.toml that no module has breaks the command only once it is installed."""
    try:
        points = list(distribution(name).entry_points)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    assert command in {point.name for point in points}
    for point in points:
        assert callable(point.load()), point


def test_versions_are_one() -> None:
    assert edgeml.__version__ == distribution("edgeml-runtime").version
    for name in DISTRIBUTIONS:
        try:
            assert distribution(name).version == edgeml.__version__
        except PackageNotFoundError:
            continue


def test_the_runtime_ships_no_other_room() -> None:
    files = distribution("edgeml-runtime").files or []
    assert files
    assert not [file for file in files if file.parts[0] in ("edgeml_export", "edgeml_devices", "edgeml_report")]


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_that_is_not_installed_is_named_in_help_and_in_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeml.cli.entry_points", lambda group: [])
    context = click.Context(group)
    assert name in group.list_commands(context)
    with pytest.raises(
        MissingExtra,
        match=rf"^edgeml {name} needs the extra '\w+': pip install 'edgeml-runtime\[\w+\]' \(from a checkout: pip install \./\w+\)$",
    ):
        group.get_command(context, name)
