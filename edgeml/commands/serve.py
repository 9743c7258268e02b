"""`edgeml serve-stdin`: JSON lines in, JSON lines out, for a parent process in any language.

Lines from the parent, at most 1 MiB each, UTF-8; unknown keys are refused, blank lines skipped:

    {"id": 7, "task": "weather", "text": "Will it rain?"}               one text; `task` may be left out where there is one
    {"id": "b", "task": "weather", "texts": ["fog", "sun"], "deadline_s": 0.5, "priority": 3}
    {"id": 8, "task": "same", "text": "...", "text_pair": "..."}        or "pairs": [["...", "..."], ...]
    {"id": 9, "task": "digit", "images": ["a.png", "b.png"]}            files that this process can read
    {"id": 10, "texts": ["fog", "sun"]}                                 where the bundle has a router: it finds the tasks
    {"cancel": 7}

`id` is a string or a whole number, not that of a request under way. `deadline_s` counts from when its text has become tokens. Each
request gets one line, when it ends, so lines come in another order; a cancelled one too, unless its answer was there first:

    {"id": 7, "state": "done", "task": "weather", "results": [{"task", "label", "score", "scores", "latency_s"}], "latency_s": 0.012,
     "stand_in": null}
    {"id": "b", "state": "failed", "error": "its deadline passed before it could run"}
    {"id": 8, "state": "refused", "error": "the queue is full (256 requests wait); try again later"}
    {"id": null, "line": 12, "state": "refused", "error": "not JSON (Expecting value at character 0)"}

`results` are those of `edgeml run --json`: a label or a vector an input, in input order. `stand_in` names the domain whose resident
set stood in because its deadline left no time to read its own (`transfer`). A request that named no task has an answer
from each task of the group that its input was sent to, with "input", "group" and "group_score", and "task" is null; it waits for all
of them, and fails as the first of them that fails. Nothing else is written to standard output.
At the end of input all requests are answered, then it ends with code 0. SIGTERM and SIGINT: what waits is cancelled, what runs is
answered, code 0 and 130. A parent that has closed its end stops it as SIGTERM does.

Threads: the main thread reads, and it alone; signals and ends of requests wake it through a pipe, so nothing is interrupted halfway. One
thread writes, so that a parent which reads late holds up neither reading nor computing, until UNREAD lines wait for it: then nothing is
read until it has taken some. The rest is in `serving`.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import click
import numpy as np

from edgeml.autoroute import Choice
from edgeml.commands._answers import answers_of
from edgeml.commands._inputs import choose_task
from edgeml.commands._options import bundle_argument, notes, quiet_option, variant_options
from edgeml.data import LINE_LIMIT
from edgeml.errors import DataError, EdgemlError, UsageError
from edgeml.serving import Ticket
from edgeml.session import RESIDENCIES, Session
from edgeml.session import open as open_session
from edgeml.strict_json import StrictJsonError, decode_object

INPUTS = ("text", "text_pair", "texts", "pairs", "images")
KEYS = {"id", "task", "deadline_s", "priority", *INPUTS}
ID_LIMIT = 256
CHUNK = 1 << 16
STUCK_S = 2.0  # how long after a signal the answers may take to go out
UNREAD = 1 << 14  # lines out that may wait before reading does


@click.command("serve-stdin")
@bundle_argument
@variant_options
@click.option("--memory", help="Memory for weights: 64MiB, 1.5GB, 50%, auto (default, or EDGEML_MEMORY).")
@click.option(
    "--residency",
    type=click.Choice(RESIDENCIES),
    default="exact",
    show_default=True,
    help="masked: only experts that fit, chosen by task; hybrid: those, where a deadline would be missed otherwise.",
)
@click.option("--threads", type=int, help="Threads to compute with (default: EDGEML_THREADS, or all processors).")
@click.option(
    "--queue", "waiting", type=click.IntRange(1), default=256, show_default=True, help="Requests that may wait; more are refused."
)
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="Batches of later requests that may go first, beside its turn.",
)
@click.option("--json", is_flag=True, expose_value=False, help="Changes nothing, as every line is JSON; it is there as everywhere else.")
@quiet_option
def command(
    bundle: str, memory: str | None, residency: str, threads: int | None, waiting: int, patience: int, quiet: bool, **variant: Any
) -> int:
    """Answer requests as JSON lines, for a parent process in any language.

    A line in is a request, a line out its answer, in the order in which they end: requests that use the same experts are
    answered together. deadline_s and priority (-100 to 100) are optional; {"cancel": ID} gives a request up. A bad line is
    answered by one sentence and disturbs nothing else. The end of input ends it once all is answered.

    Example: echo '{"id": 1, "task": "banking77", "text": "I lost my card"}' | edgeml serve-stdin model.edgeml

    \b
    {"id": 1, "task": "banking77", "text": "I lost my card", "deadline_s": 0.5}   in
    {"id": 1, "state": "done", "task": "banking77", "results": [{...}], ...}      out
    {"id": 2, "state": "refused", "error": "the queue is full (...)"}             out
    """
    source = _standard_input()
    _need_standard_output()
    with open_session(bundle, memory, threads, residency, **variant) as session:
        notes(session.notes, quiet)
        session.serve(waiting, patience)
        return _Desk(session, source).run()


def _standard_input() -> int:
    try:
        return sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        raise DataError("-: there is no standard input") from None


def _need_standard_output() -> None:
    if sys.stdout is None:
        raise DataError("-: there is no standard output to answer on")


class _Order:
    """A request under way: its tickets, one a task, each with the inputs that it answers; `left` of them have not ended."""

    def __init__(self, name: str | int, choices: Sequence[Choice] | None) -> None:
        self.name, self.choices = name, choices
        self.tickets: list[tuple[Ticket, list[int]]] = []
        self.left = 0


class _Desk:
    """Takes lines, hands out answers. `_under_way`, from an id to its order, is the main thread's and the ending threads': `_lock`."""

    def __init__(self, session: Session, source: int) -> None:
        self._session, self._source = session, source
        self._lock = threading.Lock()
        self._under_way: dict[str | int, _Order] = {}
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._fault: OSError | None = None
        self._signal = 0
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._woken, False)

    def run(self) -> int:
        """Until the end of input or a signal; returns the exit code."""
        writer = threading.Thread(target=self._write, name="edgeml-writer", daemon=True)
        writer.start()
        try:
            with self._signals():
                self._read()
                while self._under_way and not self._stopping():
                    select.select([self._woken], [], [])
                    self._drain_pipe()
                self._session.serve().close()  # cancels what waits, which after the end of input is nothing
                self._lines.put(None)
                writer.join(STUCK_S if self._signal else None)
                if writer.is_alive():  # told to stop, and nobody reads what it has to say
                    os._exit(130 if self._signal == signal.SIGINT else 0)
        finally:
            os.close(self._woken)
            os.close(self._wake)
        if self._fault is not None:
            raise self._fault
        return 130 if self._signal == signal.SIGINT else 0

    # ---- lines in ----

    def _read(self) -> None:
        number, held, skipping = 0, b"", False
        while not self._stopping():
            open_for_more = self._lines.qsize() < UNREAD
            ready, _, _ = select.select([self._source, self._woken] if open_for_more else [self._woken], [], [])
            self._drain_pipe()
            if self._source not in ready:
                continue
            chunk = os.read(self._source, CHUNK)
            *lines, held = (held + chunk).split(b"\n")
            if not chunk and held:
                lines, held = [held], b""
            for line in lines:
                number += 1
                if not skipping:
                    self._line(line, number)
                skipping = False
            if len(held) > LINE_LIMIT:
                if not skipping:
                    self._refuse(None, f"the line is longer than {LINE_LIMIT} bytes", number + 1)
                held, skipping = b"", True
            if not chunk:
                return

    def _line(self, line: bytes, number: int) -> None:
        if not line.strip():
            return
        name: str | int | None = None
        try:
            if len(line) > LINE_LIMIT:
                raise DataError(f"the line is longer than {LINE_LIMIT} bytes")
            document = decode_object(line)
            if "cancel" in document:
                self._cancel(document)
                return
            name = _name(document.get("id"), "id")
            self._submit(name, document)
        except (EdgemlError, StrictJsonError) as error:
            self._refuse(name, str(error), number)

    def _submit(self, name: str | int, document: dict[str, Any]) -> None:
        unknown = sorted(set(document) - KEYS)
        if unknown:
            raise DataError(f"a request has no key {unknown[0]!r:.60}; it has {', '.join(sorted(KEYS))}")
        task = document.get("task")
        if task is not None and not isinstance(task, str):
            raise DataError("task is the name of a task")
        inputs, manifest = _inputs(document), self._session.manifest
        choices: list[Choice] | None = None
        if task is None and manifest.router is not None and "images" not in inputs:
            choices = self._session.route(**inputs)
            parts = list(_parts(inputs, choices))
        else:
            names = sorted(each.name for each in manifest.tasks)
            if task is None and len(names) > 1:
                raise UsageError(f"there are several tasks, name one of them: {', '.join(names)}")
            chosen = choose_task(manifest, task, str(self._session.bundle.path))
            if chosen.dense:
                raise UsageError(f"task '{chosen.name}' answers a map, which is no JSON: use edgeml run --output")
            parts = [(chosen.name, [], inputs)]
        order = _Order(name, choices)
        with self._lock:
            if name in self._under_way:
                raise DataError(f"the id {json.dumps(name):.80} is that of a request under way")
            self._under_way[name] = order
            order.left = len(parts) + 1  # one for this thread, so that it does not end before all of it is under way
        urgency = {"deadline": document.get("deadline_s"), "priority": document.get("priority", 0)}
        try:
            for one, rows, given in parts:
                order.tickets.append((self._session.submit(one, **given, **urgency, on_end=lambda _: self._ended(order)), rows))
        except BaseException:
            with self._lock:
                del self._under_way[name]
            for ticket, _ in order.tickets:
                ticket.cancel()
            raise
        self._ended(order)

    def _cancel(self, document: dict[str, Any]) -> None:
        if len(document) > 1:
            raise DataError("a line that cancels has no other key")
        with self._lock:
            order = self._under_way.get(_name(document["cancel"], "cancel"))
        if order is not None:  # its answer may have gone out already
            for ticket, _ in order.tickets:
                ticket.cancel()

    # ---- lines out ----

    def _ended(self, order: _Order) -> None:
        """One of an order's tickets has ended, on whichever thread that happened, or all of them are under way."""
        with self._lock:
            order.left -= 1
            if order.left or self._under_way.get(order.name) is not order:
                return
        said: dict[str, Any] = {"id": order.name, "state": _state(order)}
        try:
            said |= self._answered(order)
        except EdgemlError as error:
            said["error"] = _sentence(str(error))
        except Exception as error:  # whatever happens, the line goes out, or its parent waits for ever
            said |= {"state": "failed", "error": f"a fault in edgeml itself: {type(error).__name__}: {_sentence(str(error))}"}
        with self._lock:
            self._lines.put(said)
            del self._under_way[order.name]
        self._wake_up()

    def _answered(self, order: _Order) -> dict[str, Any]:
        """The answers of an order's tickets. Raises what the first of them met that failed."""
        results = [ticket.result(0) for ticket, _ in order.tickets]
        answers: list[tuple[int, dict[str, Any]]] = []
        for (ticket, rows), result in zip(order.tickets, results, strict=True):
            found = list(answers_of(self._session.task(ticket.task), result))
            answers += zip(rows or range(len(found)), found, strict=True)
        if order.choices is not None:
            about = [{"input": row, "group": choice.group, "group_score": choice.score} for row, choice in enumerate(order.choices)]
            answers = sorted(((row, about[row] | answer) for row, answer in answers), key=lambda each: each[0])
        task = None if order.choices is not None else order.tickets[0][0].task
        latency_s = max((result.latency_s for result in results), default=0.0)
        stand_in = next((result.counters.stand_in for result in results if result.counters.stand_in), None)
        return {"task": task, "results": [answer for _, answer in answers], "latency_s": latency_s, "stand_in": stand_in}

    def _refuse(self, name: str | int | None, error: str, number: int) -> None:
        where = {"line": number} if name is None else {}
        self._lines.put({"id": name, **where, "state": "refused", "error": _sentence(error)})

    def _write(self) -> None:
        while (said := self._lines.get()) is not None:
            if self._lines.qsize() == UNREAD // 2:
                self._wake_up()  # reading may have stopped
            if self._fault is not None:
                continue
            try:
                sys.stdout.write(json.dumps(said, allow_nan=False) + "\n")
                sys.stdout.flush()
            except OSError as error:
                self._fault = error
                self._wake_up()

    # ---- stopping ----

    def _stopping(self) -> bool:
        return bool(self._signal) or self._fault is not None

    def _wake_up(self) -> None:
        with suppress(OSError):  # full: it will wake anyway
            os.write(self._wake, b".")

    def _drain_pipe(self) -> None:
        with suppress(BlockingIOError):
            while os.read(self._woken, CHUNK):
                pass

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the reading, instead of whatever the main thread is doing."""

        def stop(number: int, frame: Any) -> None:
            self._signal = self._signal or number
            self._wake_up()

        kept = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def _name(value: Any, key: str) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int) or len(str(value)) > ID_LIMIT:
        raise DataError(f"{key} is a string of at most {ID_LIMIT} characters or a whole number")
    return value


def _parts(inputs: Mapping[str, Any], choices: Sequence[Choice]) -> Iterator[tuple[str, list[int], dict[str, Any]]]:
    """The tasks that are to answer, each with the numbers of its inputs and what it is given; inputs with and without a bias apart."""
    found: dict[tuple[str, bool], list[int]] = {}
    for row, choice in enumerate(choices):
        for task in choice.tasks:
            found.setdefault((task, choice.bias is not None), []).append(row)
    for (task, _), rows in found.items():
        given = {key: [values[row] for row in rows] for key, values in inputs.items()}
        biases = [bias for row in rows if (bias := choices[row].bias) is not None]
        yield task, rows, given | ({"bias": np.stack(biases)} if biases else {})


def _state(order: _Order) -> str:
    """done, or what became of the first ticket that did not end so."""
    states = [ticket.state.value for ticket, _ in order.tickets]
    return next((state for state in states if state != "done"), "done")


def _inputs(document: dict[str, Any]) -> dict[str, Any]:
    """The inputs as `Session.submit` takes them; it checks what they hold."""
    given = {key: document[key] for key in INPUTS if key in document}
    if set(given) == {"text", "text_pair"}:
        if not isinstance(given["text"], str) or not isinstance(given["text_pair"], str):
            raise DataError("text and text_pair are texts")
        return {"pairs": [(given["text"], given["text_pair"])]}
    if len(given) != 1 or "text_pair" in given:
        raise DataError("give text, or text and text_pair, or one of texts, pairs and images")
    (key, value) = given.popitem()
    if key == "text":
        return {"texts": [value]}
    if not isinstance(value, list):
        raise DataError(f"{key} is a list")
    if key == "images" and not all(isinstance(each, str) for each in value):
        raise DataError("images is a list of file names")
    if key == "pairs":
        if not all(isinstance(each, list) and len(each) == 2 and all(isinstance(text, str) for text in each) for each in value):
            raise DataError("pairs is a list of pairs of texts")
        return {"pairs": [tuple(each) for each in value]}
    return {key: value}


def _sentence(text: str) -> str:
    """One line, whatever file or input it quotes."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
