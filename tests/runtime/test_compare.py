"""The gate of `edgeml bench --compare`: how often it is wrong, and what it takes for a difference."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeml.compare import (
    FEWEST_PAIRS,
    MOST_PAIRS,
    PROCESS,
    RUN,
    THREADS,
    Comparison,
    Z,
    _student,
    compare_pairs,
    compare_records,
    in_turns,
)
from edgeml.errors import UsageError

ROOT = Path(__file__).parents[2]


def turns(values: Callable[[int], list[float]], log: list[str] | None = None, name: str = "") -> Callable[[int], list[float]]:
    def take(number: int) -> list[float]:
        if log is not None:
            log.append(name)
        return values(number)

    return take


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.15])
def test_false_alarms_and_power(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 5 of 100 identical pairs are called different, at least 90 of 100 slow-downs by a tenth are found."""
    for folder in ("benchmarks", "benchmarks/quality"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import gate

    found = gate.shares(*([gate.simulated(noise, slower, seed) for seed in range(100)] for slower in (1.0, 1.1)))
    assert found["false_alarms"] <= 0.05
    assert found["found"] >= 0.90
    assert found["too_noisy"] < 0.1


logs = st.lists(st.floats(-1, 1), min_size=10, max_size=24)


@given(logs)
def test_the_interval_is_wilcoxons(values: list[float]) -> None:
    """Against plain loops: the estimate is the median of all means of two, the ends are those of the rank in the docstring."""
    means = sorted((values[i] + values[j]) / 2 for i in range(len(values)) for j in range(i, len(values)))
    n, middle = len(values), len(means) // 2
    centre = means[middle] if len(means) % 2 else (means[middle - 1] + means[middle]) / 2
    rank = math.floor(n * (n + 1) / 4 - Z * math.sqrt(n * (n + 1) * (2 * n + 1) / 24) - 0.5)
    more = Z * math.sqrt(2) * PROCESS
    low, high = (math.hypot(centre - end, more) for end in (means[max(rank, 1) - 1], means[-max(rank, 1)]))
    found = compare_pairs([math.exp(value) for value in values], [1.0] * n)
    assert found.ratio == pytest.approx(math.exp(centre))
    assert (found.low, found.high) == (pytest.approx(math.exp(centre - low)), pytest.approx(math.exp(centre + high)))


@given(logs, st.floats(0.5, 2))
def test_sides_and_units_change_nothing_else(values: list[float], factor: float) -> None:
    ours, theirs = [math.exp(value) for value in values], [1.0] * len(values)
    one, other = compare_pairs(ours, theirs), compare_pairs(theirs, ours)
    assert other.ratio == pytest.approx(1 / one.ratio)
    assert (other.low, other.high) == (pytest.approx(1 / one.high), pytest.approx(1 / one.low))
    slower = compare_pairs([value * factor for value in ours], theirs)
    assert (slower.ratio, slower.low) == (pytest.approx(one.ratio * factor), pytest.approx(one.low * factor))


def test_a_spike_is_one_pair() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (list(np.exp(rng.normal(0, 0.02, 40))) for _ in range(2))
    calm = compare_pairs(ours, theirs)
    spiked = compare_pairs([value * (1000 if number in (3, 17) else 1) for number, value in enumerate(ours)], theirs)
    assert spiked.difference is None
    assert spiked.ratio == pytest.approx(calm.ratio, abs=0.01)


def test_a_drift_cancels_out_and_both_begin_equally_often() -> None:
    order: list[str] = []
    clock = [1.0]

    def drifting(_: int) -> list[float]:
        clock[0] *= 1.01
        return [clock[0]]

    found = in_turns(turns(drifting, order, "a"), turns(drifting, order, "b"))
    assert found.ratio == pytest.approx(1, abs=0.005)
    assert found.difference is None
    firsts = order[::2]
    assert firsts.count("a") == firsts.count("b") == found.n / 2
    assert order.count("a") == found.n
    assert firsts[:8] != ["a", "b"] * 4, "the order is drawn"


def test_a_turn_counts_by_its_median() -> None:
    found = in_turns(turns(lambda _: [1.0, 2.0, 90.0]), turns(lambda _: [2.0]))
    assert found.ratio == pytest.approx(1)


def test_how_long_it_goes_on() -> None:
    rng = np.random.default_rng(0)

    def noisy(_: int) -> list[float]:
        return [math.exp(rng.normal(0, 0.8))]

    calm = in_turns(turns(lambda _: [1.0]), turns(lambda _: [1.0]))
    assert (calm.n, calm.noisy) == (FEWEST_PAIRS, False)
    assert in_turns(turns(lambda _: [1.0]), turns(lambda _: [1.0]), pairs=50).n == 50
    stopped = in_turns(turns(noisy), turns(noisy), go_on=lambda: False)
    assert (stopped.n, stopped.noisy) == (FEWEST_PAIRS, True)
    given_up = in_turns(turns(noisy), turns(noisy))
    assert (given_up.n, given_up.noisy) == (MOST_PAIRS, True)


def test_what_is_allowed_is_let_pass() -> None:
    found = in_turns(turns(lambda _: [1.06]), turns(lambda _: [1.0]), allowed=0.05)
    assert (found.difference, found.refused) == ("slower", False)
    assert in_turns(turns(lambda _: [1.06]), turns(lambda _: [1.0])).refused
    assert in_turns(turns(lambda _: [0.9]), turns(lambda _: [1.0])).difference == "faster"


def test_processes_that_differ_a_little_are_no_difference() -> None:
    assert in_turns(turns(lambda _: [1 + PROCESS]), turns(lambda _: [1.0])).difference is None
    several = in_turns(turns(lambda _: [1.03]), turns(lambda _: [1.0]), process=THREADS)
    assert (several.difference, several.noisy) == (None, False), "threads find other processors in each process"
    assert in_turns(turns(lambda _: [1.03]), turns(lambda _: [1.0])).difference == "slower"


def test_the_smallest_slow_down_is_found_as_often_as_is_said() -> None:
    """`smallest` of an interval of normal error: a shift by that much is beyond the end of the interval with 95 %."""
    error = 0.03
    one = Comparison(1.0, math.exp(-Z * error), math.exp(Z * error), 20)
    shift = math.log1p(one.smallest)
    centres = np.random.default_rng(0).normal(shift, error, 20_000)
    assert np.mean(centres - Z * error > 0) == pytest.approx(0.95, abs=0.01)


# ---- against records ----


def run(p50: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    interval = {"value": p50, "low": low or p50 * 0.99, "high": high or p50 * 1.01, "n": 30}
    return {"rounds": 30, "latency_s": {"p50": p50, "p50_interval": interval}}


def test_an_earlier_record() -> None:
    assert compare_records(run(0.010), [run(0.010)]).difference is None
    assert compare_records(run(0.0102), [run(0.010)]).difference is None
    assert compare_records(run(0.0130), [run(0.010)]).refused
    assert compare_records(run(0.0075), [run(0.010)]).difference == "faster"
    assert not compare_records(run(0.0130), [run(0.010)], allowed=0.2).refused
    assert not compare_records(run(0.0130, 0.010, 0.016), [run(0.010)]).refused, "its own noise counts"
    error = Z * math.sqrt(2 * RUN**2 + 2 * (math.log(1.01 / 0.99) / 2 / 1.959964) ** 2)
    assert compare_records(run(0.010), [run(0.010)]).high == pytest.approx(math.exp(error))


def test_several_earlier_records() -> None:
    few, many = compare_records(run(0.0115), [run(0.010)]), compare_records(run(0.0115), [run(0.010)] * 8)
    assert (few.n, many.n) == (1, 8)
    assert (few.refused, many.refused) == (False, True), "runs are known to be steady here"
    unsteady = compare_records(run(0.0115), [run(0.008), run(0.0125), run(0.010), run(0.009)])
    assert unsteady.difference is None, "they differ more among themselves"


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 4.541), (4, 3.747), (7, 2.998), (15, 2.602), (1000, 2.330)])
def test_students_quantile(freedom: int, quantile: float) -> None:
    assert _student(freedom) == pytest.approx(quantile, rel=0.021)


