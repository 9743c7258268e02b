"""What edgeml does, shown in under two minutes: answers, less memory, a mixture larger than the memory it gets, and a report of it all.

Run by `make demo`. Needs the runtime only (no torch). Bundles: `models/multitask-text.edgeml` of this repository where it is there, a
made toy otherwise, and for the third part a mixture of 256 MiB written into a temporary directory and removed afterwards.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import edgeml
    from edgeml.bundle import Bundle
    from edgeml.errors import DeviceError, EdgemlError
    from edgeml.made import LARGE, make_mixture
    from edgeml.manifest import load_manifest
    from edgeml.session import Session
except KeyboardInterrupt:
    sys.exit(130)
except ImportError as missing:
    sys.exit(f"edgeml demo: the runtime is not installed here ({missing}); run `make demo`, or `pip install .` first")

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "build" / "demo-report.html"
MODEL = ROOT / "models" / "multitask-text.edgeml"
WIDTH = 88
BUDGETS = ("100%", "50%", "25%", "0%")
ROUNDS, WARMUP = 30, 8
TOKENS = 32

#: Texts of our own, each with the task that is asked.
QUESTIONS: tuple[tuple[str, str], ...] = (
    ("banking77", "The machine at the station swallowed my card. How do I get it back?"),
    ("sentfin_headline", "Shipping group's profit halves as fuel costs climb"),
    ("medquad_answer_type", "What can I do to lower my risk of getting gallstones?"),
    ("tos_unfair", "We may close your account at any time, for any reason and without telling you."),
    ("hwu64", "wake me up at six on weekdays, please"),
    ("xed_emotion_en", "Get out of my house before I call the police!"),
    ("nollysenti", "This film sweet die, I go watch am again with my people."),
    ("mag_field", "Household debt and how interest rates pass through in small open economies"),
    ("creak", "Penguins cross the ocean by flying in large flocks."),
)
TOY_QUESTIONS: tuple[tuple[str, str], ...] = (
    ("weather", "Will it rain tomorrow morning?"),
    ("weather", "a warm and sunny day by the sea"),
    ("weather", "The wind is cold, and there is snow on the trees in the city."),
    ("mood", "I love this book, thank you very much!"),
    ("mood", "That was a very bad film."),
    ("mood", "My car will not start, and I am sorry."),
)


@dataclass(frozen=True)
class Answer:
    """One text's answer; `ms` is its latency."""

    domain: str
    task: str
    text: str
    label: str
    confidence: float
    ms: float


@dataclass(frozen=True)
class Pass:
    """All texts answered once: pages found in memory and pages read."""

    answers: list[Answer]
    hits: int
    misses: int


def main() -> int:
    """Show the four parts; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the temporary directory goes
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="edgeml-demo-", dir=scratch()) as place:
            path, questions = find_model(Path(place))
            show_answers(path, questions)
            show_budgets(path, questions)
            show_paging(Path(place))
            show_report(Path(place), path, questions[0][0])
        print(f"\nAll of this took {time.perf_counter() - started:.0f} s. Next: edgeml --help")
        return 0
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EdgemlError as error:
        return fail(str(error), error.exit_code)
    except OSError as error:
        return fail(f"{error.filename or 'the demo'}: {error.strerror or error}", 4)
    except Exception as error:
        if os.environ.get("EDGEML_DEBUG"):
            raise
        return fail(f"a fault in edgeml itself: {type(error).__name__}: {error}; set EDGEML_DEBUG=1 for the traceback and report it", 4)


def fail(sentence: str, code: int) -> int:
    """Say what went wrong."""
    print(f"\nedgeml demo: {sentence}", file=sys.stderr)
    return code


def scratch() -> str | None:
    """A place on storage: the usual temporary directory is often memory, where reading costs nothing and proves nothing."""
    return "/var/tmp" if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK) else None


def find_model(place: Path) -> tuple[Path, Sequence[tuple[str, str]]]:
    """The repository's model and the texts it can answer; or a made toy, said so."""
    if MODEL.is_file():
        with Bundle.open(MODEL) as bundle:
            known = {task.name for task in load_manifest(bundle).tasks}
        questions = [(task, text) for task, text in QUESTIONS if task in known]
        if questions:
            print(f"Model: {MODEL.relative_to(ROOT)}, {MODEL.stat().st_size / (1 << 20):.1f} MiB, {len(known)} tasks")
            return MODEL, questions
    say(f"{MODEL.relative_to(ROOT)} is not here, so a toy with random weights answers: its labels mean nothing, all else is real.")
    toy = place / "toy.edgeml"
    make_mixture(toy)
    return toy, TOY_QUESTIONS


