"""Profiles, graph counts, the played pager and the sums of a prediction: against counts by hand, and against a running session."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from edgeml_devices.fit import fit_bundle
from hypothesis import given
from hypothesis import strategies as st
from native_case import EXPERTS, HIDDEN, SITES, make_case

from edgeml.bundle import Bundle
from edgeml.device import FIGURES, Figure, Profile, parse_profile, read_profile, write_profile
from edgeml.errors import BudgetError, BundleError, DataError, UsageError
from edgeml.graph_bytes import Node, graph
from edgeml.graph_cost import graph_cost
from edgeml.layout import WeightType
from edgeml.made import TOY, make_cnn, make_mixture
from edgeml.manifest import load_manifest
from edgeml.native import Context
from edgeml.predict import STRUCTURE, page_seconds, routing_of
from edgeml.predict_pages import Medium, Pager, draw_choices, inclusion
from edgeml.session import open as open_session
from edgeml.variants import Wish

ROUND = {
    "cpu.cores": 2, "cpu.parallel_share": 1, "memory.usable_bytes": 1 << 30, "memory.read_bytes_per_s": 1e10,
    "kernels.int4_macs_per_s": 1e9,
    "kernels.int8_macs_per_s": 1e9, "kernels.f32_macs_per_s": 1e9, "kernels.int4_stream_bytes_per_s": 1e12,
    "kernels.int8_stream_bytes_per_s": 1e12, "kernels.values_per_s": 1e12, "kernels.activations_per_s": 1e12,
    "graphs.matmul_macs_per_s": 1e9, "graphs.conv_macs_per_s": 1e9, "graphs.conv_int8_macs_per_s": 2e9, "graphs.values_per_s": 1e12,
    "graphs.node_s": 1e-6, "process.request_s": 1e-3, "process.bytes": 50 << 20, "process.bytes_per_tokenizer_byte": 10,
    "process.bytes_per_graph_byte": 2, "storage.4k_qd1_bytes_per_s": 4096e2, "storage.1m_qd1_bytes_per_s": (1 << 20) * 50,
}  # fmt: skip


def profile(**changes: float) -> Profile:
    """A device of round figures: a read of 4 KiB takes 10 ms, one of 1 MiB 20 ms."""
    figures = {key: Figure(float(value), "made for a test") for key, value in ROUND.items()}
    for key, value in changes.items():
        full = key.replace("__", ".")
        figures[full] = Figure(value, "assumed: for a test", value / 2, value * 2, True)
    return Profile("made", "A made device", "aarch64", figures)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predict") / "toy.edgeml"
    make_mixture(path, layers=3, experts=12, top_k=2)
    return path


# ---- profiles ----


def test_a_profile_survives_writing_and_reading() -> None:
    made = replace(profile(graphs__node_s=2e-6), notes=('a "note" with \\ and é',), aliases=("other-name",), kernel_set="neon")
    assert parse_profile(write_profile(made), "here") == made


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('[kernels]\nint8_macs_per_s = { value = 3, source = "x" }', r"kernels\.int8_macs_per_s'.*value is 3.*from 1e\+06 to 1e\+14"),
        ('[memory]\nusable_bytes = { value = true, source = "x" }', "must be a number"),
        ('[memory]\nusable_bytes = { value = nan, source = "x" }', "must be a number"),
        ("[memory]\nusable_bytes = { value = 1e9 }", "source = TEXT"),
        ("[memory]\nusable_bytes = 1e9", "source = TEXT"),
        ('[memory]\nusable_bytes = { value = 1e9, low = 2e9, source = "x" }', "outside its own range"),
        ('[memory]\nusable_bytes = { value = 1e9, source = "x", assumed = 1 }', "true or false"),
        ('[memory]\nsize = { value = 1e9, source = "x" }', r"unknown key 'memory\.size'"),
        ("speed = 3", "unknown key 'speed'"),
        ('aliases = ["Pi 4"]', "lower-case"),
        ('notes = "one"', "list of texts"),
        ("[memory", "not TOML"),
    ],
)
def test_a_bad_profile_is_a_sentence(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('schema = 1\nname = "made"\ntitle = "Made"\narchitecture = "x"\n' + line + "\n")
    with pytest.raises(DataError, match=said) as raised:
        read_profile(file)
    assert str(file) in str(raised.value)


def test_a_profile_needs_its_schema_and_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="schema = 1"):
        parse_profile(b"schema = 2\n", "x")
    with pytest.raises(DataError, match="'title' is missing"):
        parse_profile(b'schema = 1\nname = "made"\n', "x")
    with pytest.raises(DataError, match="cannot be read"):
        read_profile(tmp_path / "none.toml")
    with pytest.raises(DataError, match="not TOML"):
        parse_profile(b"\xff", "x")
    with pytest.raises(UsageError, match=r"does not say graphs\.node_s"):
        Profile("made", "Made", "x", {}).need("graphs.node_s")


def test_every_key_says_what_it_is() -> None:
    for key, (least, most, meaning) in FIGURES.items():
        assert least < most, key
        assert meaning, key


# ---- graphs ----


def test_a_graph_is_counted() -> None:
    nodes = [
        Node("MatMul", ["x", "w"], ["a"]),
        Node("MatMul", ["a", "a"], ["b"]),
        Node("Add", ["b", "c"], ["d"]),
        Node("QuantizeLinear", ["d", "c", "c"], ["e"]),
        Node("Reshape", ["e", "c"], ["y"]),
    ]
    weights = {"w": np.zeros((5, 7), np.float32), "c": np.zeros(7, np.float32)}
    data = graph(nodes, {"x": ("float32", ("B", 5))}, {"y": ("float32", ("B", 7))}, weights, {"": 17})
    cost = graph_cost(data)
    assert (cost.nodes, cost.wide, cost.weight_macs, cost.products, cost.convolutions) == (4, 1, 35, 1, 0)
    assert cost.bytes == len(data)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_graph_are_refused_or_counted(data: bytes) -> None:
    with suppress(BundleError):
        assert graph_cost(data).bytes == len(data)


# ---- pages ----


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.data())
def test_chances_add_up_to_the_experts_a_token_uses(usage: list[float], data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, len(usage)))
    chance = inclusion(np.array(usage), top_k)
    assert ((chance >= 0) & (chance <= 1)).all()
    positive = int((np.array(usage) > 0).sum())
    if positive >= top_k and min(value for value in usage if value > 0) > 1e-6:
        assert chance.sum() == pytest.approx(top_k)


def test_tokens_choose_as_often_as_their_chance_says() -> None:
    chance = inclusion(np.array([8, 4, 2, 1, 1, 0.5]), 2)
    counts = draw_choices(chance, 2, 20000, 0.0, np.random.default_rng(0))
    assert counts.sum() == 40000
    assert np.abs(counts / 20000 - chance).max() < 0.05
    assert (draw_choices(chance, 2, 50, 1.0, np.random.default_rng(0)) > 0).sum() == 2  # all tokens alike


def test_everything_in_slots_is_read_once() -> None:
    pager = Pager(2, 8, Medium(0.01, 0.005))
    every = [list(range(4)), list(range(4, 8))]
    visits = [dict.fromkeys(pages, 0.001) for pages in every]
    first, second = (pager.request(visits, every, 0.0, 0.0) for _ in range(2))
    assert (first.misses, first.read, second.hits, second.read) == (8, 8, 8, 0)
    assert second.seconds == pytest.approx(0.008)
    assert first.seconds > 8 * 0.005


def test_what_does_not_fit_is_read_again_and_waited_for() -> None:
    every = [list(range(4)), list(range(4, 8))]
    visits = [dict.fromkeys(pages, 0.0001) for pages in every]
    pager = Pager(2, 1, Medium(0.01, 0.01))
    costs = [pager.request(visits, every, 0.0, 0.0) for _ in range(5)]
    assert all(cost.hits + cost.misses == 8 and cost.read >= 7 for cost in costs)
    assert costs[-1].waited_s == pytest.approx(costs[-1].seconds, rel=0.1)
    assert pager.held == 1


@pytest.mark.parametrize("slots", [5, 8, 12])
def test_the_played_pager_is_the_real_one(slots: int, tmp_path: Path) -> None:
    """Without reading ahead nothing depends on time: every request finds and misses as many pages."""
    case, rng, chance = make_case(tmp_path), np.random.default_rng(3), np.array([8, 5, 3, 2, 1, 1, 0.5, 0.5]) / 21
    asked = [[sorted(rng.choice(EXPERTS, 3, replace=False, p=chance)) for _ in range(SITES)] for _ in range(48)]
    every = [[site * EXPERTS + expert for expert in range(EXPERTS)] for site in range(SITES)]
    played = Pager(SITES, slots, Medium(1.0, 0.5), ahead=0)
    with case.open(slots=slots, ahead=0) as context:
        for row in asked:
            said = played.request([{site * EXPERTS + e: 1e-6 for e in used} for site, used in enumerate(row)], every, 0.0, 0.0)
            with context.request() as request:
                for site, used in enumerate(row):
                    context.experts(site, np.ones((1, HIDDEN), np.float32), np.array([used]), np.ones((1, 3), np.float32))
            assert (said.hits, said.misses) == (request.hits, request.misses)
            assert said.read == said.misses
    assert played.held == slots


def test_a_prediction_misses_about_as_often_as_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From usage to misses. What is read ahead is there in time or not, as the machine has it at that moment: so the session's
    misses lie between what is played for a medium that answers at once and one that is always late, and are met without it."""
    path = tmp_path / "m.edgeml"
    make_mixture(path, layers=4, experts=16, hidden=64, top_k=2, vocabulary=256)
    ids, reads = np.random.default_rng(5).integers(0, 256, (24, 1, 32)), ("storage__4k_qd1_bytes_per_s", "storage__1m_qd1_bytes_per_s")

    def measured() -> tuple[float, float]:
        with open_session(path, memory="25%", threads=1) as session:
            done = [session.run("weather", arrays={"ids": row}).counters for row in ids][8:]
        return sum(one.hits + one.misses for one in done) / len(done), sum(one.misses for one in done) / len(done)

    def predicted(bytes_per_s: float) -> tuple[float, float]:
        with Bundle.open(path) as bundle:
            device = profile(**dict.fromkeys(reads, bytes_per_s))
            found = fit_bundle(bundle, load_manifest(bundle), device, task="weather", memory="25%", tokens=32, threads=1).prediction
        return found.hits + found.misses, found.misses

    asked, missed = measured()
    (_, at_once), (wanted, late) = predicted(1e11), predicted(1e5)
    assert wanted == pytest.approx(asked, rel=0.1)
    assert at_once < 0.7 * late, "reading ahead is worth something where the medium is quick"
    assert 0.9 * at_once < missed < 1.1 * late
    monkeypatch.setitem(Context.__init__.__kwdefaults__, "ahead", 0)
    monkeypatch.setattr("edgeml.predict.Pager", partial(Pager, ahead=0))
    assert predicted(1e5)[1] == pytest.approx(measured()[1], rel=0.1)