@pytest.mark.parametrize("earlier", [1, 4, 8])
@pytest.mark.parametrize("noise", [0.01, 0.04])
def test_runs_of_one_program_are_seldom_called_different(noise: float, earlier: int) -> None:
    rng = np.random.default_rng(earlier)
    drawn = 0.01 * np.exp(rng.normal(0, noise, (400, earlier + 1)))
    found = [compare_records(run(values[0]), [run(value) for value in values[1:]]) for values in drawn]
    assert np.mean([one.difference is not None for one in found]) <= 0.04


def test_a_busy_machine_tells_little() -> None:
    calm, loaded = ({"load_average": load, "device": {"processors": 2}} for load in (1.5, 5.0))
    assert compare_records(run(0.0130) | calm, [run(0.010) | calm]).refused
    for new, old in ((calm, loaded), (loaded, calm)):
        found = compare_records(run(0.0130) | new, [run(0.010) | old])
        assert (found.refused, found.noisy) == (False, True)
    assert not compare_records(run(0.0130) | loaded, [run(0.010) | calm] * 8).refused
    assert compare_records(run(0.04) | calm, [run(0.010) | loaded]).refused


def test_records_of_few_rounds_are_a_sentence() -> None:
    one = run(0.01)
    one["latency_s"]["p50_interval"]["high"] = None
    for new, old in ((one, run(0.01)), (run(0.01), one), (run(0.01), {"rounds": 0, "latency_s": None})):
        with pytest.raises(UsageError, match="measure at least 6 rounds"):
            compare_records(new, [old])
