"""The scale search lowers the error, keeps to what the format allows, and never does worse than the largest value."""

from __future__ import annotations

import numpy as np
import pytest
from edgeml_export.quantize import QuantizePlan, best_scales
from hypothesis import given
from hypothesis import strategies as st

from edgeml.errors import UsageError
from edgeml.kernels import ScaleRule, largest, pack_matrix, unpack_matrix
from edgeml.layout import WeightType


def error(weights: np.ndarray, rule: ScaleRule, type: WeightType = WeightType.INT4) -> float:
    stored = unpack_matrix(pack_matrix(weights, type, rule), type, *weights.shape)
    return float(np.square(stored - weights).sum() / np.square(weights).sum())


def test_the_search_lowers_the_error_of_normal_weights_by_a_quarter() -> None:
    weights = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32) / 16
    assert error(weights, best_scales) < 0.75 * error(weights, largest)


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e3), st.integers(1, 40), st.integers(1, 70))
def test_it_is_never_worse_than_the_largest_value(seed: int, spread: float, rows: int, cols: int) -> None:
    drawn = np.random.default_rng(seed).standard_t(3, (rows, cols)) * spread
    weights = drawn.astype(np.float32)
    assert error(weights, best_scales) <= error(weights, largest) * (1 + 1e-5)


def test_zeros_and_single_values_stay_what_they_are() -> None:
    weights = np.zeros((16, 64), np.float32)
    weights[3, 40] = -7 / 16
    assert np.array_equal(unpack_matrix(pack_matrix(weights, WeightType.INT4, best_scales), WeightType.INT4, 16, 64), weights)


def test_eight_bits_take_the_largest_value() -> None:
    weights = np.random.default_rng(1).standard_normal((16, 32)).astype(np.float32)
    assert pack_matrix(weights, WeightType.INT8, best_scales) == pack_matrix(weights, WeightType.INT8)


def test_the_command_line_goes_before_the_recipe() -> None:
    plan = QuantizePlan(experts="int8", shared="int8", dense="int4")
    assert plan.override(None, None) == plan
    assert plan.override("f32", None) == QuantizePlan("f32", "f32", "int4", "int8")
    assert plan.override(None, "f32") == QuantizePlan("int8", "int8", "f32", "f32")


@pytest.mark.parametrize("field", ["experts", "shared", "dense", "embeddings", "scales"])
def test_an_unknown_type_is_refused(field: str) -> None:
    with pytest.raises(UsageError, match=field):
        QuantizePlan(**{field: "int3"})
