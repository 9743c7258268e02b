"""Whether one of two is slower: the statistics behind `edgeml bench --compare`. Knows no session: it is handed functions and records.

In turns. Both sides are open at once and take turns of a few rounds on the same inputs; who begins a pair of turns is drawn, evenly. A
pair gives one figure, log(median of our turn / median of theirs): what slows the machine for longer than a pair cancels out, and one
spike is one pair. The estimate is the Hodges-Lehmann median of those figures and its interval is Wilcoxon's, made of the ordered means of
every two: it assumes no distribution but that a pair is as likely to err one way as the other, and outliers hardly move it.

Two processes of the very same program differ by a little for as long as they live, since their pages lie elsewhere, and by more where
their threads find other processors; two runs on different days differ by still more, and by far more where other programs ran. More
rounds do not show that, so it is added to every interval: PROCESS and THREADS, RUN and BUSY_RUN, standard deviations of the logarithm of
one process's or one run's median, as benchmarks/quality/gate.py measures them. Where there are earlier records enough, how they differ
among themselves is known better than RUN, and is used in its place.

The gate is built for 2 % false alarms (two-sided: the interval is a 98 % one) and for finding a slow-down by a tenth with 95 %: turns go on
until the interval is narrow enough for that, whatever it says. Where the time is up before, the comparison says what it could have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median, stdev
from typing import Any

import numpy as np

from edgeml.errors import UsageError

__all__ = ["FEWEST_PAIRS", "Comparison", "Turn", "busy", "compare_pairs", "compare_records", "in_turns"]

FALSE_ALARMS, POWER, FOUND = 0.02, 0.95, 0.10
Z = NormalDist().inv_cdf(1 - FALSE_ALARMS / 2)
#: Half of an interval that finds a slow-down with `POWER` is at most this share of the slow-down's logarithm.
SHARE = Z / (Z + NormalDist().inv_cdf(POWER))
PROCESS, THREADS, RUN, BUSY_RUN = 0.007, 0.012, 0.065, 0.25
STEADIEST, FEWEST_RECORDS = 0.015, 4  # no run-to-run spread is believed below the one, nor of fewer records than the other
BUSY = 1.5  # load average a processor beyond which other programs ran; measuring itself is a load
FEWEST_PAIRS, STEP, MOST_PAIRS = 16, 8, 400
RECORDED = NormalDist().inv_cdf(0.975)  # of the intervals in records

#: Runs turn number i and returns the latency of each of its rounds, in seconds.
Turn = Callable[[int], Sequence[float]]


@dataclass(frozen=True)
class Comparison:
    """Our time over theirs, with its 98 % interval over `n` pairs of turns, or over `n` earlier records.

    `allowed` is the slow-down that is let pass, 0.05 for 5 %.
    """

    ratio: float
    low: float
    high: float
    n: int
    allowed: float = 0.0

    @property
    def difference(self) -> str | None:
        """slower or faster, where that is sure, whatever is allowed."""
        return "slower" if self.low > 1 else "faster" if self.high < 1 else None

    @property
    def refused(self) -> bool:
        """Surely slower than is allowed."""
        return self.low > 1 + self.allowed

    @property
    def smallest(self) -> float:
        """The smallest slow-down, beyond what is allowed, that is found with 95 % by an interval of this width."""
        return math.exp(math.log(self.high / self.low) / 2 / SHARE) - 1

    @property
    def noisy(self) -> bool:
        """A slow-down by a tenth could go unseen."""
        return self.smallest > FOUND

    def as_json(self) -> dict[str, Any]:
        """As a record has it."""
        return {
            "ratio": {"value": self.ratio, "low": self.low, "high": self.high, "n": self.n},
            "confidence": 1 - FALSE_ALARMS,
            "difference": self.difference,
            "max_slowdown": self.allowed,
            "refused": self.refused,
            "smallest_found": self.smallest,
        }


def compare_pairs(ours: Sequence[float], theirs: Sequence[float], allowed: float = 0.0, process: float = PROCESS) -> Comparison:
    """From the figure of each pair's turns, in seconds, ours and theirs; at least 10 pairs, or the interval is too narrow.

    The interval: W, the sum of ranks of the positive differences, has mean n (n + 1) / 4 and variance n (n + 1) (2 n + 1) / 24 where both
    are alike; with C its 1 % quantile, the true median lies between the C-th smallest and largest mean of two.
    """
    logs = np.log(np.asarray(ours, np.float64) / np.asarray(theirs, np.float64))
    n = len(logs)
    first, second = np.triu_indices(n)
    means = np.sort((logs[first] + logs[second]) / 2)
    rank = max(math.floor(n * (n + 1) / 4 - Z * math.sqrt(n * (n + 1) * (2 * n + 1) / 24) - 0.5), 1)
    return _widened(float(np.median(means)), float(means[rank - 1]), float(means[-rank]), Z * math.sqrt(2) * process, n, allowed)


def in_turns(
    ours: Turn,
    theirs: Turn,
    allowed: float = 0.0,
    pairs: int = FEWEST_PAIRS,
    go_on: Callable[[], bool] = lambda: True,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
    process: float = PROCESS,
) -> Comparison:
    """Let both take turns: at least so many `pairs`, then until a slow-down by a tenth would be found, at most while `go_on()`.

    `process`: by how much two processes differ for good; give `THREADS` where either computes with several.
    """
    rng = np.random.default_rng(seed)
    found: tuple[list[float], list[float]] = ([], [])
    first, wanted = 0, max(pairs, FEWEST_PAIRS)
    while True:
        for number in range(len(found[0]), wanted):
            first = int(rng.integers(2)) if number % 2 == 0 else 1 - first  # of every two pairs each side begins one
            for side in (first, 1 - first):
                found[side].append(median((ours, theirs)[side](number)))
            tick()
        so_far = compare_pairs(*found, allowed, process)
        if not so_far.noisy or wanted >= MOST_PAIRS or not go_on():
            return so_far
        wanted += STEP


def compare_records(new: Mapping[str, Any], old: Sequence[Mapping[str, Any]], allowed: float = 0.0) -> Comparison:
    """The median latency of a record against those of earlier ones of the same settings.

    Of few records, runs are taken to differ by RUN; from FEWEST_RECORDS calm ones on, by as much as these do, with Student's quantile in
    place of the normal one. Raises `UsageError` where one of them has too few rounds for an interval.
    """
    now, error = _median(new)
    before = [_median(record) for record in old]
    logs, n = [value for value, _ in before], len(before)
    centre = now - sum(logs) / n
    if n >= FEWEST_RECORDS and not any(map(busy, (new, *old))):
        spread = max(stdev(logs), math.hypot(error, STEADIEST))
        more = _student(n - 1) * spread * math.sqrt(1 + 1 / n)
    else:
        own, *theirs = (BUSY_RUN if busy(record) else RUN for record in (new, *old))
        within = sum(deviation**2 + run**2 for (_, deviation), run in zip(before, theirs, strict=True)) / n**2
        more = Z * math.sqrt(error**2 + own**2 + within)
    return _widened(centre, centre, centre, more, n, allowed)


def _student(freedom: int) -> float:
    """The quantile of Student's distribution that Z is of the normal one: Fisher's and Cornish's expansion, off by 2 % at 3 degrees."""
    terms = (
        Z,
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))


def busy(record: Mapping[str, Any]) -> bool:
    """Whether other programs ran while it was made, as far as its load average tells."""
    return float(record.get("load_average") or 0) > BUSY * int(record.get("device", {}).get("processors", 1))


def _median(record: Mapping[str, Any]) -> tuple[float, float]:
    """The logarithm of a record's median latency, and its standard error within that run."""
    latency = record.get("latency_s") or {}
    interval = latency.get("p50_interval") or {}
    low, high = interval.get("low"), interval.get("high")
    if not low or not high:
        raise UsageError(f"a record of {record.get('rounds')} rounds has no interval to compare by: measure at least 6 rounds, better 30")
    return math.log(latency["p50"]), (math.log(high) - math.log(low)) / 2 / RECORDED


def _widened(centre: float, low: float, high: float, more: float, n: int, allowed: float) -> Comparison:
    """An interval of logarithms and an independent error, `more` to each side, as ratios."""
    low, high = centre - math.hypot(centre - low, more), centre + math.hypot(high - centre, more)
    return Comparison(math.exp(centre), math.exp(low), math.exp(high), n, allowed)
