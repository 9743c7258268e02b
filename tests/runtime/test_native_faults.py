"""Misuse and odd bundles at the native seam: each is one clear error or a right answer, never a crash, a leak or a hang."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_case import EXPERTS, HIDDEN, MANIFEST, SITES, TOP_K, Case, make_case, random_call

from edgeml import native
from edgeml.bundle import write_bundle
from edgeml.errors import PageError, UsageError


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("faults"))


def ones(ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.ones((1, HIDDEN), np.float32), np.array([ids]), np.ones((1, len(ids)), np.float32)


# ---- requests ----


def test_a_second_lease_is_refused_and_the_first_stays_sound(case: Case) -> None:
    with case.open(slots=4) as context:
        with context.request() as request:
            request.lease([0, 1, 2])
            for _ in range(50):
                with pytest.raises(UsageError, match="has leased"):
                    request.lease([3, 4])
                gc.collect()
            context.experts(0, *ones([0, 1, 2]))
        with context.request() as request:  # every pin was given up
            request.lease([3, 4, 5, 6])


def test_a_lease_needs_a_running_request(case: Case) -> None:
    with case.open() as context:
        request = context.request()
        with pytest.raises(UsageError, match="not running"):
            request.lease([0])
        with request:
            pass
        with pytest.raises(UsageError, match="not running"):
            request.lease([0])


def test_requests_of_one_thread_do_not_nest(case: Case) -> None:
    with case.open() as context, context.request() as outer:
        for inner in (context.request(), outer):
            with pytest.raises(UsageError, match="this thread has a request"):
                inner.__enter__()
        context.experts(0, *ones([0]))
        assert outer.misses == 1


def test_a_request_that_ends_on_another_thread(case: Case) -> None:
    with case.open() as context:
        request = context.request()
        request.__enter__()
        other = threading.Thread(target=request.__exit__, args=(None, None, None))
        other.start()
        other.join()
        context.experts(0, *ones([0]))
        with context.request() as next_request:
            context.experts(0, *ones([0]))
        assert (request.misses, next_request.hits) == (0, 1)


def test_each_call_raises_its_own_fault_and_a_lease_is_not_refused_for_an_earlier_one(case: Case, tmp_path: Path) -> None:
    data = bytearray(case.path.read_bytes())
    data[4096 + 100] ^= 1
    path = tmp_path / "damaged.edgeml"
    path.write_bytes(data)
    with replace(case, path=path).open(slots=3) as context, context.request() as request:
        with pytest.raises(PageError, match="page 0 "):
            context.experts(0, *ones([0]))
        with pytest.raises(UsageError, match="99"):
            context.experts(0, *ones([99]))
        with pytest.raises(PageError, match="page 0 "):
            request.lease([0, 1])
        request.lease([1, 2])
        context.experts(0, *ones([1, 2]))
        assert context.stats()["resident"] == [1, 2]


# ---- closing ----


class _ClosesDuring:
    """The C library, with an attempt to close the context while a call is running."""

    def __init__(self, library: Any, name: str, context: native.Context) -> None:
        self._library, self._name, self._context = library, name, context
        self.refused: list[str] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        if name != self._name:
            return function

        def call(*arguments: Any) -> Any:
            closer = threading.Thread(target=self._close)
            closer.start()
            closer.join()
            return function(*arguments)

        return call

    def _close(self) -> None:
        try:
            self._context.close()
        except UsageError as error:
            self.refused.append(str(error))


@pytest.mark.parametrize("name", ["linear", "embed_rows", "experts", "settle", "get_stats", "advise", "request_begin"])
def test_closing_during_a_call_is_refused(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with case.open() as context:
        library = _ClosesDuring(native.lib, "edgeml_" + name, context)
        monkeypatch.setattr(native, "lib", library)
        context.linear(case.linear, np.ones((1, HIDDEN), np.float32))
        context.embed_rows(case.rows, np.array([1]))
        context.experts(0, *ones([0]))
        context.settle()
        context.stats()
        context.prefetch([1])
        with context.request():
            pass
        assert library.refused
        assert all("still use it" in text for text in library.refused)


FORKED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from native_case import make_case
from edgeml.errors import UsageError
import numpy as np
with make_case(Path(sys.argv[1])).open(threads=2) as context:
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            context.experts(0, np.ones((1, 48), np.float32), np.array([[0]]), np.ones((1, 1), np.float32))
        except UsageError as error:
            assert "forked" in str(error)
            context.close()
            sys.exit(7)
        sys.exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    context.experts(0, np.ones((1, 48), np.float32), np.array([[0]]), np.ones((1, 1), np.float32))
"""


