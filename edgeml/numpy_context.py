"""What `native.Context` does, in NumPy: for machines that have no wheel with the C extension, and to compare with.

The same calls, the same rules where an answer depends on them: pages are checked as they come in, a budget of slots holds, leases pin,
counters count. Simpler where only speed does: nothing is read ahead, the page that was not used for longest goes first, and calls
take turns. Integer matrices give the bits of the C kernels; activations lie within 2e-7 of theirs. A record says `backend: numpy`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml import kernels, scar
from edgeml.bundle import Bundle
from edgeml.checksum import crc32c_rows
from edgeml.errors import BudgetError, BundleError, EdgemlError, PageError, UsageError
from edgeml.layout import Page, PageKind, WeightType, align_up
from edgeml.native import Site

__all__ = ["BACKEND", "NumpyContext", "NumpyRequest", "numpy_plan"]

BACKEND = "numpy"
OS_PAGE = 4096

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def numpy_plan(pages: Sequence[Page], sites: Sequence[Site]) -> dict[str, int]:
    """What a `NumpyContext` would hold, in bytes, as `native.plan` says it. Scratch is the largest page's matrices unpacked."""
    pinned, routed = _placed(pages, sites)
    slot = max((align_up(pages[page].length, OS_PAGE) for page in routed), default=0)
    unpacked = [sum(6 * m.rows * m.cols for m in pages[page].matrices) for page in (*pinned, *routed)]
    return {
        "pinned_bytes": sum(align_up(pages[page].length, OS_PAGE) for page in pinned),
        "slot_bytes": slot,
        "scratch_bytes": max(unpacked, default=0),
        "pageable_bytes": slot * len(routed),
        "pageable_pages": len(routed),
    }


def _placed(pages: Sequence[Page], sites: Sequence[Site]) -> tuple[list[int], list[int]]:
    """Pages that are held from open to close, and pages that come and go."""
    shared = {page for site in sites for page, _ in site.shared}
    pinned = [page.id for page in pages if page.kind == PageKind.LINEAR or page.id in shared]
    return pinned, sorted({page for site in sites for page, _ in site.experts} - set(pinned))


class NumpyRequest:
    """One call for one task, as `native.Request`: `with context.request() as request: ...`. A thread has one at a time."""

    def __init__(self, context: NumpyContext) -> None:
        self._context = context
        self.hits = self.misses = self.page_in_bytes = self.page_wait_ns = 0
        self.error: EdgemlError | None = None
        self.leased: frozenset[int] | None = None

    def __enter__(self) -> NumpyRequest:
        if getattr(_thread, "request", None) is not None:
            raise UsageError("this request is running on another thread, or this thread has a request already")
        self._context.begin(self)
        _thread.request = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _thread.request = None
        self._context.end(self)

    def lease(self, pages: Sequence[int]) -> None:
        """Pin these pages until the request ends and page them in; nothing else may be used by it. Raises `BudgetError`, `PageError`."""
        if getattr(_thread, "request", None) is not self:
            raise UsageError("a set is leased by a request, and this one is not running")
        if self.leased is not None:
            raise UsageError("this request has leased a set already")
        self._context.lease(self, frozenset(pages))


class _Thread(threading.local):
    request: NumpyRequest | None = None


_thread = _Thread()


