"""The report: what it says, that a figure is the same however it is written, and that no name in a record can do harm."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import reported
from edgeml_report import document, plots, to_csv, to_html, to_markdown
from edgeml_report.content import Plot, Table
from edgeml_report.runs import frontier, labels
from edgeml_report.text import clean, count, interval, listed, mib, milliseconds, number, percent, points
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title><h1>'\"&amp;",
    "\u202egnp.exe",
    "\u0645\u0631\u062d\u0628\u0627 (\u05e9\u05dc\u05d5\u05dd)",
    "a`b`| c |\n# head\n[x](javascript:alert(1)) @nobody",
    "$\\frac{1}{0}$ %s {0} \x00\x1b[31m\u200b",
    "=HYPERLINK(1)",
    "n" * 10_000,
)
drawn = pytest.mark.skipif(not plots.available(), reason="needs matplotlib, the extra 'report'")


class Outline(HTMLParser):
    """A page's elements, checked for balance while they are read."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and data.strip():
            self.texts.append((self.stack[-1], data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]

    def text(self) -> str:
        return " ".join(data for tag, data in self.texts if tag != "style")


def check_page(page: str) -> Outline:
    """What every page of ours keeps to."""
    outline = Outline(page)
    tags = [tag for tag, _ in outline.elements]
    ids = [str(attributes["id"]) for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not {"script", "iframe", "object", "embed", "form", "base"} & set(tags)
    assert len(page.encode()) < 2_000_000
    for tag, attributes in outline.elements:
        assert not [key for key in attributes if key.startswith("on")], attributes
        for key in ("href", "src"):
            target = attributes.get(key)
            assert target is None or target == "data:," or (target.startswith("#") and target[1:] in ids), (tag, target)
        for key in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(key) or "").split()) <= set(ids)
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert [tag for tag in tags if tag in ("header", "nav", "main")] == ["header", "nav", "main"]
    assert outline.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    first = next(attributes for tag, attributes in outline.elements if tag == "a")
    assert first["href"] == "#main"
    assert first["class"] == "skip"
    assert tags.count("table") == tags.count("caption")
    assert all(attributes.get("scope") in ("col", "row") for attributes in outline.all("th"))
    for picture in outline.all("svg"):
        assert picture["role"] == "img"
        assert len(str(picture["aria-labelledby"]).split()) == 2
    return outline


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return reported.everything()


@pytest.fixture(scope="module")
def page(records: list[dict[str, Any]]) -> str:
    return to_html(document(records))


def test_the_page_keeps_to_the_rules(page: str) -> None:
    check_page(page)


def test_the_headline_answers_five_questions(records: list[dict[str, Any]]) -> None:
    answers = {tile.question: tile.answer for tile in document(records).tiles}
    assert answers == {
        "How fast": "12.3\u00a0ms",
        "How large": "10.8\u00a0MiB",
        "How much worse": "0.1\u00a0points lost",
        "Where": "nowhere for sure",
        "How sure": "\u00b10.4\u00a0points",
    }


def test_without_matplotlib_the_tables_have_the_figures_and_a_sentence_says_so(records: list[dict[str, Any]]) -> None:
    plain = to_html(document(records), plotted=False)
    outline = check_page(plain)
    assert outline.all("svg") == []
    assert "pip install matplotlib" in plain
    for figure in ("12.3", "97.3\u00a0%", "100.4", "0.87", "never chosen"):
        assert figure in outline.text()


@drawn
def test_plots_follow_the_page_in_colour_and_font(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(pictures) >= 8
    for picture in pictures:
        assert set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{3,6}|[a-z]+\b)", picture)) <= {"none", "var"}
        assert "font-family" not in picture
        assert "DejaVu" not in picture
        assert "<text" in picture
        assert re.search(r"<title[^>]*>[^<]+</title><desc[^>]*>[^<]+</desc>", picture)


@drawn
def test_drawing_twice_gives_the_same_page(records: list[dict[str, Any]], page: str) -> None:
    assert to_html(document(copy.deepcopy(records))) == page


