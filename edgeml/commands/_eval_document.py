"""From answers to the document of `edgeml eval`, and the gates that judge it. Answers come from a run or from a file of predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.domains import Table, gap_figures, specialised_figures, variant_figures
from edgeml.errors import UsageError
from edgeml.indices import OURS, dsi_route
from edgeml.predictions import Variant, sheets_of

__all__ = ["SHOWN", "broken_gates", "check_gates", "document"]

#: Of a variant's settings, what its entry in the document repeats.
SHOWN = (
    "bundle",
    "bundle_id",
    "variant",
    "backend",
    "threads",
    "residency",
    "memory",
    "memory_budget_bytes",
    "pageable_pages",
    "graph_bytes",
)
KEPT = ("experts_kept", "kept_by", "kept_for")
NO_REFERENCE = "there is no --reference to compare with"
NOTHING_SEEN = "the bundle does not say which data its exporter saw; say it with --domains-seen"


def document(variants: Sequence[Variant], where: str, seed: int, given_seen: Sequence[str] | None = None) -> dict[str, Any]:
    """All figures: those of the first variant at the top, of each under `variants`, of the specialised sets under their names.

    `given_seen` stands in for what the variants say they saw. Raises `DataError` where variants cannot be compared.
    """
    reference = next((one for one in variants if one.role == "reference"), None)
    judged = [one for one in variants if one.role == "variant"] or ([] if reference is None else [reference])
    table = Table(sheets_of([*([] if reference is None else [reference]), *judged], where), seed)
    entries = []
    for number, variant in enumerate(judged, 0 if reference is None else 1):
        seen = variant.seen if given_seen is None else list(given_seen)
        entries.append(_entry(table, number, variant, seen, reference is not None))
    found = {key: value for key, value in entries[0].items() if key in TOP}
    found |= {
        "variants": entries,
        "reference": None if reference is None else {"name": reference.name} | {key: reference.settings.get(key) for key in SHOWN},
        "domains_seen": entries[0]["domains_seen"],
        "excluded_domains": [] if reference is None else [table.domains[number] for number in table.excluded],
        **_specialised(variants, reference, where, seed),
        "seed": seed,
        "resamples": table.resamples,
        "formulas": OURS,
    }
    return found


TOP = ("tasks", "mean", "reference_mean", "retention", "excluded", "domains", "gg", "gg_raw", "forgetting")


def _entry(table: Table, number: int, variant: Variant, seen: Sequence[str] | None, reference: bool) -> dict[str, Any]:
    gap: dict[str, Any] = {"gg": None, "gg_raw": None, "forgetting": None, "unseen": []}
    if not reference or seen is None:
        gap["why"] = NO_REFERENCE if not reference else NOTHING_SEEN
    else:
        gap = gap_figures(table, number, seen)
    settings = variant.settings
    return {
        "name": variant.name,
        **{key: settings.get(key) for key in SHOWN},
        **{key: settings.get(key) for key in KEPT},
        **variant_figures(table, number, reference),
        "domains_seen": None if seen is None else list(seen),
        **gap,
    }


def _specialised(variants: Sequence[Variant], reference: Variant | None, where: str, seed: int) -> dict[str, Any]:
    """DSI, CDTR and what belongs to them; all None where no set was specialised."""
    none: dict[str, Any] = {"dsi": None, "dsi_max": None, "dsi_by_domain": {}, "dsi_route": None, "cdtr": None, "transfer": None}
    sets = sorted((one for one in variants if one.role == "specialised"), key=lambda one: one.name)
    if not sets or reference is None:
        return none | {"why": "no sets of experts were specialised; see --specialise" if not sets else NO_REFERENCE}
    without = [one for one in variants if one.role == "none"]
    table = Table(sheets_of([reference, *sets, *without], where), seed)
    if [one.name for one in sets] != table.domains:
        raise UsageError(f"{where}: the sets are of {', '.join(one.name for one in sets)}, the tasks of {', '.join(table.domains)}")
    return none | specialised_figures(table, bool(without)) | {"specialised_share": sets[0].settings.get("experts_kept")}


def routed(found: dict[str, Any], counts: NDArray[np.int64] | None) -> None:
    """Add DSI_route to a document; None where routing could not be followed."""
    found["dsi_route"] = None if counts is None else dsi_route(counts, found["seed"])
    found["routed_choices"] = None if counts is None else int(counts.sum())


def check_gates(seen: Sequence[str] | None, domains: Sequence[str], max_gap: float | None, compared: bool) -> None:
    """Refuse a gate that could never be judged, before anything runs. Raises `UsageError`."""
    if not compared:
        raise UsageError("--max-gap and --min-retention compare with a reference: name it with --reference")
    if max_gap is None:
        return
    if seen is None:
        raise UsageError(f"--max-gap cannot be judged: {NOTHING_SEEN}")
    if not set(domains) & set(seen) or not set(domains) - set(seen):
        what = "all" if set(domains) & set(seen) else "none"
        listed = ", ".join(domains)
        raise UsageError(f"--max-gap needs domains that were seen and some that were not; of {listed}, {what} were: see --domains-seen")


def broken_gates(found: Mapping[str, Any], max_gap: float | None, min_retention: float | None) -> Iterator[str]:
    """A sentence for each gate that a variant does not pass; a figure that is missing passes none."""
    for entry in found["variants"]:
        name, gap, kept = entry["name"], entry["gg"], entry["retention"]
        if max_gap is not None and (gap is None or gap["low"] is None):
            yield f"'{name}': GG is not known ({entry['why'] or 'too few examples'}), and --max-gap {max_gap:g} asks for it"
        elif max_gap is not None and gap["low"] > max_gap:
            yield f"'{name}': GG is {spread(gap, 100)} points, above --max-gap {100 * max_gap:g} even at its lower bound"
        if min_retention is not None and kept is None:
            yield f"'{name}': retention is not known, no task's reference is 10 points above chance, and --min-retention asks for it"
        elif min_retention is not None and kept["low"] is None:
            yield f"'{name}': retention is not known well enough, a task has fewer than 30 rows, and --min-retention asks for it"
        elif min_retention is not None and kept["value"] < min_retention:
            yield f"'{name}': retention is {spread(kept, 100, '%')}, below --min-retention {100 * min_retention:g} %"


def spread(interval: Mapping[str, Any], scale: float = 1.0, unit: str = "", digits: int = 1) -> str:
    """A figure with its interval, as people read it."""
    value, low, high = (None if interval[key] is None else f"{scale * interval[key]:.{digits}f}" for key in ("value", "low", "high"))
    after = f" {unit}" if unit else ""
    if low is None:
        return f"{value}{after}"
    flag = ", near chance: not to be trusted" if interval.get("near_clip") else ""
    return f"{value}{after} (95 %: {low} to {high}{flag})"
