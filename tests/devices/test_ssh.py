"""ssh against a real sshd on the loopback interface: keys that are unknown or wrong, machines that are not there, one shared connection."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("edgeml_devices", reason="the distribution edgeml-devices is not installed")

import sshd
from edgeml_devices.ssh import Ssh
from far import Far

from edgeml.cli import main
from edgeml.errors import UsageError


def pushed(far: Far, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["device", "push", *far.arguments])
    return code, capfd.readouterr().err


def test_an_unknown_host_key_is_not_accepted(ssh_far: Far, ssh_server: sshd.Sshd, capfd: pytest.CaptureFixture[str]) -> None:
    ssh_server.know(None)
    code, said = pushed(ssh_far, capfd)
    assert code == 4
    assert said == (
        f"edgeml: {ssh_far.to}: its host key is not known here; connect once by hand with `ssh -p {ssh_server.port} 127.0.0.1`, "
        "compare the fingerprint and accept it\n"
    )
    assert (ssh_server.folder / "known_hosts").read_text() == ""


def test_another_host_key_is_refused(ssh_far: Far, ssh_server: sshd.Sshd, capfd: pytest.CaptureFixture[str]) -> None:
    ssh_server.know("other")
    before = (ssh_server.folder / "known_hosts").read_text()
    code, said = pushed(ssh_far, capfd)
    assert code == 4
    assert said.count("\n") == 1
    assert "its host key is not the one that is known" in said
    assert f"ssh-keygen -R [127.0.0.1]:{ssh_server.port}" in said
    assert (ssh_server.folder / "known_hosts").read_text() == before


def test_what_the_users_configuration_allows_is_not_allowed(ssh_far: Far, ssh_server: sshd.Sshd, capfd: pytest.CaptureFixture[str]) -> None:
    ssh_server.know(None)
    lax = ssh_server.folder / "lax_config"
    lax.write_text("StrictHostKeyChecking no\nBatchMode no\n" + (ssh_server.folder / "ssh_config").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEML_SSH", f"ssh -F {lax}")
        code, said = pushed(ssh_far, capfd)
    assert code == 4
    assert "its host key is not known here" in said


def test_no_key_no_entrance(ssh_far: Far, ssh_server: sshd.Sshd, capfd: pytest.CaptureFixture[str]) -> None:
    lines = (ssh_server.folder / "ssh_config").read_text()
    other = ssh_server.folder / "other_config"
    other.write_text(lines.replace("/user\n", "/other\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEML_SSH", f"ssh -F {other}")
        code, said = pushed(ssh_far, capfd)
    assert code == 4
    assert "it does not let us in, and no password is asked for" in said


@pytest.mark.parametrize(
    ("to", "sentence"),
    [
        ("127.0.0.1:1", "it cannot be reached (ssh: connect to host 127.0.0.1 port 1: Connection refused)"),
        ("nobody@no-such-machine.invalid", "there is no machine of that name"),
    ],
)
def test_machines_that_are_not_there(ssh_far: Far, to: str, sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "push", "--to", to]) == 4
    said = capfd.readouterr().err
    assert said.startswith(f"edgeml: {to}: {sentence}")
    assert said.count("\n") == 1


def test_ssh_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EDGEML_SSH", "no-such-ssh")
    assert main(["device", "push", "--to", "pi"]) == 4
    assert "no-such-ssh is not installed here" in capfd.readouterr().err


@pytest.mark.parametrize("place", ["", "-oProxyCommand=true", "pi@-oX=y", "a b", "pi:0", "pi:99999", "u@h@i", "pi:22:23", "[::1", "ssh://"])
def test_addresses_that_are_none(place: str) -> None:
    with pytest.raises(UsageError, match="is no machine"):
        Ssh(place)


@pytest.mark.parametrize(
    ("place", "host", "port"),
    [
        ("pi", "pi", None),
        ("user@pi.local", "user@pi.local", None),
        ("pi:2222", "pi", "2222"),
        ("ssh://user@pi:22/", "user@pi", "22"),
        ("user@[fe80::1%eth0]:22", "user@fe80::1%eth0", "22"),
    ],
)
def test_addresses(place: str, host: str, port: str | None) -> None:
    way = Ssh(place)
    try:
        assert way._host == host
        assert way._command[-1] == (port or "none")
    finally:
        way.close()


def test_one_connection_serves_all_and_is_gone_afterwards(ssh_far: Far, ssh_server: sshd.Sshd) -> None:
    with ssh_far.remote() as remote:
        remote.open()
        remote._end(5)
        remote.open()
        assert len(ssh_server.connections()) == 1
        sockets = Path(remote._transport._sockets)  # type: ignore[attr-defined]
        assert sockets.stat().st_mode & 0o777 == 0o700
    assert not sockets.exists()
