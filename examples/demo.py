"""What edgeml does, shown in under two minutes: answers, less memory and what that costs, a mixture larger than its memory, a report.

Run by `make demo`. Needs the runtime and its reports (no torch). Bundles: `models/multitask-text.edgeml` of this repository where it is
there, a made toy otherwise, and for the fourth part a mixture of 256 MiB written into a temporary directory and removed afterwards.
Data: `examples/texts`, sentences that were written for this project, so that a checkout has something to score.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

try:
    from edgeml_report import document, to_html

    import edgeml
    from edgeml.bundle import Bundle
    from edgeml.errors import DeviceError, EdgemlError
    from edgeml.made import LARGE, make_mixture
    from edgeml.manifest import load_manifest
    from edgeml.records import read
    from edgeml.session import Session
except KeyboardInterrupt:
    sys.exit(130)
except ImportError as missing:
    sys.exit(f'edgeml demo: edgeml is not installed here ({missing}); run `make demo`, or `pip install . "./reports[plots]"` first')

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "build" / "demo-report.html"
MODEL = ROOT / "models" / "multitask-text.edgeml"
TEXTS = ROOT / "examples" / "texts"
WIDTH = 88
BUDGETS = ("100%", "50%", "25%", "0%")
ROUNDS, WARMUP = 30, 8
TOKENS = 32
#: A budget at which masking loses something, so that there is something to see.
TIGHT = "10%"
#: Variants beside the model masked at `TIGHT`: (name, setting of `edgeml eval --also`, what the table calls it).
VARIANTS: tuple[tuple[str, str, str], ...] = (
    ("masked 25%", "residency=masked,memory=25%", "masked, 25% of the experts' memory"),
    ("exact 10%", "memory=10%", "exact, 10%"),
    ("half", "experts-kept=0.5", "half of the experts, by usage"),
    ("three domains", "experts-kept=0.25,kept-for=finance+law+stem", "a quarter, those of three domains"),
)
SPECIALISED = "0.25"
MADE = (
    "A made data set: {rows} sentences written for this project, in {domains} domains, each with the answer that it should get "
    "(examples/texts). They are few and easy: they show how quality is accounted for, not how good the model is."
)

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
    """Show the five parts; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the temporary directory goes
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="edgeml-demo-", dir=scratch()) as place:
            path, questions = find_model(Path(place))
            show_answers(path, questions)
            show_budgets(path, questions)
            show_quality(Path(place), path)
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
            known = {task.name for task in load_manifest(bundle).tasks if task.labels}
        questions = [(task, text) for task, text in QUESTIONS if task in known]
        if questions:
            print(f"Model: {MODEL.relative_to(ROOT)}, {MODEL.stat().st_size / (1 << 20):.1f} MiB, {len(known)} tasks and sentence vectors")
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


def show_quality(place: Path, path: Path) -> None:
    """Part 3: labelled sentences, answered by variants beside the whole model."""
    title(3, "What less memory costs in quality")
    if path != MODEL:
        say(f"Left out: a toy has no quality to lose. It needs {MODEL.relative_to(ROOT)}.")
        return
    also = [part for name, setting, _ in VARIANTS for part in ("--also", f"{name},{setting}")]
    tight = ["--memory", TIGHT, "--residency", "masked"]
    ask = ["eval", str(path), *tight, "--reference", str(path), *also, "--specialise", SPECIALISED, "--data", str(TEXTS)]
    (line,) = edgeml_lines(*ask, "--records", str(place / "quality.jsonl"), "--json", "--quiet")
    found = json.loads(line)
    say(MADE.format(rows=found["retention"]["n"], domains=len(found["domains"])))
    print(f"\n{'':<36} {'weights':>9} {'% kept (95 %)':>23}  least kept in")
    names = [f"masked, {TIGHT} of the experts' memory", *(shown for _, _, shown in VARIANTS)]
    for shown, one in zip(names, found["variants"], strict=True):
        weights = "-" if one["experts_kept"] else f"{one['memory_budget_bytes'] / (1 << 20):.1f} MiB"
        print(f"{shown:<36} {weights:>9} {between(one['retention'], 100, 1):>23}  {worst(one['domains'])}")
    print()
    say("Kept: of what the whole model scores above chance, on the same sentences. And three figures of this project (docs/metrics.md):")
    gap = next(one["gg"] for one in found["variants"] if one["gg"] is not None)
    print(f"    GG    {between(gap, 100, 1)} points more lost by the last variant on the three other domains")
    print(f"    DSI   {between(found['dsi'])}: 0, a quarter chosen for a domain is as good on others")
    print(f"    CDTR  {between(found['cdtr'])}: 1, another domain's quarter does as well; 0, it is no help")
    if any(found[name].get("near_clip") for name in ("dsi", "cdtr")):
        print("    ~ some of its scores are near chance: not to be trusted")


