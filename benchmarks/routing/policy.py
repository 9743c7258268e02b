#!/usr/bin/env python3
"""How near the pager's policy comes to Belady's: on the text model's traces, and on made traces of a given locality.

    policy.py [--bundle models/multitask-text.edgeml] [--data ../shared/data/text] [--limit 6] [--tokens 1024] [--srp 0.25,0.4,0.5,0.6]

Everything is token by token, all sites sharing one cache of twice the experts a token uses, from an empty cache. The text model's
rows are followed task after task, and once more shuffled. A made trace draws each token's experts by a score (drifting for each
expert, AR(1) with --drift tokens of memory, times a strength) plus Gumbel noise; the strength is searched for the wanted SRP(16).

The bound is Belady's, who sees the noise before it is drawn. `informed` is given the scores that the next token is drawn by, which no
pager can see, and gives up the lowest: a yardstick for what is there to be known, not a proven optimum. Its share of Belady stands
beside each verdict. `slow` is the pager's rule with counts that do not fade.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from benchlib import MODEL, Verdict, finish, parser, progress, run, shared_text, verdict
from numpy.typing import NDArray

from edgeml.data import find_tasks
from edgeml.errors import UsageError
from edgeml.evaluate import match_tasks
from edgeml.locality import chosen_mask, null, srp, window_counts
from edgeml.replay import POLICIES, Keys, Trace, Uses, replay, uses_of
from edgeml.session import open as open_session

AT_LEAST, CAPACITY, SEGMENT, SEED, NEAR = 0.9, 2, 16, 0, 0.02
Policy = Callable[[Uses], Keys]


def slow(uses: Uses) -> Keys:
    """The farthest site first, then the fewest uses since the beginning: the pager's rule without fading."""
    site, count = np.arange(uses.width) // uses.experts, np.zeros(uses.width, np.int64)
    for now, pages in enumerate(uses.pages):
        count[pages] += 1
        yield count - (site - now - 1) % uses.sites * len(uses.pages)


def made(tokens: int, sites: int, experts: int, top_k: int, strength: float, drift: float) -> tuple[Trace, NDArray[np.float64]]:
    """A trace and the scores it was drawn by (tokens, sites, experts). Equal arguments give equal traces."""
    rng = np.random.default_rng(SEED)
    score, fresh = rng.standard_normal((2, tokens, sites, experts))
    kept = np.exp(-1 / drift)
    for token in range(1, tokens):
        score[token] = kept * score[token - 1] + np.sqrt(1 - kept**2) * fresh[token]
    drawn = strength * score + rng.gumbel(size=score.shape)
    return np.argpartition(-drawn, top_k, axis=-1)[..., :top_k], score


def locality(trace: Trace, experts: int) -> float:
    counts = [window_counts(chosen_mask(trace[:, site], experts), SEGMENT) for site in range(trace.shape[1])]
    found = srp(np.sum(counts, axis=0))
    assert found is not None
    return found[0]


def made_with(wanted: float, tokens: int, sites: int, experts: int, top_k: int, drift: float) -> tuple[Trace, NDArray[np.float64]]:
    """The made trace whose SRP(16) is nearest the wanted one."""
    low, high = 0.0, 16.0
    for _ in range(14):
        middle = (low + high) / 2
        trace, score = made(tokens, sites, experts, top_k, middle, drift)
        found = locality(trace, experts)
        low, high = (middle, high) if found < wanted else (low, middle)
    if abs(found - wanted) > NEAR:
        raise UsageError(f"no trace of SRP(16) {wanted:g} can be made with this --drift and --shape; the nearest has {found:.3f}")
    return trace, score


