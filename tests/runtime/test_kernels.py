"""Tiles and oracles: what is packed can be read back, byte places are the format's, and the arithmetic is close to plain floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeml import kernels
from edgeml.errors import UsageError
from edgeml.layout import Activation, Matrix, WeightType, expert_layout, matrix_bytes, row_bytes
from edgeml.native import crc32c

SHAPES = st.tuples(st.integers(1, 50), st.integers(1, 90))
TYPES = list(WeightType)
STEP = {WeightType.INT8: 1 / 127, WeightType.INT4: 1 / 7}


def random(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from(TYPES), st.integers(0, 1000))
def test_packed_weights_are_within_half_a_step(shape: tuple[int, int], kind: WeightType, seed: int) -> None:
    weights = random(shape, seed)
    data = kernels.pack_matrix(weights, kind)
    assert len(data) == matrix_bytes(kind, *shape)
    error = np.abs(kernels.unpack_matrix(data, kind, *shape) - weights)
    if kind == WeightType.F32:
        assert not error.any()
    else:
        assert error.max() <= np.abs(weights).max() * STEP[kind] * 0.51


def test_int8_tile_bytes_are_where_the_format_says() -> None:
    weights = np.zeros((16, 32), np.float32)
    weights[:, 0] = 127  # every row's scale is 1
    weights[3, 4 * 5 + 2] = -9
    data = kernels.pack_matrix(weights, WeightType.INT8)
    assert data[64 * 5 + 4 * 3 + 2] == 128 - 9
    assert np.frombuffer(data[512:], "<f2").tolist() == [1.0] * 16


def test_int4_tile_bytes_are_where_the_format_says() -> None:
    weights = np.zeros((16, 32), np.float32)
    weights[:, 0] = 7
    weights[3, 4 * 1 + 2] = -5  # group 1: low nibble of vector 1
    weights[3, 4 * 5 + 2] = 6  # group 5: high nibble of the same byte
    data = kernels.pack_matrix(weights, WeightType.INT4)
    assert data[64 * 1 + 4 * 3 + 2] == (8 - 5) | (8 + 6) << 4


def test_padding_is_zero_weights() -> None:
    data = kernels.pack_matrix(np.ones((1, 1), np.float32), WeightType.INT8)
    whole = kernels.unpack_matrix(data, WeightType.INT8, 16, 32)
    assert whole[0, 0] == pytest.approx(1, rel=1e-3)
    assert np.count_nonzero(whole) == 1


@pytest.mark.parametrize("kind", TYPES)
def test_matmul_is_close_to_floats(kind: WeightType) -> None:
    weights, x = random((40, 70)), random((5, 70), 1)
    data = kernels.pack_matrix(weights, kind)
    exact = x @ kernels.unpack_matrix(data, kind, 40, 70).T
    assert np.abs(kernels.matmul(data, Matrix(kind, 40, 70), x) - exact).max() < (1e-5 if kind == WeightType.F32 else 0.2)


@pytest.mark.parametrize("kind", TYPES)
def test_a_row_does_not_depend_on_its_batch_mates(kind: WeightType) -> None:
    data, matrix = kernels.pack_matrix(random((20, 40)), kind), Matrix(kind, 20, 40)
    x = random((6, 40), 1)
    x[3] *= 1e6
    together = kernels.matmul(data, matrix, x)
    alone = np.concatenate([kernels.matmul(data, matrix, x[i : i + 1]) for i in range(6)])
    assert together.tobytes() == alone.tobytes()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 80), st.integers(0, 99), st.sampled_from([1e-30, 1.0, 1e30]))
def test_quantized_rows_are_within_half_a_step(count: int, width: int, seed: int, scale: float) -> None:
    x = random((count, width), seed, scale)
    q, a = kernels.quantize_rows(x)
    back = (q.reshape(count, -1, 32) * a[..., None]).reshape(count, -1)[:, :width]
    assert (np.abs(back - x) <= np.repeat(a, 32, axis=1)[:, :width] * 0.5001).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_visible_and_alone(bad: float) -> None:
    x = random((3, 40))
    x[1, 7] = bad
    out = kernels.matmul(kernels.pack_matrix(random((4, 40)), WeightType.INT8), Matrix(WeightType.INT8, 4, 40), x)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()


def test_extremes_do_not_overflow() -> None:
    weights, x = np.ones((16, 4096), np.float32), np.ones((1, 4096), np.float32)
    for kind in (WeightType.INT8, WeightType.INT4):
        data = kernels.pack_matrix(weights, kind)
        assert kernels.matmul(data, Matrix(kind, 16, 4096), x)[0, 0] == pytest.approx(4096, rel=2e-3)


def test_weights_must_be_finite() -> None:
    with pytest.raises(UsageError, match="finite"):
        kernels.pack_matrix(np.array([[np.nan]], np.float32), WeightType.INT4)


def test_activations_against_the_standard_library() -> None:
    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    gelu = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(float)]
    silu = [v / (1 + math.exp(-v)) for v in x.astype(float)]
    assert np.allclose(kernels.activate(Activation.GELU, x), gelu, rtol=1e-6, atol=1e-7)
    assert np.allclose(kernels.activate(Activation.SILU, x), silu, rtol=1e-6, atol=1e-7)
    assert (kernels.activate(Activation.RELU, x) == np.maximum(x, 0)).all()
    assert kernels.activate(Activation.NONE, x) is x


@pytest.mark.parametrize("gated", [False, True])
def test_an_expert_is_its_formula(gated: bool) -> None:
    up, gate, down, bias = random((48, 40)), random((48, 40), 1), random((40, 48), 2), random((40,), 3)
    parts = [(up, None), (gate, None), (down, bias)] if gated else [(up, None), (down, bias)]
    data, matrices = kernels.pack_expert(parts, WeightType.F32)
    assert len(data) == expert_layout(matrices)[1]
    x = random((3, 40), 4)
    h = kernels.activate(Activation.SILU, x @ gate.T) * (x @ up.T) if gated else kernels.activate(Activation.SILU, x @ up.T)
    assert np.allclose(kernels.expert(data, matrices, Activation.SILU, x), h @ down.T + bias, atol=1e-3)


def test_a_linear_page_adds_its_bias() -> None:
    weights, bias, x = random((17, 33)), random((17,), 1), random((2, 33), 2)
    data, matrices = kernels.pack_linear(weights, bias, WeightType.F32)
    assert np.allclose(kernels.linear(data, matrices, x), x @ weights.T + bias, atol=1e-4)


@pytest.mark.parametrize("kind", [WeightType.F32, WeightType.INT8])
def test_embedding_rows_carry_their_own_checksum(kind: WeightType) -> None:
    table = random((5, 24))
    table[2] = 0
    data = kernels.pack_rows(table, kind)
    stride = row_bytes(kind, 24)
    assert len(data) == 5 * stride
    for start in range(0, len(data), stride):
        row = data[start : start + stride]
        assert crc32c(row[:-4]) == int.from_bytes(row[-4:], "little")


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(UsageError, match="takes 32 inputs"):
        kernels.matmul(kernels.pack_matrix(random((4, 32)), WeightType.INT8), Matrix(WeightType.INT8, 4, 32), random((1, 33)))
