"""Limits around a child: against folders that look like control groups of version 1 and 2, and against the real ones where allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("edgeml_devices", reason="the distribution edgeml-devices is not installed")

from edgeml_devices import emulate
from edgeml_devices.emulate import Limits, emulated


@pytest.fixture(autouse=True)
def plain_folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real control group appears with its files and vanishes with rmdir; a plain folder has neither."""
    real = emulate._remove

    def remove(group: Path) -> None:
        if not str(group).startswith("/sys/"):
            for file in group.iterdir():
                file.unlink()
        real(group)

    monkeypatch.setattr(emulate, "_remove", remove)
    return


def limits(folder: Path, memory: int | None = 100 << 20, rate: int | None = 1_000_000, cores: int | None = 1) -> Limits:
    return Limits(memory, rate, cores, folder)


def test_version_2_keeps_all_limits_in_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("memory io\n")
    monkeypatch.setattr(emulate, "_own", lambda root, controller: root)
    with emulated(limits(tmp_path), tmp_path) as found:
        (group,) = set(found.groups.values())
        assert (group / "memory.max").read_text() == str(100 << 20)
        assert (group / "io.max").read_text().endswith(" rbps=1000000")
        assert len(found.held) == 3
        assert not found.not_held
    assert not group.exists()


def test_version_1_has_a_group_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("memory", "blkio"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(emulate, "_own", lambda root, controller: root / controller)
    with emulated(limits(tmp_path), tmp_path) as found:
        assert found.groups["memory"].parent.name == "memory"
        assert found.groups["blkio"].parent.name == "blkio"
        groups = list(found.groups.values())
    assert not any(group.exists() for group in groups)


def test_without_rights_there_are_sentences_and_no_failure(tmp_path: Path) -> None:
    with emulated(limits(tmp_path, cores=1000), tmp_path / "none") as found:
        assert len(found.not_held) == 3
        assert "cannot be set here" in found.not_held[1]
        assert "1000 cores" in found.not_held[0]
        assert found.peak_memory_bytes() is None


def test_groups_vanish_when_the_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("memory io\n")
    monkeypatch.setattr(emulate, "_own", lambda root, controller: root)
    with pytest.raises(KeyboardInterrupt), emulated(limits(tmp_path), tmp_path):
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["cgroup.subtree_control"]


def test_a_real_cap_counts_and_holds(tmp_path: Path) -> None:
    with emulated(limits(tmp_path, rate=None, cores=1)) as found:
        if "memory" not in found.groups:
            pytest.skip(f"no memory group can be made here: {found.not_held}")
        group = found.groups["memory"]
        grow = "import os; print(len(os.sched_getaffinity(0))); x = bytearray(300 << 20); print('grown')"
        child = subprocess.run([sys.executable, "-c", grow], capture_output=True, text=True, check=False, preexec_fn=found.join)
        assert child.stdout.split() == ["1"]
        assert child.returncode == -9
        peak = found.peak_memory_bytes()
        assert peak is None or peak <= 101 << 20
    assert not group.exists()
    assert os.getpid()
