"""Sessions on images: one backbone pass for all tasks, no head besides those asked, and the variant that was wished for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.bundle import Bundle, PageSource, write_bundle
from edgeml.errors import BundleError, DataError, UsageError
from edgeml.graph import check_stages
from edgeml.graph_bytes import Node, graph
from edgeml.image_requests import BATCH_IMAGES
from edgeml.layout import PageKind
from edgeml.made import make_cnn
from edgeml.manifest import load_manifest
from edgeml.variants import Wish, choose_variant, parse_seconds, with_variant


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cnn") / "digits.edgeml"
    make_cnn(path, filters=4)
    return path


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cnn") / "street.edgeml"
    make_cnn(path, "dense", filters=4)
    return path


def images(count: int, *shape: int) -> list[Any]:
    return list(np.random.default_rng(1).integers(0, 256, (count, *shape), np.uint8))


def count_runs(session: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []
    original = session._graphs.run
    monkeypatch.setattr(session._graphs, "run", lambda name, *rest: ran.append(name) or original(name, *rest))
    return ran


def test_one_task_runs_one_head(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with edgeml.open(digits, threads=1) as session:
        ran = count_runs(session, monkeypatch)
        result = session.run("garment", images=images(3, 36, 36))
        assert ran == ["backbone_full", "head_full_garment"]
        assert sorted(session._graphs._loaded) == sorted(ran)  # the other head was not even loaded
    assert result.scores is not None
    assert result.scores.shape == (3, 10)
    assert np.allclose(result.scores.sum(-1), 1, atol=1e-5)
    assert result.labels == [session.task("garment").labels[index] for index in result.scores.argmax(-1)]
    assert (result.truncated, len(result.row_s)) == ([False] * 3, 3)
    assert sum(result.row_s) <= result.latency_s


def test_several_tasks_share_one_pass(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = images(BATCH_IMAGES + 5, 36, 36)
    with edgeml.open(digits, threads=1) as session:
        alone = {name: session.run(name, images=given).scores for name in ("digit", "garment")}
        ran = count_runs(session, monkeypatch)
        together = session.run_many(["garment", "digit", "garment"], images=given)
        one = session.run("digit", images=given[-1:]).scores
    assert ran[:6] == ["backbone_full", "head_full_garment", "head_full_digit"] * 2  # two batches
    assert list(together) == ["garment", "digit"]
    for name, expected in alone.items():
        assert np.array_equal(together[name].scores, expected)  # type: ignore[arg-type]
    assert np.allclose(one, alone["digit"][-1:], atol=1e-5)  # type: ignore[index,arg-type]


def test_maps_are_classes_and_probabilities(street: Path) -> None:
    with edgeml.open(street, threads=1) as session:
        found = session.run_many(["segmentation", "edge"], images=images(2, 50, 70, 3))
        nothing = session.run_many(["segmentation", "edge"], images=[])
    classes, edges = found["segmentation"].maps, found["edge"].maps
    assert classes is not None
    assert edges is not None
    assert (classes.dtype, classes.shape, edges.dtype, edges.shape) == (np.uint8, (2, 24, 32), np.float32, (2, 24, 32))
    assert classes.max() < 4, "void is no answer"
    assert edges.min() >= 0
    assert edges.max() <= 1
    assert (found["edge"].labels, found["edge"].scores) == ([], None)
    assert [nothing[name].maps.shape for name in found] == [(0, 24, 32)] * 2  # type: ignore[union-attr]


def test_wrong_questions(digits: Path, toy: Path) -> None:
    with edgeml.open(digits, threads=1) as session:
        for wrong in ({"text": "rain"}, {"images": images(1, 36, 36), "text": "rain"}):
            with pytest.raises(UsageError, match="takes images"):
                session.run("digit", **wrong)
        for wrong in ({}, {"images": images(1, 36, 36)[0]}, {"images": "photo.png"}):
            with pytest.raises(UsageError, match="images is a list"):
                session.run("digit", **wrong)
        with pytest.raises(UsageError, match="no task 'digits'"):
            session.run_many(["digit", "digits"], images=[])
        with pytest.raises(DataError, match=r"^image 33: .*uint8"):
            session.run("digit", images=[*images(33, 36, 36), np.zeros((36, 36))])
        assert session.run("digit", images=images(1, 36, 36)).labels
    with edgeml.open(toy) as session:
        with pytest.raises(UsageError, match="takes texts, not images"):
            session.run("mood", images=images(1, 36, 36))
        with pytest.raises(UsageError, match="takes texts, not images"):
            session.run_many(["mood"], images=images(1, 36, 36))


def rebuilt(path: Path, to: Path, page: int, content: bytes) -> Path:
    """A copy with another graph on a page."""
    with Bundle.open(path) as bundle:
        sources = [PageSource(PageKind.ONNX, content if p.id == page else bundle.read(p.id)) for p in bundle.pages]
        write_bundle(to, sources, dict(bundle.manifest) | {"variants": []})
    return to


@pytest.mark.parametrize(
    ("op", "words"), [("Identity", "answers float32 .* to 2 rows"), ("Log", "not finite"), ("Shape", "answers int64|not a graph|declares")]
)
def test_a_head_is_not_trusted(street: Path, tmp_path: Path, op: str, words: str) -> None:
    inputs = {"features_0": ("float32", ("B", 4, 12, 16)), "features_1": ("float32", ("B", 8, 6, 8))}
    nodes = [
        Node("ReduceMean", ["features_1"], ["mean"], {"axes": [1], "keepdims": 1}),
        Node("Sub", ["mean", "mean"], ["zero"]),
        Node(op, ["zero" if op == "Log" else "features_0"], ["map"]),
    ]
    kind = "int64" if op == "Shape" else "float32"
    shape = (4,) if op == "Shape" else ("B", "c", "h", "w")
    content = graph(nodes, inputs, {"map": (kind, shape)}, {}, {"": 17})  # type: ignore[arg-type]
    with edgeml.open(rebuilt(street, tmp_path / "bad.edgeml", 2, content), threads=1) as session:
        with pytest.raises(BundleError, match=words):
            session.run("edge", images=images(2, 24, 32, 3))
        assert session.run("segmentation", images=images(2, 24, 32, 3)).maps is not None


def test_equal_arguments_give_equal_bytes_and_every_graph_loads(tmp_path: Path) -> None:
    for kind in ("classification", "dense"):
        one, two = (tmp_path / f"{kind}{number}.edgeml" for number in (1, 2))
        assert make_cnn(one, kind, filters=4) == make_cnn(two, kind, filters=4) != make_cnn(tmp_path / "x", kind, filters=4, seed=1)
        assert one.read_bytes() == two.read_bytes()
        with Bundle.open(one) as bundle:
            assert len(list(check_stages(bundle, load_manifest(bundle)))) == 6
    with pytest.raises(UsageError, match="multiples of 4"):
        make_cnn(tmp_path / "y", height=30)
    with pytest.raises(UsageError, match="classification or dense"):
        make_cnn(tmp_path / "y", "other")


# ---- variants ----


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        ({}, "full"),
        ({"variant": "small"}, "small"),
        ({"max_latency": 0.003}, "small"),
        ({"max_latency": "20ms"}, "full"),
        ({"max_bytes": "1MB"}, "full"),
        ({"max_bytes": 4000}, "small"),
        ({"min_score": 0.85}, "full"),
        ({"min_score": 0.5}, "small"),  # alone: the cheapest that reaches it
        ({"min_score": 0.5, "max_latency": "1s"}, "full"),
    ],
)
def test_a_wish_picks_a_variant(digits: Path, wish: dict[str, Any], name: str) -> None:
    with Bundle.open(digits) as bundle:
        manifest = load_manifest(bundle)
    chosen = choose_variant(manifest, Wish(**wish), "m")
    assert chosen is not None
    assert chosen.name == name
    assert with_variant(manifest, chosen).tasks[0].stages.head == f"head_{name}_digit"


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"variant": "tiny"}, "no variant 'tiny'; it has full .4 ms, .* score 0.900., small"),
        ({"max_latency": "1us"}, "keeps to these limits; it has full"),
        ({"max_bytes": 1}, "keeps to these limits"),
        ({"min_score": 0.95}, "keeps to these limits"),
        ({"variant": "full", "min_score": 0.5}, "not both"),
        ({"max_latency": "soon"}, "not a duration"),
        ({"max_latency": 0}, "positive"),
        ({"max_latency": float("nan")}, "positive"),
        ({"max_bytes": -1}, "max_bytes"),
        ({"max_bytes": "much"}, "not a size"),
        ({"min_score": 90}, "from 0 to 1"),
    ],
)
def test_wishes_that_cannot_be(digits: Path, wish: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        edgeml.open(digits, **wish)


def test_a_session_runs_its_variant_and_says_so(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with edgeml.open(digits, threads=1, max_latency="3ms") as session:
        ran = count_runs(session, monkeypatch)
        session.run("digit", images=images(1, 36, 36))
        assert ran == ["backbone_small", "head_small_digit"]
        assert session.settings()["variant"] == "small"
        assert session.settings()["graph_bytes"] == session.variant.bytes  # type: ignore[union-attr]
        assert "recorded on a made processor" in session.notes[0]


def test_a_bundle_without_variants_has_none_to_choose(toy: Path, tmp_path: Path) -> None:
    make_cnn(tmp_path / "one.edgeml", filters=4, variants=())
    for path in (toy, tmp_path / "one.edgeml"):
        with pytest.raises(UsageError, match="no variants to choose from"):
            edgeml.open(path, max_bytes="1MB")
        with edgeml.open(path) as session:
            assert session.variant is None
            assert session.settings()["variant"] is None


def test_durations() -> None:
    assert [parse_seconds(text) for text in ("20ms", "0.5s", "800us", 3)] == [0.02, 0.5, pytest.approx(8e-4), 3.0]