def title(number: int, text: str) -> None:
    print(f"\n{number}. {text}\n" + "-" * WIDTH, flush=True)


def say(text: str) -> None:
    print(textwrap.fill(text, WIDTH), flush=True)


def ask(session: Session, questions: Sequence[tuple[str, str]]) -> Pass:
    """Answer each text by itself, as a person would ask."""
    answers, hits, misses = [], 0, 0
    for name, text in questions:
        result = session.run(name, text=text)
        scores = [] if result.scores is None else [float(score) for score in result.scores[0]]
        domain = session.task(name).domain
        answers.append(Answer(domain, name, text, result.labels[0], max(scores), 1e3 * result.latency_s))
        hits, misses = hits + result.counters.hits, misses + result.counters.misses
    return Pass(answers, hits, misses)


def load(session: Session, questions: Sequence[tuple[str, str]]) -> None:
    """Load graphs and tokenizer before anything is timed."""
    for name in dict.fromkeys(name for name, _ in questions):
        session.load(name)


def show_answers(path: Path, questions: Sequence[tuple[str, str]]) -> None:
    """Part 1: texts from several domains, one model."""
    title(1, "One model, many tasks")
    with edgeml.open(path, memory="100%") as session:
        load(session, questions)
        ask(session, questions[:1])
        answers = ask(session, questions).answers
    for answer in answers:
        print(f'"{answer.text}"')
        what = f"{answer.domain} / {answer.task}"
        print(f"    {what:<33} {answer.label:<33} {answer.confidence:>6.1%} {answer.ms:>6.1f} ms")


def show_budgets(path: Path, questions: Sequence[tuple[str, str]]) -> None:
    """Part 2: the same texts at smaller budgets, exact and masked."""
    title(2, "The same texts in less memory")
    say(
        "exact: an expert that is not in memory is read when a text needs it; answers never change. masked: a text may only use "
        "its task's most used experts, as many as fit; nothing is read in between, but answers may change."
    )
    print(f"\n{'residency':<10} {'memory':>7} {'weights':>12} {'answers changed':>17} {'hits':>7} {'misses':>7} {'ms/text':>9}")
    expected: Pass | None = None
    changes: list[str] = []
    for residency in ("exact", "masked"):
        for memory in BUDGETS:
            with edgeml.open(path, memory=memory, residency=residency) as session:
                load(session, questions)
                ask(session, questions)
                found = ask(session, questions)
                held = session.budget.total_bytes / (1 << 20)
            expected = expected or found
            changed = [(old, new) for old, new in zip(expected.answers, found.answers, strict=True) if old.label != new.label]
            changes += [f"{residency} {memory}, {new.task}: {old.label} -> {new.label} ({new.confidence:.0%})" for old, new in changed]
            mean = sum(answer.ms for answer in found.answers) / len(found.answers)
            share = f"{len(changed)} of {len(found.answers)}"
            print(f"{residency:<10} {memory:>7} {held:>8.1f} MiB {share:>17} {found.hits:>7} {found.misses:>7} {mean:>9.1f}", flush=True)
    print()
    for change in changes:
        print(f"    {change}")
    if not changes:
        say("No answer changed: the experts that were left out matter little to these texts.")