# ---- sums ----


def test_dense_layers_are_multiply_adds_over_a_rate(toy: Path) -> None:
    with Bundle.open(toy) as bundle:
        manifest = load_manifest(bundle)
        found = fit_bundle(bundle, manifest, profile(), tokens=16, threads=1, memory="100%").prediction
        macs = 16 * sum(m.rows * m.cols for page in bundle.pages if page.kind.name == "LINEAR" for m in page.matrices)
        site = manifest.sites[0]
        expert = sum(m.rows * m.cols for m in bundle.pages[site.experts[0].page].matrices)
    terms = {term.name: term.seconds for term in found.terms}
    assert terms["dense layers"] == pytest.approx(macs / 1e9, rel=0.01)
    assert terms["experts"] == pytest.approx(3 * 16 * (2 + 1) * expert / 1e9, rel=0.05)
    assert found.latency_s.value == pytest.approx(sum(terms.values()))
    assert found.page_in_bytes.value == 0
    assert not found.assumed


def test_two_threads_share_the_kernels_and_nothing_else(toy: Path) -> None:
    with Bundle.open(toy) as bundle:
        manifest = load_manifest(bundle)
        one, two = (fit_bundle(bundle, manifest, profile(), threads=count, memory="100%").prediction for count in (1, 2))
    alone, shared = ({term.name: term.seconds for term in found.terms} for found in (one, two))
    assert shared["dense layers"] == pytest.approx(alone["dense layers"] / 2)
    assert shared["request"] == alone["request"]


