#!/usr/bin/env python3
"""What masked residency keeps of the text model's scores, and what sets forget of the domains they were not made for.

    resident.py [--bundle models/multitask-text.edgeml] [--data ../shared/data/text] [--mixture MODEL] [--seeds 0,1,2]

Sets hold a quarter or a half of the routed experts' bytes, chosen by importance per byte over all sites (`resident.best_pages`) from
the usage that the export recorded on training rows. Scored on the test split: each task under its own set (what the runtime does for
a named task), under random sets, and all tasks under the set of one domain, whose usage is the mean over that domain's tasks. Random
sets hold a quarter or a half of each site, rounded up, which is to their advantage. Retention (against the uncompressed mixture, as in
masks.py) and differences are over all tasks.

Forgetting is the mean chance-corrected loss on the domains that a set was not calibrated on. With S and c the means over a domain's
tasks of score and chance, and the same bundle with all experts as the reference (a domain on which that is less than 0.1 above chance
is left out and listed, as for every gate):

    A(set, j)            = max(0, S(set, j) - c(j)) / (S(all, j) - c(j))
    forgetting, single   = mean over all ordered pairs of domains i != j of 1 - A(set of domain i, j)
    forgetting, ours     = mean over all domains j of 1 - A(sets made without j, j)

"Made without j" means without anything that the export recorded of j: requests of a held-out task begin with the pattern that is
nearest among the other domains' tasks, or with their general pattern where none is within the cut-off, and the device has then watched
--watched texts of it (from the training split, no labels), as `--residency hybrid` does. Beside it, not gated: the general pattern of
the other domains with nothing watched, the pattern that is nearest with nothing blended in, and the tasks' own sets.

Intervals are a paired bootstrap over examples. Predictions are kept in --cache by what a set holds; a run that is stopped goes on.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from answers import SEED, Cache, Labels, Questions, bundle_answers, read_questions, text_parser
from benchlib import Verdict, finish, numbers, progress, run, verdict
from masks import torch_reference
from numpy.typing import NDArray

from edgeml.evaluate import kept_set
from edgeml.manifest import Manifest
from edgeml.metrics import ABOVE_CHANCE, Interval, bootstrap, score
from edgeml.resident import (
    GENERAL,
    Usage,
    Watched,
    best_pages,
    blend,
    covered,
    cut_off,
    distance,
    general_usage,
    key_of,
    mean_usage,
    nearest,
)
from edgeml.router import ResidentSet, mask_of
from edgeml.session import Session
from edgeml.session import open as open_session

SHARES = {"quarter": 0.25, "half": 0.5}
RETENTION_AT_LEAST = {"quarter": 0.93, "half": 0.98}
FORGETTING_LOWER_BY = 0.43

Floats = NDArray[np.float64]
#: A way to choose sets: the task's number among the questions -> its set.
Choose = Callable[[int], ResidentSet]


@dataclass(frozen=True)
class Ground:
    """What all sets are made of: the bundle's manifest, bytes of each page, each task's recorded usage, and what was watched of it."""

    manifest: Manifest
    page_bytes: Mapping[int, int]
    questions: Sequence[Questions]
    recorded: Mapping[str, Usage]
    watched: Mapping[str, Watched]

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(task.task.domain for task in self.questions))

    def of_domain(self, domain: str) -> list[str]:
        return [task.task.name for task in self.questions if task.task.domain == domain]

    def set_of(self, usage: Usage, share: float) -> ResidentSet:
        budget = int(share * sum(self.page_bytes.values()))
        pages = best_pages(self.manifest.sites, usage, self.page_bytes, budget)
        return ResidentSet(pages, mask_of(self.manifest, pages))

    def others(self, domain: str) -> dict[str, Usage]:
        """The patterns of all tasks but a domain's."""
        own = self.of_domain(domain)
        return {name: usage for name, usage in self.recorded.items() if name not in own}

    def general_without(self, domain: str) -> Usage:
        """Their general pattern; where there is no other domain, every expert alike."""
        usage = general_usage(self.manifest, self.others(domain))
        return [[1 / len(site.experts)] * len(site.experts) for site in self.manifest.sites] if usage is None else usage

    def found(self, name: str, domain: str) -> str:
        """The pattern of another domain that a held-out task's watched texts are nearest to, or `GENERAL`."""
        patterns = self.others(domain)
        return nearest(patterns, key_of(self.watched[name].usage), cut_off(patterns))

    def held_out(self, name: str, domain: str) -> Usage:
        """Where a held-out task begins, before anything watched is blended in."""
        found = self.found(name, domain)
        return self.general_without(domain) if found == GENERAL else self.recorded[found]


