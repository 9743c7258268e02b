"""Where the time goes: lanes that add up, figures that agree with the session's own counters, and a trace that keeps the format's rules."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.cli import main
from edgeml.made import make_cnn
from edgeml.perfetto import Span, lane_times, own_times, write_trace
from edgeml.profile import EVENT, EVENT_KINDS, USAGE, Recorder, Round, operators, phase_figures
from edgeml.records import read
from edgeml.result import Counters

TEXT = "a warm and sunny day by the sea"


@pytest.fixture(scope="module")
def told(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What `edgeml profile` recorded, the trace it wrote, and their folder."""
    place = tmp_path_factory.mktemp("profile")
    options = ["--task", "mood", "--memory", "50%", "--threads", "2", "--iterations", "6", "--cold", "2", "--idle", "0", "--tokens", "9"]
    assert main(["profile", str(toy), *options, "--trace", str(place / "t.json"), "--records", str(place / "r.jsonl"), "--quiet"]) == 0
    (record,) = read(place / "r.jsonl")
    return record["profile"], json.loads((place / "t.json").read_text()), place


def test_figures_agree_with_each_other(told: tuple[dict[str, Any], dict[str, Any], Path]) -> None:
    profile = told[0]
    assert profile["lost_events"] == 0
    assert profile["cold"]["rounds"] == 2
    assert profile["warm"]["rounds"] == 6
    for phase in (profile["cold"], profile["warm"]):
        stages, sites = phase["stages"], phase["sites"]
        whole = phase["prepare_s"] + phase["between_s"] + sum(stage["time_s"] for stage in stages)
        assert whole == pytest.approx(phase["wall_s"], rel=1e-9)
        assert [stage["name"] for stage in stages] == ["embed", "router_mood", "trunk", "head_mood"]
        for stage in stages:
            parts = sum(stage[key] for key in ("experts_s", "wait_s", "dense_s", "rows_s", "graph_s"))
            assert stage["calls"] == phase["rounds"]
            assert parts == pytest.approx(stage["time_s"], rel=1e-9)
            assert min(stage[key] for key in ("experts_s", "wait_s", "dense_s", "rows_s", "graph_s")) >= 0
        for key in ("hits", "misses"):
            assert sum(site[key] for site in sites) == phase[key]
        for site in sites:
            assert site["calls"] == phase["rounds"]
            for key in ("hits", "misses", "page_in_bytes"):
                assert sum(expert[key] for expert in site["experts"]) == site[key]
            assert site["expert_calls"] == [expert["tokens"] for expert in site["experts"] if not expert["shared"]]
            assert sum(site["expert_calls"]) > 0
    assert profile["cold"]["misses"] > 0
    assert profile["cold"]["sites"][0]["page_in_bytes"] > 0
    assert profile["valid"] is not bool(profile["throttled"])
    assert {"page_ins", "sites", "lanes", "energy", "frequency_hz", "operators"} <= set(profile)


def test_lanes_add_up_to_the_wall(told: tuple[dict[str, Any], dict[str, Any], Path]) -> None:
    names = {lane["name"].split()[0] for lane in told[0]["lanes"]}
    assert {"requests", "compute", "reader", "scheduler"} <= names
    for lane in told[0]["lanes"]:
        assert lane["busy_s"] >= 0
        assert lane["wait_s"] >= 0
        assert lane["idle_s"] >= 0
        assert lane["busy_s"] + lane["wait_s"] + lane["idle_s"] == pytest.approx(lane["wall_s"], rel=0.02)


def test_operators_are_on_our_clock(told: tuple[dict[str, Any], dict[str, Any], Path]) -> None:
    operators = told[0]["operators"]
    assert {entry["operator"] for entry in operators["by_type"]} >= {"PagedExperts", "EmbedRows"}
    assert 0 <= operators["clock_uncertainty_s"] < 1
    assert operators["rounds"] == 10
    explained = sum(entry["share"] for entry in operators["by_type"]) + operators["prepare_share"]
    assert 0 < explained <= 1.02
    assert operators["unexplained_share"] == pytest.approx(1 - explained)
    trunk = next(entry for entry in operators["by_type"] if entry["operator"] == "PagedExperts")
    assert trunk["calls"] == 10 * 2  # rounds times sites