def test_an_assumed_rate_widens_the_interval_and_is_listed(toy: Path) -> None:
    with Bundle.open(toy) as bundle:
        manifest = load_manifest(bundle)
        exact = fit_bundle(bundle, manifest, profile(), memory="100%").prediction.latency_s
        found = fit_bundle(bundle, manifest, profile(kernels__int8_macs_per_s=1e9, graphs__conv_macs_per_s=1e9), memory="100%").prediction
    assert list(found.assumed) == ["kernels.int8_macs_per_s"]  # convolutions had no part in it
    assert exact.low == pytest.approx(exact.value * (1 - STRUCTURE))
    assert found.latency_s.low < exact.low < exact.high < found.latency_s.high
    assert found.as_json()["assumed"]["kernels.int8_macs_per_s"]["source"].startswith("assumed")


def test_less_memory_costs_reads_and_masking_none(toy: Path) -> None:
    with Bundle.open(toy) as bundle:
        manifest = load_manifest(bundle)
        full, quarter = (fit_bundle(bundle, manifest, profile(), memory=memory, threads=1) for memory in ("100%", "25%"))
        masked = fit_bundle(bundle, manifest, profile(), memory="25%", residency="masked", threads=1)
    assert quarter.prediction.latency_s.value > full.prediction.latency_s.value
    assert quarter.prediction.page_in_bytes.value > 0
    assert quarter.prediction.peak_memory_bytes.value < full.prediction.peak_memory_bytes.value
    assert masked.prediction.page_in_bytes.value == masked.prediction.wait_s == 0
    assert "mask" in quarter.advice
    assert "everything fits" in full.advice


