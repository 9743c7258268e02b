"""adb: the real client and its real server, with a made device behind them; and what they say when there is none."""

from __future__ import annotations

import adbd
import pytest

pytest.importorskip("edgeml_devices", reason="the distribution edgeml-devices is not installed")

from edgeml_devices.adb import Adb

from edgeml.cli import main
from edgeml.errors import UsageError


def test_no_device(adb_server: adbd.Adb, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EDGEML_ADB", adb_server.command)
    for to in ("adb", "adb:nothing"):
        assert main(["device", "push", "--to", to]) == 4
        said = capfd.readouterr().err
        assert said.startswith(f"edgeml: {to}: no such device; is it plugged in")
        assert said.count("\n") == 1


def test_several_devices_and_none_named(adb_server: adbd.Adb, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EDGEML_ADB", adb_server.command)
    devices = [adbd.Adbd(), adbd.Adbd()]
    for device in devices:
        adb_server.call("connect", f"127.0.0.1:{device.port}")
    assert main(["device", "push", "--to", "adb"]) == 4
    assert "there are several devices; name one as adb:SERIAL" in capfd.readouterr().err
    for device in devices:
        adb_server.call("disconnect", f"127.0.0.1:{device.port}")
        device.stop()


def test_a_device_of_the_first_shell_protocol(
    adb_server: adbd.Adb, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEML_ADB", adb_server.command)
    device = adbd.Adbd(features="cmd")
    serial = f"127.0.0.1:{device.port}"
    adb_server.call("connect", serial)
    assert main(["device", "push", "--to", f"adb:{serial}"]) == 4
    assert "its adb is too old: Android 7 or newer is needed" in capfd.readouterr().err
    adb_server.call("disconnect", serial)
    device.stop()


def test_a_phone_without_python(adb_server: adbd.Adb, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EDGEML_ADB", adb_server.command)
    device = adbd.Adbd()
    serial = f"127.0.0.1:{device.port}"
    adb_server.call("connect", serial)
    arguments = ["--to", f"adb:{serial}", "--remote-python", "/system/bin/python3"]
    assert main(["device", "push", *arguments]) == 4
    assert "there is no /system/bin/python3 that can be started" in capfd.readouterr().err
    adb_server.call("disconnect", serial)
    device.stop()


@pytest.mark.parametrize("serial", ["-s", "a b", "x;y", "$(id)"])
def test_serials_that_are_none(serial: str) -> None:
    with pytest.raises(UsageError, match="no serial number"):
        Adb(serial)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("adb: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set", "does not trust this computer yet"),
        ("error: device offline", "take the cable out and in again"),
        ("error: something else", "no connection (error: something else)"),
        ("", "adb ended with code 1"),
    ],
)
def test_what_the_client_says(said: str, sentence: str) -> None:
    assert sentence in Adb().explain(1, said)


def test_adb_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EDGEML_ADB", "no-such-adb")
    assert main(["device", "push", "--to", "adb"]) == 4
    assert "no-such-adb is not installed here" in capfd.readouterr().err
