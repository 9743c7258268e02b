"""The section about other machines: measured beside predicted, emulation with its limits, one row for each configuration of a device."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

pytest.importorskip("edgeml_report", reason="the distribution edgeml-report is not installed")

import reported
from edgeml_report import document, to_csv, to_html, to_markdown
from metrics_page import undefined


def span(value: float) -> dict[str, Any]:
    return {"value": value, "low": value / 2, "high": 2 * value, "n": None}


def predicted(**changes: Any) -> dict[str, Any]:
    said = {"profile": "raspberry-pi-5-8gb", "latency_s": span(0.0131), "peak_memory_bytes": span(91 << 20), "page_in_bytes": span(0)}
    return said | {"assumed": ["graphs.node_s", "cpu.parallel_share"], "why": None} | changes


def pulled(to: str, **changes: Any) -> dict[str, Any]:
    return reported.bench() | {"to": to, "device_run": {"predicted": predicted()}} | changes


def emulated(**changes: Any) -> dict[str, Any]:
    limits = {"held": ["a memory cap of 340 MiB, page cache included"], "not_held": ["the device has 4 cores, and this machine gives 2"]}
    run = {"profile": "raspberry-pi-zero-2-w", "emulated": True, **limits, "group_peak_bytes": 70 << 20, "scale": span(17)}
    run |= {"scaled_latency_s": span(0.2091), "predicted": predicted(profile="raspberry-pi-zero-2-w")}
    return reported.bench() | {"kind": "device", "device_run": run | changes}


def section(records: list[dict[str, Any]]) -> str:
    return to_markdown(document(records)).split("## Devices")[1].split("\n## ")[0]


def rows(records: list[dict[str, Any]]) -> list[list[str]]:
    lines = [line for line in section(records).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_device_is_a_row_with_its_prediction() -> None:
    heads, first, second = rows([pulled("pi@garden"), pulled("adb:phone", backend="numpy")])
    assert heads[:5] == ["device", "processor, kernels", "p50 ms", "p95 ms", "predicted ms"]
    assert (first[0], second[0]) == ("pi&#64;garden", "adb:phone")
    assert first[1] == "Raspberry Pi 5 Model B Rev 1.0 (neon)"
    assert "NumPy (pure wheel)" in second[1]
    assert first[2].startswith("12.3 (11.9")
    assert first[4] == "13.1 (6.55\u00a0to\u00a026.2)"
    assert first[6].startswith("91.0 (45.5")
    assert first[7] == "not measured"


def test_a_profile_of_the_same_machine_and_settings_tells_the_energy() -> None:
    drawn = reported.settings("profile") | {"to": "pi", "profile": {"energy": {"energy_j": 12.5, "mean_w": 4.1}}}
    assert rows([pulled("pi"), drawn])[1][7] == "12.5\u00a0J (a whole profile, 4.10\u00a0W)"
    assert rows([pulled("other"), drawn])[1][7] == "not measured"


def test_an_emulated_run_says_what_held_and_that_it_is_scaled() -> None:
    _, row = rows([emulated()])
    assert row[0] == "raspberry-pi-zero-2-w (emulated)"
    assert row[2] == "209 (105\u00a0to\u00a0418, scaled; 12.3 here)"
    assert row[3] == "not measured"
    text = section([emulated()])
    assert "held were a memory cap of 340 MiB, page cache included" in text
    assert "Not held: the device has 4 cores" in text
    assert "scaled by 17.0 (8.50\u00a0to\u00a034.0), not emulated" in text
    assert "2 figures behind a prediction for raspberry-pi-zero-2-w: assumed" in text
    alone = section([emulated(scaled_latency_s=None, scale=None, held=[], not_held=[])])
    assert "no limits" in alone
    assert "was not scaled" in alone


def test_what_is_not_predicted_says_why() -> None:
    nothing = predicted(latency_s=None, peak_memory_bytes=None, why="requests that overlap are not predicted", assumed=[])
    _, row = rows([pulled("pi", device_run={"predicted": nothing})])
    assert row[4] == "not predicted (requests that overlap are not predicted)"
    assert row[6] == "not predicted"
    assert rows([pulled("pi", device_run=None)])[1][4] == "not predicted"


@pytest.mark.parametrize(("second", "says"), [(0.91, "Each task scores the same"), (0.9, "Devices differ in tellers")])
def test_devices_that_score_otherwise_are_named(second: float, says: str) -> None:
    def scored(to: str, score: float) -> dict[str, Any]:
        return reported.settings("eval") | {"to": to, "eval": {"mean": score, "tasks": {"tellers": {"score": score}}}}

    text = section([scored("pi", 0.91), scored("phone", second)])
    assert says in text
    assert "| phone (small.edgeml) | neon | 1 task |" in text
    assert "on every device" not in section([scored("pi", 0.91)])


def test_without_devices_there_is_no_section() -> None:
    assert not [one for one in document([reported.bench()]).sections if one.name == "devices"]


def test_the_page_and_the_table_have_them_too() -> None:
    made = document([pulled("pi@garden"), pulled("pi<b>x"), emulated()])
    page = to_html(made)
    assert "pi@garden" in page
    assert "pi<b>" not in page
    found = list(csv.DictReader(io.StringIO(to_csv(made))))
    said = [row for row in found if row["metric"] == "device_run.predicted.latency_s"]
    assert [(row["to"], row["low"]) for row in said] == [("pi@garden", "0.00655"), ("pi<b>x", "0.00655"), ("", "0.00655")]


def test_the_commands_name_the_machine_and_the_emulated_device() -> None:
    text = to_markdown(document([pulled("pi@garden"), emulated()]))
    assert "edgeml device bench small.edgeml --task banking77 --memory 100% --threads 2 --to pi@garden" in text
    assert "edgeml device run --device raspberry-pi-zero-2-w --emulate small.edgeml" in text


def test_names_tell_machines_of_one_kind_apart() -> None:
    text = to_markdown(document([pulled("pi@garden"), pulled("pi@kitchen")]))
    assert "on pi&#64;kitchen" in text.split("## Latency")[1].split("## ")[0]


def test_every_key_is_defined() -> None:
    assert not undefined(pulled("pi"))
    assert not undefined(emulated())
