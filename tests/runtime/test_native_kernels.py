"""Every kernel set of this processor against the NumPy oracles, and against each other bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeml import kernels, native
from edgeml.errors import UsageError
from edgeml.layout import Activation, Matrix, WeightType

TYPES = list(WeightType)
BACKENDS = native.backends()
BITS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 200), st.integers(1, 20))
SIZES = st.sampled_from([0.0, 1e-40, 1e-30, 1.0, 1e30])


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def test_scalar_is_always_there_and_the_preferred_set_is_last() -> None:
    assert BACKENDS[0] == "scalar"
    assert len(set(BACKENDS)) == len(BACKENDS)
    x = random((3, 40), 0)
    data = kernels.pack_matrix(random((20, 40), 1), WeightType.INT8)
    results = {native.apply_matrix(isa, WeightType.INT8, data, 20, 40, x).tobytes() for isa in [None, *BACKENDS]}
    assert len(results) == 1


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("isa", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 999), SIZES, st.booleans())
def test_matrices_are_the_oracle(isa: str, kind: WeightType, shape: tuple[int, int, int], seed: int, size: float, biased: bool) -> None:
    rows, cols, count = shape
    data = kernels.pack_matrix(random((rows, cols), seed), kind)
    x, bias = random((count, cols), seed + 1, size), random((rows,), seed + 2) if biased else None
    expected = kernels.matmul(data, Matrix(kind, rows, cols), x, bias)
    assert native.apply_matrix(isa, kind, data, rows, cols, x, bias).tobytes() == expected.tobytes()


@pytest.mark.parametrize("isa", BACKENDS)
@pytest.mark.parametrize("kind", [WeightType.INT8, WeightType.INT4])
def test_extreme_weights_do_not_saturate(isa: str, kind: WeightType) -> None:
    signs = np.where(random((48, 4096), 0) > 0, np.float32(1), np.float32(-1))
    signs[:16] = 1
    data = kernels.pack_matrix(signs, kind)
    for x in (np.ones((1, 4096), np.float32), -np.ones((5, 4096), np.float32), np.sign(random((9, 4096), 1))):
        expected = kernels.matmul(data, Matrix(kind, 48, 4096), x)
        assert native.apply_matrix(isa, kind, data, 48, 4096, x).tobytes() == expected.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("isa", BACKENDS)
def test_a_row_that_is_not_finite_stays_visible_and_alone(isa: str, kind: WeightType, bad: float) -> None:
    x = random((7, 40), 0)
    x[1, 35] = bad
    data = kernels.pack_matrix(random((20, 40), 1), kind)
    out = native.apply_matrix(isa, kind, data, 20, 40, x)
    rest = [0, 2, 3, 4, 5, 6]
    assert not np.isfinite(out[1]).any()
    assert out[rest].tobytes() == kernels.matmul(data, Matrix(kind, 20, 40), x[rest]).tobytes()


@pytest.mark.parametrize("isa", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(Activation)), st.lists(BITS, min_size=1, max_size=70))
def test_activations_give_the_same_bits_for_any_bits(isa: str, kind: Activation, bits: list[int]) -> None:
    x = np.array(bits, np.uint32).view(np.float32)
    assert native.apply_activation(isa, kind, x).tobytes() == native.apply_activation("scalar", kind, x).tobytes()


@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize("isa", BACKENDS)
def test_activations_are_close_to_the_oracle(isa: str, kind: Activation) -> None:
    x = np.concatenate([np.linspace(-100, 100, 40001), np.geomspace(1e-40, 3e38, 5001), -np.geomspace(1e-40, 3e38, 5001)]).astype(
        np.float32
    )
    found, expected = native.apply_activation(isa, kind, x), kernels.activate(kind, x)
    assert (np.abs(found - expected) <= 2e-7 * np.maximum(1, np.abs(expected))).all()


@pytest.mark.parametrize("isa", BACKENDS)
def test_activations_of_values_that_are_not_finite(isa: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf], np.float32)
    for kind in (Activation.GELU, Activation.SILU):
        found = native.apply_activation(isa, kind, x)
        assert np.isnan(found[0])
        assert found[1] == np.inf
        assert not np.isfinite(found[2])
    relu = native.apply_activation(isa, Activation.RELU, x)
    assert np.isnan(relu[0])
    assert relu[1:].tolist() == [np.inf, 0]


def test_what_does_not_fit_is_refused() -> None:
    x, data = random((2, 40), 0), kernels.pack_matrix(random((20, 40), 1), WeightType.INT4)
    with pytest.raises(UsageError, match="no such kernels"):
        native.apply_matrix("sse9", WeightType.INT4, data, 20, 40, x)
    with pytest.raises(UsageError, match="outside its range"):
        native.apply_matrix(None, WeightType.INT4, data[:-1], 20, 40, x)
    with pytest.raises(UsageError, match="outside its range"):
        native.apply_matrix(None, 9, data, 20, 40, x)
    with pytest.raises(UsageError, match="is needed"):
        native.apply_matrix(None, WeightType.INT4, data, 20, 40, x[:, :-1])
    with pytest.raises(UsageError, match="outside its range"):
        native.apply_activation(None, 4, x)