@pytest.mark.parametrize("kind", ["bench", "eval", "profile", "routing"])
def test_a_section_without_data_is_a_sentence_with_the_command_that_fills_it(records: list[dict[str, Any]], kind: str) -> None:
    made = document([record for record in records if record["kind"] == kind])
    empty = [section for section in made.sections if not section.filled]
    assert empty
    assert all(re.search(r"`edgeml [a-z]+ ", section.lead) for section in empty)
    for section in made.sections:
        assert all(len(block.rows) > 0 for block in section.blocks if isinstance(block, Table))
    outline = check_page(to_html(made))
    for section in empty:
        assert section.title in outline.text()
    if kind != "bench":
        assert next(tile for tile in made.tiles if tile.question == "How fast").answer is None
        assert "not measured" in outline.text()


def test_unmeasured_is_never_zero() -> None:
    record = reported.bench() | {"peak_rss_bytes": None, "page_wait_s": None, "latency_s": {"p50": 0.01}, "cold": None}
    text = check_page(to_html(document([record]), plotted=False)).text()
    assert "not measured" in text
    row = next(line for line in to_markdown(document([record])).splitlines() if "100.0\u00a0%" in line)
    assert row.rstrip("| ").endswith("not measured")  # what was waited is not known, and not 0


def test_exact_answers_at_any_budget_share_one_quality_and_masked_ones_do_not(records: list[dict[str, Any]]) -> None:
    section = next(one for one in document(records).sections if one.name == "tradeoffs")
    table = next(block for block in section.blocks if isinstance(block, Table))
    assert [row[1].text for row in table.rows] == ["100.0\u00a0%"] * 3 + ["97.3\u00a0%", "87.0\u00a0%"]
    assert [row[-1].text for row in table.rows] == ["latency", "\u2013", "size", "latency", "latency"]


def test_a_workload_says_what_was_refused_and_latencies_have_intervals() -> None:
    record = reported.loaded()
    record["device"] = record["device"] | {"disk": {"device": "mmcblk0", "model": None, "rotational": False}, "governor": None, "fan": True}
    written = to_markdown(document([record])).replace("\u00a0", " ")
    assert "| small | 20.0 | 19.6 | 400 | 6 | 3 |" in written
    assert "21.0 (20.4 to 21.8)" in written
    assert "39.9 (at least 35.7)" in written
    assert "| 63.0 |" in written
    for row in ("| disk | mmcblk0 |", "| governor | not measured |", "| fan | yes |"):
        assert row in written


def test_a_comparison_says_its_verdict() -> None:
    ratio = {"value": 1.12, "low": 1.08, "high": 1.17, "n": 40}
    compared = {"how": "turns", "with": {"bundle": "old.edgeml"}, "ratio": ratio, "difference": "slower", "refused": True}
    written = to_markdown(
        document([reported.bench() | {"arm": "A", "compare": compared}, reported.bench() | {"arm": "B", "compare": None}])
    )
    assert "| arm A (against old.edgeml) | 1.12 | 1.08\u00a0to\u00a01.17 | slower (more than was allowed) |" in written
    assert "| arm B | " in written


def test_what_only_allows_some_experts_is_neither_timed_nor_weighed_and_the_reference_is_no_news() -> None:
    made = document([reported.bench(), reported.kept()])
    tables = {one.name: next(block for block in one.blocks if isinstance(block, Table)) for one in made.sections if one.filled}
    assert [(row[0].text, row[1].text) for row in tables["tradeoffs"].rows] == [("1. small", "100.2\u00a0%")]
    assert [column.name for column in tables["domains"].columns] == ["domain", "half"]
    assert "Scored: half." in made.about
    assert "not what was scored" in made.about
    assert "No DSI and CDTR: no sets." in to_markdown(made)


