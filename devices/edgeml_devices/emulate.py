"""A child process under a device's limits, as far as this Linux lets us: memory, reading, cores. Never the speed of the processor.

Memory is a control group's cap (version 1 or 2), which counts the page cache too: a file that was read is part of it, as on the
device. Reading is the block layer's throttle for the disk that the bundle lies on. Cores are an affinity mask, for which nobody needs
rights. What cannot be set is said in a sentence, and the child runs without it. Groups are made beside each other in the caller's own
and removed when the child has ended, whatever became of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from edgeml.errors import DeviceError
from edgeml.sizes import format_bytes

__all__ = ["Emulation", "Limits", "emulated", "read_limit"]

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limits:
    """What a child may have; None is no limit. `folder` lies on the disk that is slowed down."""

    memory_bytes: int | None
    read_bytes_per_s: int | None
    cores: int | None
    folder: Path


@dataclass
class Emulation:
    """The limits that could be set: `held` and `not_held` are sentences. `join` puts the calling process under them (in the child)."""

    held: list[str] = field(default_factory=list)
    not_held: list[str] = field(default_factory=list)
    groups: dict[str, Path] = field(default_factory=dict)
    cores: int | None = None

    def join(self) -> None:
        """Enter the groups and keep to the cores; called in the child before its program starts."""
        for group in dict.fromkeys(self.groups.values()):
            (group / "cgroup.procs").write_text(str(os.getpid()))
        if self.cores is not None:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: self.cores])

    def peak_memory_bytes(self) -> int | None:
        """The most memory the group held, page cache included; None where it is not counted."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            with suppress(OSError, ValueError, KeyError):
                return int((self.groups["memory"] / name).read_text())
        return None


@contextmanager
def emulated(limits: Limits, root: Path = ROOT) -> Iterator[Emulation]:
    """Set up the limits; the groups are gone afterwards. Processes in them must have ended by then."""
    found = Emulation()
    try:
        _cores(limits, found)
        if limits.memory_bytes is not None:
            _try(found, root, "memory", f"a memory cap of {format_bytes(limits.memory_bytes)}, page cache included", limits)
        if limits.read_bytes_per_s is not None:
            _try(found, root, "blkio", f"reading at no more than {limits.read_bytes_per_s / 1e6:.3g} MB/s", limits)
        yield found
    finally:
        for group in dict.fromkeys(found.groups.values()):
            _remove(group)


@contextmanager
def read_limit(bytes_per_s: int, folder: Path) -> Iterator[None]:
    """This process and those it starts read the disk of `folder` at no more than that. Raises `DeviceError` where it cannot be set."""
    before = _own(ROOT, "blkio")
    with emulated(Limits(None, bytes_per_s, None, folder)) as found:
        if found.not_held:
            raise DeviceError(f"{found.not_held[0]}; run as root, or leave it out")
        found.join()
        try:
            yield
        finally:
            (before / "cgroup.procs").write_text(str(os.getpid()))


def _cores(limits: Limits, found: Emulation) -> None:
    here = len(os.sched_getaffinity(0))
    if limits.cores is None:
        return
    found.cores = min(limits.cores, here)
    if limits.cores <= here:
        found.held.append(f"{limits.cores} of the {here} processors here")
    else:
        found.not_held.append(f"the device has {limits.cores} cores, and this machine gives {here}")


def _try(found: Emulation, root: Path, controller: str, what: str, limits: Limits) -> None:
    try:
        found.groups[controller] = group = _made(found, root, controller)
        if controller == "memory":
            _limit_memory(group, limits.memory_bytes or 0)
        else:
            _limit_reading(group, limits.read_bytes_per_s or 0, limits.folder)
        found.held.append(what)
    except OSError as error:
        group_made = found.groups.pop(controller, None)
        if group_made is not None and group_made not in found.groups.values():
            _remove(group_made)
        found.not_held.append(f"{what}, cannot be set here ({error.strerror or error})")


def _made(found: Emulation, root: Path, controller: str) -> Path:
    """A new group with this controller, below the one we are in; version 2 keeps all controllers in one."""
    if (root / controller).is_dir():
        group = _own(root, controller) / f"edgeml-{os.getpid()}"
        group.mkdir()
        return group
    for known in found.groups.values():
        return known
    name, own = {"memory": "memory", "blkio": "io"}[controller], _own(root, controller)
    for place in (own, *own.parents):
        if not place.is_relative_to(root):
            break
        with suppress(OSError):
            if name not in (place / "cgroup.subtree_control").read_text().split():
                (place / "cgroup.subtree_control").write_text("+memory +io")
            group = place / f"edgeml-{os.getpid()}"
            group.mkdir()
            return group
    raise PermissionError(1, "no control group may be made; it takes root, or a delegated group")


def _limit_memory(group: Path, count: int) -> None:
    first = group / "memory.limit_in_bytes"
    (first if first.exists() else group / "memory.max").write_text(str(count))
    for name, value in (("memory.memsw.limit_in_bytes", str(count)), ("memory.swap.max", "0")):
        with suppress(OSError):  # without swap there is nothing to forbid
            if (group / name).exists():
                (group / name).write_text(value)


def _limit_reading(group: Path, rate: int, folder: Path) -> None:
    disk = _disk(folder)
    first = group / "blkio.throttle.read_bps_device"
    if first.exists():
        first.write_text(f"{disk} {rate}")
    else:
        (group / "io.max").write_text(f"{disk} rbps={rate}")


def _disk(folder: Path) -> str:
    """MAJOR:MINOR of the whole disk below a folder: a partition cannot be throttled."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    place = Path(f"/sys/dev/block/{number}")
    if (place / "partition").exists():
        return (place.resolve().parent / "dev").read_text().strip()
    return number


def _own(root: Path, controller: str, proc: Path = Path("/proc/self/cgroup")) -> Path:
    """The group that this process is in."""
    for line in proc.read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return root / controller / path.lstrip("/")
        if names == "" and not (root / controller).is_dir():
            return root / path.lstrip("/")
    return root / controller


def _remove(group: Path) -> None:
    for _ in range(50):
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)  # the last process is still being buried