def watch(session: Session, questions: Sequence[Questions], texts: int) -> dict[str, Watched]:
    """What the first training rows of each task choose when nothing is masked."""
    found, tick = {}, progress(len(questions), "watching")
    for task in questions:
        rows = task.task.rows("train", texts)
        inputs = {"pairs": [(row.text, row.pair or "") for row in rows]} if task.task.pair else {"texts": [row.text for row in rows]}
        found[task.task.name] = Watched.of(session.manifest.sites)
        for ids in session.trace(task.task.name, **inputs):
            found[task.task.name].add(ids)
        tick(1)
    return found


def ways(ground: Ground, share: float, seeds: Sequence[int]) -> dict[str, Choose]:
    """Name -> how sets of one size are chosen."""
    names = [(task.task.name, task.task.domain) for task in ground.questions]

    def by(usage: Callable[[str, str], Usage]) -> Choose:
        return lambda number: ground.set_of(usage(*names[number]), share)

    made: dict[str, Choose] = {"task": by(lambda name, _: ground.recorded[name])}
    for domain in ground.domains:
        usage = mean_usage([ground.recorded[name] for name in ground.of_domain(domain)])
        made[f"domain {domain}"] = by(lambda name, _, usage=usage: usage)  # type: ignore[misc]
    made["watched"] = by(lambda name, domain: blend(ground.held_out(name, domain), ground.watched[name].usage, ground.watched[name].tokens))
    made["nearest"] = by(ground.held_out)
    made["general"] = by(lambda _, domain: ground.general_without(domain))
    for seed in seeds:
        made[f"random {seed}"] = lambda number, seed=seed: kept_set(ground.manifest, names[number][0], share, seed)  # type: ignore[misc]
    return made


def predict(session: Session, ground: Ground, seeds: Sequence[int], cache: Cache) -> dict[str, dict[str, list[Labels]]]:
    """Size -> way -> each task's predictions."""
    chosen = {size: ways(ground, share, seeds) for size, share in SHARES.items()}
    tick = progress(sum(map(len, chosen.values())) * sum(len(task.rows) for task in ground.questions), "sets")
    found: dict[str, dict[str, list[Labels]]] = {}
    for size, by_way in chosen.items():
        found[size] = {}
        for name, choose in by_way.items():
            if name.startswith("random"):
                label = f"kept-{SHARES[size]:g}-random{name.split()[1]}"  # as masks.py has it
                variants = [(label, choose(number)) for number in range(len(ground.questions))]
            else:
                variants = [(_label(choose(number)), choose(number)) for number in range(len(ground.questions))]
            found[size][name] = [
                bundle_answers(session, task, cache, label, resident, tick)
                for task, (label, resident) in zip(ground.questions, variants, strict=True)
            ]
    return found


def _label(resident: ResidentSet) -> str:
    """A set's name in the cache: what it holds."""
    return f"set-{len(resident.pages)}-{zlib.crc32(np.array(resident.pages, np.int64).tobytes()):08x}"


