"""Bucketed attention: kernels and operator against the dense masked oracle, on random and adversarial masks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_case import make_case

from edgeml import native, scar
from edgeml.errors import UsageError

BACKENDS = native.backends()
TOLERANCE = 1e-5


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `native.scar_attention`; cluster and domain from independent to nested, sizes around those of tiles."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    tokens = draw(st.sampled_from([1, 2, 7, 63, 64, 65, 130, 200]))
    size = draw(st.sampled_from([1, 5, 16, 32, 40, 64, 65]))
    clusters, domains = draw(st.sampled_from([1, 2, 5, 16, 700])), draw(st.sampled_from([1, 2, 4, 8, 300]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = (batch, tokens)
    cluster = rng.integers(0, clusters, rows).astype(np.int32)
    nested = draw(st.booleans())
    confidence = rng.random(rows).astype(np.float32)
    confidence[rng.random(rows) < draw(st.sampled_from([0, 0.2]))] = np.nan
    published = draw(st.booleans()) and draw(st.booleans())
    return {
        **{name: (rng.normal(size=(batch, heads, tokens, size)) * draw(st.sampled_from([1, 3]))).astype(np.float32) for name in "qkv"},
        "cluster": cluster,
        "domain": cluster % domains if nested else rng.integers(0, domains, rows).astype(np.int32),
        "confidence": confidence,
        "clusters": clusters,
        "domains": domains,
        "threshold": draw(st.sampled_from([-1.0, 0.3, 0.7, 2.0])),
        "pad": rng.random(rows) < draw(st.sampled_from([0, 0.2, 0.9, 1])) if draw(st.booleans()) else None,
        "global_tokens": 0 if published else draw(st.sampled_from([0, 0, 1, 5, 70, 1000])),
        "causal": not published and draw(st.booleans()),
        "published": published,
    }


def mask_of(call: dict[str, Any], sequence: int) -> np.ndarray:
    if call.get("published"):
        return scar.published(call["cluster"][sequence], call["confidence"][sequence], call["threshold"])
    pad = call.get("pad")
    return scar.allowed(
        *(call[name][sequence] for name in ("cluster", "domain", "confidence")),
        call["threshold"],
        pad=None if pad is None else pad[sequence],
        global_tokens=call.get("global_tokens", 0),
        causal=call.get("causal", False),
    )


def check(call: dict[str, Any], y: np.ndarray, density: np.ndarray) -> None:
    for sequence in range(len(y)):
        mask = mask_of(call, sequence)
        expected = scar.attention(*(call[name][sequence] for name in "qkv"), mask)
        assert np.abs(y[sequence] - expected).max(initial=0) <= TOLERANCE * max(1, np.abs(call["v"]).max(initial=0))
        assert density[sequence] == pytest.approx(scar.density(mask), rel=1e-6)


def made(
    tokens: int, seed: int = 0, *, heads: int = 2, size: int = 16, clusters: int = 6, domains: int = 4, batch: int = 1
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        **{name: rng.normal(size=(batch, heads, tokens, size)).astype(np.float32) for name in "qkv"},
        "cluster": rng.integers(0, clusters, (batch, tokens)).astype(np.int32),
        "domain": rng.integers(0, domains, (batch, tokens)).astype(np.int32),
        "confidence": rng.random((batch, tokens)).astype(np.float32),
        "clusters": clusters,
        "domains": domains,
        "threshold": 0.5,
    }


@settings(max_examples=80, deadline=None)
@given(calls())
def test_every_kernel_set_is_dense_masked_attention_with_the_same_bits(call: dict[str, Any]) -> None:
    first, *others = (native.scar_attention(**call, isa=isa) for isa in BACKENDS)
    check(call, *first)
    for other in others:
        assert [array.tobytes() for array in other] == [array.tobytes() for array in first]


@pytest.mark.parametrize("isa", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", ["one bucket", "a bucket and singles", "diagonal", "chequered", "long"])
def test_adversarial_masks(isa: str, causal: bool, shape: str) -> None:
    tokens = 1300 if shape == "long" else 300
    call = made(tokens, heads=1, clusters=tokens, domains=tokens)
    numbers = np.arange(tokens, dtype=np.int32)
    cluster, domain = {
        "one bucket": (numbers * 0, numbers * 0),
        "a bucket and singles": (np.where(numbers % 3, 0, numbers), numbers[::-1] // 150),
        "diagonal": (numbers, numbers),
        "chequered": (numbers % 2, numbers // 2 % 2),
        "long": (numbers % 2, numbers % 7),
    }[shape]
    call |= {"cluster": cluster[None].astype(np.int32), "domain": domain[None].astype(np.int32), "causal": causal, "isa": isa}
    check(call, *native.scar_attention(**call))


def test_edges() -> None:
    alone = made(1)
    assert np.array_equal(native.scar_attention(**alone)[0], alone["v"])
    distinct = made(40, clusters=40) | {"cluster": np.arange(40, dtype=np.int32)[None], "threshold": 2.0}
    y, density = native.scar_attention(**distinct)
    assert np.array_equal(y, distinct["v"])
    assert density[0] == np.float32(1 / 40)
    y, density = native.scar_attention(**made(9), pad=np.ones((1, 9), bool))
    assert not y.any()
    assert not density.any()
    y, density = native.scar_attention(**made(0))
    assert y.shape == (1, 2, 0, 16)
    assert not density.any()
    y, density = native.scar_attention(**made(3, batch=0))
    assert y.shape == (0, 2, 3, 16)
    more_clusters = made(5, clusters=1 << 20)
    check(more_clusters, *native.scar_attention(**more_clusters))


def test_one_bucket_is_dense_attention() -> None:
    call = made(100) | {"cluster": np.zeros((1, 100), np.int32)}
    y, density = native.scar_attention(**call)
    assert density[0] == 1
    assert np.abs(y - scar.attention(call["q"], call["k"], call["v"], np.ones((100, 100), bool))).max() <= TOLERANCE


def test_the_published_mask_is_the_paper_s() -> None:
    """Written out pair by pair from the paper's code; it always allows half of all pairs, and padding is attended to."""
    call = made(90) | {"published": True, "pad": np.arange(90)[None] > 60}
    cluster, flag = call["cluster"][0], call["confidence"][0] > call["threshold"]
    mask = scar.published(cluster, call["confidence"][0], call["threshold"])
    for i in range(90):
        for j in range(90):
            assert mask[i, j] == (cluster[i] == cluster[j] or flag[i] == flag[j])
    y, density = native.scar_attention(**call)
    check(call, y, density)
    sure = int(flag.sum())
    assert density[0] >= (sure**2 + (90 - sure) ** 2) / 90**2 >= 0.5
    scores = call["q"].astype(float) @ np.swapaxes(call["k"], -1, -2) / 4 + np.where(
        mask, 0, -1e9
    )  # as published: -1e9, not minus infinity
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    assert np.abs(y - weights / weights.sum(-1, keepdims=True) @ call["v"]).max() <= TOLERANCE


