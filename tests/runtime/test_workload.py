"""Workloads: what a file says, what is drawn from it, and how requests are driven."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeml.errors import DataError
from edgeml.workload import Request, Workload, drive, load_workload, parse_workload

PATH = Path("folder/w.toml")
MIX = '[[mix]]\ntask = "mood"\ntokens = 8\n'


def made(text: str) -> Workload:
    return parse_workload(text, PATH)


def test_a_whole_file() -> None:
    found = made(
        """
        seed = 7
        requests = 500
        warmup = 0
        [arrival]
        kind = "bursts"
        rate_per_s = 20
        burst = 8
        [[mix]]
        task = "mood"
        weight = 3
        input = "q.jsonl"
        [[mix]]
        task = "weather"
        tokens = {distribution = "lognormal", median = 24, sigma = 0.6, least = 4, most = 128}
        rows = 2
        deadline_s = 0.5
        priority = -5
        [[mix]]
        task = "digit"
        images = ["a.png", "b.png"]
        """
    )
    first, second, third = found.mix
    assert (found.seed, found.requests, found.warmup, found.concurrency) == (7, 500, 0, None)
    assert (first.weight, first.input, first.rows, first.deadline_s) == (3, Path("folder/q.jsonl"), 1, None)
    assert (second.rows, second.deadline_s, second.priority) == (2, 0.5, -5)
    assert third.images == (Path("folder/a.png"), Path("folder/b.png"))
    assert found.as_json()["arrival"] == {"kind": "bursts", "rate_per_s": 20, "burst": 8}
    assert found.as_json()["tasks"] == ["mood", "weather", "digit"]
    assert parse_workload(found.source, PATH) == found, "another process reads the same from its source"
    assert made(MIX).concurrency == 1


WRONG = {
    "": "has no \\[\\[mix\\]\\]",
    "mix = 3": "has no \\[\\[mix\\]\\]",
    "mix = []": "has no \\[\\[mix\\]\\]",
    "seed = ": "not TOML",
    "sead = 1\n" + MIX: "unknown key 'sead'",
    "seed = 1.5\n" + MIX: "seed is a whole number",
    "seed = true\n" + MIX: "seed is a whole number",
    "requests = 0\n" + MIX: "requests is a whole number from 1",
    '[arrival]\nkind = "often"\n' + MIX: "one of closed, poisson, bursts",
    '[arrival]\nkind = "poisson"\n' + MIX: "rate_per_s is a number",
    '[arrival]\nkind = "poisson"\nrate_per_s = 0\n' + MIX: "rate_per_s is a number",
    '[arrival]\nkind = "poisson"\nrate_per_s = nan\n' + MIX: "rate_per_s is a number",
    '[arrival]\nkind = "poisson"\nrate_per_s = 2\nburst = 3\n' + MIX: "unknown key 'burst'",
    '[arrival]\nkind = "closed"\nconcurrency = 1.5\n' + MIX: "concurrency is a whole number",
    'arrival = "closed"\n' + MIX: "write a table",
    "[[mix]]\ntokens = 3": "number 1: task is missing",
    MIX + "weight = -1": "weight is a number from 0",
    MIX + "weight = 0": "all weights are 0",
    MIX + 'input = "a"': "one of input, tokens and images",
    MIX + "priority = 101": "priority is a whole number from -100 to 100",
    MIX + "deadline_s = 0": "deadline_s is a number",
    MIX + "rows = 0": "rows is a whole number",
    '[[mix]]\ntask = "a"\ntokens = 0': "tokens is a whole number from 1",
    '[[mix]]\ntask = "a"\ntokens = {distribution = "normal"}': "one of uniform, lognormal",
    '[[mix]]\ntask = "a"\ntokens = {distribution = "uniform", least = 9, most = 3}': "least is more than most",
    '[[mix]]\ntask = "a"\ntokens = {distribution = "lognormal", median = 9, least = 2, most = 3}': "sigma is a number",
    '[[mix]]\ntask = "a"\nimages = "x.png"': "images is a list of files",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_a_sentence(text: str) -> None:
    with pytest.raises(DataError, match=WRONG[text]) as problem:
        made(text)
    assert str(problem.value).startswith("folder/w.toml: ")
    assert "\n" not in str(problem.value)


def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_workload(tmp_path / "none.toml")
    (tmp_path / "w.toml").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        load_workload(tmp_path / "w.toml")
    (tmp_path / "w.toml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(DataError, match="longer than any workload"):
        load_workload(tmp_path / "w.toml")


def test_equal_seeds_give_equal_requests() -> None:
    text = '[arrival]\nkind = "poisson"\nrate_per_s = 5\n[[mix]]\ntask = "a"\ntokens = {distribution = "uniform", least = 2, most = 9}\n'
    one, same, other = made(text), made(text), made("seed = 1\n" + text)
    assert one.part(1, 40) == same.part(1, 40)
    assert one.part(1, 40) != one.part(2, 40)
    assert one.part(1, 40) != other.part(1, 40)
    assert one.part(0, 0) == []
    assert all(0 <= request.seed < 1 << 32 for request in one.part(3, 100))


def test_the_mix_follows_its_weights() -> None:
    drawn = made(MIX + 'weight = 3\n[[mix]]\ntask = "b"\nweight = 1\ntokens = 4\n[[mix]]\ntask = "c"\nweight = 0\ntokens = 1').part(1, 4000)
    counts = Counter(request.kind for request in drawn)
    assert counts[0] / 4000 == pytest.approx(0.75, abs=0.03)
    assert counts[2] == 0
    assert {request.tokens for request in drawn} == {(8,), (4,)}


def test_a_length_that_is_beyond_numbers_keeps_to_its_bounds_too() -> None:
    tokens = '{distribution = "lognormal", median = 1e6, sigma = 1e6, least = 1, most = 8}'
    lengths = [request.tokens[0] for request in made(f'[[mix]]\ntask = "a"\ntokens = {tokens}\n').part(1, 99)]
    assert set(lengths) == {1, 8}


def test_arrivals_have_their_rate() -> None:
    poisson = made('[arrival]\nkind = "poisson"\nrate_per_s = 20\n' + MIX).part(1, 4000)
    times = np.array([request.at_s for request in poisson])
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.06)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1), "exponential: as wide as it is long"
    bursts = np.array([request.at_s for request in made('[arrival]\nkind = "bursts"\nrate_per_s = 20\nburst = 8\n' + MIX).part(1, 4001)])
    assert len(np.unique(bursts)) == 501
    assert 4001 / bursts[-1] == pytest.approx(20, rel=0.15)
    assert {request.at_s for request in made(MIX).part(1, 5)} == {None}


@given(st.integers(1, 64), st.floats(0.05, 2), st.integers(0, 1000))
@settings(max_examples=30)
def test_lengths_keep_to_their_bounds(median: int, sigma: float, seed: int) -> None:
    lengths = f'{{distribution = "lognormal", median = {median}, sigma = {sigma}, least = 3, most = 40}}'
    drawn = made(f'seed = {seed}\n[[mix]]\ntask = "a"\nrows = 3\ntokens = {lengths}').part(1, 50)
    assert all(len(request.tokens) == 3 and 3 <= length <= 40 for request in drawn for length in request.tokens)


# ---- driving ----


@pytest.mark.parametrize("most", [1, 3])
def test_a_closed_loop_keeps_so_many_out(most: int) -> None:
    out, largest, lock = 0, 0, threading.Lock()

    def submit(number: int, meant: float, ended: Callable[[bool], None]) -> None:
        nonlocal out, largest
        with lock:
            out += 1
            largest = max(largest, out)

        def answer() -> None:
            nonlocal out
            with lock:
                out -= 1
            ended(number != 5)

        threading.Timer(0.002, answer).start()

    done = drive([Request(0, None, 0)] * 20, submit, most)
    assert largest == most
    assert [number for number, seconds in enumerate(done.latency_s) if seconds is None] == [5]
    assert all(seconds >= 0.002 for seconds in done.latency_s if seconds is not None)
    assert done.late_s == 0


def test_latency_counts_from_the_intended_start() -> None:
    """Whoever submits stands still for 60 ms at the first request: those meant for that time pay for it."""

    def submit(number: int, meant: float, ended: Callable[[bool], None]) -> None:
        if number == 0:
            time.sleep(0.06)
        ended(True)

    done = drive([Request(0, at, 0) for at in (0.0, 0.01, 0.02, 0.03)], submit, None)
    for at, seconds in zip((0.0, 0.01, 0.02, 0.03), done.latency_s, strict=True):
        assert seconds is not None
        assert seconds >= 0.06 - at
    assert done.late_s >= 0.05
    assert done.seconds >= 0.06


def test_what_submitting_raises_ends_it() -> None:
    def submit(number: int, meant: float, ended: Callable[[bool], None]) -> None:
        raise DataError("no")

    with pytest.raises(DataError):
        drive([Request(0, None, 0)] * 3, submit, 2)
