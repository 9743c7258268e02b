"""Resident sets and the masks they become: the task's time scale of routing.

A resident set is the pageable pages a request may use under `--residency masked`. It is chosen from the task's usage by
`resident.best_pages`, so a set depends on nothing but usage and capacity.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import BundleError, UsageError
from edgeml.manifest import Manifest
from edgeml.resident import best_pages

__all__ = ["ResidentSet", "checked_bias", "mask_of", "resident_set", "usage_of"]


@dataclass(frozen=True)
class ResidentSet:
    """Pages to hold, and the bias that forbids all other experts: (S, E) float32, 0 or minus infinity.

    `stand_in`: the domain whose set it is, where that stands in for the task's own.
    """

    pages: tuple[int, ...]
    mask: NDArray[np.float32]
    stand_in: str = ""


def share_of(experts: int, share: float) -> int:
    """How many experts are at most this share of a site's."""
    return int(share * experts + 1e-9)


def checked_set(manifest: Manifest, resident: ResidentSet | None) -> ResidentSet | None:
    """The set, if it is one of the bundle's routed experts. Raises `UsageError` for other pages and for a mask of another shape."""
    if resident is None:
        return None
    pages = {expert.page for site in manifest.sites for expert in site.experts}
    shape = (len(manifest.sites), max((len(site.experts) for site in manifest.sites), default=0))
    if not pages.issuperset(resident.pages) or resident.mask.shape != shape:
        raise UsageError("a resident set has pages of this bundle's routed experts, and a mask of shape (sites, experts)")
    return resident


def usage_of(manifest: Manifest, task: str) -> Sequence[Sequence[float]]:
    """The recorded usage of a task. Raises `UsageError` where the bundle has none."""
    if task not in manifest.usage:
        raise UsageError(
            f"the bundle records no usage for task '{task}', so masked residency has nothing to choose by; use --residency exact"
        )
    return manifest.usage[task]


def resident_set(manifest: Manifest, usage: Sequence[Sequence[float]], capacity: int) -> ResidentSet:
    """The best set of at most `capacity` pages by `usage[site][expert]`."""
    pages = {expert.page: 1 for site in manifest.sites for expert in site.experts}
    chosen = best_pages(manifest.sites, usage, pages, capacity)
    return ResidentSet(chosen, mask_of(manifest, chosen))


def mask_of(manifest: Manifest, pages: Collection[int]) -> NDArray[np.float32]:
    """The bias (S, E) that leaves only experts on `pages`; sites with fewer experts are padded with minus infinity."""
    width = max((len(site.experts) for site in manifest.sites), default=0)
    mask = np.full((len(manifest.sites), width), -np.inf, np.float32)
    for number, site in enumerate(manifest.sites):
        for index, expert in enumerate(site.experts):
            if expert.page in pages:
                mask[number, index] = 0
    return mask


def checked_bias(manifest: Manifest, bias: NDArray[Any], rows: int, where: str, resident: ResidentSet | None = None) -> NDArray[np.float32]:
    """A router's bias (rows, S, E), with the mask of the `resident` set added. Raises `BundleError` for another shape, for a number that
    is no bias, and for a bare site.

    Minus infinity forbids an expert; a site without shared experts must keep one.
    """
    width = max((len(site.experts) for site in manifest.sites), default=0)
    wanted = (rows, len(manifest.sites), width)
    if bias.dtype != np.float32 or bias.shape != wanted:
        raise BundleError(f"{where} answers a bias {bias.dtype} {bias.shape} instead of float32 {wanted}")
    if np.isnan(bias).any() or np.isposinf(bias).any():
        raise BundleError(f"{where} answers a bias that is not a number or infinite; its weights are faulty")
    if resident is not None:
        bias, where = bias + resident.mask, f"{where}, under its resident set,"
    for number, site in enumerate(manifest.sites):
        if not site.shared and np.isneginf(bias[:, number, : len(site.experts)]).all(-1).any():
            raise BundleError(f"{where} leaves no expert of site '{site.name}' to choose, and it has no shared one")
    return bias
