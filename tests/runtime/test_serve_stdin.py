"""`edgeml serve-stdin` as a parent process meets it: every line has its answer, and a bad one disturbs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeml.cli import main
from edgeml.data import LINE_LIMIT
from edgeml.made import make_mixture

GOOD = {"id": "good", "task": "weather", "text": "fog and rain"}


class Child:
    """A serving process, and the answers it has given so far by id."""

    def __init__(self, bundle: Path, *options: str) -> None:
        command = [sys.executable, "-P", "-m", "edgeml.cli", "serve-stdin", str(bundle), "--threads", "1", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def send(self, *lines: Any) -> None:
        assert self.process.stdin is not None
        for line in lines:
            self.process.stdin.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said

    def end(self, code: int = 0) -> dict[Any, dict[str, Any]]:
        """Close its input; returns what it says from now on, by id (or line, where there is none)."""
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == code, err
        assert b"Traceback" not in err
        said = [json.loads(line) for line in out.splitlines()]
        found = {entry["id"] if entry["id"] is not None else ("line", entry["line"]): entry for entry in said}
        assert len(found) == len(said), "an id was answered twice"
        return found


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture that takes seconds to answer a thousand texts."""
    path = tmp_path_factory.mktemp("slow") / "m.edgeml"
    make_mixture(path, layers=8, hidden=128, width=512)
    return path


@pytest.fixture
def child(toy: Path) -> Iterator[Child]:
    child = Child(toy, "--quiet")
    yield child
    child.process.kill()
    child.process.communicate()


def answers(toy: Path, capsys: pytest.CaptureFixture[str], task: str, *texts: str) -> list[dict[str, Any]]:
    assert main(["run", str(toy), "--task", task, "--threads", "1", "--json", *(word for text in texts for word in ("--text", text))]) == 0
    results: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["results"]
    return results


