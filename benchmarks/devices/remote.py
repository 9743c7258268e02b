#!/usr/bin/env python3
"""What it costs to ask another machine: a request through the worker, and the start of a measurement, over ssh on the loopback interface.

    devices/remote.py [--model FILE] [--task TASK] [--requests 200] [--starts 30]

- A remote request adds at most 5 ms: `edgeml device serve-stdin --to` against `edgeml serve-stdin`, both started once and asked in turn,
  from writing a line to reading its answer; the median of the differences of pairs.
- A remote `edgeml device bench` adds at most 2 s: the whole of it against the whole of `edgeml bench`, in turn, 20 rounds each, with the
  bundle there already; the median of the differences. What `ssh HOST true` takes alone is among the figures.
- A remote bench measures there: its p50 against that of a local one is among the figures, as nothing of the way is in it.

A real sshd is started on the loopback interface; what a network adds is its own round trip, once a request.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import sshd
from benchlib import MODEL, Verdict, finish, parser, progress, run, verdict

from edgeml.errors import DeviceError
from edgeml.metrics import Interval, bootstrap
from edgeml.records import read

REQUEST_MS, START_S = 5.0, 2.0
TEXT = "I lost my card on the way to the station, what shall I do now?"
WARM = 20


def command(*arguments: str) -> list[str]:
    """The command line of this tree."""
    return [sys.executable, "-P", "-m", "edgeml.cli", *arguments]


def median(values: list[float]) -> Interval:
    """The median with its bootstrap interval."""
    array = np.array(values)
    return bootstrap(lambda rows: float(np.median(array[rows[0]])), [len(values)], 0)


def shown(values: list[float]) -> dict[str, float]:
    """Median and extremes of seconds."""
    return {"p50_s": float(np.median(values)), "p95_s": float(np.quantile(values, 0.95)), "max_s": max(values)}


def ask(child: subprocess.Popen[bytes], number: int, task: str) -> tuple[float, float]:
    """One request; seconds until its answer was read, and those that the answer says it took."""
    line = json.dumps({"id": number, "task": task, "text": TEXT}).encode() + b"\n"
    sink, source = pipe(child.stdin), pipe(child.stdout)
    started = time.perf_counter()
    sink.write(line)
    sink.flush()
    answer = json.loads(source.readline() or b"{}")
    taken = time.perf_counter() - started
    if answer.get("state") != "done":
        raise DeviceError(f"a request was not answered: {answer}")
    return taken, float(answer["latency_s"])


def pipe(end: IO[bytes] | None) -> IO[bytes]:
    assert end is not None
    return end


def requests(model: Path, task: str, count: int, where: list[str]) -> tuple[list[Verdict], dict[str, Any]]:
    """Both servers asked in turn, each first in half of the pairs."""
    here, there, inside = [], [], []
    tick = progress(count + WARM, "requests")
    with ExitStack() as stack:
        children = []
        for line in (
            command("serve-stdin", str(model), "--threads", "1"),
            command("device", "serve-stdin", str(model), "--threads", "1", *where),
        ):
            child = stack.enter_context(subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
            stack.callback(child.kill)
            children.append(child)
        for number in range(count + WARM):
            order = (0, 1) if number % 2 else (1, 0)
            taken = {which: ask(children[which], number, task) for which in order}
            if number >= WARM:
                here.append(taken[0][0])
                there.append(taken[1][0])
                inside.append(taken[1][1])
            tick(1)
        for child in children:
            pipe(child.stdin).close()
            child.wait(30)
    added = median([1e3 * (far - near) for far, near in zip(there, here, strict=True)])
    bound = verdict("a remote request adds, ms", f"<= {REQUEST_MS}", added.value, added.value <= REQUEST_MS, added)
    return [bound], {"request_local": shown(here), "request_remote": shown(there), "request_remote_as_answered": shown(inside)}


def starts(model: Path, task: str, count: int, where: list[str], ssh: list[str], folder: Path) -> tuple[list[Verdict], dict[str, Any]]:
    """Whole processes in turn: `edgeml bench` here, there, and ssh alone; the first of each is left out."""
    asked = ["--task", task, "--iterations", "20", "--warmup", "3", "--cold", "0", "--threads", "1", "--quiet", "--records"]
    files = {name: folder / f"{name}.jsonl" for name in ("bench_local", "bench_remote")}
    lines = {
        "bench_local": [*command("bench", str(model), *asked), str(files["bench_local"])],
        "bench_remote": [*command("device", "bench", str(model), *asked), str(files["bench_remote"]), *where],
        "ssh_true": [*ssh, "true"],
    }
    taken: dict[str, list[float]] = {name: [] for name in lines}
    tick = progress(count + 1, "starts")
    for number in range(count + 1):
        for name, line in lines.items():
            started = time.perf_counter()
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode:
                raise DeviceError(f"{name} failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
            if number:
                taken[name].append(time.perf_counter() - started)
        tick(1)
    added = median([far - near for far, near in zip(taken["bench_remote"], taken["bench_local"], strict=True)])
    bound = verdict("a remote bench adds, s", f"<= {START_S}", added.value, added.value <= START_S, added)
    measured = {name: shown([record["latency_s"]["p50"] for record in read(file)]) for name, file in files.items()}
    return [bound], {name: shown(values) for name, values in taken.items()} | {"p50_as_recorded": measured}


def main() -> int:
    """Start the server, push the bundle, measure, write the record."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path, default=MODEL)
    options.add_argument("--task", default="banking77")
    options.add_argument("--requests", type=int, default=200)
    options.add_argument("--starts", type=int, default=30)
    given = options.parse_args()
    if why := sshd.missing():
        raise DeviceError(f"this benchmark {why}")
    os.environ["PYTHONPATH"] = sshd.packages()
    folder = Path(tempfile.mkdtemp(prefix="edgeml-bench-"))
    server = sshd.Sshd(folder)
    try:
        server.start()
        os.environ["EDGEML_SSH"] = server.ssh
        where = ["--to", server.to, "--remote-python", str(sshd.far_python(folder)), "--remote-dir", str(folder / "there")]
        subprocess.run(command("device", "push", str(given.model), *where, "--quiet"), check=True, capture_output=True)
        ssh = [*server.ssh.split(), "-p", str(server.port), "127.0.0.1"]
        verdicts, figures = requests(given.model.resolve(), given.task, given.requests, where)
        more, others = starts(given.model.resolve(), given.task, given.starts, where, ssh, folder)
    finally:
        server.stop()
        shutil.rmtree(folder)
    return finish("device-remote", verdicts + more, figures | others, given.records)


if __name__ == "__main__":
    run(main)