@dataclass
class Drawn:
    """Scores of every way, and chance, on the whole rows (index 0) and on each resample: (1 + resamples, tasks)."""

    questions: Sequence[Questions]
    scores: dict[str, Floats]

    @classmethod
    def of(cls, questions: Sequence[Questions], predicted: Mapping[str, Sequence[Labels]]) -> Drawn:
        """The rows are drawn once, and everything is scored on them."""
        parts: dict[str, list[list[float]]] = {name: [] for name in (*predicted, "chance")}

        def collect(rows: Sequence[Labels]) -> float:
            for name, answers in predicted.items():
                parts[name].append([task.score(one, drawn) for task, one, drawn in zip(questions, answers, rows, strict=True)])
            labels = [task.labels[drawn] for task, drawn in zip(questions, rows, strict=True)]
            guesses = (score(task.task.metric, y, np.full_like(y, task.commonest)) for task, y in zip(questions, labels, strict=True))
            parts["chance"].append(list(guesses))
            return 0.0

        bootstrap(collect, [len(task.rows) for task in questions], SEED)
        return cls(questions, {name: np.array(values) for name, values in parts.items()})

    def interval(self, values: Floats) -> Interval:
        """Of one figure a draw."""
        total = sum(len(task.rows) for task in self.questions)
        if len(values) == 1:
            return Interval(float(values[0]), None, None, total)
        low, high = np.percentile(values[1:], [2.5, 97.5])
        return Interval(float(values[0]), float(low), float(high), total)

    def retention(self, way: str, reference: str) -> Interval | None:
        """Over the tasks whose reference is 0.1 above chance on all rows; None where there is none."""
        gained, possible = (self.scores[name] - self.scores["chance"] for name in (way, reference))
        kept = possible[0] >= ABOVE_CHANCE
        return self.interval(gained[:, kept].sum(1) / possible[:, kept].sum(1)) if kept.any() else None

    def behind(self, way: str, others: Sequence[str]) -> Interval:
        """Points by which the mean of the others is behind."""
        return self.interval(100 * (self.scores[way] - np.mean([self.scores[name] for name in others], axis=0)).mean(1))

    def loss(self, way: str, domain: str) -> Floats | None:
        """1 - A of a domain, a value a draw; None where the reference is near chance."""
        own = [number for number, task in enumerate(self.questions) if task.task.domain == domain]
        gained, possible = ((self.scores[name] - self.scores["chance"])[:, own].mean(1) for name in (way, "all"))
        return 1 - np.maximum(gained, 0) / possible if possible[0] >= ABOVE_CHANCE else None


def forgetting(drawn: Drawn, domains: Sequence[str]) -> dict[str, Floats]:
    """Mean loss away from home, a value a draw: `single`, and each way of ours on held-out domains (`task`: nothing held out)."""
    scored = [domain for domain in domains if drawn.loss("task", domain) is not None]

    def mean(pairs: Sequence[tuple[str, str]]) -> Floats:
        losses = [loss for way, domain in pairs if (loss := drawn.loss(way, domain)) is not None]
        return np.mean(losses, axis=0) if losses else np.full(len(drawn.scores["all"]), np.nan)

    found = {"single": mean([(f"domain {home}", away) for home in domains for away in scored if home != away])}
    return found | {way: mean([(way, domain) for domain in scored]) for way in ("watched", "nearest", "general", "task")}


def judge(size: str, drawn: Drawn, ground: Ground, seeds: Sequence[int], reference: str | None) -> list[Verdict]:
    """The bounds of one size."""
    bound = f">= {RETENTION_AT_LEAST[size]}"
    kept = None if reference is None else drawn.retention("task", reference)
    name = f"retention of a {size} of the routed experts, by task, against the fp32 mixture"
    if kept is None:
        verdicts = [verdict(name, bound, None, None, why="there was no --mixture, or it is nowhere 10 points above chance")]
    else:
        verdicts = [verdict(name, bound, kept.value, kept.value >= RETENTION_AT_LEAST[size], kept)]
    single = [f"domain {domain}" for domain in ground.domains]
    closest = min((drawn.behind("task", [one]) for one in single), key=lambda interval: interval.value)
    for what, interval in (
        ("random sets are behind (mean of seeds)", drawn.behind("task", [f"random {seed}" for seed in seeds])),
        ("single-domain sets are behind (mean of domains)", drawn.behind("task", single)),
        ("the closest single-domain set is behind", closest),
    ):
        holds = None if interval.low is None else interval.low > 0
        verdicts.append(verdict(f"points by which {what}, a {size}", "interval above 0", interval.value, holds, interval))
    lost = forgetting(drawn, ground.domains)
    with np.errstate(invalid="ignore", divide="ignore"):
        lower = drawn.interval(1 - lost["watched"] / lost["single"])
    verdicts.append(
        verdict(
            f"share by which forgetting on held-out domains is lower than with single-domain sets, a {size}",
            f">= {FORGETTING_LOWER_BY}",
            lower.value,
            lower.value >= FORGETTING_LOWER_BY if lost["single"][0] > 0 else None,
            lower,
        )
    )
    return verdicts


