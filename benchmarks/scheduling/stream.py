#!/usr/bin/env python3
"""A mixed stream of 8 task patterns: the scheduler against first come, first served with plain least-recently-used paging.

    stream.py [--bundle large.edgeml] [--rounds 6] [--requests 100] [--depth 64] [--texts 4] [--tokens 32] [--threads N]

A made mixture with 256 MiB of experts at half its pageable bytes, masked: each pattern has its resident set, which takes `--share` of the
budget. With all of it, the default, nothing can be read ahead; `halves` beside it has sets of half the budget, so that one is read
while another computes. A request is `--texts` seeded texts of `--tokens` token ids, its pattern is drawn at random. Both sides are the
same program with the same sets, reading and computing alike; the baseline takes requests in order of arrival, reads a set when its
turn comes, and has the pager give up the set that was used least recently (the pages' priority is the number of the batch that used
them last).

Batching is the same on both sides. In the arms with bounds a batch is one request; `joined` beside them lets requests of one pattern
share a batch of up to 32 rows, again on both sides (a baseline that does so is no longer strictly first come, first served).

Saturated: `--depth` requests are always outstanding; throughput and page-in bytes over all rounds, in which both sides take turns, and
latencies from submission. At a rate: requests arrive at random at 80 % of the baseline's saturated throughput, and latencies count
from the time a request was meant to arrive.

Bounds: throughput at least 1.5 times; p99 at most 1.2 times, saturated and at the rate; page-in bytes at least 2 times fewer;
scheduler and router below 2 % of the busy time. Intervals are bootstraps over rounds. The text model's figures stand beside.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from benchlib import MODEL, Verdict, finish, parser, progress, run, verdict

from edgeml.made import LARGE, make_mixture
from edgeml.metrics import Interval, bootstrap
from edgeml.router import resident_set, usage_of
from edgeml.session import Session
from edgeml.session import open as open_session

PATTERNS = 8
SIDES = {"baseline": "arrival", "scheduler": "overlap"}
WARM = 16
RATE_SHARE = 0.8


@dataclass
class Block:
    """What one side did with a stream of requests."""

    seconds: float = 0.0
    latency_s: list[float] = field(default_factory=list)
    page_in_bytes: int = 0
    table_s: float = 0.0
    router_s: float = 0.0
    busy_s: float = 0.0
    batches: int = 0


class Side:
    """An open session that serves in one order."""

    def __init__(self, bundle: Path, order: str, chosen: Any, rows: int) -> None:
        self.session = open_session(bundle, "50%", chosen.threads, "masked")
        self.texts, self.tokens = chosen.texts, chosen.tokens
        manifest = self.session.manifest
        self.tasks = [task.name for task in manifest.tasks if task.kind == "classification" and task.name in manifest.usage]
        pages = int(self.session.budget.pages * chosen.share)
        self.sets = {task: resident_set(manifest, usage_of(manifest, task), pages) for task in self.tasks}
        self.vocabulary = self.session.preprocessor(self.session.task(self.tasks[0])).vocabulary
        self.serving = self.session.serve(queue=1_000_000, patience=chosen.patience, order=order, rows=rows)
        self.router_s = _time_routers(self.session)
        for task in self.tasks:
            self.session.load(task)

    def stream(self, requests: int, seed: int) -> list[tuple[str, Any]]:
        """Tasks and token ids."""
        rng = np.random.default_rng(seed)
        tasks = rng.integers(0, len(self.tasks), requests)
        return [(self.tasks[task], rng.integers(5, self.vocabulary, (self.texts, self.tokens))) for task in tasks]

    def block(self, requests: Sequence[tuple[str, Any]], depth: int, arrivals: Sequence[float] | None = None) -> Block:
        """Serve a stream; with `arrivals`, in seconds from the start, else with `depth` requests outstanding."""
        done, before, router = Block(), self._counts(), len(self.router_s)
        free, started = threading.Semaphore(depth), time.perf_counter()
        tickets = []
        for number, (task, ids) in enumerate(requests):
            if arrivals is None:
                free.acquire()
                came = time.perf_counter()
            else:
                came = started + arrivals[number]
                time.sleep(max(0.0, came - time.perf_counter()))

            def ended(ticket: Any, came: float = came) -> None:
                done.latency_s.append(time.perf_counter() - came)
                free.release()

            tickets.append(self.session.submit(task, arrays={"ids": ids}, resident=self.sets[task], on_end=ended))
        for ticket in tickets:
            ticket.result()
        self.serving.drain()
        done.seconds = time.perf_counter() - started
        after = self._counts()
        done.page_in_bytes = int(after["page_in_bytes"] - before["page_in_bytes"])
        done.table_s, done.busy_s = after["table_s"] - before["table_s"], after["busy_s"] - before["busy_s"]
        done.batches, done.router_s = int(after["batches"] - before["batches"]), sum(self.router_s[router:])
        return done

    def _counts(self) -> dict[str, float]:
        return {**self.serving.stats(), "page_in_bytes": self.session.stats()["page_in_bytes"]}


def _time_routers(session: Session) -> list[float]:
    """The seconds that each run of a router stage will take, as they come."""
    graphs, seconds = session._graphs, list[float]()
    inner = graphs.run

    def timed(name: str, *rest: Any) -> Any:
        started = time.perf_counter()
        try:
            return inner(name, *rest)
        finally:
            if name in routers:
                seconds.append(time.perf_counter() - started)

    routers = {getattr(task.stages, "router", None) for task in session.manifest.tasks}
    graphs.run = timed  # type: ignore[method-assign]
    return seconds


def measure(bundle: Path, chosen: Any, rows: int, label: str) -> dict[str, list[Block]]:
    """Blocks of both sides in turns, in every round saturated, then at a rate: a share of the baseline's saturated throughput so far."""
    sides = {name: Side(bundle, order, chosen, rows) for name, order in SIDES.items()}
    found: dict[str, list[Block]] = {f"{name}{how}": [] for how in ("", " at a rate") for name in sides}
    tick = progress(chosen.rounds, label)
    try:
        for side in sides.values():
            side.block(side.stream(WARM, 0), WARM)
        for number in range(chosen.rounds):
            for name, side in sides.items():
                found[name].append(side.block(side.stream(chosen.requests, 1 + number), chosen.depth))
            rate = RATE_SHARE * chosen.requests / float(np.mean([block.seconds for block in found["baseline"]]))
            arrivals = np.cumsum(np.random.default_rng(number).exponential(1 / rate, chosen.requests)).tolist()
            for name, side in sides.items():
                found[f"{name} at a rate"].append(side.block(side.stream(chosen.requests, 101 + number), 1, arrivals))
            tick(1)
    finally:
        for side in sides.values():
            side.session.close()
    return found


