"""DSI, GG, CDTR and what belongs to them: against the formulas in plain loops, against tables worked out by hand, and intervals
against what is true of simulated data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeml.domains import Sheet, Table, gap_figures, specialised_figures, variant_figures
from edgeml.errors import DataError, UsageError
from edgeml.metrics import cdtr, corrected, dsi, dsi_route, forgetting, gg

EPS = 0.01
Matrix = list[list[float]]


# ---- the formulas, in plain loops ----


def plain_out(s: Matrix, c: list[float]) -> list[int]:
    return [j for j in range(len(c)) if not s[0][j] - c[j] >= EPS]


def plain_kept(s: Matrix, c: list[float], v: int, j: int) -> float:
    above, reference = s[v][j] - c[j], s[0][j] - c[j]
    return (above if above > 0 else 0.0) / (reference if reference > EPS else EPS)


def plain_dsi(s: Matrix, c: list[float]) -> tuple[float | None, float | None, list[float | None]]:
    out, each = plain_out(s, c), []
    domains = [j for j in range(len(c)) if j not in out]
    for i in range(len(c)):
        if i in out or len(domains) < 2:
            each.append(None)
            continue
        home, away, others = plain_kept(s, c, i + 1, i), 0.0, 0
        for j in domains:
            if j != i:
                away, others = away + plain_kept(s, c, i + 1, j), others + 1
        away /= others
        each.append(0.0 if home + away == 0 else (home - away) / (home + away))
    there = [value for value in each if value is not None]
    return (sum(there) / len(there), max(there), each) if there else (None, None, each)


def plain_gg(s: Matrix, v: int, seen: list[int], unseen: list[int], out: list[int]) -> tuple[float | None, float | None]:
    drops, scores = [], []
    for part in (seen, unseen):
        columns = [j for j in part if j not in out]
        if not columns:
            return None, None
        drops.append(sum(s[0][j] - s[v][j] for j in columns) / len(columns))
        scores.append(sum(s[v][j] for j in columns) / len(columns))
    return drops[1] - drops[0], scores[0] - scores[1]


def plain_cdtr(s: Matrix, b: list[float], out: list[int]) -> tuple[float | None, dict[tuple[int, int], float]]:
    ratios, top, bottom = {}, 0.0, 0.0
    for j in range(len(b)):
        own = s[j + 1][j] - b[j]
        if j in out or not own >= EPS:
            continue
        for i in range(len(b)):
            if i not in out:
                ratios[i, j] = (s[i + 1][j] - b[j]) / own
                if i != j:
                    top, bottom = top + s[i + 1][j] - b[j], bottom + own
    return (top / bottom if bottom else None), ratios


def plain_route(counts: list[list[int]]) -> float | None:
    rows = [row for row in counts if sum(row)]
    if len(rows) < 2:
        return None
    shares = [[n / sum(row) for n in row] for row in rows]
    told = 0.0
    for row in shares:
        for e, p in enumerate(row):
            if p:
                told += p / len(rows) * math.log(p / (sum(other[e] for other in shares) / len(rows)))
    return told / math.log(len(rows))


def random_table(rng: np.random.Generator) -> tuple[Matrix, list[float], list[float]]:
    """Scores, chance and a baseline, with domains at chance, sets that are worth nothing, and equal scores now and then."""
    count = int(rng.integers(1, 7))
    scores = rng.random((count + 1, count))
    chance, floor = rng.random(count) * 0.5, rng.random(count) * 0.6
    scores[0] = np.where(rng.random(count) < 0.2, chance + rng.normal(0, 0.01, count), scores[0]).clip(0, 1)
    own = np.diag_indices(count)
    scores[1:][own] = np.where(rng.random(count) < 0.2, floor + rng.normal(0, 0.01, count), scores[1:][own]).clip(0, 1)
    if rng.random() < 0.1:
        scores[1:] = chance  # nothing is above chance: 0, not a division by nothing
    return scores.tolist(), chance.tolist(), floor.tolist()


def test_indices_are_the_formulas() -> None:
    rng = np.random.default_rng(0)
    seen_undefined = {"dsi": 0, "gg": 0, "cdtr": 0, "ratio": 0}
    for _ in range(1000):
        s, c, b = random_table(rng)
        out = plain_out(s, c)
        value, most, each = plain_dsi(s, c)
        found = dsi(s, c)
        assert found.excluded == tuple(out)
        assert list(found.each) == pytest.approx(each, abs=1e-9)
        assert (found.value, found.most) == pytest.approx((value, most), abs=1e-9)
        for v in range(len(s)):
            assert corrected(s, c)[v] == pytest.approx([plain_kept(s, c, v, j) for j in range(len(c))], abs=1e-9)
        home = [j for j in range(len(c)) if rng.random() < 0.5]
        away = [j for j in range(len(c)) if j not in home]
        variant = int(rng.integers(1, len(s)))
        gap = gg(s, variant, home, away, out)
        assert (gap.value, gap.raw) == pytest.approx(plain_gg(s, variant, home, away, out), abs=1e-9)
        lost = [1 - plain_kept(s, c, variant, j) for j in away if j not in out]
        assert forgetting(s, c, variant, away) == pytest.approx(sum(lost) / len(lost) if lost else None, abs=1e-9)
        total, ratios = plain_cdtr(s, b, out)
        moved = cdtr(s, b, out)
        assert moved.value == pytest.approx(total, abs=1e-9)
        for i in range(len(b)):
            assert list(moved.ratios[i]) == pytest.approx([ratios.get((i, j)) for j in range(len(b))], abs=1e-9)
        assert set(moved.above_one) == {pair for pair, ratio in ratios.items() if ratio > 1 and pair[0] != pair[1]}
        seen_undefined["dsi"] += value is None
        seen_undefined["gg"] += gap.value is None
        seen_undefined["cdtr"] += total is None
        seen_undefined["ratio"] += None in sum(moved.ratios, ())
    assert min(seen_undefined.values()) > 50, seen_undefined


@given(st.lists(st.lists(st.integers(0, 40), min_size=4, max_size=4), min_size=1, max_size=5))
def test_what_routing_tells_is_the_formula(counts: list[list[int]]) -> None:
    assert dsi_route(counts, shuffles=0) == pytest.approx(plain_route(counts), abs=1e-9)


# ---- by hand ----


def test_specialisation_by_hand() -> None:
    """Retention at home 1 and 0.5, away 0.5 and 0.5."""
    found = dsi([[0.9, 0.9], [0.9, 0.5], [0.5, 0.5]], [0.1, 0.1])
    assert found.each == pytest.approx((1 / 3, 0.0))
    assert (found.value, found.most) == pytest.approx((1 / 6, 1 / 3))
    assert dsi([[0.9], [0.9]], [0.1]).value is None
    assert dsi([[0.9, 0.9], [0.9, 0.1], [0.0, 0.9]], [0.1, 0.1]).value == 1


def test_a_gap_by_hand() -> None:
    gap = gg([[0.9, 0.8, 0.7], [0.9, 0.7, 0.5]], 1, [0], [1, 2])
    assert gap.value == pytest.approx((0.1 + 0.2) / 2 - 0)
    assert gap.raw == pytest.approx(0.9 - 0.6)
    assert gg([[0.9, 0.8], [0.9, 0.7]], 1, [0, 1], []).value is None


def test_transfer_by_hand() -> None:
    found = cdtr([[0.9, 0.9], [0.9, 0.7], [0.3, 0.8]], [0.5, 0.4])
    assert found.ratios[0][1] == pytest.approx(0.3 / 0.4)
    assert found.ratios[1][0] == pytest.approx(-0.2 / 0.4)
    assert found.value == pytest.approx((0.3 - 0.2) / (0.4 + 0.4))
    assert cdtr([[0.9, 0.9], [0.9, 0.95], [0.3, 0.8]], [0.5, 0.4]).above_one == ((0, 1),)
    assert cdtr([[0.9, 0.9], [0.5, 0.7], [0.3, 0.4]], [0.5, 0.4]).value is None


def test_routing_that_ignores_the_domain_tells_nothing() -> None:
    """The plug-in figure alone would say that it tells something."""
    rng = np.random.default_rng(1)
    same = rng.multinomial(300, [1 / 30] * 30, size=4)
    plain = dsi_route(same, shuffles=0)
    assert plain is not None
    assert plain > 0.01
    corrected_figure = dsi_route(same)
    assert corrected_figure is not None
    assert corrected_figure < plain / 3
    assert dsi_route(np.eye(3, dtype=int) * 1000) == pytest.approx(1, abs=0.01)
    assert dsi_route(same, seed=3) == dsi_route(same, seed=3)
    assert dsi_route([[1, 2]]) is None
    assert dsi_route([[1, 2], [0, 0]]) is None


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dsi([[0.5, float("nan")]] * 3, [0, 0]), DataError, "row 0 on domain 1 is not a number"),
        (lambda: dsi([[0.5, 0.5]] * 2, [0, 0]), UsageError, "a row for each of the 2 domains"),
        (lambda: dsi([[0.5, 0.5]] * 3, [0, 0, 0]), UsageError, "one number a domain"),
        (lambda: gg([[0.5]], 1, [0], []), UsageError, "reference first"),
        (lambda: gg([[0.5, 0.5]] * 2, 2, [0], [1]), UsageError, "a row from 1 to 1"),
        (lambda: gg([[0.5, 0.5]] * 2, 1, [0], [0]), UsageError, "different columns"),
        (lambda: gg([[0.5, 0.5]] * 2, 1, [0], [2]), UsageError, "from 0 to 1"),
        (lambda: dsi_route([[1, -1]]), DataError, "not negative"),
        (lambda: dsi_route([[10**9, 1], [1, 1]]), UsageError, "can be shuffled"),
    ],
)
def test_what_cannot_be_is_a_sentence(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


# ---- tables ----


def sheet(name: str, domain: str, *right: list[int] | np.ndarray, commonest: int = 0, classes: int = 4) -> Sheet:
    """A task whose answers are right where there is a 1; its labels take turns, so chance is 1 / classes."""
    labels = np.arange(len(right[0])) % classes
    return Sheet.of_labels(name, domain, "accuracy", labels, commonest, [np.where(one, labels, (labels + 1) % classes) for one in right])


def rights(rng: np.random.Generator, n: int, share: float) -> np.ndarray:
    return (rng.random(n) < share).astype(int)


def test_domains_are_means_over_tasks() -> None:
    whole = [1] * 40
    half = [1, 1, 1, 1, 0, 0, 0, 0] * 5
    table = Table([sheet("a", "x", whole, half), sheet("b", "x", whole, whole), sheet("c", "y", whole, half)])
    assert table.domains == ["x", "y"]
    assert table.sizes == [80, 40]
    assert table.domain_scores[1].tolist() == [0.75, 0.5]
    found = variant_figures(table, 1)
    assert found["domains"]["x"]["retention"]["value"] == pytest.approx((0.75 - 0.25) / 0.75)
    assert found["domains"]["y"]["n"] == 40
    assert found["tasks"]["b"]["score"] == 1
    assert found["retention"]["value"] == pytest.approx((0.25 + 0.75 + 0.25) / 2.25)


def test_an_interval_does_not_depend_on_the_other_variants_or_tasks() -> None:
    rng = np.random.default_rng(2)
    answers = [rights(rng, 100, share) for share in (0.9, 0.8, 0.6)]
    alone = variant_figures(Table([sheet("a", "x", answers[0], answers[1])]), 1)
    beside = variant_figures(Table([sheet("b", "y", *answers), sheet("a", "x", *answers)]), 1)
    assert alone["domains"]["x"] == beside["domains"]["x"]
    other = variant_figures(Table([sheet("a", "x", answers[0], answers[1])], seed=1), 1)
    assert alone["domains"]["x"]["retention"]["low"] != other["domains"]["x"]["retention"]["low"]


def test_too_few_examples_say_nothing() -> None:
    few, many = [1] * 29, [1] * 60
    table = Table([sheet("a", "x", few, few), sheet("b", "y", many, many)])
    gap = gap_figures(table, 1, ["x"])
    assert (gap["gg"], gap["gg_raw"], gap["forgetting"]) == (None, None, None)
    assert "domain 'x' has 29 examples, and 30 are the fewest" in gap["why"]
    assert variant_figures(table, 1)["domains"]["x"]["retention"] is None
    assert variant_figures(table, 1)["domains"]["y"]["retention"]["value"] == 1
    special = specialised_figures(Table([sheet("a", "x", few, few, few), sheet("b", "y", many, many, many)]), False)
    assert special["dsi"] is None
    assert "29 examples" in special["why"]


def test_undefined_gaps_say_why() -> None:
    many = [1] * 60
    table = Table([sheet("a", "x", many, many), sheet("b", "y", many, many)])
    assert "every domain was seen" in gap_figures(table, 1, ["x", "y", "z"])["why"]
    assert "every domain was not seen" in gap_figures(table, 1, [])["why"]
    nothing = Table([sheet("a", "x", [0] * 60, many), sheet("b", "y", [0] * 60, many)])
    assert "above chance on no domain" in gap_figures(nothing, 1, ["x"])["why"]
    assert "fewer than two domains" in specialised_figures(Table([sheet("a", "x", many, many)]), False)["why"]


def test_domains_at_chance_are_left_out_and_listed() -> None:
    many, half, chance = [1] * 60, [1, 1, 1, 1, 0, 0, 0, 0] * 7 + [1] * 4, [1, 0, 0, 0] * 15
    table = Table(
        [sheet("a", "x", many, many, half, many), sheet("b", "y", many, half, many, many), sheet("c", "z", chance, many, many, many)]
    )
    found = specialised_figures(table, False)
    assert found["excluded_domains"] == ["z"]
    assert set(found["dsi_by_domain"]) == {"x", "y"}
    assert found["dsi"]["value"] == pytest.approx(dsi(table.domain_scores, table.domain_chance).value)
    assert found["cdtr"] is None
    assert variant_figures(table, 1)["domains"]["z"]["retention"] is None
    assert gap_figures(table, 1, ["x", "z"])["unseen"] == ["y"]


def test_a_score_near_chance_is_flagged() -> None:
    """Away at chance: retention is clipped there, and the bootstrap cannot see it."""
    rng = np.random.default_rng(3)
    n = 200
    home, away = [rights(rng, n, 0.9) for _ in range(4)], [rights(rng, n, 0.25) for _ in range(2)]
    table = Table([sheet("a", "x", home[0], home[1], away[0]), sheet("b", "y", home[2], away[1], home[3])])
    found = specialised_figures(table, False)
    assert found["dsi"]["near_clip"] is True
    assert variant_figures(table, 2)["domains"]["x"]["retention"]["near_clip"] is True
    assert "near_clip" not in variant_figures(table, 1)["domains"]["x"]["retention"]
    far = Table([sheet("a", "x", *home[:3]), sheet("b", "y", *home[1:])])
    assert "near_clip" not in specialised_figures(far, False)["dsi"]


def test_other_rows_cannot_be_compared() -> None:
    one, two = sheet("a", "x", [1] * 4), sheet("a", "x", [1] * 5)
    with pytest.raises(DataError, match="do not answer the same 4 examples"):
        Table([Sheet("a", "x", "accuracy", one.always, (one.answers[0], two.answers[0]))])


# ---- intervals on simulated data ----


def truth(shares: np.ndarray, chance: float) -> tuple[np.ndarray, np.ndarray]:
    return shares, np.full(shares.shape[1], chance)


def test_an_index_whose_set_is_at_chance_at_home_is_flagged() -> None:
    rng = np.random.default_rng(0)
    sheets = []
    for home, name in enumerate("abc"):
        labels = rng.integers(0, 2, 200)
        hit = [0.9, *(0.5 if (made, home) == (0, 0) else 0.85 for made in range(3))]
        answers = [np.where(rng.random(200) < share, labels, 1 - labels) for share in hit]
        sheets.append(Sheet.of_labels(f"task-{name}", name, "accuracy", labels, 0, answers))
    found = specialised_figures(Table(sheets), False)
    assert found["dsi_by_domain"]["a"]["near_clip"]
    assert found["dsi"]["near_clip"]
    assert not found["dsi_by_domain"]["b"].get("near_clip")


def test_intervals_cover_what_is_true() -> None:
    """n = 200 a domain, retention above 0.2: in the long run 95 % of the intervals hold the truth. benchmarks/quality/coverage.py has
    the long run; here 60 tables, whose coverage varies by three points, so that only a broken interval fails."""
    rng = np.random.default_rng(4)
    shares = np.array([[0.90, 0.85, 0.95], [0.88, 0.60, 0.55], [0.65, 0.80, 0.60], [0.70, 0.62, 0.90], [0.5, 0.45, 0.4]])
    chance = np.full(3, 0.25)
    true = {
        "dsi": dsi(shares[:4], chance).value,
        "cdtr": cdtr(shares[:4], shares[4]).value,
        "gg": gg(shares[:2], 1, [0], [1, 2]).value,
        "retention": float(corrected(shares[:2], chance)[1, 1]),
    }
    covered = dict.fromkeys(true, 0)
    for trial in range(60):
        sheets = [sheet(f"t{j}", f"d{j}", *(rights(rng, 200, share) for share in shares[:, j])) for j in range(3)]
        table = Table(sheets, seed=trial, resamples=300)
        special = specialised_figures(table, True)
        found = {
            "dsi": special["dsi"],
            "cdtr": special["cdtr"],
            "gg": gap_figures(table, 1, ["d0"])["gg"],
            "retention": variant_figures(table, 1)["domains"]["d1"]["retention"],
        }
        for name, value in true.items():
            assert value is not None
            covered[name] += found[name]["low"] <= value <= found[name]["high"]
    assert all(count / 60 >= 0.86 for count in covered.values()), covered
