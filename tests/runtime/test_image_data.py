"""Image data and the metrics of maps: what a folder says, what is refused, and figures by hand."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeml.errors import DataError, UsageError
from edgeml.image_data import EDGE_VOID, commonest_label, find_image_sets, read_image_set
from edgeml.metrics import chance, edge_f1, from_tally, miou, score, tally


def drawn(top: int, *shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, top, shape, np.uint8)


def write_set(root: Path, labels: Any, splits: dict[str, dict[str, Any]], name: str = "made") -> Path:
    place = root / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "image.json").write_text(json.dumps({"name": name, "labels": labels, "licence": "none"}))
    for split, arrays in splits.items():
        np.savez_compressed(place / f"{split}.npz", **arrays)
    return place


def two_labels(count: int, seed: int = 0) -> dict[str, Any]:
    return {"x": drawn(256, count, 9, 9, seed=seed), "y_digit": drawn(3, count), "y_garment": drawn(2, count)}


LABELS = {"y_digit": ["0", "1", "2"], "y_garment": ["coat", "bag"]}


def test_a_set_says_what_is_labelled(tmp_path: Path) -> None:
    write_set(tmp_path / "images", LABELS, {"train": two_labels(25), "test": two_labels(5)})
    write_set(tmp_path / "images", ["a", "b"], {"test": {"x": drawn(256, 4, 9, 9, 3), "y": drawn(2, 4)}}, "plain")
    for root in (tmp_path, tmp_path / "images"):
        made, plain = find_image_sets(root)
        assert [(task.name, task.kind, task.metric, task.void) for task in made.tasks] == [
            ("digit", "classification", "accuracy", None),
            ("garment", "classification", "accuracy", None),
        ]
        assert [task.name for task in plain.tasks] == ["plain"]
    assert find_image_sets(tmp_path / "images" / "made")[0].licence == "none"
    assert find_image_sets(tmp_path / "absent") == []


def test_validation_is_the_last_tenth_of_training_where_there_is_no_file(tmp_path: Path) -> None:
    arrays = two_labels(25)
    images = read_image_set(write_set(tmp_path, LABELS, {"train": arrays}))
    assert np.array_equal(images.rows("train").images, arrays["x"][:23])
    assert np.array_equal(images.rows("validation").images, arrays["x"][23:])
    assert np.array_equal(images.rows("validation").labels["digit"], arrays["y_digit"][23:])
    assert np.array_equal(images.rows("train", limit=4).images, arrays["x"][:4])
    with_file = read_image_set(write_set(tmp_path, LABELS, {"train": arrays, "validation": two_labels(7, 1)}, "other"))
    assert [len(with_file.rows(split).images) for split in ("train", "validation")] == [25, 7]


def test_edges_are_void_where_the_segmentation_is(tmp_path: Path) -> None:
    arrays = {"x": drawn(256, 3, 8, 8, 3), "segmentation": drawn(3, 3, 8, 8), "edge": drawn(2, 3, 8, 8)}
    images = read_image_set(write_set(tmp_path, ["sky", "road", "void"], {"test": arrays}))
    assert [(task.name, task.kind, task.void) for task in images.tasks] == [
        ("segmentation", "segmentation", 2),
        ("edge", "edge", EDGE_VOID),
    ]
    edges = images.rows("test").labels["edge"]
    void = arrays["segmentation"] == 2
    assert (edges[void] == EDGE_VOID).all()
    assert np.array_equal(edges[~void], arrays["edge"][~void])


def raw(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return out.getvalue()


def npy(array: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def header(shape: str, length: int) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(length)


GOOD = {"x": npy(drawn(256, 5, 9, 9)), "y_digit": npy(drawn(3, 5)), "y_garment": npy(drawn(2, 5))}
BAD: dict[str, tuple[bytes, str]] = {
    "no archive": (b"hello", "not an .npz"),
    "cut short": (raw(**GOOD)[:300], "not an .npz"),
    "a flipped byte": (raw(**GOOD).replace(GOOD["x"][200:260], bytes(60)), "damaged"),
    "no images": (raw(y_digit=GOOD["y_digit"], y_garment=GOOD["y_garment"]), "'x' is missing"),
    "no labels": (raw(x=GOOD["x"], y_digit=GOOD["y_digit"]), "'y_garment' is missing"),
    "pickled": (raw(**GOOD | {"x": npy(np.array([{}], object))}), "does not agree"),
    "claims more than it has": (raw(**GOOD | {"x": header("(1000000, 1000, 1000)", 100)}), "does not agree"),
    "no header": (raw(**GOOD | {"x": b"\x93NUMPY"}), "damaged"),
    "floats": (raw(**GOOD | {"x": npy(np.zeros((5, 9, 9)))}), "must be uint8"),
    "four channels": (raw(**GOOD | {"x": npy(drawn(256, 5, 9, 9, 4))}), "must be uint8"),
    "another number of labels": (raw(**GOOD | {"y_digit": npy(drawn(3, 4))}), "for 5 images"),
    "a label without a class": (raw(**GOOD | {"y_digit": npy(np.array([0, 1, 2, 3, 0]))}), "outside 0 to 2"),
    "a label below zero": (raw(**GOOD | {"y_digit": npy(np.array([0, -1, 2, 1, 0]))}), "outside 0 to 2"),
    "labels are words": (raw(**GOOD | {"y_digit": npy(np.array(["a"] * 5))}), "whole numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_a_sentence(name: str, tmp_path: Path) -> None:
    content, word = BAD[name]
    images = read_image_set(write_set(tmp_path, LABELS, {"train": two_labels(25)}))
    (images.path / "test.npz").write_bytes(content)
    with pytest.raises(DataError, match=f"test.npz: .*{word}") as caught:
        images.rows("test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"labels": 3}', "'labels'"),
        ('{"labels": {"y_digit": ["0", "1", "2"]}}', "y_garment"),
    ],
)
def test_a_bad_description_is_a_sentence(text: str, word: str, tmp_path: Path) -> None:
    place = write_set(tmp_path, LABELS, {"train": two_labels(25)})
    (place / "image.json").write_text(text)
    with pytest.raises(DataError, match=f"image.json: .*{word}"):
        find_image_sets(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    place = write_set(tmp_path, LABELS, {"train": two_labels(25)})
    with pytest.raises(DataError, match=r"test\.npz: cannot be read"):
        read_image_set(place).rows("test")
    with pytest.raises(DataError, match="no split 'dev'"):
        read_image_set(place).rows("dev")
    (place / "train.npz").unlink()
    with pytest.raises(DataError, match=r"no train\.npz"):
        read_image_set(place)


SHARED = Path(os.environ.get("EDGEML_SHARED", Path(__file__).parents[3] / "shared")) / "data" / "images"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here: set EDGEML_SHARED")
def test_the_shared_images_are_read() -> None:
    sets = {images.name: images for images in find_image_sets(SHARED)}
    assert [task.name for task in sets["multi_fashion_mnist"].tasks] == ["digit", "fashion"]
    assert [(task.name, task.void) for task in sets["camvid"].tasks] == [("segmentation", 11), ("edge", 2)]
    rows = sets["camvid"].rows("validation", limit=3)
    assert (rows.images.shape, rows.labels["edge"].shape) == ((3, 72, 96, 3), (3, 72, 96))
    assert len(sets["multi_fashion_mnist"].rows("validation").images) == 1000


# ---- metrics of maps ----


def test_miou_by_hand() -> None:
    labels = np.array([[0, 0, 1, 1, 2, 3]])
    answers = np.array([[0, 1, 1, 1, 0, 0]])  # void pixel (3) left out: class 0 1/3, class 1 2/3, class 2 0
    assert miou(labels, answers, 4, void=3) == pytest.approx(1 / 3)
    assert miou(labels, labels, 4) == 1
    assert miou(np.array([3, 3]), np.array([0, 1]), 4, void=3) == 0  # nothing to score
    assert score("miou", labels, answers, classes=4, void=3) == pytest.approx(1 / 3)


def test_edge_f1_by_hand() -> None:
    labels = np.array([[[1, 1, 0, 0, 2]]])
    assert edge_f1(labels, np.array([[[1, 0, 1, 0, 1]]]), void=2) == 0.5
    assert edge_f1(labels, np.array([[[True, True, False, False, True]]]), void=2) == 1
    assert edge_f1(np.zeros((2, 2), int), np.zeros((2, 2), int)) == 0


def test_chance_of_maps_is_the_commonest_class() -> None:
    labels = np.array([[[0, 0, 0, 1, 2, 2, 2, 2]]], np.uint8)
    assert commonest_label(labels, 2) == 0
    assert chance("miou", labels, 0, classes=3, void=2) == pytest.approx(3 / 4 / 2)
    assert chance("edge_f1", np.array([[0, 0, 1]]), 0) == 0


def test_counts_of_images_add_up() -> None:
    labels, answers = drawn(5, 6, 7, 8), drawn(4, 6, 7, 8, seed=1)
    counts = tally(labels, answers, 5, void=4)
    assert counts.shape == (6, 5, 3)
    drawn_rows = np.array([0, 3, 3, 5])
    assert from_tally("miou", counts[drawn_rows].sum(0)) == pytest.approx(miou(labels[drawn_rows], answers[drawn_rows], 5, 4))


def test_misshapen_maps_are_a_sentence() -> None:
    with pytest.raises(DataError, match="one shape"):
        miou(np.zeros((2, 2), int), np.zeros((2, 3), int), 2)
    with pytest.raises(DataError, match="whole numbers"):
        edge_f1(np.zeros((2, 2), int), np.zeros((2, 2)))
    with pytest.raises(DataError, match="outside 0 to 1"):
        miou(np.array([0, 1]), np.array([0, 2]), 2)
    with pytest.raises(UsageError, match="no metric"):
        from_tally("bleu", np.zeros((2, 3), np.int64))