def show_paging(place: Path) -> None:
    """Part 3: a mixture that is larger than the memory it may use, each budget in a process of its own."""
    title(3, "When the experts do not fit: a made mixture with 256 MiB of them")
    path = place / "large.edgeml"
    free = shutil.disk_usage(place).free
    if free < 320 << 20:
        say(f"Left out: {place} has {free >> 20} MiB free, and this part needs 320; set TMPDIR to a place with more.")
        return
    started = time.perf_counter()
    make_mixture(path, LARGE)
    spent = time.perf_counter() - started
    count = f"{LARGE.layers} layers of {LARGE.experts} experts, {LARGE.top_k} a token"
    say(f"Written in {spent:.1f} s: {count}. {ROUNDS} answers to {TOKENS} random tokens each; hits, page-ins and reads are per answer.")
    print(f"\n{'memory':>7} {'weights':>12} {'hits':>8} {'page-ins':>9} {'read':>10} {'p50':>10} {'p95':>10} {'peak memory':>13}")
    records = []
    sizes = ["--memory", "100%,50%,25%", "--iterations", str(ROUNDS), "--warmup", str(WARMUP), "--cold", "0", "--tokens", str(TOKENS)]
    for record in measure(path, next(iter(LARGE.tasks)), place / "paging.jsonl", *sizes):
        records.append(record)
        print(row(record), flush=True)
    if not records[-1]["direct_reads"]:
        print()
        say("Reads went through the system's page cache here (no direct reads), so they look cheaper than the storage is.")
    print()
    say(advice(records[0], records[-1]))


def row(record: dict[str, Any]) -> str:
    """A line of the table: costs per answer."""
    rounds, latency, mib = record["rounds"], record["latency_s"], 1 << 20
    return (
        f"{record['memory']:>7} {record['memory_budget_bytes'] / mib:>8.0f} MiB {record['hits'] / rounds:>8.0f} "
        f"{record['misses'] / rounds:>9.0f} {record['page_in_bytes'] / rounds / mib:>6.0f} MiB {1e3 * latency['p50']:>7.0f} ms "
        f"{1e3 * latency['p95']:>7.0f} ms {record['peak_rss_bytes'] / mib:>9.0f} MiB"
    )


def advice(full: dict[str, Any], small: dict[str, Any]) -> str:
    """When not to page, from what was measured."""
    slower = small["latency_s"]["p50"] / full["latency_s"]["p50"]
    read = small["page_in_bytes"] / small["rounds"] / (1 << 20)
    saved = (full["peak_rss_bytes"] - small["peak_rss_bytes"]) / (1 << 20)
    figures = f"at {small['memory']} an answer took {slower:.1f} times as long and read {read:.0f} MiB, to save {saved:.0f} MiB of memory"
    if slower < 1.2:
        return f"Here paging is nearly free: {figures}. Do not page where storage is slower than this machine's."
    instead = "When they do not fit, page; or use --residency masked, which reads only when the task changes."
    return f"Do not page when the experts fit: {figures}. {instead}"


def show_report(place: Path, path: Path, task: str) -> None:
    """Part 4: the records of part 3 and some of the model on one page."""
    title(4, "All of it on one page")
    records = place / "records.jsonl"
    for _ in measure(path, task, records, "--memory", "100%,50%,0%", "--residency", "exact,masked", "--iterations", "100"):
        pass
    files = [str(file) for file in (records, place / "paging.jsonl") if file.exists()]
    REPORT.parent.mkdir(exist_ok=True)
    for line in edgeml_lines("report", *files, "--output", str(REPORT), "--quiet"):
        print(line)
    say(f"Open {REPORT.relative_to(ROOT)} in a browser. `edgeml eval --records` would add what less memory costs in quality.")
    if importlib.util.find_spec("matplotlib") is None:
        say("Its tables have all figures; with `pip install matplotlib` beside edgeml it has plots too.")


def measure(path: Path, task: str, records: Path, *options: str) -> Iterator[dict[str, Any]]:
    """Records of `edgeml bench`, as each setting's process ends; they are added to a file too."""
    arguments = ["bench", str(path), "--task", task, "--output", "jsonl", "--quiet", "--records", str(records), *options]
    return map(json.loads, edgeml_lines(*arguments))


def edgeml_lines(*arguments: str) -> Iterator[str]:
    """What an edgeml command prints, line by line. Raises `DeviceError` with its last words where it fails."""
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen([sys.executable, "-P", "-m", "edgeml.cli", *arguments], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield from child.stdout or ()
            code = child.wait()
        finally:
            child.terminate()
            child.wait()
        if code:
            log.seek(0)
            said = log.read()[-1000:].decode("utf-8", "replace").strip().splitlines()
            raise DeviceError((said[-1] if said else f"edgeml {arguments[0]} ended with code {code}").removeprefix("edgeml: "))


if __name__ == "__main__":
    sys.exit(main())
