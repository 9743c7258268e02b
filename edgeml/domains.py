"""Several variants of a model on several domains: scores, retention, and DSI, GG and CDTR with their intervals.

A `Sheet` is one task's examples with every variant's answers, the reference's first. A `Table` scores all sheets, by task and, as
unweighted means over tasks, by domain; and scores them again on a thousand draws of the examples, the same for every variant.
An interval is the 2.5th to 97.5th percentile over the draws. Each task's draws depend on the seed and its name alone, so that a
variant's interval does not depend on which others are evaluated.

Nothing is said of too little: DSI, GG and CDTR are None, with a reason, where any domain that counts has fewer than 30 examples.
Retention is clipped at chance, and where an unclipped score's draws reach down to chance, the bootstrap is known to fail: such an
interval is flagged `near_clip`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import DataError
from edgeml.indices import EPSILON, cdtr, corrected, dsi, forgetting, gg, near_chance
from edgeml.metrics import ABOVE_CHANCE, FEWEST_EXAMPLES, RESAMPLES, Interval, drawn_scores, from_tally, interval_of, one_hot, retention

__all__ = ["Sheet", "Table", "gap_figures", "specialised_figures", "task_figures", "variant_figures"]

Floats = NDArray[np.float64]
Counts = NDArray[np.integer[Any]]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Sheet:
    """One task's n examples as counts (n, classes, 3), see `metrics`: of always naming the commonest label of the training split,
    and of each variant's answers, the reference's first where there is one."""

    name: str
    domain: str
    metric: str
    always: Counts
    answers: tuple[Counts, ...]

    @classmethod
    def of_labels(cls, name: str, domain: str, metric: str, labels: Labels, commonest: int, answers: Sequence[Labels]) -> Sheet:
        """From label indices (n,) and predicted ones."""
        classes = 1 + max(int(one.max(initial=0)) for one in (labels, *answers, np.array([commonest])))
        counts = tuple(one_hot(labels, one, classes) for one in answers)
        return cls(name, domain, metric, one_hot(labels, np.full_like(labels, commonest), classes), counts)

    def __len__(self) -> int:
        return len(self.always)


class Table:
    """Scores of `sheets` whose answers are of the same variants in the same order. `domains` are sorted, `sizes` their examples.

    `scores` (variants, tasks), `chance` (tasks,); `domain_scores` (variants, D), `domain_chance` (D,); the same on every draw with
    an axis of draws in front, computed when first asked for.
    """

    def __init__(self, sheets: Sequence[Sheet], seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.sheets, self.seed, self.resamples = list(sheets), seed, resamples
        for sheet in sheets:
            if any(len(counts) != len(sheet) for counts in sheet.answers) or len(sheet.answers) != len(sheets[0].answers):
                raise DataError(f"task '{sheet.name}': its variants do not answer the same {len(sheet)} examples")
        self.domains = sorted({sheet.domain for sheet in sheets})
        self.sizes = [sum(len(sheet) for sheet in sheets if sheet.domain == domain) for domain in self.domains]
        everything = [[from_tally(sheet.metric, counts.sum(0)) for counts in (sheet.always, *sheet.answers)] for sheet in sheets]
        whole = np.array(everything, np.float64).T
        self.chance, self.scores = whole[0], whole[1:]

    @property
    def domain_scores(self) -> Floats:
        return self._by_domain(self.scores)

    @property
    def domain_chance(self) -> Floats:
        return self._by_domain(self.chance)

    @cached_property
    def drawn(self) -> tuple[Floats, Floats]:
        """Scores (draws, variants, tasks) and chance (draws, tasks)."""
        found = [
            drawn_scores(sheet.metric, (sheet.always, *sheet.answers), [self.seed, zlib.crc32(sheet.name.encode())], self.resamples)
            for sheet in self.sheets
        ]
        together = np.stack(found, axis=-1)
        return together[:, 1:], together[:, 0]

    @cached_property
    def drawn_domains(self) -> tuple[Floats, Floats]:
        """Scores (draws, variants, D) and chance (draws, D)."""
        scores, chance = self.drawn
        return self._by_domain(scores), self._by_domain(chance)

    @cached_property
    def excluded(self) -> tuple[int, ...]:
        """Domains on which the reference is less than 0.01 above chance."""
        return near_chance(np.vstack([self.domain_scores[0], self.domain_scores]), self.domain_chance)

    def index(self, statistic: Callable[[Floats, Floats], float | None], near_clip: bool = False) -> Interval | None:
        """A statistic of domain scores (variants, D) and chance (D,), with its interval."""
        value = statistic(self.domain_scores, self.domain_chance)
        if value is None:
            return None
        return interval_of(value, [statistic(*draw) for draw in zip(*self.drawn_domains, strict=True)], sum(self.sizes), near_clip)

    def too_few(self) -> str | None:
        """The reason for saying nothing, if a domain that counts has fewer than 30 examples."""
        for number, (name, size) in enumerate(zip(self.domains, self.sizes, strict=True)):
            if size < FEWEST_EXAMPLES and number not in self.excluded:
                return f"domain '{name}' has {size} examples, and {FEWEST_EXAMPLES} are the fewest that an index is given for"
        return None

    def at_the_clip(self, variant: int, domain: int) -> bool:
        """Whether the variant's score on a domain comes down to chance on more than one draw in forty."""
        scores, chance = self.drawn_domains
        return bool(np.percentile(scores[:, variant, domain] - chance[:, domain], 2.5) <= 0)

    def _by_domain(self, values: Floats) -> Floats:
        """Means over each domain's tasks, along the last axis."""
        columns = [[number for number, sheet in enumerate(self.sheets) if sheet.domain == domain] for domain in self.domains]
        return np.stack([values[..., own].mean(-1) for own in columns], axis=-1)