def test_read_times_lie_between_the_blocks_that_were_measured() -> None:
    assert page_seconds(profile(), 4096, 1) == pytest.approx(0.01)
    assert page_seconds(profile(), 1 << 20, 2) == pytest.approx(0.02)  # no depth of 2 is known: that of 1
    assert 0.01 < page_seconds(profile(), 1 << 19, 1) < 0.02
    assert page_seconds(profile(), 1 << 21, 1) == pytest.approx(0.04)


def test_traces_tell_the_chances_and_the_agreement(toy: Path) -> None:
    with Bundle.open(toy) as bundle:
        manifest = load_manifest(bundle)
    alike = [np.tile(np.array([[[0, 1]] * 3]), (20, 1, 1)), np.tile(np.array([[[2, 3]] * 3]), (20, 1, 1))]
    found = routing_of(manifest, alike)
    assert found.agreement > 0.8
    assert found.chance[0][:4] == pytest.approx([0.5] * 4, abs=0.01)


def test_what_cannot_be_predicted_is_said(toy: Path, tmp_path: Path) -> None:
    small = profile()
    small = replace(small, figures={**small.figures, "memory.usable_bytes": Figure(float(161 << 20), "x")})
    with Bundle.open(toy) as bundle:
        manifest = load_manifest(bundle)
        with pytest.raises(UsageError, match="reads 1 to 64 tokens"):
            fit_bundle(bundle, manifest, profile(), tokens=65)
        with pytest.raises(UsageError, match="no task 'x'"):
            fit_bundle(bundle, manifest, profile(), task="x")
        with pytest.raises(UsageError, match="not 'hybrid'"):
            fit_bundle(bundle, manifest, profile(), residency="hybrid")
        lacking = {key: figure for key, figure in profile().figures.items() if not key.startswith("storage")}
        with pytest.raises(UsageError, match="does not say storage"):
            fit_bundle(bundle, manifest, replace(profile(), figures=lacking), memory="25%")
    make_mixture(tmp_path / "big.edgeml", replace(TOY, hidden=512, width=2048, expert_type=WeightType.F32))
    with Bundle.open(tmp_path / "big.edgeml") as bundle, pytest.raises(BudgetError, match="fewer bits, or prune"):
        fit_bundle(bundle, load_manifest(bundle), small)


def test_a_network_for_images_is_its_multiply_adds(tmp_path: Path) -> None:
    make_cnn(tmp_path / "cnn.edgeml", variants=("full", "small"))
    with Bundle.open(tmp_path / "cnn.edgeml") as bundle:
        manifest = load_manifest(bundle)
        smallest = min(manifest.variants, key=lambda variant: variant.macs)
        found = fit_bundle(bundle, manifest, profile(), threads=1, wish=Wish(variant=smallest.name))
    assert {term.name: term.seconds for term in found.prediction.terms}["convolutions"] == pytest.approx(smallest.macs / 1e9)
    assert found.tokens is None
