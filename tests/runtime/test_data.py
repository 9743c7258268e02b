"""Data directories: rows as the layout says, and every fault a sentence with file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from edgeml.data import Columns, Row, TableData, find_tasks, majority_label, read_task
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
    "document",
    ["", "{", "[]", '{"name": "x"}', json.dumps(TASK | {"metric": "bleu"}), json.dumps(TASK | {"labels": []}), "[" * 99999, "9" * 9999],
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


# ---- one table ----


def table(tmp_path: Path, name: str, content: bytes | str, columns: Columns | None = None, pair: bool = False) -> TableData:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return TableData("t", "d", ("no", "yes"), "accuracy", pair, None, file, columns or Columns())


def test_tables_are_read(tmp_path: Path) -> None:
    rows = [Row("a, b\nc", None, 1), Row("d", None, 0)]
    assert table(tmp_path, "t.csv", '\ufefftext,label,more\n"a, b\nc",yes,1\nd,0,2\n').rows("test") == rows
    assert table(tmp_path, "t.tsv", "label\ttext\nyes\ta, b c\n").rows("train") == [Row("a, b c", None, 1)]
    lines = '{"said": "a", "verdict": "no", "x": [1]}\n\n{"said": "b", "verdict": 1}\n'
    named = Columns("said", "then", "verdict")
    assert table(tmp_path, "t.jsonl", lines, named).rows("test") == [Row("a", None, 0), Row("b", None, 1)]
    assert table(tmp_path, "t.jsonl.gz", gzip.compress(lines.encode()), named).rows("test", 1) == [Row("a", None, 0)]
    assert table(tmp_path, "p.csv", "text,text_pair,label\na,b,yes\n", pair=True).rows("test") == [Row("a", "b", 1)]


def test_a_name_comes_before_a_number(tmp_path: Path) -> None:
    task = table(tmp_path, "t.csv", "text,label\na,1\nb,0\n")
    assert [row.label for row in task.rows("test")] == [1, 0]
    named = TableData("t", "d", ("1", "0"), "accuracy", False, None, task.path)
    assert [row.label for row in named.rows("test")] == [0, 1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "text,label\na,yes\nb,maybe\n", r"t\.csv:3: the label 'maybe' is none of task 't's 2 \(no, yes\)"),
        ("t.csv", "text,label\na,2\n", r"t\.csv:2: the label '2'"),
        ("t.csv", "text,label\na,-1\n", r"t\.csv:2: the label '-1'"),
        ("t.csv", "text,label\na,nan\n", r"t\.csv:2: the label 'nan'"),
        ("t.csv", f"text,label\na,{'9' * 5000}\n", r"t\.csv:2: the label '9"),
        ("t.csv", "text,label\na\n", r"t\.csv:2: the row has not the 2 cells"),
        ("t.csv", "text,label\na,yes,b\n", r"t\.csv:2: the row has not the 2 cells"),
        ("t.csv", 'text,label\n"a,yes\n', r"t\.csv:2: not a row of a table"),
        ("t.csv", "words,label\na,yes\n", r"t\.csv: no column 'text'; it has words, label; see --text-column"),
        ("t.csv", "", r"t\.csv: no column 'text'; it has none"),
        ("t.csv", "text,label\n", r"t\.csv: it has no rows"),
        ("t.csv", b"text,label\n\xff,yes\n", r"t\.csv:2: not UTF-8"),
        ("t.csv", b"text,label\n" + b"a,yes\n" * 9000 + b"\xc3,yes\n", r"t\.csv:9002: not UTF-8"),
        ("t.csv", "text,text,label\na,b,yes\n", r"t\.csv: 2 column 'text'; it has text, text, label"),
        ("t.jsonl", '{"text": "a", "label": true}\n', r"t\.jsonl:1: the label True"),
        ("t.jsonl", '{"text": "a", "label": NaN}\n', r"t\.jsonl:1: the label nan"),
        ("t.jsonl", '{"text": "a"}\n', r"t\.jsonl:1: the label None"),
        ("t.jsonl", '{"text": 3, "label": 1}\n', r"t\.jsonl:1: 'text' must be a text"),
        ("t.jsonl", '{"text": "a", "label": 1}\nno\n', r"t\.jsonl:2: not a JSON row"),
        ("t.jsonl", "[]\n", r't\.jsonl:1: expected an object with "text" and "label"'),
        ("t.jsonl", f'{{"text": "a", "label": {"1" * 5000}}}\n', r"t\.jsonl:1: not a JSON row"),
        ("t.parquet", "", r"t\.parquet: a table is a \.csv"),
        ("t.jsonl.gz", "x", r"t\.jsonl\.gz:1: cannot be read"),
    ],
)
def test_a_broken_table_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes | str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        table(tmp_path, name, content).rows("test")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="'text_pair'"):
        table(tmp_path, "p.csv", "text,label\na,yes\n", pair=True).rows("test")


def test_a_text_is_checked_where_it_stands(tmp_path: Path) -> None:
    def check(text: str, where: str) -> None:
        if text == "b":
            raise DataError(f"{where}: no")

    with pytest.raises(DataError, match=r"t\.csv:3: no"):
        table(tmp_path, "t.csv", "text,label\na,yes\nb,no\n").rows("test", None, check)
    with pytest.raises(DataError, match=r"p\.csv:2: no"):
        table(tmp_path, "p.csv", "text,text_pair,label\na,b,yes\n", pair=True).rows("test", None, check)
    make(tmp_path, [b'{"text": "a", "label": 0}', b'{"text": "b", "label": 0}'])
    with pytest.raises(DataError, match=r"test\.jsonl\.gz:2: no"):
        find_tasks(tmp_path)[0].rows("test", None, check)
    assert len(find_tasks(tmp_path)[0].rows("test", 1, check)) == 1


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    for name in ("absent.csv", "absent.jsonl"):
        with pytest.raises(DataError, match="cannot be read"):
            TableData("t", "d", ("no",), "accuracy", False, None, tmp_path / name).rows("test")