def task_figures(table: Table, variant: int, reference: bool) -> dict[str, dict[str, Any]]:
    """Of each task: domain, metric, n, chance, score, reference_score (None without a `reference`)."""
    return {
        sheet.name: {
            "domain": sheet.domain,
            "metric": sheet.metric,
            "n": len(sheet),
            "chance": float(table.chance[number]),
            "score": float(table.scores[variant, number]),
            "reference_score": float(table.scores[0, number]) if reference else None,
        }
        for number, sheet in enumerate(table.sheets)
    }


def variant_figures(table: Table, variant: int, reference: bool = True) -> dict[str, Any]:
    """What one row of the table comes to: tasks, means, retention with the tasks it leaves out, and each domain's retention."""
    found: dict[str, Any] = {
        "tasks": task_figures(table, variant, reference),
        "mean": float(table.scores[variant].mean()),
        "reference_mean": float(table.scores[0].mean()) if reference else None,
        "retention": None,
        "excluded": [],
        "domains": {},
    }
    if reference:
        whole, excluded = _retention(table, variant)
        found |= {"retention": _json(whole), "excluded": [table.sheets[number].name for number in excluded]}
    kept = corrected(table.domain_scores, table.domain_chance) if reference and len(table.scores) > 1 else None
    for number, name in enumerate(table.domains):
        found["domains"][name] = {
            "score": float(table.domain_scores[variant, number]),
            "reference_score": float(table.domain_scores[0, number]) if reference else None,
            "chance": float(table.domain_chance[number]),
            "n": table.sizes[number],
            "retention": None if kept is None else _json(_domain_retention(table, variant, number, float(kept[variant, number]))),
        }
    return found


def gap_figures(table: Table, variant: int, seen: Collection[str]) -> dict[str, Any]:
    """GG, GG_raw and forgetting of a variant that was made with the domains `seen`, and `why` where they are None."""
    out = table.excluded
    home, away = ([n for n, name in enumerate(table.domains) if (name in seen) is side and n not in out] for side in (True, False))
    found: dict[str, Any] = {"gg": None, "gg_raw": None, "forgetting": None, "unseen": [table.domains[n] for n in away], "why": None}
    if not home or not away:
        left = "was seen by what made this variant" if home else "was not seen by what made this variant"
        every = f"every domain {left}; name those it saw with --domains-seen"
        found["why"] = every if home or away else "the reference is above chance on no domain"
        return found
    found["why"] = table.too_few()
    if found["why"] is None:
        near = any(table.at_the_clip(variant, number) for number in away)
        found["gg"] = _json(table.index(lambda scores, _: gg(scores, variant, home, away).value))
        found["gg_raw"] = _json(table.index(lambda scores, _: gg(scores, variant, home, away).raw))
        found["forgetting"] = _json(table.index(lambda scores, chance: forgetting(scores, chance, variant, away, out), near))
    return found


