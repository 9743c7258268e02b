"""What tests of devices share: a small mixture, a bundle that is worth copying, and a far side behind each transport."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import adbd
import numpy as np
import pytest
import sshd
from far import Far

from edgeml.bundle import PageKind, PageSource, write_bundle
from edgeml.made import make_mixture


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 8 routed experts; tasks weather, mood and vector. Nobody writes to it."""
    path = tmp_path_factory.mktemp("shared") / "toy.edgeml"
    make_mixture(path)
    return path


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 8 MiB, good for copying only."""
    path = tmp_path_factory.mktemp("shared") / "big.edgeml"
    content = np.random.default_rng(0).integers(0, 256, 8 << 20, np.uint8).tobytes()
    write_bundle(path, [PageSource(PageKind.JSON, content)], {})
    return path


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Sshd]:
    """A real sshd on the loopback interface."""
    if why := sshd.missing():
        pytest.skip(why)
    server = sshd.Sshd(tmp_path_factory.mktemp("sshd"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def adb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[adbd.Adb]:
    """adb's own server, on a port of its own."""
    if why := adbd.missing():
        pytest.skip(why)
    server = adbd.Adb(tmp_path_factory.mktemp("adb"))
    server.call("start-server")
    yield server
    server.call("kill-server")


@pytest.fixture
def local_far(tmp_path: Path) -> Far:
    """This machine."""
    return Far("local", sshd.far_python(tmp_path), tmp_path / "there", None)


@pytest.fixture
def ssh_far(tmp_path: Path, ssh_server: sshd.Sshd, monkeypatch: pytest.MonkeyPatch) -> Far:
    """This machine behind ssh."""
    ssh_server.know("host")
    monkeypatch.setenv("EDGEML_SSH", ssh_server.ssh)
    return Far(ssh_server.to, sshd.far_python(tmp_path), tmp_path / "there", ssh_server.cut)


@pytest.fixture
def adb_far(tmp_path: Path, adb_server: adbd.Adb, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    """This machine as an Android device."""
    device = adbd.Adbd()
    serial = f"127.0.0.1:{device.port}"
    assert "connected" in adb_server.call("connect", serial)
    monkeypatch.setenv("EDGEML_ADB", adb_server.command)
    yield Far(
        f"adb:{serial}", sshd.far_python(tmp_path), tmp_path / "there", device.cut, lambda: adb_server.call("-s", serial, "wait-for-device")
    )
    adb_server.call("disconnect", serial)
    device.stop()


@pytest.fixture(params=["local", "ssh", "adb"])
def far(request: pytest.FixtureRequest) -> Far:
    """Every transport in turn."""
    found: Far = request.getfixturevalue(f"{request.param}_far")
    return found


@pytest.fixture(params=["ssh", "adb"])
def wire(request: pytest.FixtureRequest) -> Far:
    """The transports that have something between here and there which can break."""
    found: Far = request.getfixturevalue(f"{request.param}_far")
    return found