def test_a_forked_child_is_told_and_ends(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parents[1] / "support"), str(Path(native.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", FORKED, str(tmp_path), *paths], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


# ---- odd bundles ----


def test_experts_that_share_pages_and_a_page_both_routed_and_shared(case: Case, tmp_path: Path) -> None:
    """Four pages of two experts each; the first page holds a shared expert and a routed one."""
    singles = case.sources[:EXPERTS]
    pages = [replace(one, data=bytes(one.data) + bytes(two.data), count=2) for one, two in zip(singles[::2], singles[1::2], strict=True)]
    path = tmp_path / "paired.edgeml"
    write_bundle(path, pages, MANIFEST)
    paired = [(number // 2, number % 2) for number in range(EXPERTS)]
    alone = replace(case, sites=[native.Site([(e, 0) for e in range(1, EXPERTS)], [(0, 0)], HIDDEN, TOP_K)])
    both = replace(case, path=path, sites=[native.Site(paired[1:], paired[:1], HIDDEN, TOP_K)])
    call = random_call(200, 3, experts=EXPERTS - 1)
    with alone.open() as one, both.open(slots=1, threads=2) as two:
        assert one.experts(0, *call).tobytes() == two.experts(0, *call).tobytes()
        with two.request() as request:
            request.lease([0, 3])  # page 0 is always there and takes no slot
            leased = two.experts(0, *ones([0, 5, 6]))
            two.prefetch([0, 3])
        assert leased.tobytes() == one.experts(0, *ones([0, 5, 6])).tobytes()
        stats = two.stats()
        assert (stats["slots"], stats["resident"]) == (1, [3])


@pytest.mark.parametrize("routed", [True, False])
def test_a_site_without_shared_or_without_routed_experts(case: Case, routed: bool) -> None:
    site = case.sites[0]
    half = replace(case, sites=[replace(site, shared=[]) if routed else replace(site, experts=[], top_k=0)])
    x, ids, weights = random_call(140, 2, k=TOP_K if routed else 0)
    with half.open(slots=2 if routed else 0) as context:
        np.testing.assert_allclose(context.experts(0, x, ids, weights), half.oracle(0, x, ids, weights), rtol=1e-4, atol=1e-5)


def test_an_expert_chosen_twice_by_one_token(case: Case) -> None:
    x, ids, weights = random_call(70, 2)
    ids[:] = 4
    for threads in (1, 2):
        with case.open(slots=1, threads=threads) as context:
            np.testing.assert_allclose(context.experts(1, x, ids, weights), case.oracle(1, x, ids, weights), rtol=1e-4, atol=1e-5)
            assert context.stats()["misses"] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_input_that_is_no_number_stays_with_its_token(case: Case, value: float) -> None:
    x, ids, weights = random_call(40, 2)
    ids = np.abs(ids)
    for site in range(SITES):
        with case.open(slots=2, threads=2) as context:
            clean = context.experts(site, x, ids, weights)
            spoiled = x.copy()
            spoiled[7, 3] = value
            out = context.experts(site, spoiled, ids, weights)
        assert not np.isfinite(out[7]).all()
        assert np.delete(out, 7, 0).tobytes() == np.delete(clean, 7, 0).tobytes()


def test_numbers_that_do_not_fit_are_refused_in_a_sentence(case: Case) -> None:
    with case.open() as context:
        for number in (-1, 2**32, 2**70):
            for refused in (
                lambda number=number: context.prefetch([number]),
                lambda number=number: context.linear(number, np.ones((1, HIDDEN), np.float32)),
                lambda number=number: context.set_priority([number], 0),
            ):
                with pytest.raises(UsageError):
                    refused()
            with context.request() as request, pytest.raises(UsageError):
                request.lease([number])
        with pytest.raises(UsageError):
            context.prefetch([0], 2**31)
    for options in ({"threads": -1}, {"slots": 2**32}, {"readers": 0}, {"requests": 257}, {"isa": "abacus"}):
        with pytest.raises(UsageError), case.open(**options):
            pass
