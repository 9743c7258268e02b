#!/usr/bin/env python3
"""The table and the record of compare.py's rows: mean and standard deviation over seeds, and what must hold.

    report.py --work DIR [--records benchmarks/records]

A lead over the best peer is counted seed by seed, on the same reference and batches; the best peer is the one with the best mean
drop, uniform ratios included. Fewer than three seeds decide nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import benchlib
import network
import peers
from compare import LOSSES, OURS, PARAMETERS, Row, rows

from edgeml.errors import DataError

LIMITS = {0.6: -0.5, 0.8: -1.5}  # share of MACs -> lowest drop, in percent
SEEDS = 3
Rows = dict[tuple[str, float, str], dict[int, Row]]


def table(groups: Rows) -> None:
    """Best first, for each loss and cut."""
    columns = ("loss", "cut", "method", "seeds", "MACs removed", "parameters removed", *network.TASKS, "raw drop %", "drop % (each seed)")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for (loss, share, method), same in sorted(groups.items(), key=lambda item: (*item[0][:2], -_mean(item[1], "drop"))):
        cells = [loss, f"{share:.0%}", method, str(len(same))]
        cells += [f"{_mean(same, name):.1%}" for name in ("macs_removed", "parameters_removed")]
        cells += [_spread([one["test"][task] for one in same.values()]) for task in network.TASKS]
        drops = [same[seed]["drop"] for seed in sorted(same)]
        cells += [f"{_mean(same, 'raw_drop'):+.1f}", f"**{_spread(drops, '+.2f')}** ({', '.join(f'{drop:+.2f}' for drop in drops)})"]
        print(f"| {' | '.join(cells)} |")


def judged(groups: Rows, loss: str, share: float, method: str) -> Iterator[benchlib.Verdict]:
    """What must hold of ours at one cut, under one loss."""
    ours = groups.get((loss, share, method), {})
    where = f"{method}, {loss}, {share:.0%} of MACs"
    if not ours:
        return
    decided = len(ours) >= SEEDS
    about: dict[str, Any] = {"seeds": sorted(ours)} | ({} if decided else {"why": f"{len(ours)} of {SEEDS} seeds"})

    def told(name: str, bound: str, measured: float, holds: bool) -> benchlib.Verdict:
        return benchlib.verdict(f"{where}: {name}", bound, measured, holds if decided else None, **about)

    for name, least in (("macs_removed", share), ("parameters_removed", PARAMETERS)):
        measured = min(one[name] for one in ours.values())
        yield told(f"least share of {name.replace('_', ' ')}", f">= {least}", measured, measured >= least)
    mean = _mean(ours, "drop")
    yield told("drop in %", f">= {LIMITS[share]}", mean, mean >= LIMITS[share])
    theirs = {peer: groups.get((loss, share, peer), {}) for peer in peers.PEERS}
    theirs = {peer: found for peer, found in theirs.items() if set(ours) <= set(found)}
    if not theirs:
        return
    best = max(theirs, key=lambda peer: statistics.mean(theirs[peer][seed]["drop"] for seed in ours))
    leads = [ours[seed]["drop"] - theirs[best][seed]["drop"] for seed in ours]
    spread = statistics.stdev(leads) if decided and share > 0.7 else 0.0
    lead = statistics.mean(leads)
    yield told(f"lead over {best} in points", f"> {spread:.2f}", lead, lead > spread)


def bounded(work: Path) -> Iterator[benchlib.Verdict]:
    """Every task's loss ratio under the bounds that were tried."""
    for file in sorted(work.glob("bound-*.json")):
        found = json.loads(file.read_text("utf-8"))
        worst = max(found["ratios"].values())
        about = {"ratios": found["ratios"], "seed": found["seed"], "macs_removed": found["macs_removed"]}
        name = f"largest loss ratio of a task on calibration, bound {found['bound']:.2f}, seed {found['seed']}"
        yield benchlib.verdict(name, f"<= {found['bound']}", worst, worst <= found["bound"] * (1 + 1e-6), **about)


def _mean(same: dict[int, Row], name: str) -> float:
    return statistics.mean(one[name] for one in same.values())


def _spread(values: list[float], form: str = ".2f") -> str:
    about = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{about}"


def main() -> int:
    made = benchlib.parser(__doc__)
    made.add_argument("--work", type=Path, required=True, help="folder of compare.py")
    options = made.parse_args()
    found = rows(options.work)
    if not found:
        raise DataError(f"{options.work / 'results.jsonl'} has no rows yet; run `compare.py run` first")
    groups: Rows = {}
    for one in found:
        groups.setdefault((one["loss"], one["cut"], one["method"]), {})[one["seed"]] = one
    table(groups)
    verdicts = [verdict for loss in LOSSES for share in LIMITS for method in OURS for verdict in judged(groups, loss, share, method)]
    return benchlib.finish("pruning", [*verdicts, *bounded(options.work)], {"rows": found}, options.records)


if __name__ == "__main__":
    benchlib.run(main)
