"""Whatever the records hold: the page stays below 2 MB and says what it left out; a figure out of range is no fault."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reported
from edgeml_report import document, plots, to_csv, to_html, to_markdown
from edgeml_report.content import Table
from edgeml_report.plots import MOST_MARKS, _joined, _risen
from edgeml_report.text import OUT_OF_RANGE, count, mib, milliseconds, number, percent, points, ratio, size
from hypothesis import given
from hypothesis import strategies as st

LIMIT = 2_000_000


def busy(number_of: int) -> dict[str, Any]:
    """A profile with as many page-ins as a record keeps, and many experts."""
    record = reported.profile()
    events = [{"start_s": 0.001 * place, "end_s": 0.001 * place + 0.0003, "bytes": 28672, "page": place} for place in range(2000)]
    sites = [{"name": f"layer.{row}", "expert_calls": [(row * 7 + n * number_of) % 13 for n in range(128)]} for row in range(16)]
    return record | {"memory": f"{number_of}%", "profile": {"page_ins": events, "sites": sites}}


def sweep(amount: int) -> list[dict[str, Any]]:
    return [reported.bench(0.01 + 1e-5 * place) | {"memory_budget_bytes": 1 << 20 | place, "memory": str(place)} for place in range(amount)]


@pytest.mark.parametrize("what", ["rows", "profiles", "evaluations"])
def test_a_page_stays_below_two_megabytes_and_says_what_it_left_out(what: str) -> None:
    if what == "rows":
        records = [*sweep(700), reported.evaluation()]
    elif what == "profiles":
        records = [busy(place + 1) for place in range(7)]
    else:
        records = []
        for place in range(120):
            record = copy.deepcopy(reported.evaluation()) | {"bundle_id": f"{place:064x}", "limit": place}
            for one in record["eval"]["variants"]:
                one["bundle_id"], one["tasks"]["clinic"]["n"] = record["bundle_id"], 900 + place // 40
            records.append(record)
    made = document(records)
    page = to_html(made)
    assert len(page.encode()) < LIMIT
    assert "left out" in page.lower()
    assert all(len(block.rows) <= 200 for section in made.sections for block in section.blocks if isinstance(block, Table))
    assert len(to_markdown(made)) < LIMIT


def test_the_csv_has_what_the_page_left_out() -> None:
    assert to_csv(document(sweep(300))).count(",latency_s.p50,") == 300


@pytest.mark.skipif(not plots.available(), reason="needs matplotlib, the extra 'report'")
def test_two_full_timelines_are_small() -> None:
    records = [busy(1), busy(2)]
    for record in records:
        record["profile"]["sites"] = []
    assert len(to_html(document(records)).encode()) < 150_000


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 50), st.floats(0, 9)), min_size=1, max_size=1500))
def test_a_timeline_is_drawn_with_few_marks_and_loses_nothing(drawn: list[tuple[float, float, float]]) -> None:
    events = [(start, start + took, size_of) for start, took, size_of in drawn]
    spans, (at, came) = _joined(events), _risen(events)
    assert len(spans) <= MOST_MARKS + 1
    assert len(at) == len(came) <= MOST_MARKS + 2
    assert came[-1] == pytest.approx(sum(size_of for _, _, size_of in events))
    assert came == sorted(came)
    assert at == sorted(at)
    assert all(any(begin <= start and end <= stop for begin, stop in spans) for start, end, _ in events)


@pytest.mark.parametrize("value", [1e308, -1e308, 10**400, float("inf"), float("nan")])
def test_a_figure_that_nothing_measures_is_out_of_range(value: float) -> None:
    for show in (count, mib, milliseconds, number, percent, points, ratio, size):
        assert show(value) == OUT_OF_RANGE
    record = reported.bench()
    record["latency_s"]["max"] = record["peak_rss_bytes"] = record["memory_budget_bytes"] = value
    written = to_markdown(document([record, reported.evaluation()]))
    assert "not measured" in written
    assert "inf" not in written.split("## How")[0].replace("info", "").replace("infer", "")


def test_no_rounds_are_no_division() -> None:
    assert "not measured" in to_markdown(document([reported.bench() | {"rounds": 0}]))


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [place for key, found in inner for place in places(found, (*way, key))] or (
        [way] if isinstance(value, int | float) and not isinstance(value, bool) else []
    )


EVERYTHING = reported.everything()


@given(st.sampled_from(places(EVERYTHING)), st.sampled_from([0, -1, 1e308, -1e308, 5e-324, 10**400, 1e17]))
def test_one_wrong_number_is_a_page_all_the_same(place: tuple[Any, ...], value: float) -> None:
    record = copy.deepcopy(EVERYTHING[place[0]])
    target: Any = record
    for key in place[1:-1]:
        target = target[key]
    target[place[-1]] = value
    made = document([record, EVERYTHING[place[0]]])
    to_html(made, plotted=False)
    to_markdown(made)
