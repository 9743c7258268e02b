#!/usr/bin/env python3
"""Paging against what the machine allows: a made mixture with 256 MiB of experts at 100 %, 50 % and 25 % of its memory.

    bound.py [--bundle large.edgeml] [--rounds 40] [--tokens 32] [--threads N] [--read-rate 800MB]

Each budget runs in a process of its own. In every round all three answer the same seeded random token ids, and this process reads
about as many bytes of the same file as the 25 % run missed last: whole pages past the page cache, with as many readers as the
pager has and into huge pages, as it does; once in random order and once in that of the file, which is nearer to how sites ask for
them. The faster of the two is the read rate. They take turns in another order each round, so that none is always the one to find
a rested disk, and a drift meets all of them.

Bounds. Memory: the peak of each process, after opening and over the run, is at most its budget + 120 MiB. Time at 25 %: at least
85 % of the speed of max(compute, bytes missed / measured read rate), where compute is the time of the same inputs at 100 %,
everything in memory. The interval is a bootstrap over rounds.

A site's pages are known only when the one before it is done, so what lies between two sites is time in which little can be read: the
faster the disk, the more it weighs. `--read-rate` (root, and a kernel that can) lets this process and its children read only so much
a second, as a board's flash does, and writes a record of its own.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from benchlib import Verdict, finish, parser, progress, run, verdict

from edgeml.bundle import Bundle, Page, PageKind
from edgeml.errors import DeviceError
from edgeml.made import LARGE, make_mixture
from edgeml.measure import peak_rss_bytes, rss_bytes
from edgeml.metrics import Interval, bootstrap
from edgeml.session import open as open_session
from edgeml.sizes import parse_bytes

BUDGETS = ("100%", "50%", "25%")
OVER_BYTES = 120 << 20
SHARE_AT_LEAST = 0.85
READERS, BLOCK, HUGE = 3, 4096, 2 << 20
INPUTS = 16  # different ones; each is answered once to warm up


class Worker:
    """A process that holds the bundle under one budget and answers rounds on demand, a JSON line for a line."""

    def __init__(self, bundle: Path, memory: str, tokens: int, threads: int | None) -> None:
        job = {"bundle": str(bundle), "memory": memory, "tokens": tokens, "threads": threads}
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.opened = self._next()

    def ask(self, number: int) -> dict[str, Any]:
        """Answer input `number`; returns what it cost."""
        assert self.child.stdin is not None
        self.child.stdin.write(f"{number}\n")
        self.child.stdin.flush()
        return self._next()

    def close(self) -> None:
        """End the process, however it fares."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()

    def _next(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise DeviceError(f"a measuring process ended with code {self.child.wait()}; what it said is above")
        said: dict[str, Any] = json.loads(line)
        return said


def work(job: dict[str, Any]) -> int:
    """The worker's side."""
    with open_session(job["bundle"], job["memory"], job["threads"]) as session:
        task = next(task for task in session.manifest.tasks if task.kind == "classification")
        session.load(task.name)
        drawn = np.random.default_rng(0).integers(0, session.preprocessor(task).vocabulary, (INPUTS, 1, job["tokens"]))
        opened = {"settings": session.settings(), "rss_after_open_bytes": rss_bytes(), "peak_after_open_bytes": peak_rss_bytes()}
        print(json.dumps(opened), flush=True)
        for line in sys.stdin:
            ids = drawn[int(line) % INPUTS]
            started = time.perf_counter()
            counters = session.run(task.name, arrays={"ids": ids}).counters
            seconds = time.perf_counter() - started
            said = {"seconds": seconds, **vars(counters), "peak_rss_bytes": peak_rss_bytes()}
            print(json.dumps(said), flush=True)
    return 0


class RawReader:
    """Whole expert pages of a file, drawn at random, by `READERS` threads, past the page cache where the file system can do that."""

    def __init__(self, path: Path) -> None:
        with Bundle.open(path) as bundle:
            self.pages: list[Page] = [page for page in bundle.pages if page.kind == PageKind.EXPERT]
        try:
            self.fd, self.direct = os.open(path, os.O_RDONLY | os.O_DIRECT), True
        except OSError:
            self.fd, self.direct = os.open(path, os.O_RDONLY), False
        self.rng = np.random.default_rng(0)
        size = -(-max(page.length for page in self.pages) // HUGE) * HUGE
        self.buffers = [mmap.mmap(-1, size) for _ in range(READERS)]  # aligned to a page of memory, as O_DIRECT wants
        for buffer in self.buffers:
            buffer.madvise(mmap.MADV_HUGEPAGE)

    def read(self, wanted: int, in_order: bool) -> tuple[int, float]:
        """Read pages of about `wanted` bytes, in random order or in that of the file; returns bytes and seconds."""
        count = max(1, round(wanted / self.pages[0].length))
        drawn = np.resize(self.rng.permutation(len(self.pages)), count)
        pages = [self.pages[i] for i in (sorted(drawn) if in_order else drawn)]
        return sum(page.length for page in pages), self._read(pages)

    def _read(self, drawn: Sequence[Page]) -> float:
        if not self.direct:
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        faults: list[str] = []
        threads = [threading.Thread(target=self._reader, args=(drawn[i::READERS], self.buffers[i], faults)) for i in range(READERS)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        if faults:
            raise DeviceError(f"reading the bundle failed: {faults[0]}; check the medium")
        return seconds

    def _reader(self, pages: Sequence[Page], buffer: mmap.mmap, faults: list[str]) -> None:
        view = memoryview(buffer)
        try:
            for page in pages:
                length = -(-page.length // BLOCK) * BLOCK
                if os.preadv(self.fd, [view[:length]], page.offset) < page.length:
                    faults.append("a short read")
        except OSError as error:
            faults.append(str(error.strerror))


def measure(bundle: Path, chosen: Any) -> tuple[list[Verdict], dict[str, Any]]:
    workers: dict[str, Worker] = {}
    try:
        for memory in BUDGETS:
            workers[memory] = Worker(bundle, memory, chosen.tokens, chosen.threads)
        tick = progress(INPUTS + chosen.rounds, "paging")
        for number in range(INPUTS):
            for worker in workers.values():
                worker.ask(number)
            tick(1)
        said, reads = rounds(workers, RawReader(bundle), chosen.rounds, tick)
    finally:
        for worker in workers.values():
            worker.close()
    verdicts, memory = memory_bound({name: worker.opened for name, worker in workers.items()}, said)
    one, speed = time_bound(said, reads)
    return [*verdicts, one], {"memory": memory, "time": speed, "rounds": chosen.rounds, "tokens": chosen.tokens}


Reads = dict[bool, list[tuple[int, float]]]  # in the file's order or not: bytes and seconds of each round


def rounds(
    workers: dict[str, Worker], reader: RawReader, count: int, tick: Callable[[int], None]
) -> tuple[dict[str, list[dict[str, Any]]], Reads]:
    """What each worker said in each round, and the raw reads."""
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    reads: Reads = {True: [], False: []}
    rng = np.random.default_rng(0)
    missed = workers["25%"].ask(0)["page_in_bytes"]
    for number in range(count):
        turns: list[str | bool] = [*workers, *reads]
        for turn in rng.permutation(len(turns)):
            who = turns[turn]
            if isinstance(who, bool):
                reads[who].append(reader.read(missed, who))
            else:
                said[who].append(workers[who].ask(number))
        missed = said["25%"][-1]["page_in_bytes"]
        tick(1)
    return said, reads


def memory_bound(opened: dict[str, dict[str, Any]], said: dict[str, list[dict[str, Any]]]) -> tuple[list[Verdict], dict[str, Any]]:
    verdicts, found = [], {}
    for name, first in opened.items():
        budget, peak = first["settings"]["memory_budget_bytes"], said[name][-1]["peak_rss_bytes"]
        over = (peak - budget) / (1 << 20)
        verdicts.append(verdict(f"peak memory over the budget at {name}, MiB", "<= 120", over, peak - budget <= OVER_BYTES))
        found[name] = {"budget_bytes": budget, "peak_bytes": peak, **first}
    return verdicts, found


def time_bound(said: dict[str, list[dict[str, Any]]], reads: Reads) -> tuple[Verdict, dict[str, Any]]:
    compute = np.array([answer["seconds"] for answer in said["100%"]])
    actual = np.array([answer["seconds"] for answer in said["25%"]])
    missed = np.array([answer["page_in_bytes"] for answer in said["25%"]])
    rates = {"file": np.array(reads[True]), "random": np.array(reads[False])}

    def rate(chosen: Any) -> float:
        return max(float(one[chosen, 0].sum() / one[chosen, 1].sum()) for one in rates.values())

    def share(rows: Sequence[Any]) -> float:
        chosen = rows[0]
        return float(max(compute[chosen].sum(), missed[chosen].sum() / rate(chosen)) / actual[chosen].sum())

    found: Interval = bootstrap(share, [len(actual)], 0)
    best = rate(slice(None))
    figures = {
        "read_bytes_per_s": best,
        "read_bytes_per_s_by_order": {order: float(one[:, 0].sum() / one[:, 1].sum()) for order, one in rates.items()},
        "missed_bytes_per_answer": float(missed.mean()),
        "compute_s": float(compute.mean()),
        "read_s": float(missed.mean() / best),
        "compute_plus_read_s": float(compute.mean() + missed.mean() / best),  # what no overlap at all would take
        "actual_s": float(actual.mean()),
        "share_of_bound": found.as_json(),
        "answers": {
            name: {
                "p50_s": float(np.median([answer["seconds"] for answer in answers])),
                "hits": sum(answer["hits"] for answer in answers),
                "misses": sum(answer["misses"] for answer in answers),
                "page_in_bytes": sum(answer["page_in_bytes"] for answer in answers),
                "page_wait_s": sum(answer["page_wait_s"] for answer in answers),
            }
            for name, answers in said.items()
        },
    }
    name = "speed at 25 % as a share of max(compute, bytes missed / read rate)"
    return verdict(name, f">= {SHARE_AT_LEAST}", found.value, found.value >= SHARE_AT_LEAST, found), figures


@contextmanager
def slowed(rate: int, folder: Path) -> Iterator[None]:
    """This process, and those it starts, in a control group (version 1 or 2) that reads `folder`'s disk at most at `rate` bytes/s."""
    place = folder.stat().st_dev
    disk = f"{os.major(place)}:{os.minor(place)}"
    root, version1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/blkio")
    group = (version1 if version1.is_dir() else root) / f"edgeml-bound-{os.getpid()}"
    try:
        group.mkdir()
        try:
            if version1.is_dir():
                (group / "blkio.throttle.read_bps_device").write_text(f"{disk} {rate}")
            else:
                (group / "io.max").write_text(f"{disk} rbps={rate}")
            (group / "cgroup.procs").write_text(str(os.getpid()))
            yield
            (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        finally:
            group.rmdir()
    except OSError as error:
        raise DeviceError(
            f"--read-rate: this system lets nobody slow its disk down here ({error}); run as root, or leave it out"
        ) from error


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--bundle", type=Path, help="a bundle that edgeml.made wrote (default: LARGE, written for this run)")
    options.add_argument("--folder", type=Path, help="where it is written (default: the system's temporary folder); on the disk to measure")
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--threads", type=int, help="threads to compute with (default: all processors)")
    options.add_argument(
        "--read-rate", type=parse_bytes, help="most that may be read a second, such as 800MB (default: what the disk gives)"
    )
    options.add_argument("--worker", help="used by this script itself")
    chosen = options.parse_args()
    if chosen.worker is not None:
        return work(json.loads(chosen.worker))
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        bundle = chosen.bundle
        if bundle is None:
            print("writing the mixture ...", file=sys.stderr)
            bundle = Path(temporary) / "large.edgeml"
            make_mixture(bundle, LARGE)
        with slowed(chosen.read_rate, bundle.parent) if chosen.read_rate else nullcontext():
            verdicts, figures = measure(bundle, chosen)
    name = f"paging-bound-{chosen.read_rate // 1_000_000}mb-per-s" if chosen.read_rate else "paging-bound"
    return finish(name, verdicts, figures | {"read_rate_limit_bytes_per_s": chosen.read_rate}, chosen.records)


if __name__ == "__main__":
    run(main)