def informed(score: NDArray[np.float64]) -> Policy:
    """Give up the page with the lowest true score."""
    keys = (score.reshape(len(score), -1) * (1 << 30)).astype(np.int64)
    return lambda uses: (keys[now // uses.sites] for now in range(len(uses.pages)))


def rates(uses: Uses, top_k: int, more: dict[str, Policy]) -> dict[str, float]:
    capacity = CAPACITY * top_k * uses.sites
    policies = POLICIES | {"slow": slow} | more
    return {name: float(replay(uses, policy, [capacity]).rate(warm=False)[0]) for name, policy in policies.items()}


def followed(bundle: Path, data: Path, limit: int) -> tuple[list[Trace], int, int]:
    """The text model's traces, its experts a site, and top-k."""
    with open_session(bundle, "100%", 1) as session:
        tasks, _ = match_tasks(find_tasks(data), session.manifest, str(bundle))
        traces: list[Trace] = []
        tick = progress(len(tasks), "following")
        for task in tasks:
            rows = task.rows("test", limit)
            asked = {"pairs": [(row.text, row.pair or "") for row in rows]} if task.pair else {"texts": [row.text for row in rows]}
            traces += session.trace(task.name, **asked)  # type: ignore[arg-type]
            tick(1)
        sites = session.manifest.sites
    return traces, max(len(site.experts) for site in sites), sites[0].top_k


def on_text(bundle: Path, data: Path, limit: int) -> tuple[list[Verdict], dict[str, Any]]:
    orders = ("task after task", "shuffled")
    if not (bundle.is_file() and data.is_dir()):
        why = "the bundle or the shared data is not here"
        return [verdict(_name(f"the text model, {order}"), _BOUND, None, None, why=why) for order in orders], {}
    traces, experts, top_k = followed(bundle, data, limit)
    mixed = [traces[number] for number in np.random.default_rng(SEED).permutation(len(traces))]
    verdicts, figures = [], {}
    for order, texts in zip(orders, (traces, mixed), strict=True):
        stream = np.concatenate(texts)
        found = rates(uses_of(stream, experts), top_k, {})
        figures[order] = {"tokens": len(stream), "texts": len(texts), "srp_16": locality(stream, experts), "hit_rate": found}
        share = found["pager"] / found["belady"]
        verdicts.append(verdict(_name(f"the text model, {order}"), _BOUND, share, share >= AT_LEAST))
    return verdicts, figures


def on_made(wanted: Sequence[float], tokens: int, sites: int, shape: tuple[int, int], drift: float) -> tuple[list[Verdict], dict[str, Any]]:
    experts, top_k = shape
    verdicts, figures = [], {}
    tick = progress(len(wanted), "made traces")
    for target in wanted:
        trace, score = made_with(target, tokens, sites, experts, top_k, drift)
        found = rates(uses_of(trace, experts), top_k, {"informed": informed(score)})
        share, reachable = (found[name] / found["belady"] for name in ("pager", "informed"))
        figures[f"{target:g}"] = {"srp_16": locality(trace, experts), "hit_rate": found}
        about: dict[str, Any] = {"informed_of_belady": reachable, "slow_of_belady": found["slow"] / found["belady"]}
        if reachable < AT_LEAST:
            about["why"] = "not even a policy that is given the scores the trace is drawn by comes to the bound"
        verdicts.append(verdict(_name(f"made traces of SRP(16) {target:g}"), _BOUND, share, share >= AT_LEAST, **about))
        tick(1)
    return verdicts, {"null_16": null(SEGMENT, top_k / experts), "experts": experts, "top_k": top_k, "sites": sites, "traces": figures}


_BOUND = f">= {AT_LEAST}"


def _name(what: str) -> str:
    return f"the pager's hit rate over Belady's at twice the active experts, {what}"


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--bundle", type=Path, default=MODEL)
    options.add_argument("--data", type=Path, default=shared_text())
    options.add_argument("--limit", type=int, default=6, help="rows a task (default: 6)")
    options.add_argument("--tokens", type=int, default=1024, help="tokens of a made trace (default: 1024)")
    options.add_argument("--sites", type=int, default=2, help="sites of a made trace (default: 2)")
    options.add_argument("--shape", default="128:8", help="experts and top-k of a made trace (default: 128:8)")
    options.add_argument("--drift", type=float, default=16.0, help="memory of a made trace's scores, in tokens (default: 16)")
    options.add_argument("--srp", default="0.25,0.4,0.5,0.6", help="SRP(16) of the made traces (default: 0.25,0.4,0.5,0.6)")
    chosen = options.parse_args()
    experts, top_k = (int(part) for part in chosen.shape.split(":"))
    text, of_text = on_text(chosen.bundle, chosen.data, chosen.limit)
    drawn, of_made = on_made([float(part) for part in chosen.srp.split(",")], chosen.tokens, chosen.sites, (experts, top_k), chosen.drift)
    settings = {"capacity": CAPACITY, "drift": chosen.drift, "tokens": chosen.tokens, "limit": chosen.limit, "seed": SEED}
    return finish("routing-policy", text + drawn, settings | {"text": of_text, "made": of_made}, chosen.records)


if __name__ == "__main__":
    run(main)
