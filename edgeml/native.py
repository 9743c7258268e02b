"""The seam to libedgeml: the only module that imports the C extension. It checks what crosses and does nothing else.

A wheel without the extension has checksums in NumPy here, and `numpy_context` in the place of `Context`; the rest of this module
then says in one sentence that it needs the extension.

Arrays are made contiguous and checked for rank and width before a pointer leaves; the one function that turns a status into
an exception is `_check`. What each call does is said in native/include/edgeml.h.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml import checksum
from edgeml.errors import BudgetError, BundleError, DeviceError, EdgemlError, PageError, UsageError


class _Absent:
    """Stands for the extension's objects where there is none."""

    def __getattr__(self, name: str) -> Any:
        raise DeviceError("this needs edgeml's C extension, which this installation lacks; install the wheel for this kind of machine")


try:
    from edgeml._native import __file__ as _library
    from edgeml._native import ffi, lib

    PRESENT = True
except ModuleNotFoundError:
    _library, ffi, lib, PRESENT = "", _Absent(), _Absent(), False

__all__ = [
    "LIBRARY_PATH",
    "PRESENT",
    "Context",
    "Request",
    "Site",
    "apply_activation",
    "apply_matrix",
    "backends",
    "crc32c",
    "crc32c_name",
    "plan",
    "scar_attention",
]

