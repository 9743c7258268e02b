"""What a far side may be: without edgeml, with another version, too old, too full, of another machine, silent. One sentence each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("edgeml_devices", reason="the distribution edgeml-devices is not installed")

import sshd
from edgeml_devices import remote as remote_module
from edgeml_devices import worker
from edgeml_devices.remote import Remote, check_wheel, connect, start_line
from far import Far

import edgeml
from edgeml.bundle import Bundle
from edgeml.cli import main
from edgeml.errors import DeviceError, InputError


def script(folder: Path, text: str) -> Path:
    """A program that stands in for the far side's Python."""
    path = folder / "python"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def told(python: Path, root: Path, capfd: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    code = main(["device", *(more or ("push",)), "--to", "local", "--remote-python", str(python), "--remote-dir", str(root)])
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    return code, said


def test_another_version(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "edgeml").mkdir()
    (tmp_path / "edgeml" / "__init__.py").write_text('__version__ = "0.0.9"\n')
    python = script(tmp_path, f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    code, said = told(python, tmp_path / "there", capfd, "run", str(toy), "--task", "mood", "--text", "fog")
    assert code == 4
    assert f"edgeml-runtime 0.0.9 is there and {edgeml.__version__} is here; give --install" in said


def test_no_edgeml(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    python = script(tmp_path, f'exec {sys.executable} -S -I "$@"\n')
    code, said = told(python, tmp_path / "there", capfd, "run", str(toy), "--task", "mood", "--text", "fog")
    assert (code, said) == (
        4,
        "edgeml: local: edgeml-runtime is not installed there; give --install WHEEL, or name the Python that has it with --remote-python\n",
    )
    assert not (tmp_path / "there").exists()


def test_edgeml_that_does_not_start(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "edgeml").mkdir()
    (tmp_path / "edgeml" / "__init__.py").write_text('raise ImportError("libfoo.so.1 is missing")\n')
    python = script(tmp_path, f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    code, said = told(python, tmp_path / "there", capfd, "run", str(toy), "--task", "mood", "--text", "fog")
    assert code == 4
    assert "does not start there (ImportError: libfoo.so.1 is missing)" in said


def test_an_old_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    python = script(tmp_path, f'shift; code=$1; shift; exec {sys.executable} -c "import sys;sys.version_info=(3,9,2);$code" "$@"\n')
    code, said = told(python, tmp_path / "there", capfd)
    assert (code, said) == (4, "edgeml: local: Python 3.9 is there, and edgeml needs 3.11; name another with --remote-python\n")


def test_no_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = told(tmp_path / "none", tmp_path / "there", capfd)
    assert code == 4
    assert "that can be started; name Python 3.11 or newer with --remote-python" in said


def test_a_login_that_talks(tmp_path: Path) -> None:
    """Lines, bytes that are no text, and a last word without an end of line, before the worker's first."""
    python = script(tmp_path, f'printf "Welcome\\n\\377\\nand then "; exec {sys.executable} "$@"\n')
    with Remote(connect("local"), str(python), str(tmp_path / "there")) as remote:
        assert remote.open()["python"].startswith("3.")


def test_a_login_that_never_stops_talking(tmp_path: Path) -> None:
    python = script(tmp_path, "yes\n")
    with Remote(connect("local"), str(python), str(tmp_path / "there")) as remote, pytest.raises(DeviceError, match="what came was no"):
        remote.open()


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in its name, a folder is one word there; ~/ is the home there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for given, expected in ((None, ".cache/edgeml-device"), ("~/a b;'$x", "a b;'$x"), (str(tmp_path / "$(id)"), "$(id)")):
        with Remote(connect("local"), sys.executable, given) as remote:
            assert remote.open()["root"] == str(tmp_path / expected)


def test_the_environment_of_install_comes_first() -> None:
    line = start_line(connect("pi"), None, "/x", 5)
    assert line.startswith('r=/x; [ -x "$r/venv/bin/python" ] && p="$r/venv/bin/python" || p=python3; exec "$p" -c ')
    line = start_line(connect("local"), "my python", "/x", 5)
    assert line.startswith("r=/x; p='my python'; exec ")
    assert f"p={sys.executable}" in start_line(connect("local"), None, "/x", 5), "another python3 may have no edgeml"


def test_a_folder_that_others_can_write(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    code, said = told(sshd.far_python(tmp_path), tmp_path / "open", capfd)
    assert code == 4
    assert "can be written by others than this user; name another folder with --remote-dir" in said
    assert (tmp_path / "open").is_dir(), "it was there before us"


def test_a_folder_that_cannot_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, said = told(sshd.far_python(tmp_path), tmp_path / "file" / "there", capfd)
    assert code == 4
    assert "Not a directory; name another folder with --remote-dir" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m,mode=700", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_disk_that_is_too_small(small_disk: Path, big: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = told(sshd.far_python(tmp_path), small_disk / "there", capfd, "push", str(big))
    assert code == 4
    assert "the disk there is full: " in said
    assert "free some, or name another folder with --remote-dir" in said
    assert list(small_disk.rglob("*.part")) == []


def test_a_disk_that_fills_meanwhile(small_disk: Path, tmp_path: Path) -> None:
    from edgeml.bundle import PageKind, PageSource, write_bundle

    middle = tmp_path / "middle.edgeml"
    write_bundle(middle, [PageSource(PageKind.JSON, bytes([1]) * (4 << 20))], {})
    filler = small_disk / "filler"

    def step(_: int) -> None:
        if not filler.exists():
            filler.write_bytes(b"x" * (3 << 20))

    with Remote(connect("local"), str(sshd.far_python(tmp_path)), str(small_disk / "there")) as remote, Bundle.open(middle) as bundle:
        remote.open()
        with pytest.raises(DeviceError, match="the disk there is full; nothing of it was kept"):
            remote.send_bundle(bundle, True, step)
        assert list(small_disk.rglob("*.part")) == []
        filler.unlink()
        assert remote.send_bundle(bundle, True).bytes > 0  # the connection is as good as before


def test_two_copies_at_once(local_far: Far, big: Path) -> None:
    with Bundle.open(big) as bundle, local_far.remote() as first, local_far.remote() as second:
        first.open()
        second.open()

        def step(_: int) -> None:
            with pytest.raises(DeviceError, match="another copy of this bundle is under way there"):
                second.send_bundle(bundle, True)

        first.send_bundle(bundle, True, step)
        assert second.send_bundle(bundle, True).bytes == 0


def test_bytes_that_change_on_the_way(local_far: Far, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Remote._send

    def spoiled(self: Remote, message: dict[str, object], data: bytes = b"") -> None:
        send(self, message, data[:-1] + b"?" if data else b"")

    with Bundle.open(toy) as bundle, local_far.remote() as remote:
        remote.open()
        monkeypatch.setattr(Remote, "_send", spoiled)
        with pytest.raises(DeviceError, match="what arrived is not what was sent"):
            remote.send_bundle(bundle, True)
    assert local_far.left() == []


@pytest.mark.parametrize("columns", [None, 77])
def test_progress_has_a_terminal_where_there_is_one_here(local_far: Far, columns: int | None) -> None:
    code = "import os, sys; print(os.isatty(2) and os.get_terminal_size(2).columns, file=sys.stderr)"
    said: list[str] = []
    with local_far.remote() as remote:
        remote.open()
        remote._send({"do": "start", "code": code, "arguments": [], "columns": columns})
        assert remote._follow(said.append, said.append, lambda _: None) == 0
    assert "".join(said).strip() == str(columns or False)


def test_text_that_comes_in_pieces_stays_whole(local_far: Far) -> None:
    code = "import os, time\nfor byte in 'a\u00fc\u20ac\U0001f642'.encode() + b'\\xff': os.write(1, bytes([byte])); time.sleep(0.005)"
    said: list[str] = []
    with local_far.remote() as remote:
        remote.open()
        remote._send({"do": "start", "code": code, "arguments": []})
        remote._follow(said.append, said.append, lambda _: None)
    assert "".join(said) == "a\u00fc\u20ac\U0001f642\ufffd"


def test_a_command_that_is_killed(local_far: Far) -> None:
    with local_far.remote() as remote:
        remote.open()
        remote._doing = "x"
        remote._send({"do": "start", "code": "import os; os.kill(os.getpid(), 9)", "arguments": []})
        assert remote._follow(lambda _: None, lambda _: None, lambda _: None) == -9


def test_a_host_that_is_silent_ends_the_worker(local_far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path(worker.__file__).read_bytes().replace(b"SILENCE_S = 60.0", b"SILENCE_S = 0.2")
    monkeypatch.setattr(Path, "read_bytes", lambda _: short)
    with local_far.remote() as remote:
        remote.open()
        with pytest.raises(DeviceError, match="the connection broke"):
            remote._next()
    assert local_far.left() == []


def test_a_far_side_that_is_silent(local_far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_far.remote() as remote:
        remote.open()
        monkeypatch.setattr(worker, "SILENCE_S", 0.2)
        with pytest.raises(DeviceError, match="nothing was heard"):
            remote._next()


def test_ctrl_c_ends_it_on_both_sides(local_far: Far, toy: Path) -> None:
    command = [sys.executable, "-P", "-m", "edgeml.cli", "device", "serve-stdin", str(toy), *local_far.arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b'{"id": 1, "task": "mood", "text": "fog"}\n')
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["state"] == "done"
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=20)
    assert child.returncode == 130
    assert said.strip() == b"edgeml: interrupted"
    assert local_far.left() == []


def wheel(folder: Path, tag: str = "py3-none-any", version: str = edgeml.__version__, body: str = "") -> Path:
    """A wheel of the runtime that is none: a package of the right name and version."""
    path = folder / f"edgeml_runtime-{version}-{tag}.whl"
    about = f"edgeml_runtime-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("edgeml/__init__.py", f"__version__ = {version!r}\n")
        file.writestr("edgeml/cli.py", body or "import sys\nprint(*sys.argv[1:])\n")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: edgeml-runtime\nVersion: {version}\n")
        file.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{about}/RECORD", "")
    return path


def test_install_makes_an_environment_of_its_own(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    where = ["--to", "local", "--remote-dir", str(tmp_path / "there")]
    bare = script(tmp_path, f'exec {sys.executable} -S -I "$@"\n')
    assert main(["device", "push", *where, "--remote-python", str(bare), "--install", str(wheel(tmp_path))]) == 0
    assert f"| {edgeml.__version__} " in capfd.readouterr().out
    asked = ["device", "run", str(toy), *where, "--task", "mood", "--text", "fog"]
    assert main([*asked, "--json"]) == 4  # this edgeml prints its arguments, whatever they are
    assert "printed no document there" in capfd.readouterr().err
    assert main([*asked, "--install", str(wheel(tmp_path))]) == 0  # the same version is there: nothing to do
    assert capfd.readouterr().out == "run toy.edgeml --task=mood --text=fog\n"
    assert main(["device", "clean", *where]) == 0
    assert not (tmp_path / "there").exists()


def test_an_installation_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(remote_module, "INSTALL", "import sys; sys.exit('ensurepip is not available')")
    bare = script(tmp_path, f'exec {sys.executable} -S -I "$@"\n')
    code, said = told(bare, tmp_path / "there", capfd, "push", "--install", str(wheel(tmp_path)), "--quiet")
    name = f"edgeml_runtime-{edgeml.__version__}-py3-none-any.whl"
    assert (code, said) == (4, f"edgeml: local: {name} could not be installed there (ensurepip is not available)\n")
    assert not (tmp_path / "there").exists()


def test_a_wheel_that_is_cut(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="damaged"):
        check_wheel(path, {"platform": "linux-x86_64"}, "pi")


@pytest.mark.parametrize(
    ("name", "platform", "sentence"),
    [
        ("numpy-2.0-py3-none-any.whl", "linux-x86_64", "this is no wheel of edgeml-runtime"),
        ("edgeml_runtime-0.1.0.tar.gz", "linux-x86_64", "this is no wheel of edgeml-runtime"),
        ("edgeml_runtime-9.9.9-py3-none-any.whl", "linux-x86_64", "this is version 9.9.9"),
        (f"edgeml_runtime-{edgeml.__version__}-cp311-abi3-manylinux_2_17_x86_64.whl", "linux-aarch64", "give the wheel for aarch64"),
        (f"edgeml_runtime-{edgeml.__version__}-cp311-abi3-manylinux_2_17_aarch64.whl", "linux-armv7l", "give the wheel for armv7l"),
    ],
)
def test_wheels_that_are_refused(tmp_path: Path, name: str, platform: str, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(InputError, match=sentence):
        check_wheel(path, {"platform": platform}, "pi")


@pytest.mark.parametrize("tag", ["manylinux_2_17_aarch64.manylinux2014_aarch64", "any", "linux_aarch64"])
def test_wheels_for_the_machine(tmp_path: Path, tag: str) -> None:
    path = wheel(tmp_path, f"cp311-abi3-{tag}")
    check_wheel(path, {"platform": "linux-aarch64"}, "pi")


def test_old_parts_go(local_far: Far, toy: Path) -> None:
    folder = local_far.root / "bundles"
    folder.mkdir(parents=True)
    for name, age in (("old", worker.PART_AGE_S + 60), ("new", 60)):
        (folder / f"{name}.part").write_bytes(b"x")
        os.utime(folder / f"{name}.part", (time.time() - age,) * 2)
    with local_far.remote() as remote:
        remote.open()
    assert local_far.left() == ["bundles/new.part"]
