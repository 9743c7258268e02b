"""Which experts a device should hold: decisions about resident sets, without a file, a clock or a session.

Theory. A task uses few experts, and always much the same ones (PreMoe). Its *usage* says how much of a site's work each expert does;
a *pattern* is a usage with a name. Five decisions rest on it:

- Which pages to hold. All pages of all sites compete by importance per byte, after each site has its top-k, so that a concentrated
  site keeps few experts and a diffuse one many (`best_pages`).
- Which pattern a request follows. The key is the usage of the first two sites, distance is cosine. A key that no pattern is near
  follows the general pattern, which is the mean over domains: a nearest neighbour always answers, a cut-off may say "unknown".
- When to change it. Segment by segment; only when another pattern was closer by a fifth twice in a row (`Drift`).
- When to mask. Only when reading what is missing would break a deadline, and masking would read less (`mask_for_deadline`).
- Whose set stands in. Where a task's own set cannot be read in time, that of another domain, if it was measured to help (`Transfer`).

Unlike in the paper, experts that are not held stay on disk and are used by the requests that can wait for them. What those use on
this device is blended into the recorded usage (`blend`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgeml.indices import cdtr
from edgeml.manifest import Manifest, Site

__all__ = [
    "GENERAL",
    "SEGMENT_TOKENS",
    "Drift",
    "Forecast",
    "Meter",
    "Transfer",
    "Usage",
    "Watched",
    "all_pages",
    "best_pages",
    "blend",
    "covered",
    "cut_off",
    "distance",
    "expected_bytes",
    "general_usage",
    "key_of",
    "mask_for_deadline",
    "mean_usage",
    "nearest",
]

#: usage[site][expert], from 0 up and 1 in sum per site.
Usage = Sequence[Sequence[float]]
Floats = NDArray[np.float64]

GENERAL = "(general)"  # no task can be called so
KEY_SITES = 2
#: A key of fewer tokens is too noisy to judge by.
SEGMENT_TOKENS = 256
#: How many tokens of this device weigh as much as what was recorded.
PRIOR_TOKENS = 1024
CLOSER_BY, TIMES = 0.2, 2
WITHIN_SHARE, WITHIN_AT_LEAST = 0.95, 20
LONE_CUT_OFF = 0.25


def best_pages(
    sites: Sequence[Site], usage: Usage, page_bytes: Mapping[int, int], budget_bytes: float, among: Collection[int] | None = None
) -> tuple[int, ...]:
    """The pages to hold within the budget, in ascending order; `page_bytes` is what each costs, 0 for one that costs nothing.

    Each site first keeps its most used experts up to top-k, as far as the budget goes, evenly; then the pages with the most
    importance per byte anywhere follow. What does not fit is passed over. Ties go to the lower page. `among`: only these pages.
    """
    worth: dict[int, float] = {}
    ranked: list[list[int]] = []
    for site, importance in zip(sites, usage, strict=True):
        order = sorted(range(len(site.experts)), key=lambda e: (-importance[e], e))
        ranked.append([site.experts[e].page for e in order])
        for expert, value in zip(site.experts, importance, strict=True):
            worth[expert.page] = worth.get(expert.page, 0.0) + value
    deepest = max((site.top_k for site in sites), default=0)
    floor = [
        pages[depth] for depth in range(deepest) for site, pages in zip(sites, ranked, strict=True) if depth < min(site.top_k, len(pages))
    ]
    chosen: set[int] = set()
    left = budget_bytes
    for page in floor + sorted(worth, key=lambda page: (-worth[page] / max(page_bytes[page], 1e-9), page)):
        if page not in chosen and page_bytes[page] <= left and (among is None or page in among):
            chosen.add(page)
            left -= page_bytes[page]
    return tuple(sorted(chosen))


def covered(sites: Sequence[Site], usage: Usage, pages: Collection[int]) -> float:
    """The share of the usage that these pages serve, mean over the sites, in [0, 1]."""
    shares = [
        sum(value for expert, value in zip(site.experts, importance, strict=True) if expert.page in pages)
        for site, importance in zip(sites, usage, strict=True)
    ]
    return sum(shares) / len(shares) if shares else 1.0


def mean_usage(usages: Sequence[Usage]) -> Usage:
    """The unweighted mean of at least one usage."""
    return [[sum(values) / len(usages) for values in zip(*rows, strict=True)] for rows in zip(*usages, strict=True)]


def general_usage(manifest: Manifest, usage: Mapping[str, Usage]) -> Usage | None:
    """The general pattern: the mean over domains of the mean over their tasks. None where no task has a usage."""
    domains: dict[str, list[Usage]] = {}
    for task in manifest.tasks:
        if task.name in usage:
            domains.setdefault(task.domain, []).append(usage[task.name])
    return mean_usage([mean_usage(tasks) for tasks in domains.values()]) if domains else None


def blend(prior: Usage, observed: Usage, tokens: float) -> Usage:
    """What was recorded, moved towards what `tokens` tokens here showed; no tokens leave it as it is."""
    own = tokens / (tokens + PRIOR_TOKENS)
    return [
        [(1 - own) * before + own * now for before, now in zip(*rows, strict=True)] if any(rows[1]) else list(rows[0])
        for rows in zip(prior, observed, strict=True)
    ]


def key_of(usage: Usage) -> Floats:
    """What patterns are compared by: the usage of the first two sites, (E0 + E1,)."""
    return np.concatenate([np.asarray(row, np.float64) for row in usage[:KEY_SITES]] or [np.zeros(0)])


def distance(one: Floats, other: Floats) -> float:
    """Cosine distance of two keys, from 0 (alike) to 1 (no expert in common); 1 to a key without any use."""
    lengths = math.sqrt(float(one @ one)) * math.sqrt(float(other @ other))  # two roots: the product of small squares would be 0
    return min(max(1 - float(one @ other) / lengths, 0.0), 1.0) if lengths else 1.0


def cut_off(patterns: Mapping[str, Usage], within: Sequence[float] = ()) -> float:
    """The largest distance at which a key still follows a pattern.

    The 95th percentile of the distances `within` tasks that this device has seen; until those are twenty, half the distance of the
    two closest patterns, inside which a key cannot be as near to another.
    """
    if len(within) >= WITHIN_AT_LEAST:
        return float(np.quantile(within, WITHIN_SHARE))
    keys = [key_of(usage) for usage in patterns.values()]
    apart = [distance(one, other) for number, one in enumerate(keys) for other in keys[:number]]
    return min(apart) / 2 if apart else LONE_CUT_OFF


def nearest(patterns: Mapping[str, Usage], key: Floats, limit: float) -> str:
    """The pattern that a key follows, the first on a tie; `GENERAL` where none is within the limit."""
    distances = {name: distance(key_of(usage), key) for name, usage in patterns.items()}
    name = min(distances, key=distances.__getitem__, default=GENERAL)
    return name if name != GENERAL and distances[name] <= limit else GENERAL


@dataclass
class Drift:
    """Which pattern a stream of segments follows; it changes only on evidence. The general pattern lies at the cut-off."""

    current: str
    rival: str | None = None
    times: int = 0

    def segment(self, distances: Mapping[str, float], limit: float) -> bool:
        """Judge a segment by its distance to each pattern; whether that changed the current one."""
        all_distances = {**distances, GENERAL: limit}
        closest = min(all_distances, key=all_distances.__getitem__)
        if all_distances[closest] >= (1 - CLOSER_BY) * all_distances[self.current]:
            self.rival, self.times = None, 0
            return False
        self.times = self.times + 1 if closest == self.rival else 1
        self.rival = closest
        if self.times < TIMES:
            return False
        self.current, self.rival, self.times = closest, None, 0
        return True


def expected_bytes(sites: Sequence[Site], usage: Usage, page_bytes: Mapping[int, int], resident: Collection[int], tokens: int) -> float:
    """Bytes that `tokens` tokens are expected to read when `resident` pages are in memory and nothing is masked.

    An expert of importance I is chosen by a token with probability of about k I; tokens count as independent, so that many tokens of
    one text read no more than this.
    """
    untouched: dict[int, float] = {}
    for site, importance in zip(sites, usage, strict=True):
        for expert, value in zip(site.experts, importance, strict=True):
            if expert.page not in resident:
                missed = (1 - min(site.top_k * value, 1.0)) ** tokens
                untouched[expert.page] = untouched.get(expert.page, 1.0) * missed
    return sum(page_bytes[page] * (1 - chance) for page, chance in untouched.items())


@dataclass(frozen=True)
class Forecast:
    """Seconds a batch is expected to take: computing it, and reading what it lacks when nothing is masked or when it is."""

    compute_s: float
    exact_read_s: float
    masked_read_s: float


def mask_for_deadline(forecast: Forecast, left_s: float) -> bool:
    """Whether to mask: nothing masked would be too late, and masking reads less (even where it is too late as well)."""
    return forecast.compute_s + forecast.exact_read_s > left_s and forecast.masked_read_s < forecast.exact_read_s


@dataclass
class Meter:
    """A measured rate, such as bytes a second; beyond `window` the past fades, so that it follows the machine it runs on."""

    amount: float = 0.0
    seconds: float = 0.0
    window: float = math.inf

    def add(self, amount: float, seconds: float) -> None:
        """Count what was done, and how long it took."""
        self.amount += amount
        self.seconds += seconds
        while self.amount > self.window:
            self.amount, self.seconds = self.amount / 2, self.seconds / 2

    @property
    def rate(self) -> float | None:
        """Amount a second, None before there is anything to measure by."""
        return self.amount / self.seconds if self.amount > 0 and self.seconds > 0 else None


@dataclass
class Watched:
    """What a task's tokens chose on this device: `choices[site][expert]` counted, over `tokens` tokens; beyond `window` the past fades.

    A choice counts the same whatever its weight, which a trunk does not tell.
    """

    choices: list[Floats]
    tokens: float = 0.0
    window: float = math.inf

    @classmethod
    def of(cls, sites: Sequence[Site], window: float = math.inf) -> Watched:
        """Nothing seen yet."""
        return cls([np.zeros(len(site.experts)) for site in sites], 0.0, window)

    def add(self, ids: NDArray[np.int64]) -> None:
        """Count the choices (tokens, sites, k), -1 for none."""
        for site, counts in enumerate(self.choices):
            chosen = ids[:, site].ravel()
            counts += np.bincount(chosen[chosen >= 0], minlength=len(counts))
        self._count(len(ids))

    def merge(self, other: Watched) -> None:
        """Add what was seen elsewhere."""
        for counts, theirs in zip(self.choices, other.choices, strict=True):
            counts += theirs
        self._count(other.tokens)

    def _count(self, tokens: float) -> None:
        self.tokens += tokens
        while self.tokens > self.window:
            self.tokens /= 2
            for counts in self.choices:
                counts /= 2

    @property
    def usage(self) -> Usage:
        """Shares of the choices by site; all 0 at a site where nothing was chosen."""
        return [[float(value) for value in counts / max(counts.sum(), 1.0)] for counts in self.choices]


def all_pages(sites: Iterable[Site]) -> frozenset[int]:
    """Every page with a routed expert."""
    return frozenset(expert.page for site in sites for expert in site.experts)


@dataclass(frozen=True)
class Transfer:
    """What each domain's resident set makes of the others' data, as this device measured it. D domains, all rows in their order.

    `sets[i]`: the pages of domain i's set. `scores[i][j]`: S[i, j], the mean over domain j's tasks of the metric under that set;
    `reference[j]` with nothing masked, `baseline[j]` without any routed expert, None where a site has no shared one; all in [0, 1].
    `examples[j]`: how many rows. `by`: "labels", or "agreement" where scores are shares of answers that are the unmasked ones.
    """

    domains: tuple[str, ...]
    sets: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    reference: tuple[float, ...]
    baseline: tuple[float, ...] | None
    examples: tuple[int, ...]
    by: str

    @cached_property
    def ratios(self) -> tuple[tuple[float | None, ...], ...]:
        """T[i, j], see `indices.cdtr`: 1 where domain i's set is as good as domain j's own, None where that is undefined."""
        if self.baseline is None:
            return ((None,) * len(self.domains),) * len(self.domains)
        return cdtr((self.reference, *self.scores), self.baseline).ratios

    @property
    def cdtr(self) -> float | None:
        """The cross-domain transfer ratio; None where it is undefined."""
        return None if self.baseline is None else cdtr((self.reference, *self.scores), self.baseline).value

    def stand_ins(self, domain: str) -> list[tuple[str, float, tuple[int, ...]]]:
        """The domains whose sets help this one, T > 0, with their T and pages, the most helpful first."""
        if domain not in self.domains:
            return []
        own = self.domains.index(domain)
        found = [
            (name, ratio, pages)
            for number, (name, pages) in enumerate(zip(self.domains, self.sets, strict=True))
            if number != own and (ratio := self.ratios[number][own]) is not None and ratio > 0
        ]
        return sorted(found, key=lambda each: (-each[1], each[0]))