class NumpyContext:
    """The weights of one open bundle under a budget. Safe for several threads; see `native.Context` for what the calls mean."""

    def __init__(self, bundle: Bundle, sites: Sequence[Site], *, slots: int) -> None:
        self._bundle, self._sites, self._slots = bundle, list(sites), slots
        pinned, self._routed = _placed(bundle.pages, sites)
        self._site_of = {page: number for number, site in enumerate(sites) for page, _ in site.experts}
        self._priority: dict[int, int] = {}
        self._pins: dict[int, int] = {}
        self._resident: dict[int, bytes] = {}  # in the order of use, the latest last
        self._changed = threading.Condition(threading.RLock())
        self._running, self._closed, self._process = 0, False, os.getpid()
        self._total = dict.fromkeys(("hits", "misses", "page_in_bytes", "page_wait_ns", "evictions", "failures"), 0)
        self._by_site = [dict.fromkeys(("hits", "misses", "page_in_bytes", "page_wait_ns"), 0) for _ in sites]
        self._plan = numpy_plan(bundle.pages, sites)
        self._pinned = {page: self._read(page) for page in pinned}

    def request(self) -> NumpyRequest:
        """A request of the calling thread, as a context manager."""
        return NumpyRequest(self)

    def linear(self, page: int, x: Floats) -> Floats:
        """A linear page applied to (N, cols) -> (N, rows)."""
        self._check_page(page, PageKind.LINEAR)
        return kernels.linear(self._pinned[page], self._bundle.pages[page].matrices, np.asarray(x, np.float32))

    def experts(self, site: int, x: Floats, ids: Ints, weights: Floats) -> Floats:
        """A site's experts applied to (N, hidden) with ids, weights (N, k): the shared ones, then each token's in its order of j."""
        if not 0 <= site < len(self._sites):
            raise UsageError(f"there is no site {site}")
        here, out = self._sites[site], np.zeros_like(x, np.float32)
        wrong = ids[(ids < -1) | (ids >= len(here.experts))]
        if wrong.size:
            raise self._met(UsageError(f"an argument is outside its range: {wrong.flat[0]}"))
        for page, sub in here.shared:
            out = out + self._expert(self._pinned[page], page, sub, x)
        routed = np.zeros((*ids.shape, x.shape[1]), np.float32)
        for chosen in sorted(set(ids[ids >= 0].tolist()), key=lambda expert: here.experts[expert]):
            page, sub = here.experts[chosen]
            tokens, places = np.nonzero(ids == chosen)
            routed[tokens, places] = self._expert(self._acquire(page), page, sub, x[tokens])
        for j in range(ids.shape[1]):
            used = ids[:, j] >= 0
            out[used] = out[used] + weights[used, j, None] * routed[used, j]
        return out

    def embed_rows(self, page: int, ids: Ints) -> Floats:
        """Rows `ids` (N,) of a rows page -> (N, cols); each is checked as it is read."""
        self._check_page(page, PageKind.ROWS)
        record = self._bundle.pages[page]
        matrix, stride = record.matrices[0], record.stride
        wrong = ids[(ids < 0) | (ids >= matrix.rows)]
        if wrong.size:
            raise self._met(UsageError(f"an argument is outside its range: {wrong.flat[0]}"))
        unique, places = np.unique(ids, return_inverse=True)
        data = b"".join(os.pread(self._bundle.fd, stride, record.offset + int(row) * stride) for row in unique)
        if len(data) != len(unique) * stride:
            raise self._met(PageError(f"page {page}: the file ends too early: it was cut after it was opened"))
        rows = np.frombuffer(data, np.uint8).reshape(-1, stride)
        stored = np.ascontiguousarray(rows[:, -4:]).view("<u4")[:, 0]
        if (crc32c_rows(rows[:, :-4]) != stored).any():
            raise self._met(PageError(f"page {page}: the checksum of a row is wrong; check the medium, or copy the bundle again"))
        if matrix.type == WeightType.F32:
            table = np.ascontiguousarray(rows[:, :-4]).view("<f4")
        else:
            table = rows[:, 4:-4].view(np.int8).astype(np.float32) * np.ascontiguousarray(rows[:, :4]).view("<f4")
        return np.asarray(table, np.float32)[places.reshape(-1)]

    def operator(self, name: str, attributes: Mapping[str, Any], inputs: Sequence[NDArray[Any] | None]) -> list[NDArray[Any]]:
        """An operator of the domain `edgeml` on a graph's tensors. Raises `UsageError` for one that is unknown."""
        x = inputs[0]
        assert x is not None
        if name == "PagedExperts":
            ids, weights = inputs[1], inputs[2]
            assert ids is not None
            assert weights is not None
            flat = x.reshape(-1, x.shape[-1])
            count = ids.shape[-1]
            return [self.experts(attributes["site"], flat, ids.reshape(-1, count), weights.reshape(-1, count)).reshape(x.shape)]
        if name == "Linear":
            made = self.linear(attributes["page"], x.reshape(-1, x.shape[-1]))
            return [made.reshape(*x.shape[:-1], made.shape[1])]
        if name == "EmbedRows":
            made = self.embed_rows(attributes["page"], x.reshape(-1))
            return [made.reshape(*x.shape, made.shape[1])]
        if name == "ScarAttention":
            return _attention(attributes, inputs)
        raise UsageError(f"there is no operator edgeml.{name} in this version")

    def prefetch(self, pages: Sequence[int], priority: int = 0) -> None:
        """Give pages a priority. Nothing is read ahead."""
        self.set_priority(pages, priority)

    def set_priority(self, pages: Sequence[int], priority: int) -> None:
        """Give pages a priority; the lowest is given up first."""
        with self._changed:
            self._priority.update(dict.fromkeys(pages, priority))

    def settle(self) -> None:
        """No read is ever under way."""

    def evict_all(self) -> None:
        """Give up every page that is resident and unpinned."""
        with self._changed:
            self._resident = {page: data for page, data in self._resident.items() if page in self._pins}

    def stats(self) -> dict[str, Any]:
        """As `native.Context.stats`."""
        with self._changed:
            held = {name: self._plan[name] for name in ("pinned_bytes", "slot_bytes", "scratch_bytes")}
            other = {"retries": 0, "slots": self._slots, "direct": False, "isa": BACKEND, "resident": sorted(self._resident)}
            return {**self._total, **held, **other}

    def site_stats(self) -> list[dict[str, int]]:
        """Counters of each site."""
        with self._changed:
            return [dict(site) for site in self._by_site]

    def close(self) -> None:
        """Free everything; a second call does nothing. Raises `UsageError` while requests run."""
        with self._changed:
            if self._running:
                raise UsageError("requests or graphs still use it")
            self._closed = True
            self._resident.clear()
            self._pinned.clear()

    def begin(self, request: NumpyRequest) -> None:
        """Count a request that begins."""
        with self._changed:
            if self._closed or os.getpid() != self._process:
                raise UsageError("this bundle is closed" if self._closed else "this bundle was opened before the process was forked")
            self._running += 1

    def end(self, request: NumpyRequest) -> None:
        """Give up a request's lease."""
        with self._changed:
            self._running -= 1
            for page in request.leased or ():
                self._pins[page] -= 1
                if not self._pins[page]:
                    del self._pins[page]
            self._changed.notify_all()

    def lease(self, request: NumpyRequest, pages: frozenset[int]) -> None:
        """Pin these pages for a request, once there is room, and read those that are absent."""
        if not pages <= set(self._routed):
            raise UsageError("there is no page of such a number")
        if len(pages) > self._slots:
            raise BudgetError("the set of pages is larger than the slots that there are; give more memory or a smaller set")
        with self._changed:
            self._changed.wait_for(lambda: len(pages | self._pins.keys()) <= self._slots)
            for page in pages:
                self._pins[page] = self._pins.get(page, 0) + 1
            request.leased = pages
            for page in sorted(pages):
                self._acquire(page)

    def _acquire(self, page: int) -> bytes:
        """A routed page's bytes, read where it is absent, counted for the thread's request."""
        request = _thread.request
        if request is not None and request.leased is not None and page not in request.leased:
            raise self._met(UsageError(f"page {page}: a page outside the request's leased set was asked for; its mask does not agree"))
        with self._changed:
            data = self._resident.pop(page, None)
            self._count(page, "misses" if data is None else "hits", 1)
            if data is None:
                self._changed.wait_for(lambda: len(self._resident) < self._slots or bool(self._loose()))
                if len(self._resident) >= self._slots:
                    loose = self._loose()
                    del self._resident[min(loose, key=lambda one: self._priority.get(one, 0))]  # of equals the first, longest unused
                    self._total["evictions"] += 1
                started = time.perf_counter_ns()
                data = self._read(page)
                self._count(page, "page_in_bytes", len(data))
                self._count(page, "page_wait_ns", time.perf_counter_ns() - started)
            self._resident[page] = data
            return data

    def _loose(self) -> list[int]:
        """Resident pages that may be given up."""
        return [page for page in self._resident if page not in self._pins]

    def _count(self, page: int, what: str, by: int) -> None:
        self._total[what] += by
        self._by_site[self._site_of[page]][what] += by
        if _thread.request is not None:
            setattr(_thread.request, what, getattr(_thread.request, what) + by)

    def _expert(self, data: bytes, page: int, sub: int, x: Floats) -> Floats:
        record = self._bundle.pages[page]
        return kernels.expert(data[sub * record.stride : (sub + 1) * record.stride], record.matrices, record.activation, x)

    def _read(self, page: int) -> bytes:
        try:
            return self._bundle.read(page)
        except PageError as error:
            self._total["failures"] += 1
            raise self._met(PageError(str(error).removeprefix(f"{self._bundle.path}: "))) from None

    def _check_page(self, page: int, kind: PageKind) -> None:
        if not 0 <= page < len(self._bundle.pages) or self._bundle.pages[page].kind != kind:
            raise UsageError(f"page {page} has no matrix")

    @staticmethod
    def _met(error: EdgemlError) -> EdgemlError:
        """Keep an error for the thread's request, whose graph may hide it."""
        if _thread.request is not None:
            _thread.request.error = error
        return error