def test_answers_are_those_of_run(child: Child, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child.send({"id": 1, "task": "weather", "texts": ["fog", "a sunny day"]}, b"\n", {"id": "v", "task": "vector", "text": "rain"})
    child.send({"id": 2, "task": "mood", "text": "bad film", "deadline_s": 60, "priority": -3})
    said = child.end()
    assert {entry["state"] for entry in said.values()} == {"done"}
    for key, task, texts in ((1, "weather", ["fog", "a sunny day"]), (2, "mood", ["bad film"]), ("v", "vector", ["rain"])):
        assert said[key]["task"] == task
        assert said[key]["latency_s"] > 0
        for found, wanted in zip(said[key]["results"], answers(toy, capsys, task, *texts), strict=True):
            assert set(found) == set(wanted)
            assert found.get("label") == wanted.get("label")
            assert found.get("scores", {}) == pytest.approx(wanted.get("scores", {}), abs=1e-6)


def test_an_answer_comes_while_the_input_stays_open(child: Child) -> None:
    child.send(GOOD)
    assert child.read()["state"] == "done"
    child.send(GOOD)  # the id is free again
    assert child.read()["state"] == "done"
    assert child.end() == {}


def test_the_last_line_needs_no_end(child: Child) -> None:
    child.send(json.dumps(GOOD).encode())
    assert child.end()["good"]["state"] == "done"


BAD = [
    (b"{", "not JSON (Expecting property name enclosed in double quotes at character 1)"),
    (b"[1]", "not a JSON object"),
    (b'{"id": "\xff"}', "not UTF-8 (byte 8)"),
    (b'{"id": 1, "id": 2}', "the key 'id' occurs twice in one object"),
    (b'{"id": 1, "task": "weather", "text": "fog", "deadline_s": NaN}', "NaN is not a number"),
    (b"[" * 100, "more than 32 levels deep"),
    (b"x" * (LINE_LIMIT + 1), f"the line is longer than {LINE_LIMIT} bytes"),
    (b"x" * (3 * LINE_LIMIT), f"the line is longer than {LINE_LIMIT} bytes"),
    (b'{"task": "weather", "text": "fog"}', "id is a string of at most 256 characters or a whole number"),
    (b'{"id": true, "text": "fog"}', "id is a string of at most 256 characters or a whole number"),
    (b'{"id": 1.5, "text": "fog"}', "id is a string of at most 256 characters or a whole number"),
    (b'{"cancel": [1]}', "cancel is a string of at most 256 characters or a whole number"),
    (b'{"cancel": 1, "id": 1}', "a line that cancels has no other key"),
]


@pytest.mark.parametrize(("line", "sentence"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_one_sentence(child: Child, line: bytes, sentence: str) -> None:
    child.send(line + b"\n", GOOD)
    said = child.end()
    assert said["good"]["state"] == "done"
    assert said["line", 1] == {"id": None, "line": 1, "state": "refused", "error": sentence}
    assert len(said) == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"task": "wether"}, "has no task 'wether'; it has weather, vector, mood"),
        ({"task": 3}, "task is the name of a task"),
        ({"task": None}, "there are several tasks, name one of them: mood, vector, weather"),
        ({"text": ""}, "input 0: the text is empty"),
        ({"text": 5}, "input 0: expected text, got int"),
        ({"texts": ["a"]}, "give text, or text and text_pair, or one of texts, pairs and images"),
        ({"text_pair": "b"}, "task 'weather' takes single texts, not pairs"),
        ({"text_pair": None}, "text and text_pair are texts"),
        ({"extra": 1}, "a request has no key 'extra'; it has"),
        ({"deadline_s": -1}, "the deadline is not in the future; give seconds from now, or none"),
        ({"deadline_s": 0}, "the deadline is not in the future; give seconds from now, or none"),
        ({"deadline_s": "soon"}, "a deadline is a number of seconds from now, not soon"),
        ({"deadline_s": 10**400}, "a deadline is a number of seconds from now, not 1000"),
        ({"priority": 1000}, "a priority is a whole number from -100 to 100, not 1000"),
        ({"priority": 0.5}, "a priority is a whole number, not 0.5"),
        ({"id": "good"}, 'the id "good" is that of a request under way'),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_its_id(slow: Path, change: dict[str, Any], sentence: str) -> None:
    count = 3000 if change.get("id") == "good" else 1  # under way for as long as it takes to read the next line
    child = Child(slow, "--quiet")
    child.send({"id": "good", "task": "weather", "texts": ["fog"] * count}, {"id": 1, "task": "weather", "text": "fog"} | change)
    if change.get("id") == "good":
        first = child.read()
        assert sentence in first["error"]
        assert child.end()["good"]["state"] == "done"
        return
    said = child.end()
    assert said["good"]["state"] == "done"
    assert said[1]["state"] == "refused"
    assert sentence in said[1]["error"]
    assert set(said[1]) == {"id", "state", "error"}


def test_cancelling(slow: Path) -> None:
    child = Child(slow, "--quiet")
    many = {"id": "long", "task": "weather", "texts": ["fog and rain"] * 3000}
    child.send(many, {"id": "next", "task": "mood", "text": "good"}, {"cancel": "next"}, {"cancel": "nobody"}, {"cancel": "long"}, GOOD)
    said = child.end()
    assert said["good"]["state"] == "done"
    assert (said["long"]["state"], said["long"]["error"]) == ("failed", "the request was cancelled")
    assert set(said) == {"long", "next", "good"}


def test_the_queue_is_bounded_and_a_deadline_may_pass(slow: Path) -> None:
    child = Child(slow, "--quiet", "--queue", "1")
    child.send({"id": "long", "task": "weather", "texts": ["fog"] * 3000})
    child.send(
        {"id": "late", "task": "mood", "text": "fog", "deadline_s": 1e-4}, *({"id": n, "task": "mood", "text": "fog"} for n in range(5))
    )
    said = child.end()
    assert said["long"]["state"] == "done"
    assert said["late"]["error"] in ("its deadline passed before it could run", "the queue is full (1 requests wait); try again later")
    refused = [said[number] for number in range(5) if said[number]["state"] == "refused"]
    assert refused
    assert {entry["error"] for entry in refused} == {"the queue is full (1 requests wait); try again later"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_cancel_what_waits_and_end_cleanly(slow: Path, number: signal.Signals, code: int) -> None:
    child = Child(slow, "--quiet")
    child.send(GOOD)
    assert child.read()["state"] == "done"
    child.send(*({"id": key, "task": "weather", "texts": ["fog and rain and wind"] * 1000} for key in range(50)), GOOD | {"text": 1})
    assert child.read()["error"] == "input 0: expected text, got int"  # all lines have been read
    child.process.send_signal(number)
    said = child.end(code)
    assert set(said) == set(range(50))
    assert {entry["state"] for entry in said.values()} <= {"done", "failed"}
    assert said[49]["error"] == "the request was cancelled"


def test_a_parent_that_has_gone_stops_it(child: Child) -> None:
    assert child.process.stdout is not None
    child.process.stdout.close()
    child.send(GOOD)
    assert child.process.wait(60) == 0
    assert child.process.stderr is not None
    assert child.process.stderr.read() == b""


def test_a_parent_that_writes_all_before_it_reads(child: Child) -> None:
    """Neither side may wait for the other: more answers than a pipe holds, all unread while requests are written."""
    lines = [json.dumps({"id": number, "task": "vector", "text": "fog"}).encode() + b"\n" for number in range(3000)]
    child.send(*lines)
    said = child.end()
    assert set(said) == set(range(3000))


def test_no_standard_input(toy: Path) -> None:
    command = [sys.executable, "-P", "-m", "edgeml.cli", "serve-stdin", str(toy)]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr == "edgeml: -: there is no standard input\n"
    assert done.stdout == ""


def test_a_parent_that_reads_nothing_cannot_keep_it_from_stopping(child: Child) -> None:
    child.send(*(b"nonsense that is answered by a long sentence\n" for _ in range(3000)))
    child.process.send_signal(signal.SIGTERM)
    assert child.process.wait(60) == 0


def test_without_standard_output_it_says_so(toy: Path) -> None:
    command = f'exec "{sys.executable}" -P -m edgeml.cli serve-stdin "{toy}" >&-'
    done = subprocess.run(["sh", "-c", command], input=b"", capture_output=True, timeout=60)
    assert (done.returncode, done.stderr.decode().strip()) == (3, "edgeml: -: there is no standard output to answer on")


def test_a_parent_that_never_reads_is_not_read_for_ever(toy: Path) -> None:
    """Its answers must not fill the memory: after some lines it has to read before more is taken from it."""
    start = "import sys, edgeml.commands.serve as serve; serve.UNREAD = 8; from edgeml.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", start, "serve-stdin", str(toy), "--threads", "1", "--quiet"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(GOOD).encode() + b"\n")
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["state"] == "done"
        os.set_blocking(child.stdin.fileno(), False)
        line, taken, waits = b"?" * 499 + b"\n", 0, 0
        while waits < 20 and taken < 20_000:  # two seconds in which nothing is taken: it has stopped reading
            try:
                assert os.write(child.stdin.fileno(), line) == len(line)
                taken, waits = taken + 1, 0
            except BlockingIOError:
                time.sleep(0.1)
                waits += 1
        assert taken < 5_000
        os.set_blocking(child.stdin.fileno(), True)
        child.stdin.close()
        said = [json.loads(answer) for answer in child.stdout]
    assert [answer["line"] for answer in said] == list(range(2, taken + 2))
