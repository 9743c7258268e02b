"""What the routing of a mixture means for paging it: the figures behind `edgeml routing`. Knows no session: it is handed traces.

Locality is `locality.srp` against its null; hit rates are `replay`ed at capacities in units of the experts that a token uses.
Warm, the texts are one stream through one cache, and a load into a free slot counts as a hit; cold, each text begins with an
empty cache and every load counts. `sch` is the published figure: each text by itself, first loads into free slots as hits.
Pooled figures let all sites share one cache, as the pager does; experts are counted, as if each were a page of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.locality import chosen_mask, null, srp_interval, window_counts
from edgeml.replay import POLICIES, Replayed, Trace, Uses, replay, sch, uses_of
from edgeml.sizes import format_bytes

__all__ = ["RATIOS", "SEGMENTS", "Part", "Storage", "advise", "capacities", "document"]

SEGMENTS = (4, 16, 64, 256)
HEADLINE = 16
RATIOS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
USUAL_RATIO = 2.0
NEAR_BELADY = 0.05
#: Paging is worth its while where reading takes no longer than this many times the computing.
BEARABLE = 1.0
SEED = 0

Tick = Callable[[int], None]
Curve = list[list[float]]


@dataclass(frozen=True)
class Part:
    """A part of the sites: its traces text by text, how many experts it has, how many a token uses, and its widest site."""

    traces: Sequence[Trace]
    experts: int
    active: int
    width: int

    @property
    def least(self) -> int:
        """The smallest capacity that holds any one visit."""
        return max((int((trace >= 0).sum(2).max(initial=0)) for trace in self.traces), default=0)


@dataclass(frozen=True)
class Storage:
    """What reading costs here: bytes a second of page-sized reads, bytes of one expert, and seconds of computing a token."""

    bytes_per_s: float
    expert_bytes: float
    compute_s: float


def capacities(part: Part) -> dict[float, int]:
    """Capacity ratio -> experts held, from one token's experts to all there are."""
    sizes = {ratio: round(ratio * part.active) for ratio in RATIOS if ratio * part.active < part.experts}
    sizes[part.experts / part.active] = part.experts
    return {ratio: size for ratio, size in sizes.items() if size >= part.least}


def document(traces: Sequence[Trace], names: Sequence[str], experts: Sequence[int], top_k: Sequence[int], tick: Tick) -> dict[str, Any]:
    """The figures of `--json`: pooled at the top, and under `sites` those of each site by itself.

    `traces` are (tokens, sites, k), one a text; `experts` and `top_k` those of each site. `tick` is called once a part.
    """
    width = max(experts)
    pooled = Part(traces, sum(experts), sum(top_k), width)
    figures = _figures(pooled)
    tick(len(names))
    sites = []
    for number, name in enumerate(names):
        alone = Part([trace[:, number : number + 1] for trace in traces], experts[number], top_k[number], width)
        sites.append({"name": name, "experts": experts[number], "top_k": top_k[number], **_figures(alone)})
        tick(1)
    return {**figures, "sites": sites, "texts": len(traces), "tokens": sum(map(len, traces))}


def _figures(part: Part) -> dict[str, Any]:
    intervals = {str(m): srp_interval(_counts(part, m), SEED) for m in SEGMENTS}
    chosen = sum(int((trace >= 0).sum()) for trace in part.traces)
    rate = chosen / max(sum(map(len, part.traces)) * part.experts, 1)
    sizes = capacities(part)
    stream = uses_of(np.concatenate(part.traces), part.width)
    texts = [uses_of(trace, part.width) for trace in part.traces]
    return {
        "srp": {m: None if interval is None else interval.as_json() for m, interval in intervals.items()},
        "srp_null": {str(m): null(m, rate) for m in SEGMENTS},
        "hit_rate": {name: _curve(sizes, [stream], name, warm=True) for name in POLICIES},
        "hit_rate_cold": {name: _curve(sizes, texts, name, warm=False) for name in POLICIES},
        "sch": {str(HEADLINE): _published(part, sizes)},
    }


