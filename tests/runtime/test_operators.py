"""The operators inside onnxruntime: every slot of its table that they use, what they refuse, and whose request they count for."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from native_case import EXPERTS, HIDDEN, SITES, TOP_K, Case, make_case, random_call

from edgeml import native
from edgeml.errors import PageError


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("operators"))


@pytest.fixture
def context(case: Case) -> Iterator[native.Context]:
    with case.open(threads=2) as opened:
        yield opened


def model(operator: str, **attributes: int) -> bytes:
    """A graph of one node with dynamic shapes."""
    kinds = {"PagedExperts": ["x:f", "ids:i", "weights:f"], "Linear": ["x:f"], "EmbedRows": ["ids:i"]}[operator]
    names = [kind.split(":")[0] for kind in kinds]
    return one_node(operator, names, ["int64" if kind.endswith("i") else "float32" for kind in kinds], attributes)


def one_node(operator: str, names: list[str], kinds: list[str], attributes: dict[str, int]) -> bytes:
    onnx = pytest.importorskip("onnx")
    types = {"int64": onnx.TensorProto.INT64, "float32": onnx.TensorProto.FLOAT}
    node = onnx.helper.make_node(operator, names, ["y"], domain="edgeml", **attributes)
    inputs = [onnx.helper.make_tensor_value_info(name, types[kind], None) for name, kind in zip(names, kinds, strict=True)]
    graph = onnx.helper.make_graph([node], "one", inputs, [onnx.helper.make_tensor_value_info("y", types["float32"], None)])
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("edgeml", 1)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def session(context: native.Context | None, data: bytes, threads: str | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = 3
        options.add_session_config_entry("edgeml.threads", threads)
    if context is not None:
        options.add_session_config_entry("edgeml.context", context.handle)
    options.register_custom_ops_library(native.LIBRARY_PATH)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def test_paged_experts_are_the_direct_call(case: Case, context: native.Context) -> None:
    x, ids, weights = random_call(12, 1)
    run = session(context, model("PagedExperts", site=1))
    for shape in ((12,), (3, 4), (2, 3, 2)):
        feeds = {"x": x.reshape(*shape, HIDDEN), "ids": ids.reshape(*shape, TOP_K), "weights": weights.reshape(*shape, TOP_K)}
        (y,) = run.run(None, feeds)
        assert y.shape == (*shape, HIDDEN)
        assert y.tobytes() == context.experts(1, x, ids, weights).tobytes()


def test_linear_and_rows_are_the_direct_call(case: Case, context: native.Context) -> None:
    x = random_call(6, 1)[0]
    (y,) = session(context, model("Linear", page=case.linear)).run(None, {"x": x.reshape(2, 3, HIDDEN)})
    assert y.shape == (2, 3, 70)
    assert y.tobytes() == context.linear(case.linear, x).tobytes()
    ids = np.array([[0, 7], [299, 7]])
    (y,) = session(context, model("EmbedRows", page=case.rows)).run(None, {"ids": ids})
    assert y.shape == (2, 2, HIDDEN)
    assert y.tobytes() == context.embed_rows(case.rows, ids.ravel()).tobytes()


def test_nothing_in_gives_nothing_out(case: Case, context: native.Context) -> None:
    x, ids, weights = random_call(0, 1)
    (y,) = session(context, model("PagedExperts", site=0)).run(None, {"x": x, "ids": ids, "weights": weights})
    assert y.shape == (0, HIDDEN)
    (y,) = session(context, model("EmbedRows", page=case.rows)).run(None, {"ids": np.zeros((0, 3), np.int64)})
    assert y.shape == (0, 3, HIDDEN)


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [("PagedExperts", {"site": 99}), ("PagedExperts", {"site": -1}), ("Linear", {"page": 0}), ("EmbedRows", {"page": 10**9})],
)
def test_a_graph_that_names_what_the_bundle_lacks(context: native.Context, operator: str, attributes: dict[str, int]) -> None:
    with pytest.raises(Exception, match="which the bundle does not have"):
        session(context, model(operator, **attributes))


def test_shapes_that_do_not_fit(case: Case, context: native.Context) -> None:
    x, ids, weights = random_call(4, 1)
    run = session(context, model("PagedExperts", site=0))
    for feeds in (
        {"x": x[:, :-1], "ids": ids, "weights": weights},
        {"x": x[:-1], "ids": ids, "weights": weights},
        {"x": x, "ids": ids, "weights": weights[:, :-1]},
    ):
        with pytest.raises(Exception, match="do not fit"):
            run.run(None, feeds)
    with pytest.raises(Exception, match="does not fit"):
        session(context, model("Linear", page=case.linear)).run(None, {"x": x[:, 1:]})


def test_an_id_out_of_range_is_named_and_the_next_call_is_fine(case: Case, context: native.Context) -> None:
    x, ids, weights = random_call(4, 1)
    run = session(context, model("PagedExperts", site=0))
    bad = ids.copy()
    bad[2, 1] = 77
    with pytest.raises(Exception, match="77 is outside its range"):
        run.run(None, {"x": x, "ids": bad, "weights": weights})
    run.run(None, {"x": x, "ids": ids, "weights": weights})
    with pytest.raises(Exception, match="-1 is outside its range"):
        session(context, model("EmbedRows", page=case.rows)).run(None, {"ids": np.array([3, -1])})


def test_operators_count_for_the_request_of_their_thread(case: Case, context: native.Context) -> None:
    run = session(context, model("PagedExperts", site=2))

    def call(seed: int) -> tuple[int, int]:
        x, ids, weights = random_call(3, seed)
        with context.request() as request:
            run.run(None, {"x": x, "ids": ids, "weights": weights})
        return request.hits + request.misses, len(set(ids.ravel()) - {-1})

    with ThreadPoolExecutor(4) as pool:
        assert all(counted == needed for counted, needed in pool.map(call, range(40)))


def test_a_damaged_page_is_the_request_s_error(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "damaged.edgeml"
    data = bytearray(case.path.read_bytes())
    data[4096 + 100] ^= 1
    path.write_bytes(data)
    x, ids, weights = random_call(3, 1)
    ids[0, 0] = 0
    with Case(path, case.sites, case.linear, case.rows, case.sources, case.table).open() as context:
        run = session(context, model("PagedExperts", site=0))
        with context.request() as request, pytest.raises(Exception, match="page 0 at offset 4096: the checksum is wrong"):
            run.run(None, {"x": x, "ids": ids, "weights": weights})
        assert isinstance(request.error, PageError)
        with context.request() as request:
            run.run(None, {"x": x, "ids": np.where(ids == 0, 1, ids), "weights": weights})
        assert request.error is None
        del run


@pytest.mark.parametrize("slots", [1, SITES * EXPERTS])
def test_operators_on_the_sessions_threads_are_the_direct_call(case: Case, slots: int) -> None:
    x, ids, weights = random_call(40, 1)
    with case.open(slots=slots, threads=3) as context:
        experts, linear = context.experts(1, x, ids, weights), context.linear(case.linear, x)
        for _ in range(5):
            shared = session(context, model("PagedExperts", site=1), "session")
            assert shared.run(None, {"x": x, "ids": ids, "weights": weights})[0].tobytes() == experts.tobytes()
            own = session(context, model("PagedExperts", site=1))
            assert own.run(None, {"x": x, "ids": ids, "weights": weights})[0].tobytes() == experts.tobytes()
            dense = session(context, model("Linear", page=case.linear), "session")
            assert dense.run(None, {"x": x})[0].tobytes() == linear.tobytes()
        with pytest.raises(Exception, match=r"edgeml\.threads is session, or not there"):
            session(context, model("Linear", page=case.linear), "mine")
        del shared, own, dense


def test_two_bundles_open_at_once(case: Case, context: native.Context) -> None:
    x, ids, weights = random_call(3, 1)
    with case.open(slots=1) as other:
        runs = [session(one, model("PagedExperts", site=0)) for one in (context, other)]
        first, second = (run.run(None, {"x": x, "ids": ids, "weights": weights})[0].tobytes() for run in runs)
        assert first == second
        assert other.stats()["hits"] + other.stats()["misses"] == len(set(ids.ravel()) - {-1})
        del runs


def test_a_session_without_a_context_or_with_a_closed_one(case: Case) -> None:
    data = model("PagedExperts", site=0)
    with pytest.raises(Exception, match=r"edgeml\.context before registering"):
        session(None, data)
    with case.open() as closed:
        handle = closed.handle
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("edgeml.context", handle)
    with pytest.raises(Exception, match="is closed"):
        options.register_custom_ops_library(native.LIBRARY_PATH)


def test_options_that_outlive_their_context(case: Case) -> None:
    """The session is created when the context is closed and another has taken its place."""
    with case.open() as closed:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("edgeml.context", closed.handle)
        options.register_custom_ops_library(native.LIBRARY_PATH)
    data = model("Linear", page=case.linear)
    with pytest.raises(Exception, match=r"context named by edgeml\.context is closed"):
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    with case.open() as other:
        run = session(other, data)
        with pytest.raises(Exception, match=r"context named by edgeml\.context is closed"):
            onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        del run


def test_a_request_tells_of_the_call_that_failed_last(case: Case, context: native.Context) -> None:
    x, ids, weights = random_call(4, 1)
    run = session(context, model("PagedExperts", site=0))
    with context.request() as request:
        for bad in (77, 78):
            ids[2, 1] = bad
            with pytest.raises(Exception, match=f"{bad} is outside its range"):
                run.run(None, {"x": x, "ids": ids, "weights": weights})
            assert str(bad) in str(request.error)


def test_two_sessions_on_one_context_from_several_threads(case: Case, context: native.Context) -> None:
    x, ids, weights = random_call(9, 1)
    feeds = {"x": x, "ids": ids, "weights": weights}
    with case.open(slots=2, threads=2, requests=1) as narrow:
        runs = [session(narrow, model("PagedExperts", site=site)) for site in (0, 1)]
        expected = [context.experts(site, x, ids, weights).tobytes() for site in (0, 1)]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda number: runs[number % 2].run(None, feeds)[0].tobytes(), range(40)))
        assert answers == expected * 20
        runs.clear()


def test_a_context_with_operators_in_a_session_does_not_close(case: Case) -> None:
    with case.open() as context:
        run = session(context, model("Linear", page=case.linear))
        with pytest.raises(Exception, match="still use it"):
            context.close()
        del run
