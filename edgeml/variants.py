"""Which variant of a bundle is used: by name, or the best that keeps to limits on latency, bytes and score.

    limits on latency or bytes   the best mean score among the variants that keep to all limits
    a least score alone          the cheapest that reaches it (recorded latency, then bytes): the best would always be the largest
    nothing                      the first, whose stages the tasks name themselves

Figures are those recorded at export; a variant without a recorded figure does not satisfy a limit on it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from edgeml.errors import UsageError
from edgeml.manifest import Manifest, Variant
from edgeml.sizes import format_bytes, parse_bytes

__all__ = ["Wish", "choose_variant", "parse_seconds", "with_variant"]

_DURATION = re.compile(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(us|ms|s)\s*", re.ASCII)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Wish:
    """What a caller asks of a variant: its name, or limits; all None is no wish."""

    variant: str | None = None
    max_latency: float | str | None = None
    max_bytes: int | str | None = None
    min_score: float | None = None

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return any(limit is not None for limit in (self.max_latency, self.max_bytes, self.min_score))


def parse_seconds(value: float | str) -> float:
    """Seconds, or a text such as `20ms`, `0.5s` or `800us`. Raises `UsageError`."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if match is None:
            raise UsageError(f"'{value}' is not a duration: write 20ms, 0.5s or 800us")
        return float(match[1]) * _SECONDS[match[2]]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"a latency must be a positive number of seconds or a text such as 20ms, not {value!r:.40}")
    return float(value)


def choose_variant(manifest: Manifest, wish: Wish, where: str) -> Variant | None:
    """The variant a wish picks, None where the bundle has none. Raises `UsageError` listing what there is when nothing fits."""
    latency = None if wish.max_latency is None else parse_seconds(wish.max_latency)
    size = _bytes(wish.max_bytes)
    score = _share(wish.min_score)
    if wish.variant is not None and wish.limited:
        raise UsageError("name a variant or set limits (max_latency, max_bytes, min_score), not both")
    if not manifest.variants:
        if wish.variant is not None or wish.limited:
            raise UsageError(f"{where} has no variants to choose from; leave out the variant and its limits")
        return None
    if wish.variant is not None:
        named = [variant for variant in manifest.variants if variant.name == wish.variant]
        if not named:
            raise UsageError(f"{where} has no variant {wish.variant!r:.80}; it has {_listed(manifest)}")
        return named[0]
    if not wish.limited:
        return manifest.variants[0]
    fitting = [variant for variant in manifest.variants if _keeps(variant, latency, size, score)]
    if not fitting:
        raise UsageError(f"no variant of {where} keeps to these limits; it has {_listed(manifest)}")
    if latency is None and size is None:
        return min(fitting, key=lambda v: (math.inf if v.latency_s is None else v.latency_s, v.bytes))
    return max(fitting, key=lambda v: (-1.0 if v.score is None else v.score, -v.bytes))


def with_variant(manifest: Manifest, variant: Variant | None) -> Manifest:
    """The manifest whose tasks on images run the stages of `variant`."""
    if variant is None:
        return manifest
    tasks = tuple(replace(task, stages=variant.stages.get(task.name, task.stages)) for task in manifest.tasks)
    return replace(manifest, tasks=tasks)


def _keeps(variant: Variant, latency: float | None, size: int | None, score: float | None) -> bool:
    if latency is not None and (variant.latency_s is None or variant.latency_s > latency):
        return False
    if score is not None and (variant.score is None or variant.score < score):
        return False
    return size is None or variant.bytes <= size


def _bytes(value: int | str | None) -> int | None:
    if value is None or isinstance(value, str):
        return None if value is None else parse_bytes(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"max_bytes must be a number of bytes or a text such as 2MiB, not {value!r:.40}")
    return value


def _share(value: float | None) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1):
        raise UsageError(f"min_score must be a number from 0 to 1, not {value!r:.40}")
    return value


def _listed(manifest: Manifest) -> str:
    return ", ".join(f"{variant.name} ({_figures(variant)})" for variant in manifest.variants[:12])


def _figures(variant: Variant) -> str:
    latency = "latency unmeasured" if variant.latency_s is None else f"{variant.latency_s * 1e3:.3g} ms"
    score = "score unmeasured" if variant.score is None else f"score {variant.score:.3f}"
    return f"{latency}, {format_bytes(variant.bytes)}, {score}"
