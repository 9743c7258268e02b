"""Data directories: rows as the layout says, and every fault a sentence with file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from edgeml.data import Row, find_tasks, majority_label, read_task
from edgeml.errors import DataError

TASK = {"name": "t", "domain": "d", "labels": ["no", "yes"], "metric": "accuracy"}


def make(root: Path, lines: list[bytes], task: dict[str, object] | None = None, compress: bool = True) -> Path:
    place = root / "d" / "t"
    place.mkdir(parents=True)
    (place / "task.json").write_text(json.dumps(TASK | (task or {})))
    data = b"\n".join(lines)
    (place / ("test.jsonl.gz" if compress else "test.jsonl")).write_bytes(gzip.compress(data) if compress else data)
    return root


@pytest.mark.parametrize("compress", [True, False])
def test_rows_are_read(tmp_path: Path, compress: bool) -> None:
    make(tmp_path, [b'{"text": "a", "label": 1}', b"", b'{"text": "b", "label": 0, "text_pair": "c"}'], compress=compress)
    assert find_tasks(tmp_path)[0].rows("test") == [Row("a", None, 1), Row("b", "c", 0)]
    assert find_tasks(tmp_path / "d" / "t")[0].rows("test", 1) == [Row("a", None, 1)]
    assert find_tasks(tmp_path, ["d/t"]) == find_tasks(tmp_path, ["t"])


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        b'{"label": 1}',
        b'{"text": 5, "label": 1}',
        b'{"text": "a"}',
        b'{"text": "a", "label": 2}',
        b'{"text": "a", "label": -1}',
        b'{"text": "a", "label": true}',
        b'{"text": "a", "label": 0, "text_pair": []}',
        b'{"text": "\xff", "label": 0}',
        b"[" * 100_000,
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: bytes) -> None:
    make(tmp_path, [b'{"text": "fine", "label": 0}', line])
    with pytest.raises(DataError, match=r"test\.jsonl\.gz:2: ") as caught:
        find_tasks(tmp_path)[0].rows("test")
    assert "\n" not in str(caught.value)


def test_a_pair_task_needs_pairs(tmp_path: Path) -> None:
    make(tmp_path, [b'{"text": "a", "label": 1}'], {"pair": True})
    with pytest.raises(DataError, match="text_pair"):
        find_tasks(tmp_path)[0].rows("test")


def test_a_cut_off_archive_is_a_sentence(tmp_path: Path) -> None:
    make(tmp_path, [b'{"text": "a", "label": 1}'] * 100)
    file = tmp_path / "d" / "t" / "test.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        find_tasks(tmp_path)[0].rows("test")


@pytest.mark.parametrize(
    "document", ["", "{", "[]", '{"name": "x"}', json.dumps(TASK | {"metric": "bleu"}), json.dumps(TASK | {"labels": []})]
)
def test_a_bad_description_is_a_sentence(tmp_path: Path, document: str) -> None:
    (tmp_path / "task.json").write_text(document)
    with pytest.raises(DataError, match=r"task\.json"):
        read_task(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        find_tasks(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no task\.json"):
        find_tasks(tmp_path)
    make(tmp_path, [])
    with pytest.raises(DataError, match="called 'other'"):
        find_tasks(tmp_path, ["other"])
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        find_tasks(tmp_path)[0].rows("train")
    with pytest.raises(DataError, match="no split"):
        find_tasks(tmp_path)[0].rows("../test")


def test_the_commonest_label_is_the_lowest_on_a_tie() -> None:
    assert majority_label([Row("a", None, 1), Row("b", None, 0), Row("c", None, 1), Row("d", None, 0)]) == 0
    with pytest.raises(DataError):
        majority_label([])


SHARED = Path(os.environ.get("EDGEML_SHARED", Path(__file__).parents[3] / "shared")) / "data" / "text"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here: set EDGEML_SHARED")
def test_the_shared_tasks_are_readable() -> None:
    tasks = find_tasks(SHARED)
    assert len(tasks) == 38
    assert all(len(task.rows("test", 5)) == 5 for task in tasks)