#: What `SessionOptions.register_custom_ops_library` takes.
LIBRARY_PATH: str = os.path.abspath(str(_library)) if PRESENT else ""

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Site:
    """A place where experts are chosen: `(page, sub)` of its routed and shared experts, its width, experts per token."""

    experts: Sequence[tuple[int, int]]
    shared: Sequence[tuple[int, int]]
    hidden: int
    top_k: int


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of a bytes-like object, continuing from `crc` (0 for a new message)."""
    if not PRESENT:
        return checksum.crc32c(data, crc)
    with memoryview(data) as view:
        return int(lib.edgeml_crc32c(crc, ffi.from_buffer(view), view.nbytes))


def crc32c_name() -> str:
    """How the checksum is computed here: `sse4.2`, `armv8`, `table` or `numpy`."""
    return "numpy" if not PRESENT else str(ffi.string(lib.edgeml_crc32c_name()).decode("ascii"))


def backends() -> list[str]:
    """Names of the kernel sets this processor can run: `scalar` first, the preferred one last; `numpy` alone without the extension."""
    if not PRESENT:
        return ["numpy"]
    names = ffi.new("const char *[16]")
    count = lib.edgeml_backends(names, 16)
    return [ffi.string(names[number]).decode("ascii") for number in range(min(count, 16))]


def apply_matrix(isa: str | None, type: int, tiles: bytes, rows: int, cols: int, x: Floats, bias: Floats | None = None) -> Floats:
    """Packed tiles (rows, cols) times x (N, cols), plus bias (rows,), by one kernel set: (N, rows). For tests and probes."""
    x = _array(x, np.float32, (None, cols))
    added = ffi.NULL if bias is None else _floats(_array(bias, np.float32, (rows,)))
    out = np.empty((len(x), rows), np.float32)
    data = ffi.from_buffer(tiles)
    _check(lib.edgeml_apply_matrix(_name(isa), type, data, len(data), rows, cols, _floats(x), len(x), added, _floats(out)))
    return out


def apply_activation(isa: str | None, activation: int, x: Floats) -> Floats:
    """An activation function of every value of x, by one kernel set. For tests and probes."""
    out = np.array(x, np.float32, order="C")
    _check(lib.edgeml_apply_activation(_name(isa), activation, _floats(out), out.size))
    return out


def scar_attention(
    q: Floats,
    k: Floats,
    v: Floats,
    cluster: NDArray[np.int32],
    domain: NDArray[np.int32],
    confidence: Floats,
    *,
    clusters: int,
    domains: int,
    threshold: float,
    pad: NDArray[np.bool_] | None = None,
    global_tokens: int = 0,
    causal: bool = False,
    published: bool = False,
    context: Context | None = None,
    isa: str | None = None,
) -> tuple[Floats, Floats]:
    """Bucketed attention of q, k, v (B, H, N, size) by the mask of `edgeml.scar.allowed`: the same shape, and each sequence's density (B,).

    cluster and domain (B, N) are below `clusters` and `domains`; a context lends its threads. Raises `UsageError`.
    """
    q = _array(q, np.float32, (None, None, None, None))
    batch, heads, tokens, size = q.shape
    rows, out, density = (batch, tokens), np.empty_like(q), np.empty(batch, np.float32)
    if not all(0 <= number < 2**32 for number in (clusters, domains, global_tokens)):
        raise UsageError("clusters, domains and global_tokens are numbers from 0 up")
    call = ffi.new("edgeml_attention *")
    k, v = _array(k, np.float32, q.shape), _array(v, np.float32, q.shape)
    cluster, domain = _array(cluster, np.int32, rows), _array(domain, np.int32, rows)
    confidence, hidden = _array(confidence, np.float32, rows), None if pad is None else _array(pad, np.bool_, rows)
    call.q, call.k, call.v, call.y, call.density = map(_floats, (q, k, v, out, density))
    call.cluster, call.domain = ffi.from_buffer("int32_t[]", cluster), ffi.from_buffer("int32_t[]", domain)
    call.confidence, call.pad = _floats(confidence), ffi.NULL if hidden is None else ffi.from_buffer("uint8_t[]", hidden)
    call.batch, call.heads, call.tokens, call.head_size = batch, heads, tokens, size
    call.clusters, call.domains, call.global_tokens = clusters, domains, global_tokens
    call.threshold, call.causal, call.published = threshold, causal, published
    with nullcontext(ffi.NULL) if context is None else context._use() as inner:
        scratch, fault = np.empty(lib.edgeml_attention_scratch(inner, call), np.uint8), ffi.new("edgeml_fault *")
        if not scratch.size:
            raise UsageError("the sizes or options of this attention are outside their ranges or do not fit together")
        status = lib.edgeml_scar_attention(inner, _name(isa), call, ffi.from_buffer(scratch), fault)
    _check(status, fault)
    return out, density


def plan(index: bytes, sites: Sequence[Site], threads: int = 1, requests: int = 2) -> dict[str, int]:
    """What a `Context` would hold, in bytes: `pinned_bytes`, `slot_bytes`, `scratch_bytes`, `pageable_bytes`, `pageable_pages`."""
    options, _keep = _options(-1, index, sites, 1, threads, 1, 0, requests, False, None)
    out = ffi.new("edgeml_plan_result *")
    _check(lib.edgeml_plan(options, out))
    names = ("pinned_bytes", "slot_bytes", "scratch_bytes", "pageable_bytes", "pageable_pages")
    return {name: int(getattr(out, name)) for name in names}


class Context:
    """The native side of one open bundle; safe for several threads, of no use in a forked child (`UsageError`).

    Raises `PageError` when a pinned page cannot be read, `DeviceError` when memory, threads or descriptors are lacking.
    """

    def __init__(
        self,
        fd: int,
        index: bytes,
        sites: Sequence[Site],
        *,
        slots: int,
        threads: int = 1,
        readers: int = 3,
        ahead: int = 4,
        requests: int = 2,
        direct: bool = True,
        isa: str | None = None,
    ) -> None:
        options, _keep = _options(fd, index, sites, slots, threads, readers, ahead, requests, direct, isa)
        handle, fault = ffi.new("edgeml_context **"), ffi.new("edgeml_fault *")
        self._context: Any = None
        self._lock, self._calls, self._process = threading.Lock(), 0, os.getpid()
        _check(lib.edgeml_open(options, handle, fault), fault)
        self._context = handle[0]
        self._sites = list(sites)

    @property
    def handle(self) -> str:
        """The value of the session configuration entry `edgeml.context`."""
        with self._use() as context:
            return str(lib.edgeml_handle(context))

    def request(self) -> Request:
        """A request of the calling thread, as a context manager."""
        return Request(self)

    def linear(self, page: int, x: Floats) -> Floats:
        """A linear page applied to (N, cols) -> (N, rows)."""
        rows, cols = self._matrix(page)
        x = _array(x, np.float32, (None, cols))
        out = np.empty((len(x), rows), np.float32)
        with self._use() as context:
            _check(lib.edgeml_linear(context, page, _floats(x), len(x), _floats(out)))
        return out

    def experts(self, site: int, x: Floats, ids: Ints, weights: Floats) -> Floats:
        """A site's experts applied to (N, hidden) with ids, weights (N, k), counted for the thread's current request."""
        if not 0 <= site < len(self._sites):
            raise UsageError(f"there is no site {site}")
        x = _array(x, np.float32, (None, self._sites[site].hidden))
        ids = _array(ids, np.int64, (len(x), None))
        weights = _array(weights, np.float32, ids.shape)
        out, k = np.empty_like(x), ids.shape[1]
        with self._use() as context:
            request = _request_of(context)
            status = lib.edgeml_experts(context, request, site, _floats(x), _longs(ids), _floats(weights), len(x), k, _floats(out))
        _check(status, ffi.addressof(request, "fault"))
        return out

    def embed_rows(self, page: int, ids: Ints) -> Floats:
        """Rows `ids` (N,) of a rows page -> (N, cols)."""
        cols = self._matrix(page)[1]
        ids = _array(ids, np.int64, (None,))
        out = np.empty((len(ids), cols), np.float32)
        with self._use() as context:
            request = _request_of(context)
            status = lib.edgeml_embed_rows(context, request, page, _longs(ids), len(ids), _floats(out))
        _check(status, ffi.addressof(request, "fault"))
        return out

    def prefetch(self, pages: Sequence[int], priority: int = 0) -> None:
        """Give pages a priority and read the absent ones where there is room for them; does not wait."""
        self._advise(pages, priority, 1)

    def set_priority(self, pages: Sequence[int], priority: int) -> None:
        """Give pages a priority; the lowest is evicted first."""
        self._advise(pages, priority, 0)

    def settle(self) -> None:
        """Wait until no read is under way."""
        with self._use() as context:
            lib.edgeml_settle(context)

    def evict_all(self) -> None:
        """Give up every page that is resident and unpinned."""
        with self._use() as context:
            lib.edgeml_evict_all(context)

    def stats(self) -> dict[str, Any]:
        """Counters since opening and what is held. Bytes and nanoseconds by name; `resident` lists the pages in slots."""
        out = ffi.new("edgeml_stats *")
        with self._use() as context:
            lib.edgeml_get_stats(context, out)
            pages = ffi.new("uint32_t[]", out.slots)
            count = lib.edgeml_get_resident(context, pages, out.slots)
        names = ("evictions", "retries", "failures", "pinned_bytes", "slot_bytes", "scratch_bytes", "slots")
        return {
            **_counters(out.total),
            **{name: int(getattr(out, name)) for name in names},
            "direct": bool(out.direct),
            "isa": ffi.string(out.isa).decode("ascii"),
            "resident": [int(pages[i]) for i in range(count)],
        }

    def site_stats(self) -> list[dict[str, int]]:
        """Counters of each site: `hits`, `misses`, `page_in_bytes`, `page_wait_ns`."""
        out = ffi.new("edgeml_counters[]", max(len(self._sites), 1))
        with self._use() as context:
            lib.edgeml_get_site_stats(context, out)
        return [_counters(out[i]) for i in range(len(self._sites))]

    def note_events(self, room: int = 1 << 16) -> None:
        """Note from now on what each thread does, as far as there is room until somebody takes it; `room` 0: no more."""
        with self._use() as context:
            _check(lib.edgeml_events_start(context, room) if room else lib.edgeml_events_stop(context) or 0)

    def events(self) -> tuple[bytes, int]:
        """What was noted since the last call, edgeml_event after edgeml_event; and how many found no room since the start."""
        size, lost = ffi.sizeof("edgeml_event"), ffi.new("uint64_t *")
        out = np.empty(size << 14, np.uint8)  # not cleared: whoever is measured keeps what it has in the cache
        with self._use() as context:
            taken = lib.edgeml_events_take(context, ffi.from_buffer("edgeml_event[]", out), 1 << 14, lost)
        return out[: taken * size].tobytes(), int(lost[0])

    def close(self) -> None:
        """Free everything; a second call does nothing. Raises `UsageError` while calls, requests or graphs still use it."""
        if os.getpid() != self._process:
            return  # a forked child has none of the threads that would be waited for
        with self._lock:
            if self._context is not None:
                _check(lib.EDGEML_BUSY if self._calls else lib.edgeml_close(self._context))
                self._context = None

    @contextmanager
    def _use(self) -> Iterator[Any]:
        """The C context, which does not close meanwhile. C itself sees requests and graphs only."""
        if os.getpid() != self._process:
            raise UsageError("this bundle was opened before the process was forked; open it again in the child")
        with self._lock:
            if self._context is None:
                raise UsageError("this bundle is closed")
            self._calls += 1
        try:
            yield self._context
        finally:
            with self._lock:
                self._calls -= 1

    def _advise(self, pages: Sequence[int], priority: int, load: int) -> None:
        if not -(2**31) <= priority < 2**31:
            raise UsageError(f"a priority is a 32-bit number, not {priority}")
        numbers = _numbers(pages)
        with self._use() as context:
            _check(lib.edgeml_advise(context, numbers, len(numbers), priority, load))

    def _matrix(self, page: int) -> tuple[int, int]:
        rows, cols = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        with self._use() as context:
            if not 0 <= page < 2**32 or lib.edgeml_get_matrix(context, page, 0, rows, cols):
                raise UsageError(f"page {page} has no matrix")
        return int(rows[0]), int(cols[0])

    def __del__(self) -> None:
        # A context that is dropped instead of closed must not leave its threads behind; one in use cannot be freed.
        if getattr(self, "_context", None) is not None and os.getpid() == self._process:
            lib.edgeml_close(self._context)


class Request:
    """One call for one task, on one thread: `with context.request() as request: ...`. Its counters stay readable afterwards.

    A thread has one request at a time (`UsageError`).
    """

    def __init__(self, context: Context) -> None:
        self._owner = context
        self._request = ffi.new("edgeml_request *")
        self._lease: Any = None

    def __enter__(self) -> Request:
        if self._request.context:
            raise UsageError("this request is running on another thread, or this thread has a request already")
        with self._owner._use() as context:
            _check(lib.edgeml_request_begin(context, self._request))
        _thread.request = self  # also keeps the memory alive that C now points to
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        lib.edgeml_request_end(self._request)
        if _thread.request is self:
            _thread.request = None

    def lease(self, pages: Sequence[int]) -> None:
        """Pin these pages until the request ends and page them in; nothing else may be used by it. Raises `BudgetError`, `PageError`."""
        if not self._request.context:
            raise UsageError("a set is leased by a request, and this one is not running")
        if self._request.leased:
            raise UsageError("this request has leased a set already")
        self._lease = _numbers(sorted(set(pages)))  # C reads it until the request ends
        _check(lib.edgeml_request_lease(self._request, self._lease, len(self._lease)), ffi.addressof(self._request, "fault"))

    @property
    def hits(self) -> int:
        """Acquisitions of pages that were resident."""
        return int(self._request.counters.hits)

    @property
    def misses(self) -> int:
        """Acquisitions of pages that were not."""
        return int(self._request.counters.misses)

    @property
    def page_in_bytes(self) -> int:
        """Bytes read for this request."""
        return int(self._request.counters.page_in_bytes)

    @property
    def page_wait_ns(self) -> int:
        """Nanoseconds its thread waited for pages."""
        return int(self._request.counters.page_wait_ns)

    @property
    def error(self) -> EdgemlError | None:
        """What the call of this request that failed last met, or None."""
        fault = self._request.fault
        return _error(fault.status, fault) if fault.status else None


class _Thread(threading.local):
    """Its current request: what C keeps for the operators, kept for the direct calls of `Context`."""

    request: Request | None = None


_thread = _Thread()


def _request_of(context: Any) -> Any:
    """The C request that a direct call on this thread is counted for: the current one, or one that is thrown away."""
    current = _thread.request
    return current._request if current is not None and current._request.context == context else ffi.new("edgeml_request *")


def _options(
    fd: int,
    index: bytes,
    sites: Sequence[Site],
    slots: int,
    threads: int,
    readers: int,
    ahead: int,
    requests: int,
    direct: bool,
    isa: str | None,
) -> tuple[Any, list[Any]]:
    """The C options and what must stay alive while they are used."""
    table = ffi.new("edgeml_site[]", max(len(sites), 1))
    keep: list[Any] = [table, ffi.from_buffer(index)]
    for entry, site in zip(table, sites, strict=False):
        experts, shared = ffi.new("edgeml_expert_ref[]", list(site.experts)), ffi.new("edgeml_expert_ref[]", list(site.shared))
        keep += [experts, shared]
        entry.experts, entry.expert_count = experts, len(site.experts)
        entry.shared, entry.shared_count = shared, len(site.shared)
        entry.hidden, entry.top_k = site.hidden, site.top_k
    name = _name(isa)
    options = ffi.new("edgeml_options *")
    options.fd, options.direct = fd, direct
    options.index, options.index_bytes = keep[1], len(index)
    options.sites, options.site_count = table, len(sites)
    if not all(0 <= number < 2**32 for number in (slots, threads, readers, ahead, requests)):
        raise UsageError("slots, threads, readers, ahead and requests are numbers from 0 up")
    options.slots, options.threads, options.requests = slots, threads, requests
    options.readers, options.ahead = readers, ahead
    options.isa = name
    return options, [*keep, name, options]


def _counters(counters: Any) -> dict[str, int]:
    return {name: int(getattr(counters, name)) for name in ("hits", "misses", "page_in_bytes", "page_wait_ns")}


def _array(values: Any, kind: type, shape: tuple[int | None, ...]) -> NDArray[Any]:
    array: NDArray[Any] = np.ascontiguousarray(values, kind)
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        raise UsageError(f"an array of shape {array.shape}, where {tuple('any' if n is None else n for n in shape)} is needed")
    return array


def _numbers(pages: Sequence[int]) -> Any:
    if not all(0 <= page < 2**32 for page in pages):
        raise UsageError("there is no page of such a number")
    return ffi.new("uint32_t[]", list(pages))


def _name(isa: str | None) -> Any:
    return ffi.NULL if isa is None else ffi.new("char[]", isa.encode())


def _floats(array: Floats) -> Any:
    return ffi.from_buffer("float[]", array)


def _longs(array: Ints) -> Any:
    return ffi.from_buffer("int64_t[]", array)


def _check(status: int, fault: Any = None) -> None:
    if status:
        raise _error(status, fault)


def _error(status: int, fault: Any) -> EdgemlError:
    sentence = ffi.string(lib.edgeml_status_text(status)).decode("ascii")
    if status in (lib.EDGEML_READ_FAILED, lib.EDGEML_TRUNCATED, lib.EDGEML_CHECKSUM):
        cause = f" ({os.strerror(fault.error)})" if fault.error else ""
        return PageError(f"page {fault.page} at offset {fault.offset}: {sentence}{cause}; check the medium, or copy the bundle again")
    if status == lib.EDGEML_NOT_LEASED:
        return UsageError(f"page {fault.page}: {sentence}; its mask and its pages do not agree")
    if status == lib.EDGEML_NEVER_FITS:
        return BudgetError(f"{sentence}; give more memory or a smaller set")
    if status == lib.EDGEML_BAD_ARGUMENT and fault is not None:
        return UsageError(f"{sentence}: {fault.value}")
    if status == lib.EDGEML_BAD_INDEX:
        return BundleError(sentence)
    if status == lib.EDGEML_NO_MEMORY:
        return DeviceError(f"{sentence}; give a smaller budget, or close other programs")
    return UsageError(sentence)