def _attention(attributes: Mapping[str, Any], inputs: Sequence[NDArray[Any] | None]) -> list[NDArray[Any]]:
    """`ScarAttention` by its definition: see native/src/ops.c for its inputs and attributes."""
    q, k, v, cluster, domain, confidence = (np.asarray(value) for value in inputs[:6])
    pad = inputs[6] if len(inputs) > 6 else None
    shape = q.shape
    if q.ndim == 3:
        heads = attributes.get("heads", 0)
        if not heads or shape[2] % heads:
            raise BundleError("edgeml.ScarAttention: the shapes of its inputs, or heads, do not fit each other")
        q, k, v = (value.reshape(*shape[:2], heads, -1).transpose(0, 2, 1, 3) for value in (q, k, v))
    scale, size = attributes.get("scale", 0.0), q.shape[-1]
    if scale:
        q = q * np.float32(scale * np.sqrt(size))  # what `attention` divides by
    out, densities = np.zeros(q.shape, np.float32), []
    for row, (own, where, sure) in enumerate(zip(cluster, domain, confidence, strict=True)):
        threshold = attributes["threshold"]
        if attributes.get("published", 0):
            mask = scar.published(own, sure, threshold)
        else:
            rules = {"global_tokens": attributes.get("global_tokens", 0), "causal": bool(attributes.get("causal", 0))}
            mask = scar.allowed(own, where, sure, threshold, pad=None if pad is None else pad[row], **rules)
        out[row] = scar.attention(q[row], k[row], v[row], mask)
        densities.append(scar.density(mask))
    if len(shape) == 3:
        out = np.ascontiguousarray(out.transpose(0, 2, 1, 3)).reshape(shape)
    return [out, np.array(densities, np.float32)]