def test_a_difference_says_which_part_lost_it() -> None:
    site = {"name": "layers.0", "kind": "experts", "alone_error": 0.0131, "error": 0.02, "state_error": 0.01, "same_choices": 0.998}
    heads = {"name": "heads", "kind": "head", "same": True, "error": 0.03, "gain": None}
    parts = [site | {"restored_error": 0.011, "gain": reported.interval(0.004, 0.003, 640)}, heads]
    about = {"reference_bundle": "full.edgeml", "error": 0.03, "worst": "layers.0", "split": "validation", "limit": 64}
    made = document([reported.settings("diff") | {"diff": about | {"parts": parts}}])
    written = to_markdown(made).replace("\u00a0", " ")
    assert "| layers.0 (the state is 1.00 % off, 99.8 % of the choices are the same) | 1.31 % | 2.00 % | 1.10 % |" in written
    assert "| 1.10 % | +0.4 points (+0.1 to +0.7) |" in written
    assert "| heads | same | 3.00 % | \u2013 | \u2013 |" in written
    assert "Most is lost in layers.0: restored alone, it leaves 1.10 % and gains +0.4 points." in written
    assert "edgeml diff full.edgeml small.edgeml --data DATA --split validation --limit 64 --threads 2" in written
    check_page(to_html(made))


def test_a_difference_of_nonsense_is_shown_as_far_as_it_goes() -> None:
    for parts in (
        [{}],
        [None, 3],
        [{"name": "<b>", "error": "x", "state_error": [1], "alone_error": True}],
        "abc",
        [{"kind": "layer"}] * 4,
    ):
        check_page(to_html(document([reported.settings("diff") | {"diff": {"parts": parts, "worst": 3, "why": "<i>"}}])))


def test_transfer_says_what_interferes_and_what_is_undefined(page: str) -> None:
    table = next(part for part in re.findall(r"<table.*?</table>", page, re.S) if "Transfer in %" in part)
    assert re.findall(r'<td class="([^"]*)">([^<]*)', table) == [
        ("number", "100"),
        ("number h2", "\u221220"),
        ("number", "61"),
        ("number", "undefined"),
    ]
    assert "worse than no experts" in page


def test_what_was_timed_and_what_was_scored_are_not_mixed_up(records: list[dict[str, Any]]) -> None:
    other = reported.bench() | {"bundle_id": reported.FULL, "bundle": "other.edgeml"}
    assert "not what was scored" in document([other, reported.evaluation()]).about


def test_domains_say_why_they_have_no_figure_and_which_not_to_trust(page: str) -> None:
    assert "12 rows are too few" in page
    assert "near chance" in page
    record = reported.evaluation()
    record["eval"]["variants"][0]["domains"]["tiny"] |= {"n": 400, "reference_score": 0.055}
    assert "reference at chance" in to_html(document([record]), plotted=False)


def test_the_formulas_are_said_to_be_ours_wherever_they_are_printed(records: list[dict[str, Any]], page: str) -> None:
    for text in (page, to_markdown(document(records))):
        assert "edgeml" in text
        assert "own, not a standard" in text
        assert text.count("GG") > 1


@pytest.mark.parametrize(
    ("low", "value", "high", "says"),
    [(-0.01, 0.002, 0.012, "not measurably"), (0.01, 0.02, 0.03, "Brittle"), (-0.03, -0.02, -0.01, "less than")],
)
def test_the_gap_is_read_from_its_interval(low: float, value: float, high: float, says: str) -> None:
    record = reported.evaluation()
    record["eval"]["variants"] = record["eval"]["variants"][:1]
    record["eval"]["variants"][0]["gg"] = {"value": value, "low": low, "high": high, "n": 100}
    assert says in to_markdown(document([record]))


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_does_harm(name: str) -> None:
    made = document(hostile(name))
    page = to_html(made, plotted=False)
    outline = check_page(page)
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "\x00" not in page
    assert not any(tag in ("img", "script") for tag, _ in outline.elements)
    assert len(outline.all("h1")) == 1
    shown = clean(name)
    assert shown in outline.text()
    assert len(shown) <= 96
    written = to_markdown(made)
    assert not re.search(
        r"<[a-z/]|(?<!\\)\[x\]|@nobody", "\n".join(line for line in written.splitlines() if not line.startswith("edgeml "))
    )
    tables = [line for line in written.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) > 2 for line in tables)
    rows = list(csv.DictReader(io.StringIO(to_csv(made))))
    assert not any(value.startswith(("=", "+", "@")) for row in rows for value in row.values() if value)


