"""The profiles that come with edgeml: valid, sourced, and honest about what nobody measured."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("edgeml_devices", reason="the distribution edgeml-devices is not installed")

from edgeml_devices.library import find, profiles

from edgeml.device import Profile, write_profile
from edgeml.errors import DataError, UsageError

NAMES = sorted(profiles())


def no_host() -> Profile:
    raise AssertionError("the host was measured")


def test_the_boards_and_phones_that_are_promised() -> None:
    boards = {"raspberry-pi-zero-2-w", "raspberry-pi-3b-plus", *(f"raspberry-pi-4-{size}gb" for size in (2, 4, 8))}
    boards |= {f"raspberry-pi-5-{size}gb" for size in (4, 8, 16)} | {"box-2gb", "box-4gb", "phone-entry", "phone-middle", "phone-high"}
    assert set(NAMES) == boards


@pytest.mark.parametrize("name", NAMES)
def test_each_figure_has_a_source_and_what_is_assumed_says_how(name: str) -> None:
    profile = profiles()[name]
    assert profile.figures["memory.usable_bytes"].value < profile.figures["memory.total_bytes"].value
    for key, figure in profile.figures.items():
        if figure.assumed:
            assert figure.source.startswith("assumed: "), key
            assert figure.low is not None, key
            assert figure.high is not None, key
        elif key not in ("cpu.cores", "cpu.clock_hz"):
            assert not figure.source.startswith("assumed"), key
    needs_sensor = name.startswith("raspberry-pi-5")
    assert (profile.energy_sensor is not None) == needs_sensor


def test_names_and_aliases_are_used_once() -> None:
    names = [name for profile in profiles().values() for name in (profile.name, *profile.aliases)]
    assert len(names) == len(set(names))
    assert find("raspberry-pi-4", no_host).name == "raspberry-pi-4-4gb"


def test_a_misspelt_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean raspberry-pi-4"):
        find("raspbery-pi4", no_host)
    with pytest.raises(UsageError, match="edgeml device list"):
        find("zzzzzz", no_host)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(write_profile(profiles()["box-2gb"]))
    assert find(str(file), no_host) == profiles()["box-2gb"]
    with pytest.raises(DataError, match="cannot be read"):
        find(str(tmp_path / "none.toml"), no_host)