def figures_of(found: dict[str, list[Block]]) -> dict[str, Any]:
    """Sums and percentiles of each side."""
    said: dict[str, Any] = {}
    for name, blocks in found.items():
        latencies = np.concatenate([block.latency_s for block in blocks])
        seconds, busy = sum(b.seconds for b in blocks), sum(b.busy_s for b in blocks)
        said[name] = {
            "requests": len(latencies),
            "batches": sum(b.batches for b in blocks),
            "requests_per_s": len(latencies) / seconds,
            "latency_s": {f"p{p}": float(np.percentile(latencies, p)) for p in (50, 90, 99)} | {"max": float(latencies.max())},
            "page_in_bytes": sum(b.page_in_bytes for b in blocks),
            "busy_share": busy / seconds,
            "scheduler_share": sum(b.table_s for b in blocks) / busy,
            "router_share": sum(b.router_s for b in blocks) / busy,
        }
    return said


def judge(found: dict[str, list[Block]]) -> list[Verdict]:
    """The bounds."""
    ours, theirs = found["scheduler"], found["baseline"]

    def over_rounds(value: Any) -> Interval:
        return bootstrap(lambda rows: float(value(rows[0])), [len(ours)], 0)

    def seconds(blocks: Sequence[Block], rows: Any) -> float:
        return sum(blocks[row].seconds for row in rows)

    def p99(blocks: Sequence[Block], rows: Any) -> float:
        return float(np.percentile(np.concatenate([blocks[row].latency_s for row in rows]), 99))

    def paged(blocks: Sequence[Block], rows: Any) -> float:
        return max(sum(blocks[row].page_in_bytes for row in rows), 1)

    speed = over_rounds(lambda rows: seconds(theirs, rows) / seconds(ours, rows))
    late = over_rounds(lambda rows: p99(ours, rows) / p99(theirs, rows))
    fewer = over_rounds(lambda rows: paged(theirs, rows) / paged(ours, rows))
    ours_at_rate, theirs_at_rate = found["scheduler at a rate"], found["baseline at a rate"]
    at_rate = over_rounds(lambda rows: p99(ours_at_rate, rows) / p99(theirs_at_rate, rows))
    share = sum(b.table_s + b.router_s for b in ours) / sum(b.busy_s for b in ours)
    return [
        verdict("throughput against first come, first served with LRU", ">= 1.5", speed.value, speed.value >= 1.5, speed),
        verdict("p99 against it, saturated", "<= 1.2", late.value, late.value <= 1.2, late),
        verdict("p99 against it, at 80 % of its throughput", "<= 1.2", at_rate.value, at_rate.value <= 1.2, at_rate),
        verdict("page-in bytes of it against ours", ">= 2", fewer.value, fewer.value >= 2, fewer),
        verdict("scheduler and router as a share of busy time", "< 0.02", share, share < 0.02),
    ]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--bundle", type=Path, help="a mixture of edgeml.made with 8 tasks (default: LARGE, written for this run)")
    options.add_argument("--folder", type=Path, help="where it is written (default: the system's temporary folder); on the disk to measure")
    options.add_argument("--text", type=Path, default=MODEL, help="a bundle whose figures stand beside (default: the text model)")
    options.add_argument("--rounds", type=int, default=6)
    options.add_argument("--requests", type=int, default=100, help="in a block, of which each side has one a round")
    options.add_argument("--depth", type=int, default=64, help="requests outstanding")
    options.add_argument("--texts", type=int, default=4, help="of a request")
    options.add_argument("--tokens", type=int, default=32, help="of a text")
    options.add_argument("--share", type=float, default=1.0, help="of the budget that a resident set may take")
    options.add_argument("--patience", type=int, default=2)
    options.add_argument("--threads", type=int, help="threads to compute with (default: all processors)")
    options.add_argument("--only", action="store_true", help="leave out what has no bounds")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        bundle = chosen.bundle
        if bundle is None:
            print("writing the mixture ...", file=sys.stderr)
            bundle = Path(temporary) / "large.edgeml"
            make_mixture(bundle, LARGE, tasks={f"pattern_{number}": ("a", "b", "c") for number in range(PATTERNS)})
        found = measure(bundle, chosen, chosen.texts, "stream")
        figures: dict[str, Any] = {"stream": figures_of(found)}
        if not chosen.only:
            share, chosen.share = chosen.share, chosen.share / 2
            figures["halves"] = figures_of(measure(bundle, chosen, chosen.texts, "halves"))
            chosen.share = share
            figures["joined"] = figures_of(measure(bundle, chosen, 32, "joined"))
            if chosen.text.exists():
                figures["text_model"] = figures_of(measure(chosen.text, chosen, chosen.texts, "text model"))
    settings = {key: getattr(chosen, key) for key in ("rounds", "requests", "depth", "texts", "tokens", "share", "patience", "threads")}
    return finish("scheduling-stream", judge(found), {"settings": settings, **figures}, chosen.records)


if __name__ == "__main__":
    run(main)