@drawn
@pytest.mark.parametrize("name", ["".join(HOSTILE[:8]), HOSTILE[6] + HOSTILE[4]])
def test_no_name_does_harm_in_a_plot(name: str) -> None:
    check_page(to_html(document(hostile(name))))


def hostile(name: str) -> list[dict[str, Any]]:
    """Records whose every name is this one."""
    records = reported.everything()
    for record in records:
        record |= {"bundle": name, "backend": name, "residency": name, "memory": name, "task": name, "tool_version": name}
        record["device"] = {"cpu": name, "board": name, "kernel": name}
    evaluated = records[5]["eval"]
    evaluated["excluded"] = [name]
    for number_of, variant in enumerate(evaluated["variants"]):
        variant |= {"name": f"{name}{number_of}", "why": name, "domains": {name: variant["domains"]["law"], **variant["domains"]}}
    records[6]["profile"]["sites"][0]["name"] = name
    records[7]["routing"]["advice"] = name
    return records


def junk() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=True) | st.text(max_size=8)
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, found in inner:
        if not (isinstance(key, int) and key > 1):
            yield (*path, key)
            yield from places(found, (*path, key))


EVERYTHING = reported.everything()
PLACES = [place for place in places(EVERYTHING) if len(place) > 1 and place[1] != "kind"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PLACES), junk()), min_size=1, max_size=4))
def test_a_record_that_says_nonsense_is_a_page_all_the_same(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    records = copy.deepcopy(EVERYTHING)
    for (*way, last), value in changes:
        target: Any = records
        try:
            for key in way:
                target = target[key]
            target[last] = value
        except (KeyError, IndexError, TypeError):
            continue
    made = document(records)
    check_page(to_html(made, plotted=False))
    to_markdown(made)
    to_csv(made)


def test_markdown_and_page_have_the_same_tables(records: list[dict[str, Any]]) -> None:
    made = document(records)
    tables = [block for section in made.sections for block in section.blocks if isinstance(block, Table)]
    written = to_markdown(made)
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    assert len(rows) == len(made.tiles) + 1 + sum(1 + len(table.rows) for table in tables)


def test_the_commands_make_these_records_again() -> None:
    def commands(*records: dict[str, Any]) -> list[str]:
        shown = to_markdown(document(list(records))).split("```sh\n")[1].split("\n```")[0]
        return [line.removesuffix(" --records records.jsonl") for line in shown.splitlines()]

    sweep = [reported.bench(share=share, residency=residency) for share in (100, 50) for residency in ("exact", "masked")]
    begin, end = "edgeml bench small.edgeml --task banking77", "--threads 2 --iterations 200 --cold 5"
    assert commands(*sweep) == [f"{begin} --memory 100%,50% --residency exact,masked {end}"]
    assert commands(*sweep[:1], *sweep[3:]) == [f"{begin} --memory 100% {end}", f"{begin} --memory 50% --residency masked {end}"]
    (line,) = commands(reported.evaluation())
    assert "--also 'masked 50%,residency=masked' --also 'masked 0%,residency=masked' --domains-seen banking,finance,health" in line


def test_one_machine_that_told_more_later_is_one_machine() -> None:
    later = reported.bench() | {"device": reported.DEVICE | {"numpy": "2.4.6", "governor": None}}
    other = reported.bench() | {"device": reported.DEVICE | {"kernel": "6.12"}}
    written = to_markdown(document([reported.bench(), later]))
    assert "| part | this machine |" in written
    assert "| NumPy | 2.4.6 |" in written
    assert "| governor | not measured |" in written
    assert "| part | machine 1 | machine 2 |" in to_markdown(document([later, other]))


def test_every_number_of_a_record_is_in_the_csv(records: list[dict[str, Any]]) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(document(records)))))
    found = {(row["record"], row["metric"]): row for row in rows}
    assert found[("1", "latency_s.p50")]["value"] == "0.0123"
    assert found[("1", "peak_rss_bytes")]["kind"] == "bench"
    gap = found[("6", "eval.variants.1.gg")]
    assert float(gap["low"]) < float(gap["value"]) < float(gap["high"])
    assert gap["n"] == "8952"


