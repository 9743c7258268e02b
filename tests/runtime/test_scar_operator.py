"""`edgeml.ScarAttention` inside onnxruntime: it is the direct call, in both layouts, and says what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
import pytest
from native_case import make_case

from edgeml import native

onnx = pytest.importorskip("onnx")

BATCH, HEADS, TOKENS, SIZE, CLUSTERS, DOMAINS = 2, 3, 70, 24, 5, 4
NEEDED = {"clusters": CLUSTERS, "domains": DOMAINS, "threshold": 0.5}
KINDS = {"q": 1, "k": 1, "v": 1, "cluster": 6, "domain": 6, "confidence": 1, "pad": 9}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[native.Context]:
    with make_case(tmp_path_factory.mktemp("scar")).open(threads=2) as opened:
        yield opened


def session(context: native.Context, inputs: list[str], outputs: list[str], attributes: dict[str, Any]) -> Any:
    node = onnx.helper.make_node("ScarAttention", inputs, outputs, domain="edgeml", **attributes)
    given = [onnx.helper.make_tensor_value_info(name, KINDS[name], None) for name in inputs]
    wanted = [onnx.helper.make_tensor_value_info(name, 1, None) for name in outputs if name]
    graph = onnx.helper.make_graph([node], "one", given, wanted)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("edgeml", 1)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("edgeml.context", context.handle)
    options.register_custom_ops_library(native.LIBRARY_PATH)
    data = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def feeds(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = (BATCH, TOKENS)
    return {
        **{name: rng.normal(size=(BATCH, HEADS, TOKENS, SIZE)).astype(np.float32) for name in "qkv"},
        "cluster": rng.integers(0, CLUSTERS, rows).astype(np.int32),
        "domain": rng.integers(0, DOMAINS, rows).astype(np.int32),
        "confidence": rng.random(rows).astype(np.float32),
        "pad": rng.random(rows) < 0.2,
    }


def token_major(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(BATCH, TOKENS, HEADS * SIZE)


@pytest.mark.parametrize("options", [{}, {"global_tokens": 3}, {"causal": 1}, {"published": 1}, {"global_tokens": 2, "causal": 1}])
def test_it_is_the_direct_call_in_both_layouts(context: native.Context, options: dict[str, int]) -> None:
    fed = feeds()
    y, density = native.scar_attention(**fed, **{**NEEDED, **options})
    got = session(context, list(KINDS), ["y", "density"], NEEDED | options).run(None, fed)
    assert got[0].shape == fed["q"].shape
    assert [array.tobytes() for array in got] == [y.tobytes(), density.tobytes()]
    flat = fed | {name: token_major(fed[name]) for name in "qkv"}
    got = session(context, list(KINDS), ["y", "density"], NEEDED | options | {"heads": HEADS}).run(None, flat)
    assert got[0].shape == flat["q"].shape
    assert [array.tobytes() for array in got] == [token_major(y).tobytes(), density.tobytes()]


def test_padding_and_density_may_be_left_out(context: native.Context) -> None:
    fed = feeds()
    del fed["pad"]
    (alone,) = session(context, list(fed), ["y"], NEEDED).run(None, fed)
    assert alone.tobytes() == native.scar_attention(**fed, **NEEDED)[0].tobytes()


def test_scale(context: native.Context) -> None:
    fed = feeds()
    (y,) = session(context, list(KINDS), ["y"], NEEDED | {"scale": 1.0}).run(None, fed)
    root = np.float32(np.sqrt(SIZE))
    assert np.abs(y - native.scar_attention(**fed | {"q": fed["q"] * root}, **NEEDED)[0]).max() < 1e-5


def test_nothing_in_gives_nothing_out(context: native.Context) -> None:
    fed = {name: value[:, :, :0] if value.ndim == 4 else value[:, :0] for name, value in feeds().items()}
    y, density = session(context, list(KINDS), ["y", "density"], NEEDED).run(None, fed)
    assert y.shape == (BATCH, HEADS, 0, SIZE)
    assert not density.any()


@pytest.mark.parametrize("missing", list(NEEDED))
def test_an_attribute_that_must_be_there(context: native.Context, missing: str) -> None:
    with pytest.raises(Exception, match=missing):
        session(context, list(KINDS), ["y"], {name: value for name, value in NEEDED.items() if name != missing})


@pytest.mark.parametrize(
    "bad",
    [
        {"clusters": 0}, {"domains": -1}, {"clusters": 2**40}, {"threshold": float("nan")}, {"heads": -1}, {"global_tokens": -1},
        {"published": 1, "causal": 1}, {"published": 1, "global_tokens": 2},
    ],
)  # fmt: skip
def test_an_attribute_out_of_range(context: native.Context, bad: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"edgeml\.ScarAttention: an attribute is outside its range"):
        session(context, list(KINDS), ["y"], NEEDED | bad)


def test_shapes_that_do_not_fit(context: native.Context) -> None:
    fed = feeds()
    run = session(context, list(KINDS), ["y"], NEEDED)
    spoiled = [{name: fed[name][:, :, 1:]} for name in "qkv"] + [{name: fed[name][:, 1:]} for name in list(KINDS)[3:]]
    spoiled += [{name: token_major(fed[name]) for name in "qkv"}, {"cluster": fed["cluster"].ravel()}, {"q": fed["q"][0, 0]}]
    for change in spoiled:
        with pytest.raises(Exception, match="do not fit each other"):
            run.run(None, fed | change)
    flat = {name: token_major(fed[name]) for name in "qkv"}
    with pytest.raises(Exception, match="do not fit each other"):
        session(context, list(KINDS), ["y"], NEEDED | {"heads": 7}).run(None, fed | flat)
    run.run(None, fed)


def test_an_id_out_of_range_is_named_and_the_next_call_is_fine(context: native.Context) -> None:
    fed = feeds()
    run = session(context, list(KINDS), ["y"], NEEDED)
    bad = fed["cluster"].copy()
    bad[1, 9], fed["pad"][1, 9] = CLUSTERS, False
    with pytest.raises(Exception, match=r"edgeml\.ScarAttention: 5 is outside its range"):
        run.run(None, fed | {"cluster": bad})
    run.run(None, fed)


def test_several_threads_at_once(context: native.Context) -> None:
    run = session(context, list(KINDS), ["y"], NEEDED)
    many = [feeds(seed) for seed in range(6)]
    expected = [native.scar_attention(**fed, **NEEDED)[0].tobytes() for fed in many]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: run.run(None, many[number % 6])[0].tobytes(), range(30)))
    assert answers == expected * 5
