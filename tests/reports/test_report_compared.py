"""What a report compares: scores of one kind on the same rows, and a headline that claims no more than they say."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import reported
from edgeml_report import document, to_markdown
from edgeml_report.content import Document, Table
from edgeml_report.runs import frontier

NO_WIDTH = {"value": 1.0, "low": 1.0, "high": 1.0, "n": 120}


def on_other_rows(n: int = 40, **changes: Any) -> dict[str, Any]:
    """A later evaluation of the same bundle, of one task and without a reference."""
    one = reported.variant("exact", 0.0) | {"retention": None, "mean": 0.975, "reference_mean": None, **changes}
    one["tasks"] = {"snips": {"domain": "talk", "metric": "accuracy", "n": n, "chance": 0.1, "score": 0.975, "reference_score": None}}
    one["domains"] = {}
    return reported.settings("eval") | {"eval": {"variants": [one], "why": "no sets"}}


def tile(made: Document, question: str) -> Any:
    return next(one for one in made.tiles if one.question == question)


def tradeoffs(made: Document) -> tuple[Table, str]:
    section = next(one for one in made.sections if one.name == "tradeoffs")
    return next(block for block in section.blocks if isinstance(block, Table)), " ".join(str(block) for block in section.blocks)


@pytest.mark.parametrize("later", [True, False])
def test_scores_of_other_rows_replace_nothing_and_are_said_to_be_left_out(later: bool) -> None:
    records = [reported.bench(), reported.bench(share=50), reported.evaluation()]
    made = document([*records, on_other_rows()] if later else [on_other_rows(), *records])
    table, said = tradeoffs(made)
    assert [column.name for column in table.columns][1:4] == ["retention", "95 % interval", "mean score"]
    assert {row[1].text for row in table.rows} == {"100.0\u00a0%", "97.3\u00a0%", "87.0\u00a0%"}
    assert "97.5" not in " ".join(row[3].text for row in table.rows)
    assert "other rows and do not compare: exact (40 rows of snips)." in said
    assert "on 4\u202f900 rows of clinic and tellers" in made.about
    assert tile(made, "How much worse").answer == "0.1\u00a0points lost"


@pytest.mark.parametrize("way", ["no retention", "another reference"])
def test_one_column_has_one_kind_of_score(way: str) -> None:
    record = reported.evaluation()
    second = record["eval"]["variants"][1]
    if way == "no retention":
        second["retention"] = None
    else:
        second["tasks"]["clinic"]["reference_score"] = 0.7
    table, said = tradeoffs(document([reported.bench(), record]))
    assert [column.name for column in table.columns][1] == "mean score"
    assert [row[1].text for row in table.rows] == ["79.9\u00a0%", "78.8\u00a0%", "74.5\u00a0%"]
    assert "not all of them have a retention" in said
    assert "mean score in % against" in said


def test_the_same_variant_on_the_same_rows_counts_once_the_last() -> None:
    again = reported.evaluation()
    again["eval"]["variants"][0]["mean"] = 0.5
    table, _ = tradeoffs(document([reported.bench(), reported.evaluation(), again]))
    assert [row[3].text for row in table.rows] == ["50.0\u00a0%", "78.8\u00a0%", "74.5\u00a0%"]


def test_where_is_a_domain_whose_loss_is_sure() -> None:
    record = reported.evaluation()
    record["eval"]["variants"] = [reported.variant("masked", 0.03)]
    found = tile(document([record]), "Where")
    assert found.answer == "speech"
    assert "surely lost some" in found.detail
    assert tile(document([reported.evaluation()]), "Where").answer == "nowhere for sure"


def test_what_is_gained_is_not_lost() -> None:
    record = reported.evaluation()
    record["eval"]["variants"] = [reported.variant("better", -0.012)]
    assert tile(document([record]), "How much worse").answer == "1.2\u00a0points gained"


def test_rows_without_a_difference_have_no_interval_but_the_rule_of_three() -> None:
    record = reported.evaluation()
    one = reported.variant("half", 0.0) | {"retention": NO_WIDTH, "gg": {"value": 0.0, "low": 0.0, "high": 0.0, "n": 120}}
    one["domains"]["law"]["retention"] = NO_WIDTH | {"n": 40}
    record["eval"]["variants"] = [one]
    made = document([record])
    sure = tile(made, "How sure")
    assert sure.answer == "0 of 120 differ"
    assert "fewer than 2.5\u00a0% do, rule of three" in sure.detail
    written = to_markdown(made)
    assert "none of 40 differs (95 %: under 7.5\u00a0%)" in written
    assert "no interval: no answer of 120 differs" in written
    assert "\u00b10.0" not in written
    assert "100.0\u00a0to\u00a0100.0" not in written


def test_two_evaluations_and_two_profiles_say_which_they_are() -> None:
    other = copy.deepcopy(reported.evaluation()) | {"bundle": "other.edgeml", "bundle_id": reported.FULL}
    first, second = (reported.profile() | {"memory": share} for share in ("50%", "25%"))
    written = to_markdown(document([reported.evaluation(), other, first, second])).replace("\u00a0", " ")
    for index in ("DSI", "CDTR"):
        names = re.findall(rf"^\| {index}, (\S+)", written, re.M)
        assert names == ["small,", "other,"]
    captions = re.findall(r"^Transfer in %.*; (.*):$", written, re.M)
    assert len(captions) == len(set(captions)) == 2
    assert len(set(re.findall(r"^Experts by site, (.*):$", written, re.M))) == 2
    sentences = [line for line in written.splitlines() if "half of the bytes had come by" in line]
    assert len(sentences) == len({line.split(":")[0] for line in sentences}) == 2


def test_a_share_of_stand_ins_is_shown_and_a_dash_without() -> None:
    records = [reported.loaded() | {"stand_in_share": 0.125}, reported.loaded() | {"stand_in_share": None, "threads": 1}]
    rows = [line for line in to_markdown(document(records)).splitlines() if "| 400 |" in line]
    assert [row.split("|")[-2].strip() for row in rows] == ["12.5", "\u2013"]


def test_equals_are_on_the_frontier_together() -> None:
    assert frontier([(9, 1.0), (9, 1.0), (9, 0.9), (10, 1.0), (11, 1.2)]) == [0, 1, 4]