@pytest.mark.parametrize("shift", [0, 10**18, -(10**15)])
def test_the_offset_of_another_clock_is_found(toy: Path, tmp_path: Path, shift: int) -> None:
    """Runs inside stages, told by a clock that began elsewhere and counts whole microseconds."""
    draw = random.Random(shift)
    with edgeml.open(toy, threads=1) as session:
        recorder, told, at = Recorder(session), [], 5_000_000
        for _ in range(20):
            begin, lead, run, tail = at, draw.randint(2_000, 30_000), draw.randint(50_000, 90_000), draw.randint(2_000, 30_000)
            recorder.stages.append(Span("", "trunk", "stage", begin, begin + lead + run + tail, {"thread": 1}))
            recorder.phases["operators"].append(Round(begin - 500, begin + lead + run + tail + 500, Counters(), dict.fromkeys(USAGE, 0)))
            started = begin + lead + shift
            told += [("Node", "MatMul_kernel_time", started + 10_000, 20_000), ("Session", "model_run", started, run)]
            at += 200_000
        file = tmp_path / "trunk.json"
        entries = [
            {"cat": cat, "name": name, "ph": "X", "ts": when // 1000, "dur": took // 1000, "args": {"op_name": "MatMul"}}
            for cat, name, when, took in told
        ]
        file.write_text(json.dumps(entries))
        found = operators(recorder, {"trunk": str(file), "never": str(file)}, None)
    assert found is not None
    assert found["clock_uncertainty_s"] < 20e-6
    assert found["by_type"][0]["calls"] == 20
    assert found["by_type"][0]["time_s"] == pytest.approx(20 * 20e-6)
    for (_, _, when, _), span in zip(told[::2], recorder.extra, strict=True):
        assert abs(span.begin_ns - (when - shift)) <= 1000 * (1e6 * found["clock_uncertainty_s"] + 2)


def rules(trace: dict[str, Any]) -> None:
    """The Trace Event Format, as far as we use it."""
    lanes: dict[tuple[int, int], list[dict[str, Any]]] = {}
    named, begun, last = set(), {}, {}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert event["name"]
        assert event["ph"] in "MXbe"
        assert {"pid", "tid"} <= set(event)
        place = (event["pid"], event["tid"])
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            if event["name"] == "thread_name":
                assert place not in named
                assert event["args"]["name"]
                named.add(place)
            continue
        assert place in named
        assert event["ts"] >= 0
        assert isinstance(event["cat"], str)
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= last.get(place, 0)
            last[place] = event["ts"]
            lanes.setdefault(place, []).append(event)
        elif event["ph"] == "b":
            assert (event["cat"], event["id"]) not in begun
            begun[event["cat"], event["id"]] = event["ts"]
        else:
            assert event["ts"] >= begun.pop((event["cat"], event["id"]))
    assert not begun
    for events in lanes.values():  # after another or inside it
        ends: list[float] = []
        for event in events:
            while ends and ends[-1] <= event["ts"] + 1e-6:
                ends.pop()
            assert not ends or event["ts"] + event["dur"] <= ends[-1] + 1e-3
            ends.append(event["ts"] + event["dur"])


def test_the_trace_keeps_the_rules(told: tuple[dict[str, Any], dict[str, Any], Path]) -> None:
    trace = told[1]
    rules(trace)
    lanes = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert {"requests", "compute 0", "reader 0", "scheduler", "submitted", "onnxruntime"} <= lanes
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"cold", "warm", "trunk", "site layer.0", "job layer.0", "read layer.1", "checksum layer.1"} <= names
    assert sum(event["ph"] == "b" for event in trace["traceEvents"]) == 12


def test_the_recorder_sees_what_the_session_counts(toy: Path) -> None:
    with edgeml.open(toy, memory="25%", threads=1) as session:
        recorder = Recorder(session)
        quiet = session.run("mood", text=TEXT)
        recorder.start()
        before = session.stats()
        recorder.rounds("warm", lambda _: session.run("mood", text=TEXT).counters, 5, session.evict_all)
        session._context.settle()
        recorder.stop()
        after, figures = session.stats(), phase_figures(recorder, "warm")
        assert figures is not None
        assert phase_figures(recorder, "cold") is None
        assert figures["hits"] == after["hits"] - before["hits"]
        assert figures["misses"] == after["misses"] - before["misses"]
        spans = recorder.spans()
        assert sum(span.about["bytes"] for span in spans if span.kind == "read") == after["page_in_bytes"] - before["page_in_bytes"]
        again = session.run("mood", text=TEXT)  # nothing is noted any more
        recorder.drain()
        assert len(recorder.spans()) == len(spans)
        assert quiet.scores is not None
        assert again.scores is not None
        assert np.array_equal(quiet.scores, again.scores)


def test_events_that_find_no_room_are_counted(toy: Path) -> None:
    with edgeml.open(toy, threads=1) as session:
        session._context.note_events(4)
        session.run("mood", text=TEXT)
        session._context.note_events(0)
        events, lost = session._context.events()
        assert len(events) == 4 * EVENT.itemsize
        assert lost > 10
        assert session._context.events()[0] == b""


def test_the_events_are_those_of_the_header() -> None:
    header = (Path(__file__).parents[2] / "native" / "include" / "edgeml.h").read_text()
    kinds = header.split("typedef enum edgeml_event_kind {")[1].split("}")[0]
    assert tuple(name.lower() for name in re.findall(r"EDGEML_EVENT_(\w+)", kinds)) == EVENT_KINDS[1:]
    fields = header.split("typedef struct edgeml_event {")[1].split("}")[0]
    names = re.findall(r"\w+(?=[,;])", re.sub(r"/\*.*?\*/", "", fields))
    assert tuple(names) == EVENT.names[:-1]