def specialised_figures(table: Table, baseline: bool) -> dict[str, Any]:
    """DSI, CDTR and the tables behind them. Rows: the reference, one a domain in the order of `domains`, and with `baseline` the
    answers without any specialised expert."""
    count, out = len(table.domains), table.excluded
    scores, chance = table.domain_scores, table.domain_chance
    rows, floor = scores[: count + 1], scores[-1]
    single, moved = dsi(rows, chance, out), cdtr(rows, floor, out) if baseline else None
    kept = [number for number in range(count) if number not in out]
    why = "fewer than two domains are above chance" if len(kept) < 2 else table.too_few()
    found: dict[str, Any] = {
        "dsi": None,
        "dsi_max": None,
        "dsi_by_domain": {},
        "cdtr": None,
        "transfer": {
            "domains": table.domains,
            "scores": rows[1:].tolist(),
            "baseline": floor.tolist() if baseline else None,
            "retention": corrected(rows, chance)[1:].tolist(),
            "forgetting": [forgetting(rows, chance, 1 + i, [j for j in range(count) if j != i], out) for i in range(count)],
            "ratios": None if moved is None else [list(row) for row in moved.ratios],
            "above_one": [] if moved is None else [[table.domains[i], table.domains[j]] for i, j in moved.above_one],
        },
        "excluded_domains": [table.domains[number] for number in out],
        "why": why,
    }
    if why is not None:
        return found
    near = any(table.at_the_clip(1 + i, j) for i in kept for j in kept)
    drawn = [dsi(draw[: count + 1], at, out) for draw, at in zip(*table.drawn_domains, strict=True)]
    total = sum(table.sizes)
    found["dsi"] = _json(interval_of(single.value, [one.value for one in drawn], total, near))
    found["dsi_max"] = _json(interval_of(single.most, [one.most for one in drawn], total, near))
    for number in kept:
        own = any(table.at_the_clip(1 + number, j) for j in kept)
        found["dsi_by_domain"][table.domains[number]] = _json(
            interval_of(single.each[number], [one.each[number] for one in drawn], total, own)
        )
    if baseline:
        found["cdtr"] = _json(table.index(lambda drawn, _: cdtr(drawn[: count + 1], drawn[-1], out).value))
    return found


def _retention(table: Table, variant: int) -> tuple[Interval | None, list[int]]:
    """Ratio of sums over tasks; no interval where one of them has fewer than 30 examples, and nothing where all together have."""
    (value,), excluded = retention(table.scores[[0, variant]], table.chance)
    kept = [number for number in range(len(table.sheets)) if number not in excluded]
    if value is None:
        return None, excluded
    sizes = [len(table.sheets[number]) for number in kept]
    if sum(sizes) < FEWEST_EXAMPLES:
        return None, excluded
    if min(sizes) < FEWEST_EXAMPLES:
        return Interval(value, None, None, sum(sizes)), excluded
    scores, chance = table.drawn
    gained = (scores - chance[:, None])[:, :, kept].sum(-1)
    possible = np.maximum(gained[:, 0], ABOVE_CHANCE * EPSILON)  # a draw on which the reference does no better than chance
    return interval_of(value, (gained[:, variant] / possible).tolist(), sum(sizes)), excluded


def _domain_retention(table: Table, variant: int, domain: int, value: float) -> Interval | None:
    if domain in table.excluded or table.sizes[domain] < FEWEST_EXAMPLES:
        return None
    scores, chance = (part[..., domain] for part in table.drawn_domains)
    drawn = np.maximum(0, scores[:, variant] - chance) / np.maximum(EPSILON, scores[:, 0] - chance)
    return interval_of(value, drawn.tolist(), table.sizes[domain], table.at_the_clip(variant, domain))


def _json(interval: Interval | None) -> dict[str, Any] | None:
    return None if interval is None else interval.as_json()
