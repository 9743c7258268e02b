"""`edgeml diff`: pages are sorted into parts, mixtures of two bundles are bundles, and the part that was damaged is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.bundle import Bundle, PageSource
from edgeml.bundle_writer import write_bundle
from edgeml.cli import main
from edgeml.diff import check_alike, parts, relative_error, write_mixture
from edgeml.layout import PageKind, WeightType
from edgeml.made import TOY, make_cnn, make_mixture
from edgeml.manifest import load_manifest

TEXTS = [f"{word} and rain {number}" for number in range(5) for word in ("sun", "snow", "fog", "wind")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in f32 and in 4 and 8 bits, and rows that are labelled as the f32 model answers."""
    place = tmp_path_factory.mktemp("diff")
    make_mixture(place / "full.edgeml", expert_type=WeightType.F32, dense_type=WeightType.F32)
    make_mixture(place / "small.edgeml", expert_type=WeightType.INT4, dense_type=WeightType.INT8)
    with edgeml.open(place / "full.edgeml") as session:
        for name, labels in TOY.tasks.items():
            answers = session.run(name, texts=TEXTS).labels
            folder = place / "data" / "made" / name
            folder.mkdir(parents=True)
            (folder / "task.json").write_text(json.dumps({"name": name, "domain": "made", "labels": list(labels), "metric": "accuracy"}))
            rows = [{"text": text, "label": list(labels).index(label)} for text, label in zip(TEXTS, answers, strict=True)]
            for split in ("train", "validation"):
                (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def diff(place: Path, first: str, second: str, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["diff", str(place / first), str(place / second), "--data", str(place / "data"), "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_page_that_differs_is_in_one_part(place: Path) -> None:
    with Bundle.open(place / "full.edgeml") as first, Bundle.open(place / "small.edgeml") as second:
        manifest = load_manifest(second)
        differing = check_alike(first, second, load_manifest(first), manifest)
        found = parts(manifest, second.pages, differing)
        assert differing
        assert sorted(page for part in found for page in part.pages) == sorted(differing)
        assert {part.kind for part in found} >= {"experts", "dense"}
        assert [part.name for part in found if part.kind == "experts"] == [f"experts of {site.name}" for site in manifest.sites]
        everything = parts(manifest, second.pages, frozenset(page.id for page in second.pages))
        assert sorted(page for part in everything for page in part.pages) == [page.id for page in second.pages]


def test_a_mixture_of_everything_is_the_other_bundle(place: Path, tmp_path: Path) -> None:
    with Bundle.open(place / "full.edgeml") as first, Bundle.open(place / "small.edgeml") as second:
        same = write_mixture(tmp_path / "m.edgeml", first, second, frozenset(page.id for page in second.pages))
        with Bundle.open(same) as mixture:
            assert mixture.id == second.id
        same = write_mixture(tmp_path / "m.edgeml", first, second, frozenset())
        with Bundle.open(same) as mixture:
            assert mixture.id == first.id


def test_the_damaged_part_is_found_and_restoring_it_brings_everything_back(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Bundle.open(place / "full.edgeml") as bundle:
        manifest = load_manifest(bundle)
        hurt = {expert.page for expert in (*manifest.sites[1].experts, *manifest.sites[1].shared)}
        pages = []
        for page in bundle.pages:
            data = bundle.read(page.id)
            if page.id in hurt:
                weights = np.frombuffer(data, np.float32)
                data = (weights * np.float32(-3)).tobytes()
            pages.append(PageSource(page.kind, data, page.matrices, page.activation, max(page.count, 1)))
        write_bundle(place / "hurt.edgeml", pages, dict(bundle.manifest))
    found = diff(place, "full.edgeml", "hurt.edgeml", capsys)
    (part,) = found["parts"]
    assert part["name"] == f"experts of {manifest.sites[1].name}"
    assert part["error"] == pytest.approx(found["error"])
    assert part["error"] > 0.01
    assert found["reference_score"] == 1
    assert found["score"] + part["gain"] == pytest.approx(1)


def test_figures_are_those_of_the_mixtures(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = diff(place, "full.edgeml", "small.edgeml", capsys, "--records", str(tmp_path / "r.jsonl"))
    assert found["rows"] == 2 * len(TEXTS)
    dense = next(part for part in found["parts"] if part["kind"] == "dense")
    with Bundle.open(place / "full.edgeml") as first, Bundle.open(place / "small.edgeml") as second:
        taken = frozenset(page.id for page in second.pages if page.kind == PageKind.LINEAR)
        path = write_mixture(tmp_path / "m.edgeml", first, second, taken)
    with edgeml.open(path) as mixed, edgeml.open(place / "full.edgeml") as whole:
        scores = [[session.run(name, texts=TEXTS).scores for name in TOY.tasks] for session in (mixed, whole)]
    off = np.sqrt(sum(np.square(one - two).sum() for one, two in zip(*scores, strict=True)))
    size = np.sqrt(sum(np.square(two).sum() for two in scores[1]))
    assert dense["error"] == pytest.approx(off / size, rel=1e-4)
    assert dense["bytes"] < dense["reference_bytes"]
    record = json.loads((tmp_path / "r.jsonl").read_text())
    assert record["kind"] == "diff"
    assert record["diff"]["parts"] == found["parts"]


def test_equal_bundles_have_no_parts_and_people_get_a_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diff(place, "small.edgeml", "small.edgeml", capsys)["parts"] == []
    for pair, said in ((("small", "small"), "no page differs"), (("full", "small"), "experts of ")):
        paths = [str(place / f"{name}.edgeml") for name in pair]
        assert main(["diff", *paths, "--data", str(place / "data")]) == 0
        assert said in capsys.readouterr().out


def test_an_error_of_nothing() -> None:
    zero, one = np.zeros(3), np.ones(3)
    assert relative_error([one], [one]) == 0
    assert relative_error([one], [zero]) == 1
    assert relative_error([zero], [one]) == 1


def test_pairs_that_do_not_belong_together(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_mixture(tmp_path / "deep.edgeml", layers=3)
    make_mixture(tmp_path / "wide.edgeml", width=96)
    make_mixture(tmp_path / "tasks.edgeml", tasks={"weather": ("sun", "rain", "snow", "fog")})
    make_cnn(tmp_path / "cnn.edgeml")
    for name, said in (
        ("deep", "other stages or sites"),
        ("wide", "is of another kind or shape"),
        ("tasks", "other tasks"),
        ("cnn", "diff is for bundles on texts"),
        ("none", "no such file"),
    ):
        assert main(["diff", str(place / "full.edgeml"), str(tmp_path / f"{name}.edgeml"), "--data", str(place / "data")]) == 3
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