def _counts(part: Part, m: int) -> NDArray[np.int64]:
    """(texts, m + 1), summed over the sites."""
    masks = ([chosen_mask(trace[:, site], part.width) for site in range(trace.shape[1])] for trace in part.traces)
    return np.stack([np.sum([window_counts(mask, m) for mask in text], axis=0) for text in masks])


def _curve(sizes: Mapping[float, int], uses: Sequence[Uses], policy: str, warm: bool) -> Curve:
    held = list(sizes.values())
    total = Replayed(0, np.zeros(len(held), np.int64), np.zeros(len(held), np.int64))
    for one in uses:
        total += replay(one, POLICIES[policy], held)
    return [[ratio, float(value)] for ratio, value in zip(sizes, total.rate(warm), strict=True)]


def _published(part: Part, sizes: Mapping[float, int]) -> Curve:
    positions = np.concatenate([sch(trace, part.width, HEADLINE) for trace in part.traces])
    return [[ratio, float((positions < size).mean()) if len(positions) else 0.0] for ratio, size in sizes.items()]


def advise(figures: Mapping[str, Any], experts: Sequence[int], top_k: Sequence[int], storage: Storage) -> dict[str, Any]:
    """`advice`, one sentence with this machine's storage in it, and `advised`, the figures it rests on.

    The capacity is the smallest at which the pager comes within 5 points of Belady, 2 where there is none but holding everything.
    Paging is not advised where SRP(16) is within its interval of the null, nor where reading would take longer than computing.
    """
    curves = figures["hit_rate"]
    ratio, hit_rate = _chosen(curves["pager"], curves["belady"])
    active, total = sum(top_k), sum(experts)
    paging_s = (1 - hit_rate) * active * storage.expert_bytes / storage.bytes_per_s
    few = round(ratio * active / len(experts))
    share = -(-100 * round(ratio * active) // total)
    local = _above_null(figures)
    advised = {
        "capacity_ratio": ratio,
        "hit_rate": hit_rate,
        "held_experts": round(ratio * active),
        "paging_s": paging_s,
        "compute_s": storage.compute_s,
        "local": local,
    }
    rate = f"{format_bytes(int(storage.bytes_per_s))}/s"
    held = f"{few} of {round(total / len(experts))} experts a site"
    cost = f"{_seconds(paging_s)} a token on this disk ({rate}, hit rate {hit_rate:.0%} with {held} in memory)"
    if local is False:
        said = f"tokens choose experts as if at random (SRP(16) is no higher than chance), and per-token paging would cost {cost}"
        said += f": hold all experts, or use masked residency with {held}"
    elif paging_s > BEARABLE * storage.compute_s:
        said = f"per-token paging would cost {cost}, computing it takes {_seconds(storage.compute_s)}: use masked residency with {held}"
    else:
        said = f"per-token paging costs {cost}, computing it takes {_seconds(storage.compute_s)}: page, with --memory {share}%"
    return {"advice": said, "advised": advised}


def _chosen(pager: Curve, belady: Curve) -> tuple[float, float]:
    """The advised capacity ratio and the pager's hit rate there."""
    near = [ratio for (ratio, own), (_, best) in zip(pager, belady, strict=True) if best - own <= NEAR_BELADY]
    wanted = near[0] if near and near[0] < pager[-1][0] else USUAL_RATIO  # holding everything is no advice
    ratio, rate = next((pair for pair in pager if pair[0] >= wanted), pager[-1])
    return ratio, rate


def _above_null(figures: Mapping[str, Any]) -> bool | None:
    """Whether SRP(16) is above what chance gives; None where texts are too short or too few to tell."""
    found, chance = figures["srp"][str(HEADLINE)], figures["srp_null"][str(HEADLINE)]
    if found is None or chance is None or found["low"] is None:
        return None
    return bool(found["low"] > chance)


def _seconds(value: float) -> str:
    """Two figures in the unit that needs no exponent; from 100 s on whole seconds."""
    if value >= 99.5:
        return f"{value:.0f} s"
    return f"{value:.2g} s" if value >= 0.0995 else f"{1e3 * value:.2g} ms" if value >= 0.995e-4 else f"{1e6 * value:.2g} us"