def test_every_plot_has_words_for_it(records: list[dict[str, Any]]) -> None:
    pictures = [block for section in document(records).sections for block in section.blocks if isinstance(block, Plot)]
    assert {picture.name for picture in pictures} == {
        "pareto-size",
        "pareto-latency",
        "latency",
        "timeline-1",
        "memory",
        "usage-1",
        "hits-1",
    }
    assert all(re.search(r"\d", picture.alt) and len(picture.alt) > 40 for picture in pictures)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_frontier_is_what_nothing_beats(points_of: list[tuple[int, int]]) -> None:
    found = {points_of[place] for place in frontier(points_of)}
    oracle = {(x, y) for x, y in points_of if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points_of)}
    assert found == oracle


def test_names_of_configurations_are_what_differs_and_never_equal() -> None:
    names, shared = labels([reported.bench(), reported.bench(share=50), reported.bench(share=50)])
    assert names == ["100\u00a0% of experts", "50\u00a0% of experts (1)", "50\u00a0% of experts (2)"]
    assert shared.startswith("small, task banking77")
    other = reported.bench() | {"bundle": "other.edgeml", "task": "mood"}
    names, shared = labels([reported.bench(), other])
    assert names == ["small", "other"]
    assert "task" not in shared
    assert "2 threads" in shared


def test_figures_have_three_digits_a_unit_and_a_true_minus() -> None:
    assert [milliseconds(s) for s in (0.00123456, 0.0123, 1.5)] == ["1.23\u00a0ms", "12.3\u00a0ms", "1\u202f500\u00a0ms"]
    assert [number(x) for x in (0, 0.00012345, 99.96, 0.9999, 12345.6)] == ["0", "0.000123", "100.0", "1.000", "12\u202f346"]
    assert [points(x) for x in (0.0004, -0.0004, -0.012)] == ["0.0\u00a0points", "0.0\u00a0points", "\u22121.2\u00a0points"]
    assert [percent(None), mib(None), count(1234567.0)] == ["not measured", "not measured", "1\u202f234\u202f567"]
    assert mib(28672) == "0.03\u00a0MiB"
    assert interval({"value": 1, "low": None, "high": None, "n": 4}) == "no interval: too few examples"
    assert interval({"value": 1, "low": 0.5, "high": None, "n": 4}) == "at least 50.0"
    assert listed(list("abcdefgh")) == "a, b, c, d, e and 3 more"
    assert listed(["a"]) == "a"
    assert listed([]) == ""


def test_the_colours_of_cells_can_be_read(page: str) -> None:
    sheets = re.findall(r":root \{(.*?)\}", page, re.S)
    assert len(sheets) == 2
    for sheet in sheets:
        colour = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", sheet))
        pairs = [("ink", f"h{level}") for level in range(5)] + [
            ("strong", "h5"),
            ("ink", "surface"),
            ("muted", "surface"),
            ("muted", "page"),
        ]
        for front, back in [*pairs, ("surface", "s1"), ("s1", "page"), ("focus", "page"), ("warning", "surface")]:
            assert contrast(colour[front], colour[back]) >= 4.5, (front, back)
        for series in ("s1", "s2", "s3", "s4"):
            assert contrast(colour[series], colour["surface"]) >= 3, series


def contrast(one: str, other: str) -> float:
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05)."""

    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((light(one), light(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_the_records_made_by_hand_follow_the_published_schema() -> None:
    schema = Path(__file__).parents[2] / "docs" / "record.schema.json"
    validator = pytest.importorskip("jsonschema", reason="jsonschema is not installed").Draft202012Validator(
        json.loads(schema.read_text("utf-8"))
    )
    for record in [*reported.everything(), reported.kept(), reported.loaded()]:
        assert [error.message for error in validator.iter_errors(record)] == []


def test_nothing_of_the_page_is_elsewhere(page: str) -> None:
    found = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert {urlparse(address).netloc for address in found} <= {"www.w3.org"}  # the name of a namespace
