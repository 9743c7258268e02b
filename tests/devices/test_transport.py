"""What holds over every transport: whole copies, resumed copies, runs that leave nothing, connections that break."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("edgeml_devices", reason="the distribution edgeml-devices is not installed")

from far import Far, alive

from edgeml.bundle import Bundle
from edgeml.cli import main
from edgeml.errors import DeviceError


def silent(_: str) -> None:
    pass


class _Cut(Exception):
    pass


def broken_copy(far: Far, big: Path, after: int) -> DeviceError:
    """Cut the connection once `after` bytes are sent; the error that the host gets."""
    sent = 0

    def step(count: int) -> None:
        nonlocal sent
        before, sent = sent, sent + count
        if before < after <= sent:
            far.cut()

    with far.remote() as remote, Bundle.open(big) as bundle:
        remote.open()
        with pytest.raises(DeviceError) as caught:
            remote.send_bundle(bundle, True, step)
    return caught.value


def kept(far: Far, bundle: Bundle) -> Path:
    return far.root / "bundles" / f"{bundle.id}.edgeml"


def test_a_bundle_is_copied_once_and_byte_for_byte(far: Far, big: Path) -> None:
    with Bundle.open(big) as bundle:
        with far.remote() as remote:
            remote.open()
            first = remote.send_bundle(bundle, True)
        with far.remote() as remote:
            remote.open()
            second = remote.send_bundle(bundle, True)
        assert (first.bytes, first.resumed_bytes) == (big.stat().st_size, 0)
        assert (second.bytes, second.resumed_bytes) == (0, 0)
        assert kept(far, bundle).read_bytes() == big.read_bytes()
        assert far.left() == [f"bundles/{bundle.id}.edgeml"]


def test_a_copy_that_broke_off_goes_on(wire: Far, big: Path) -> None:
    error = broken_copy(wire, big, 4 << 20)
    assert "the connection broke while copying big.edgeml; what had arrived is kept there" in str(error)
    assert error.exit_code == 4
    with Bundle.open(big) as bundle:
        assert wire.left() == [f"bundles/{bundle.id}.part"]
        with wire.remote() as remote:
            remote.open()
            copied = remote.send_bundle(bundle, True)
        assert copied.resumed_bytes > 0
        assert copied.resumed_bytes + copied.bytes == big.stat().st_size
        assert kept(wire, bundle).read_bytes() == big.read_bytes()
        assert wire.left() == [f"bundles/{bundle.id}.edgeml"]


def test_a_damaged_part_is_sent_again(local_far: Far, big: Path) -> None:
    broken_copy(local_far, big, 4 << 20)
    with Bundle.open(big) as bundle:
        part = kept(local_far, bundle).with_suffix(".part")
        content = bytearray(part.read_bytes())
        content[5000] ^= 1
        part.write_bytes(content)
        with local_far.remote() as remote:
            remote.open()
            assert remote.send_bundle(bundle, True).resumed_bytes == 0
        assert kept(local_far, bundle).read_bytes() == big.read_bytes()


def test_what_a_killed_worker_left_is_removed_by_the_next(local_far: Far, big: Path) -> None:
    broken_copy(local_far, big, 4 << 20)
    assert [path.name for path in local_far.root.glob("run-*/*")] == ["lock"]
    with local_far.remote() as remote:
        remote.open()
        assert len(list(local_far.root.glob("run-*"))) == 1
    with Bundle.open(big) as bundle:
        assert local_far.left() == [f"bundles/{bundle.id}.part"]


def test_a_part_longer_than_the_bundle_is_cut(local_far: Far, toy: Path) -> None:
    (local_far.root / "bundles").mkdir(parents=True)
    with Bundle.open(toy) as bundle:
        kept(local_far, bundle).with_suffix(".part").write_bytes(toy.read_bytes() + b"more")
        with local_far.remote() as remote:
            remote.open()
            assert remote.send_bundle(bundle, True).bytes == 0
        assert kept(local_far, bundle).read_bytes() == toy.read_bytes()


def test_a_newer_manifest_is_another_bundle(local_far: Far, toy: Path, tmp_path: Path) -> None:
    from edgeml.bundle import replace_manifest

    newer = tmp_path / "newer.edgeml"
    newer.write_bytes(toy.read_bytes())
    with Bundle.open(toy) as bundle:
        replace_manifest(newer, dict(bundle.manifest) | {"evidence": None})
    with Bundle.open(toy) as old, Bundle.open(newer) as new, local_far.remote() as remote:
        assert old.id == new.id
        remote.open()
        remote.send_bundle(old, True)
        assert remote.send_bundle(new, True).bytes == newer.stat().st_size
        assert kept(local_far, new).read_bytes() == newer.read_bytes()


def test_a_run_answers_and_leaves_nothing(far: Far, toy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["--task", "weather", "--text", "fog"]
    assert main(["run", str(toy), *asked]) == 0
    here = capfd.readouterr().out.split("\t")[:3]
    assert main(["device", "run", str(toy), *far.arguments, *asked]) == 0
    assert capfd.readouterr().out.split("\t")[:3] == here
    assert far.left() == []
    assert main(["device", "run", str(toy), *far.arguments, *asked, "--keep", "--json"]) == 0
    (device,) = json.loads(capfd.readouterr().out)["devices"]
    assert [device["exit_code"], device["error"], device["copied_bytes"]] == [0, None, toy.stat().st_size]
    assert device["document"]["results"][0]["label"] == here[1]
    assert len(far.left()) == 1


def test_what_push_brought_stays_until_clean(local_far: Far, toy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "push", str(toy), *local_far.arguments, "--verify"]) == 0
    assert "copied" in capfd.readouterr().out
    assert main(["device", "push", str(toy), *local_far.arguments]) == 0
    assert "was there" in capfd.readouterr().out
    assert main(["device", "run", str(toy), *local_far.arguments, "--task", "mood", "--text", "fog"]) == 0
    assert len(local_far.left()) == 1
    assert main(["device", "clean", *local_far.arguments]) == 0
    assert local_far.left() == []


def test_a_connection_that_breaks_in_a_run(wire: Far, toy: Path) -> None:
    pids: list[int] = []

    def out(text: str) -> None:
        pids.append(int(text))
        wire.cut()

    with wire.remote() as remote, Bundle.open(toy) as bundle:
        remote.open()
        remote.send_bundle(bundle, False)
        remote.place(bundle, "toy.edgeml")
        remote._doing = "running edgeml bench"
        code = "import os, time; os.write(1, b'%d' % os.getpid()); time.sleep(600)"
        remote._send({"do": "start", "code": code, "arguments": []})
        with pytest.raises(DeviceError, match="the connection broke while running edgeml bench") as caught:
            remote._follow(out, silent, lambda _: None)
        assert caught.value.exit_code == 4
    assert wire.left() == []  # not even the bundle, which was not to stay
    assert not alive(pids[0])


def test_a_host_that_is_killed_leaves_nothing_there(wire: Far, toy: Path) -> None:
    command = [sys.executable, "-P", "-m", "edgeml.cli", "device", "serve-stdin", str(toy), *wire.arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (
        tempfile.TemporaryDirectory() as sockets,  # what a killed process cannot remove; a socket's path must be short
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment | {"TMPDIR": sockets}) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b'{"id": 1, "task": "mood", "text": "fog"}\n')
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["state"] == "done"
        assert len(list(wire.root.glob("bundles/*"))) == 1
        child.kill()
    assert wire.left() == []


def test_records_come_as_they_are_measured(local_far: Far, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from edgeml.records import read

    asked = ["--task", "mood", "--iterations", "2", "--warmup", "0", "--cold", "0", "--memory", "50%,100%"]
    file = tmp_path / "records.jsonl"
    assert main(["device", "bench", str(toy), *local_far.arguments, *asked, "--records", str(file)]) == 0
    shown = capfd.readouterr().out
    assert "p50 ms" in shown
    found = read(file)
    assert [record["memory"] for record in found] == ["50%", "100%"]
    assert {record["bundle"] for record in found} == {"toy.edgeml"}
    assert {record["to"] for record in found} == {local_far.to}


def test_several_devices_fill_one_table(local_far: Far, ssh_far: Far, toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = [*local_far.arguments, "--to", ssh_far.to]
    asked = ["--task", "mood", "--iterations", "2", "--warmup", "0", "--cold", "0"]
    assert main(["device", "bench", str(toy), *where, *asked]) == 0
    table = capfd.readouterr().out
    assert [sum(line.startswith(f"| {name}") for line in table.splitlines()) for name in ("on", "local", ssh_far.to)] == [1, 1, 1]
    assert main(["device", "run", str(toy), *where, "--task", "mood", "--text", "fog"]) == 0
    assert capfd.readouterr().out.count("mood") == 2


def test_one_of_several_that_is_not_there_spoils_nothing(
    local_far: Far, ssh_far: Far, toy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = [*local_far.arguments, "--to", "127.0.0.1:1"]
    assert main(["device", "run", str(toy), *where, "--task", "mood", "--text", "fog"]) == 4
    shown = capfd.readouterr()
    assert "| local" in shown.out
    assert "edgeml: 127.0.0.1:1: it cannot be reached" in shown.err


def test_the_far_command_speaks_for_itself(local_far: Far, toy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "run", str(toy), *local_far.arguments, "--task", "nothing", "--text", "fog"]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("edgeml: ")
    assert "nothing" in shown.err
    assert local_far.left() == []