def between(found: dict[str, Any], by: float = 1.0, digits: int = 2) -> str:
    """A figure and its interval."""
    value, low, high = (f"{by * found[key]:.{digits}f}" for key in ("value", "low", "high"))
    if low == high:  # not one answer differs, in no resample
        return value
    return f"{value} ({low} to {high}){' ~' if found.get('near_clip') else ''}"


def worst(domains: dict[str, Any]) -> str:
    """The domain that kept least, with how much."""
    kept = {name: one["retention"]["value"] for name, one in domains.items()}
    name = min(kept, key=lambda one: kept[one])
    return "-" if kept[name] >= 0.9995 else f"{name}, {100 * kept[name]:.0f} kept"


def show_paging(place: Path) -> None:
    """Part 4: a mixture that is larger than the memory it may use, each budget in a process of its own."""
    title(4, "When the experts do not fit: a made mixture with 256 MiB of them")
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
    """Part 5: the records of parts 3 and 4, with how fast the model is and how it routes, on one page."""
    title(5, "All of it on one page")
    records = place / "records.jsonl"
    for _ in measure(path, task, records, "--memory", f"100%,25%,{TIGHT}", "--residency", "masked,exact", "--iterations", "100"):
        pass
    keep = ["--records", str(records), "--json", "--quiet"]
    also = [["profile", str(path), "--task", task, "--memory", "25%", *keep]]
    also += [["routing", str(path), "--data", str(TEXTS), "--limit", "8", *keep]] if path == MODEL else []
    for arguments in also:
        for _ in edgeml_lines(*arguments):
            pass
    found = [record for file in (place / "quality.jsonl", records, place / "paging.jsonl") if file.exists() for record in read(file)]
    scored = [record["eval"] for record in found if record["kind"] == "eval"]
    page = document(found)
    about = [page.about, *(MADE.format(rows=one["retention"]["n"], domains=len(one["domains"])) for one in scored)]
    about += ["`large.edgeml` has random weights."] * (place / "paging.jsonl").exists()
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(to_html(replace(page, about=" ".join(about))), "utf-8")
    say(f"Open {REPORT.relative_to(ROOT)} in a browser: how fast, how large, how much worse, where, and how sure.")
    say("`edgeml report` makes such a page of the records of any command.")
    if importlib.util.find_spec("matplotlib") is None:
        say('Its tables have all figures; with `pip install "./reports[plots]"` it has plots too.')


def measure(path: Path, task: str, records: Path, *options: str) -> Iterator[dict[str, Any]]:
    """Records of `edgeml bench`, as each setting's process ends; they are added to a file too."""
    arguments = ["bench", str(path), "--task", task, "--output", "jsonl", "--quiet", "--records", str(records), *options]
    return map(json.loads, edgeml_lines(*arguments))


def edgeml_lines(*arguments: str) -> Iterator[str]:
    """What an edgeml command prints, line by line. Raises `DeviceError` with its last words where it fails."""
    line = [sys.executable, "-P", "-m", "edgeml.cli", *arguments]
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log, text=True) as child:
            try:
                yield from child.stdout or ()
                code = child.wait()
            finally:
                child.terminate()
        if code:
            log.seek(0)
            said = log.read()[-1000:].decode("utf-8", "replace").strip().splitlines()
            raise DeviceError((said[-1] if said else f"edgeml {arguments[0]} ended with code {code}").removeprefix("edgeml: "))


if __name__ == "__main__":
    sys.exit(main())