@pytest.mark.parametrize("density", ["sparse", "dense"])
def test_a_sequence_does_not_depend_on_its_batch_or_on_threads(tmp_path: Path, density: str) -> None:
    call = made(200, batch=3, clusters=2 if density == "dense" else 9) | {"global_tokens": 2}
    arrays = ("q", "k", "v", "cluster", "domain", "confidence")
    together, shares = native.scar_attention(**call)
    assert np.all((shares > 0.5) == (density == "dense"))
    for sequence in range(3):
        alone, share = native.scar_attention(**call | {name: call[name][sequence : sequence + 1] for name in arrays})
        assert alone.tobytes() == together[sequence].tobytes()
        assert share == shares[sequence]
    for threads in (1, 2, 5):
        with make_case(tmp_path).open(threads=threads) as context:
            assert native.scar_attention(**call, context=context)[0].tobytes() == together.tobytes()
            with ThreadPoolExecutor(4) as pool:
                for y, _ in pool.map(lambda _: native.scar_attention(**call, context=context), range(12)):
                    assert y.tobytes() == together.tobytes()


@pytest.mark.parametrize("isa", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "causal"), [("q", False), ("k", False), ("v", False), ("k", True), ("v", True)])
@pytest.mark.parametrize("clusters", [1, 5])
def test_what_is_not_finite_reaches_only_the_rows_that_meet_it(isa: str, bad: float, name: str, causal: bool, clusters: int) -> None:
    call = made(150, clusters=clusters) | {"threshold": 2.0, "causal": causal}
    clean = native.scar_attention(**call, isa=isa)[0]
    call[name] = call[name].copy()
    call[name][0, 0, 70, 3] = bad
    y = native.scar_attention(**call, isa=isa)[0]
    met = np.zeros(150, bool)
    met[70] = True
    if name != "q":
        met = mask_of(call, 0)[:, 70]
    same = [y[0, head, row].tobytes() == clean[0, head, row].tobytes() for head in range(2) for row in range(150)]
    assert all(same[150:])
    assert all(equal for equal, hit in zip(same, met, strict=False) if not hit)
    if name == "v" or np.isnan(bad):
        assert not np.isfinite(y[0, 0, met][:, 3]).any()
    if np.isnan(bad) and name != "v":
        assert {value.tobytes() for value in y[0, 0, met].ravel()} == {np.uint32(0x7FC00000).tobytes()}


def test_padding_is_neither_read_nor_checked() -> None:
    call = made(80) | {"pad": np.arange(80)[None] >= 50}
    clean = native.scar_attention(**call)[0]
    for name in "qkv":
        call[name] = call[name].copy()
        call[name][:, :, 50:] = np.nan
    for name in ("cluster", "domain"):
        call[name] = call[name].copy()
        call[name][:, 50:] = -9
    assert native.scar_attention(**call)[0].tobytes() == clean.tobytes()
    assert not clean[:, :, 50:].any()


@pytest.mark.parametrize(("name", "value"), [("cluster", 6), ("cluster", -1), ("domain", 4), ("domain", -(2**31)), ("domain", 2**31 - 1)])
def test_an_id_out_of_range_is_named(name: str, value: int) -> None:
    call = made(30)
    call[name][0, 7] = value
    with pytest.raises(UsageError, match=f"outside its range: {value}"):
        native.scar_attention(**call)


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": np.nan}, {"clusters": 0}, {"domains": 2**21}, {"clusters": -1}, {"published": True, "causal": True},
        {"published": True, "global_tokens": 1}, {"k": np.zeros((1, 2, 9, 16), np.float32)}, {"pad": np.zeros((1, 9), bool)},
        {"cluster": np.zeros((2, 10), np.int32)}, {"q": np.zeros((1, 2, 10), np.float32)}, {"isa": "none"},
        {name: np.zeros((1, 2, 10, 0), np.float32) for name in "qkv"},
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        native.scar_attention(**made(10) | change)