def test_own_times_against_a_plain_count() -> None:
    """Random nests: each moment belongs to the innermost span that covers it."""
    draw = random.Random(0)
    for _ in range(50):
        spans: list[Span] = []

        def nest(begin: int, end: int, depth: int, spans: list[Span] = spans) -> None:
            at = begin
            while at < end and draw.random() < 0.8:
                first = draw.randint(at, end)
                last = draw.randint(first, end)
                if last > first:
                    spans.append(Span("lane", str(len(spans)), draw.choice(["job", "wait"]), first, last))
                    if depth:
                        nest(first, last, depth - 1)
                at = last

        nest(0, 60, 3)
        draw.shuffle(spans)
        counted = dict.fromkeys((span.name for span in spans), 0)
        for moment in range(60):
            inner = [span for span in spans if span.begin_ns <= moment < span.end_ns]
            if inner:  # those inside were made later; a span as long as its outer one shares its moments with it either way
                counted[max(inner, key=lambda span: (span.begin_ns, -span.end_ns, int(span.name))).name] += 1
        found = {span.name: own for span, own, _ in own_times(spans)}
        assert sum(found.values()) == sum(counted.values())
        distinct = {(span.begin_ns, span.end_ns) for span in spans}
        if len(distinct) == len(spans):
            assert found == counted
        for lane in lane_times(spans):
            assert lane["busy_s"] + lane["wait_s"] + lane["idle_s"] == pytest.approx(lane["wall_s"])


def test_overlapping_spans_do_not_add_up() -> None:
    (lane,) = lane_times([Span("a", "x", "job", 0, 60), Span("a", "y", "job", 30, 100)])
    assert lane["busy_s"] + lane["idle_s"] != pytest.approx(lane["wall_s"], rel=0.02) or lane["busy_s"] < 0
    assert lane_times([]) == []


def test_networks_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_cnn(tmp_path / "cnn.edgeml")
    trace = tmp_path / "t.json"
    options = ["--task", "digit,garment", "--iterations", "3", "--idle", "0", "--trace", str(trace), "--json", "--quiet"]
    assert main(["profile", str(tmp_path / "cnn.edgeml"), *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cold"] is None
    assert document["sites"] == []
    assert document["page_ins"] == []
    assert len(document["warm"]["stages"]) == 3  # the backbone once, two heads
    rules(json.loads(trace.read_text()))


def test_the_table_reads_well(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["profile", str(toy), "--task", "mood", "--iterations", "2", "--cold", "1", "--no-operators", "--idle", "0", "--text", TEXT])
        == 0
    )
    printed = capsys.readouterr().out
    for part in (
        "cold: 1 rounds",
        "warm: 2 rounds",
        "stage trunk",
        "between stages",
        "page faults",
        "lane",
        "energy",
        "throttling",
        "site",
    ):
        assert part in printed, part
    assert "operator of onnxruntime" not in printed


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--task", "mod"], 2, "mood"),
        (["--task", "mood", "--trace", "nowhere/t.json"], 3, "there is no folder"),
        (["--task", "mood", "--records", "nowhere/r.jsonl"], 3, "there is no folder"),
        (["--task", "mood", "--tokens", "100000"], 2, "reads at most"),
        (["--task", "mood", "--residency", "none"], 2, "none"),
        (["--task", "mood", "--idle", "nan"], 2, "nan is no finite number"),
        (["--task", "mood", "--text-pair", "a"], 2, "--text"),
        (["--task", "mood", "--memory", "1KiB"], 2, "floor"),
    ],
)
def test_bad_input_is_one_sentence(toy: Path, options: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = main(["profile", str(toy), *options])
    said = capsys.readouterr().err
    assert found in (code, 3, 4)
    assert sentence in said
    assert said.count("\n") == 1
    assert "Traceback" not in said


def test_what_was_measured_is_printed_and_recorded_where_the_trace_cannot_be_written(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t").mkdir()
    asked = ["profile", str(toy), "--task", "mood", "--iterations", "2", "--cold", "1", "--no-operators", "--idle", "0", "--text", TEXT]
    assert main([*asked, "--trace", str(tmp_path / "t"), "--records", str(tmp_path / "r.jsonl"), "--json"]) == 4
    shown = capsys.readouterr()
    assert "the trace cannot be written" in shown.err
    (record,) = read(tmp_path / "r.jsonl")
    assert record["profile"] == json.loads(shown.out)


def test_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(edgeml.errors.DeviceError, match="cannot be written"):
        write_trace(tmp_path, [Span("a", "x", "job", 0, 1)], {})
    assert list(tmp_path.parent.glob("*.partial")) == []
