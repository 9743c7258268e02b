"""From a memory budget to page slots: what is pinned, what may be paged, and when to refuse.

    budget = pinned pages + slots x slot bytes + scratch        (all weight bytes held; KV cache and process are outside)

`P%` means pinned + scratch + P % of the pageable bytes, so `100%` holds everything and `0%` is the floor: one slot, because
a page must pass through memory to be used. Bytes below the floor are refused with the floor's size. `auto`, the default, is
everything where the machine has room for it, and what the machine can spare otherwise.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edgeml import native
from edgeml.bundle import Bundle
from edgeml.errors import BudgetError, EdgemlError, UsageError
from edgeml.manifest import Manifest, load_manifest
from edgeml.sizes import MemorySize, format_bytes, parse_memory

__all__ = ["REQUESTS", "Budget", "available_bytes", "naming", "native_sites", "open_context", "plan_budget", "resolve_threads"]

#: Requests that may run at once on one context; more wait for their turn. Each has working memory of its own, inside the budget.
REQUESTS = 2
#: `auto` leaves this to the process itself (interpreter, onnxruntime, activations), and a fifth of the rest to the others.
AUTO_RESERVE_BYTES = 160 << 20
AUTO_SHARE = 0.8
#: The storage rate that predictions are stated for: a slow card, and easy to scale in the head.
STATED_RATE = 100e6


@dataclass(frozen=True)
class Budget:
    """A resolved budget, in bytes and pages.

    `total_bytes` is what will be held; `pages` how many pageable pages fit in it (what a masked set may use), `slots` the same
    but at least one; `working_pages` how many a single token needs in all sites together.
    """

    asked: str
    total_bytes: int
    full_bytes: int
    pinned_bytes: int
    scratch_bytes: int
    slot_bytes: int
    slots: int
    pages: int
    pageable_pages: int
    working_pages: int

    @property
    def complete(self) -> bool:
        """Whether every page has a slot of its own."""
        return self.pages >= self.pageable_pages

    def notes(self, residency: str) -> list[str]:
        """What a user should know before waiting: each note one sentence."""
        notes = []
        if self.asked == "auto" and not self.complete:
            notes.append(
                f"this machine's free memory allows {format_bytes(self.total_bytes)} of the {format_bytes(self.full_bytes)} of "
                f"weights, so pages are read as they are needed"
            )
        missing = self.working_pages - self.slots
        if residency == "exact" and missing > 0:
            read = missing * self.slot_bytes
            notes.append(
                f"the budget holds {self.slots} of the {self.working_pages} pages that one token needs: expect at least "
                f"{format_bytes(read)} of reading for each token, {read / STATED_RATE:.2g} s at 100 MB/s"
            )
        return notes


def open_context(
    bundle: Bundle, memory: int | str | None = None, threads: int | None = None, isa: str | None = None
) -> tuple[native.Context, Manifest, Budget]:
    """Validate the manifest, resolve the budget and open the native side; large memory is taken only here.

    Reads bypass the page cache when not everything fits, so that the file is not held twice. `isa` names a kernel set (tests);
    "numpy" does without the C extension, as does an installation that lacks it.
    """
    manifest = load_manifest(bundle)
    count = resolve_threads(threads)
    by_numpy = isa == "numpy" or not native.PRESENT
    budget = plan_budget(bundle, manifest, memory, count, by_numpy)
    with naming(bundle):
        if by_numpy:
            from edgeml.numpy_context import NumpyContext  # which nobody else needs

            return cast("native.Context", NumpyContext(bundle, native_sites(manifest), slots=budget.slots)), manifest, budget
        context = native.Context(
            bundle.fd,
            bundle.index_bytes,
            native_sites(manifest),
            slots=budget.slots,
            threads=count,
            direct=not budget.complete,
            isa=isa,
            requests=REQUESTS,
        )
    return context, manifest, budget


@contextmanager
def naming(bundle: Bundle) -> Iterator[None]:
    """Errors of the native side get the file's name in front."""
    try:
        yield
    except EdgemlError as error:
        raise type(error)(f"{bundle.path}: {error}") from None