def figures(size: str, drawn: Drawn, ground: Ground, seeds: Sequence[int], reference: str | None) -> dict[str, Any]:
    lost = forgetting(drawn, ground.domains)
    domains, ways_of = ground.domains, [way for way in drawn.scores if way not in ("chance", "all", "fp32 mixture")]

    def retained(against: str) -> dict[str, Any]:
        found = {way: drawn.retention(way, against) for way in ways_of}
        return {way: None if interval is None else interval.as_json() for way, interval in found.items()}

    with np.errstate(invalid="ignore", divide="ignore"):
        lower = {way: drawn.interval(1 - values / lost["single"]).as_json() for way, values in lost.items() if way != "single"}
    losses = {way: {domain: drawn.loss(way, domain) for domain in domains} for way in ways_of if not way.startswith("random")}
    pages = {name: _pages_by_site(ground, ground.set_of(usage, SHARES[size])) for name, usage in ground.recorded.items()}
    return {
        "pages": pages,
        "mean": {way: float(values[0].mean()) for way, values in drawn.scores.items()},
        "tasks": {task.task.name: {way: float(drawn.scores[way][0, n]) for way in drawn.scores} for n, task in enumerate(ground.questions)},
        "retention_against_the_fp32_mixture": None if reference is None else retained(reference),
        "retention_against_the_whole_bundle": retained("all"),
        "points_behind": {way: drawn.behind("task", [way]).as_json() for way in ways_of if way.startswith(("random", "domain"))},
        "forgetting_leaves_out": [domain for domain in domains if drawn.loss("all", domain) is None],
        "forgetting": {way: drawn.interval(values).as_json() for way, values in lost.items()},
        "forgetting_lower_by": lower,
        "loss_by_domain": {way: {d: None if loss is None else loss[0] for d, loss in by.items()} for way, by in losses.items()},
    }


def _pages_by_site(ground: Ground, resident: ResidentSet) -> list[int]:
    return [len({expert.page for expert in site.experts} & set(resident.pages)) for site in ground.manifest.sites]


def lookups(ground: Ground) -> dict[str, Any]:
    """What the watched texts of each task find: among all patterns, and with their own domain held out."""
    limit, found = cut_off(ground.recorded), {}
    for task in ground.questions:
        name, key = task.task.name, key_of(ground.watched[task.task.name].usage)
        away = {other: distance(key_of(usage), key) for other, usage in ground.recorded.items() if other != name}
        found[name] = {
            "tokens": ground.watched[name].tokens,
            "own_distance": distance(key_of(ground.recorded[name]), key),
            "closest_other": min(away, key=away.__getitem__, default=None),
            "closest_other_distance": min(away.values(), default=None),
            "found": nearest(ground.recorded, key, limit),
            "found_without_its_domain": ground.found(name, task.task.domain),
            "covered_by_own_quarter": covered(
                ground.manifest.sites, ground.watched[name].usage, ground.set_of(ground.recorded[name], 0.25).pages
            ),
        }
    return {"cut_off": limit, "tasks": found}


def main() -> int:
    options = text_parser(__doc__)
    options.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="seeds of the random sets (default: 0,1,2)")
    options.add_argument("--watched", type=int, default=32, help="training texts of a held-out task that the device watches (default: 32)")
    chosen = options.parse_args()
    cache = Cache(chosen.cache)
    with open_session(chosen.bundle, "100%", chosen.threads) as session:
        questions = read_questions(chosen.data, session.manifest, str(chosen.bundle), chosen.limit)
        questions = [task for task in questions if task.task.name in session.manifest.usage]
        page_bytes = {expert.page: session.bundle.pages[expert.page].length for site in session.manifest.sites for expert in site.experts}
        recorded = {task.task.name: session.manifest.usage[task.task.name] for task in questions}
        ground = Ground(session.manifest, page_bytes, questions, recorded, watch(session, questions, chosen.watched))
        whole = [bundle_answers(session, task, cache, "all", None, progress(0, "")) for task in questions]
        found = predict(session, ground, chosen.seeds, cache)
        about = {"bundle": session.settings(), "limit": chosen.limit, "seeds": chosen.seeds, "watched_texts": chosen.watched}
    against = torch_reference(chosen.mixture, questions, cache)
    verdicts: list[Verdict] = []
    document: dict[str, Any] = about | {"lookup": lookups(ground)}
    for size, predicted in found.items():
        extra = {} if against is None else {"fp32 mixture": against}
        drawn = Drawn.of(questions, {**predicted, "all": whole, **extra})
        reference = None if against is None else "fp32 mixture"
        verdicts += judge(size, drawn, ground, chosen.seeds, reference)
        document[size] = figures(size, drawn, ground, chosen.seeds, reference)
    return finish("text-resident", verdicts, document, chosen.records)


if __name__ == "__main__":
    run(main)
