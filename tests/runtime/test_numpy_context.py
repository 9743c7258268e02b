"""Without the C extension: NumPy gives the answers of the C side, under the same budget, with the same counters and refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_case import EXPERTS, HIDDEN, SITES, Case, make_case, random_call

import edgeml
from edgeml import checksum, native
from edgeml.bundle import Bundle
from edgeml.errors import BudgetError, BundleError, PageError, UsageError
from edgeml.graph_bytes import Node, graph
from edgeml.graph_split import SplitGraph
from edgeml.numpy_context import NumpyContext, numpy_plan

TEXTS = ["Will it rain tomorrow?", "a warm and sunny day by the sea", "fog"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("numpy"))


@contextmanager
def opened(case: Case, slots: int = SITES * EXPERTS) -> Iterator[NumpyContext]:
    with Bundle.open(case.path) as bundle:
        context = NumpyContext(bundle, case.sites, slots=slots)
        yield context
        context.close()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 2**32 - 1), st.integers(0, 70_000))
def test_checksums_are_those_of_the_c_side(data: bytes, crc: int, zeros: int) -> None:
    data += bytes(zeros)
    assert checksum.crc32c(data, crc) == native.crc32c(data, crc)
    assert checksum.crc32c(memoryview(data)[1:]) == native.crc32c(data[1:])


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("site", range(SITES))
def test_experts_are_the_oracle_and_close_to_the_c_side(case: Case, site: int, tokens: int) -> None:
    x, ids, weights = random_call(tokens, site)
    with opened(case, slots=1) as context, case.open() as c:
        found = context.experts(site, x, ids, weights)
        assert found.tobytes() == case.oracle(site, x, ids, weights).tobytes()
        np.testing.assert_allclose(found, c.experts(site, x, ids, weights), rtol=1e-4, atol=1e-5)


def test_layers_and_rows_have_the_bits_of_the_c_side(case: Case) -> None:
    x, ids = random_call(9, 3)[0], np.array([0, 299, 5, 5, 17])
    with opened(case) as context, case.open() as c:
        assert context.linear(case.linear, x).tobytes() == c.linear(case.linear, x).tobytes()
        assert context.embed_rows(case.rows, ids).tobytes() == c.embed_rows(case.rows, ids).tobytes()


def test_what_it_would_hold_is_what_the_c_side_would_hold(case: Case) -> None:
    with Bundle.open(case.path) as bundle:
        c = native.plan(bundle.index_bytes, case.sites)
        ours = numpy_plan(bundle.pages, case.sites)
    assert {name: value for name, value in ours.items() if name != "scratch_bytes"} == {
        name: value for name, value in c.items() if name != "scratch_bytes"
    }


def test_pages_stay_within_the_slots_and_are_counted(case: Case) -> None:
    x = np.ones((1, HIDDEN), np.float32)
    weights = np.ones((1, 1), np.float32)
    with opened(case, slots=2) as context, context.request() as request:
        for expert in (0, 1, 0, 2, 0):  # 2 takes the place of 1, which was not used for longest
            context.experts(0, x, np.array([[expert]]), weights)
        stats = context.stats()
        assert (request.hits, request.misses, stats["evictions"]) == (2, 3, 1)
        assert request.page_in_bytes == sum(len(case.sources[page].data) for page in (0, 1, 2))
        assert stats["resident"] == [0, 2]
        assert stats["isa"] == "numpy"
        assert context.site_stats()[0]["misses"] == 3


def test_priority_goes_before_use(case: Case) -> None:
    x, weights = np.ones((1, HIDDEN), np.float32), np.ones((1, 1), np.float32)
    with opened(case, slots=2) as context:
        context.set_priority([0], 5)
        for expert in (0, 1, 2):
            context.experts(0, x, np.array([[expert]]), weights)
        assert context.stats()["resident"] == [0, 2]
        context.evict_all()
        assert context.stats()["resident"] == []


def test_a_lease_pins_and_allows_nothing_else(case: Case) -> None:
    x, weights = np.ones((1, HIDDEN), np.float32), np.ones((1, 1), np.float32)
    with opened(case, slots=2) as context:
        with context.request() as request:
            with pytest.raises(BudgetError, match="larger than the slots"):
                request.lease([0, 1, 2])
            request.lease([0, 1])
            with pytest.raises(UsageError, match="leased a set already"):
                request.lease([0])
            context.experts(0, x, np.array([[1]]), weights)
            with pytest.raises(UsageError, match="leased set"):
                context.experts(0, x, np.array([[2]]), weights)
            assert isinstance(request.error, UsageError)
            with pytest.raises(UsageError, match="request already"), context.request():
                pass
            with pytest.raises(UsageError, match="still use it"):
                context.close()
        context.experts(0, x, np.array([[2]]), weights)
        with pytest.raises(UsageError, match="is not running"):
            request.lease([0])


def test_bad_ids_and_pages_are_refused(case: Case) -> None:
    x, weights = np.ones((1, HIDDEN), np.float32), np.ones((1, 1), np.float32)
    with opened(case) as context:
        for wrong in (-2, EXPERTS):
            with pytest.raises(UsageError, match=f"outside its range: {wrong}"):
                context.experts(0, x, np.array([[wrong]]), weights)
        with pytest.raises(UsageError, match="outside its range: 300"):
            context.embed_rows(case.rows, np.array([300]))
        with pytest.raises(UsageError, match="no site"):
            context.experts(SITES, x, np.array([[0]]), weights)
        with pytest.raises(UsageError, match="no matrix"):
            context.linear(0, x)
        with pytest.raises(UsageError, match="no operator"):
            context.operator("Unknown", {}, [x])


def test_damage_is_found_when_it_is_read(case: Case, tmp_path: Path) -> None:
    content = bytearray(case.path.read_bytes())
    with Bundle.open(case.path) as bundle:
        content[bundle.pages[1].offset + 9] ^= 4
        content[bundle.pages[case.rows].offset + 5 * bundle.pages[case.rows].stride + 7] ^= 4
    (tmp_path / "m").write_bytes(content)
    x, weights = np.ones((1, HIDDEN), np.float32), np.ones((1, 1), np.float32)
    with Bundle.open(tmp_path / "m") as bundle:
        context = NumpyContext(bundle, case.sites, slots=3)
        with context.request() as request:
            with pytest.raises(PageError, match=r"^page 1 .*checksum"):
                context.experts(0, x, np.array([[1]]), weights)
            assert isinstance(request.error, PageError)
            with pytest.raises(PageError, match="checksum of a row"):
                context.embed_rows(case.rows, np.array([5]))
            context.embed_rows(case.rows, np.array([4, 6]))


@pytest.mark.parametrize("options", [{}, {"global_tokens": 3}, {"causal": 1}, {"published": 1}, {"scale": 0.3}])
@pytest.mark.parametrize("token_major", [False, True])
def test_attention_is_close_to_the_c_side(case: Case, options: dict[str, float], token_major: bool) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 3, 40, 8)).astype(np.float32) for _ in range(3))
    cluster, domain = (rng.integers(0, 4, (2, 40)).astype(np.int32) for _ in range(2))
    confidence, pad = rng.random((2, 40)).astype(np.float32), rng.random((2, 40)) < 0.2
    scaled = q * np.float32(options.get("scale", 8**-0.5) * 8**0.5)
    rules: dict[str, Any] = {name: value for name, value in options.items() if name != "scale"}
    expected, density = native.scar_attention(
        scaled, k, v, cluster, domain, confidence, clusters=4, domains=4, threshold=0.5, pad=pad, **rules
    )
    attributes = {"threshold": 0.5, "clusters": 4, "domains": 4, "heads": 3 if token_major else 0, **options}
    if token_major:
        q, k, v, expected = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(2, 40, 24) for x in (q, k, v, expected))
    with opened(case) as context:
        found, share = context.operator("ScarAttention", attributes, [q, k, v, cluster, domain, confidence, pad])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(share, density, rtol=1e-5)


# --- graphs ------------------------------------------------------------------------------------------------------------


def plain(data: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def test_a_graph_is_cut_at_its_operators_and_nowhere_else(case: Case) -> None:
    """Two layers side by side and one behind them: three segments, whatever the order of the nodes allows."""
    nodes = [
        Node("Mul", ["x", "two"], ["doubled"]),
        Node("Linear", ["doubled"], ["a"], {"page": 1}, "edgeml"),
        Node("Linear", ["x"], ["b"], {"page": 2}, "edgeml"),
        Node("Add", ["a", "b"], ["sum"]),
        Node("Linear", ["sum"], ["c"], {"page": 3}, "edgeml"),
        Node("Add", ["c", "doubled"], ["y"]),
    ]
    shape = ("float32", ("N", 4))
    data = graph(nodes, {"x": shape}, {"y": shape}, {"two": np.array(2, np.float32)}, {"": 17, "edgeml": 1})
    asked, made = [], []

    def operator(name: str, attributes: Any, inputs: Any) -> list[np.ndarray]:
        asked.append((name, attributes["page"]))
        return [inputs[0] * np.float32(attributes["page"])]

    def make(model: bytes) -> Any:
        made.append(model)
        return plain(model)

    split = SplitGraph(data, make, operator)
    assert [value.name for value in split.get_inputs()] == ["x"]
    assert [value.name for value in split.get_outputs()] == ["y"]
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    for _ in range(2):
        (y,) = split.run(["y"], {"x": x}, None)
        np.testing.assert_array_equal(y, 3 * (1 * 2 * x + 2 * x) + 2 * x)
    assert asked[:3] == [("Linear", 1), ("Linear", 2), ("Linear", 3)]
    assert len(made) == 3  # and not once more in the second run


def test_what_is_no_graph_or_cannot_be_cut_is_refused() -> None:
    shape = ("float32", ("N", 4))
    for data in (b"not a graph", b"\x3a\xff\x01"):
        with pytest.raises(BundleError, match="no ONNX graph"):
            SplitGraph(data, plain, lambda *_: [])
    of_constant = graph(
        [Node("Linear", ["w"], ["y"], {"page": 1}, "edgeml")], {}, {"y": shape}, {"w": np.ones((2, 4), np.float32)}, {"": 17}
    )
    with pytest.raises(BundleError, match="constant"):
        SplitGraph(of_constant, plain, lambda *_: [])
    early = graph([Node("Neg", ["t"], ["y"]), Node("Neg", ["x"], ["t"])], {"x": shape}, {"y": shape}, {}, {"": 17})
    with pytest.raises(BundleError, match="before it is made"):
        SplitGraph(early, plain, lambda *_: [])


# --- sessions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("residency", "memory"), [("exact", "0%"), ("exact", "100%"), ("masked", "50%")])
def test_a_session_answers_as_with_the_extension(toy: Path, residency: str, memory: str) -> None:
    for task in ("weather", "mood", "vector"):
        with edgeml.open(toy, memory=memory, residency=residency, threads=1) as session:
            expected = session.run(task, texts=TEXTS)
        with edgeml.open(toy, memory=memory, residency=residency, isa="numpy") as session:
            assert session.backend == "numpy"
            assert session.settings()["backend"] == "numpy"
            found = session.run(task, texts=TEXTS)
            values = (found.scores, expected.scores) if task != "vector" else (found.vectors, expected.vectors)
        np.testing.assert_allclose(*values, atol=1e-3)
        assert found.counters.hits + found.counters.misses == expected.counters.hits + expected.counters.misses
        assert found.counters.misses > 0


@pytest.fixture(scope="module")
def without_extension(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command, run from a copy of the package as the pure wheel has it."""
    place = tmp_path_factory.mktemp("pure")
    shutil.copytree(Path(edgeml.__file__).parent, place / "edgeml", ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "edgeml.cli", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return run


def test_an_installation_without_the_extension_answers_and_says_so(toy: Path, without_extension: Any) -> None:
    done = without_extension("run", toy, "--task", "weather", "--text", TEXTS[0], "--json")
    assert done.returncode == 0, done.stderr
    with edgeml.open(toy) as session:
        assert session.run("weather", text=TEXTS[0]).labels[0] in done.stdout
    assert json.loads(done.stdout)
    assert without_extension("verify", toy).returncode == 0
    done = without_extension("bench", toy, "--task", "weather", "--iterations", "2", "--memory", "50%", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert '"backend": "numpy"' in done.stdout


def test_a_damaged_page_is_the_same_sentence_without_the_extension(toy: Path, flipped: Any, without_extension: Any) -> None:
    with Bundle.open(toy) as bundle:
        page = next(page.id for page in bundle.pages if page.kind == 2 and page.count)
    done = without_extension("verify", flipped(page))
    assert done.returncode == 3
    assert "checksum" in done.stderr
    assert "Traceback" not in done.stderr