def resolve_threads(threads: int | None) -> int:
    """`threads`, or EDGEML_THREADS, or the processors this process may use. Raises `UsageError` outside 1 to 256."""
    text = os.environ.get("EDGEML_THREADS", "") if threads is None else str(threads)
    if not text:
        return len(os.sched_getaffinity(0))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:6]) <= 256:
        where = "EDGEML_THREADS" if threads is None else "threads"
        raise UsageError(f"{where} must be a number from 1 to 256, not {text!r:.40}")
    return int(text)


def plan_budget(bundle: Bundle, manifest: Manifest, memory: int | str | None, threads: int, by_numpy: bool = not native.PRESENT) -> Budget:
    """Resolve `memory`: bytes, "64MiB", "50%" or "auto"; None is EDGEML_MEMORY, or auto. Raises `BudgetError` below the floor."""
    asked = str(memory if memory is not None else os.environ.get("EDGEML_MEMORY") or "auto").strip()
    size = parse_memory(memory if isinstance(memory, int) else asked)
    sites = native_sites(manifest)
    if by_numpy:
        from edgeml.numpy_context import numpy_plan

        plan = numpy_plan(bundle.pages, sites)
    else:
        plan = native.plan(bundle.index_bytes, sites, threads=threads, requests=REQUESTS)
    fixed = plan["pinned_bytes"] + plan["scratch_bytes"]
    slot, count = plan["slot_bytes"], plan["pageable_pages"]
    full, floor = fixed + slot * count, fixed + (slot if count else 0)
    total = _resolve(size, fixed, full)
    if total < floor and size.kind != "percent":
        raise BudgetError(
            f"{bundle.path}: {_too_little(size, total)} is below the floor of {format_bytes(floor)} "
            f"({format_bytes(plan['pinned_bytes'])} pinned, {format_bytes(plan['scratch_bytes'])} scratch, one page of "
            f"{format_bytes(slot)}); give at least {-(-floor >> 20) or 1}MiB, or 0% for the smallest that runs"
        )
    pages = min((total - fixed) // slot, count) if count else 0
    slots = max(pages, 1) if count else 0
    return Budget(
        asked=asked.lower() if size.kind == "auto" else asked,
        total_bytes=fixed + slots * slot,
        full_bytes=full,
        pinned_bytes=plan["pinned_bytes"],
        scratch_bytes=plan["scratch_bytes"],
        slot_bytes=slot,
        slots=slots,
        pages=pages,
        pageable_pages=count,
        working_pages=sum(min(site.top_k, len({expert.page for expert in site.experts})) for site in manifest.sites),
    )


def _resolve(size: MemorySize, fixed: int, full: int) -> int:
    if size.kind == "auto":
        return min(full, int(max(available_bytes() - AUTO_RESERVE_BYTES, 0) * AUTO_SHARE))
    if size.kind == "percent":
        return fixed + int((full - fixed) * size.value / 100)
    return int(size.value)


def _too_little(size: MemorySize, total: int) -> str:
    if size.kind == "auto":
        return f"what this machine can spare for weights, {format_bytes(total)},"
    return f"the memory budget of {format_bytes(total)}"


def native_sites(manifest: Manifest) -> list[native.Site]:
    """The manifest's sites in the numbers that C takes."""
    return [
        native.Site(
            experts=[(expert.page, expert.sub) for expert in site.experts],
            shared=[(expert.page, expert.sub) for expert in site.shared],
            hidden=site.hidden,
            top_k=site.top_k,
        )
        for site in manifest.sites
    ]


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may still take: the kernel's estimate, or less where a control group (v1, v2) or `ulimit -v` says so."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) << 10)
    limits.extend(_group_limits(proc, groups))
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        used = _lines(proc / "self/statm")[:1] or ["0"]
        limits.append(address_space - int(used[0].split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    return max(min(limits), 0)


def _group_limits(proc: Path, groups: Path) -> Iterator[int]:
    """What each control group on the way up still allows. Page cache counts as used there, but gives way: it is added back."""
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names, cache = groups, ("memory.max", "memory.current"), "inactive_file "
        elif "memory" in controllers.split(","):
            root, names, cache = groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file "
        else:
            continue
        place = Path(path.lstrip("/"))
        for group in (root / place, *(root / parent for parent in place.parents)):
            limit, used = (_number(group / name) for name in names)
            if limit is not None and used is not None:
                spare = [int(line.split()[1]) for line in _lines(group / "memory.stat") if line.startswith(cache)]
                yield limit - used + sum(spare)


def _number(file: Path) -> int | None:
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
