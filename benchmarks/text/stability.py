#!/usr/bin/env python3
"""Answers depend on nothing but the input: not on the memory budget, the threads, the kernels, or the rows beside it.

    stability.py [--bundle models/multitask-text.edgeml] [--data ../shared/data/text] [--inputs 500]

Whole model, at least --inputs test rows over all tasks (as many a task, in full batches of 32 where it has the rows):
- labels and scores bit for bit the same at memory 100 %, 50 %, 25 % and 0 % (one slot);
- alone, in batches of 8 and in batches of 32: the same labels, scores to 1e-3.
Operators, on the bundle's own pages and seeded random inputs: every `Linear` page and every `PagedExperts` site bit for bit the same
over the budgets, 1 and 2 threads, every kernel set of this processor, and alone against together.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from answers import Questions, read_questions
from benchlib import MODEL, Verdict, finish, parser, progress, run, shared_text, verdict
from numpy.typing import NDArray

import edgeml.batching
from edgeml import native
from edgeml.bundle import Bundle, PageKind
from edgeml.data import Row
from edgeml.manifest import load_manifest
from edgeml.session import Session
from edgeml.session import open as open_session
from edgeml.store import native_sites, plan_budget

Floats = NDArray[np.float32]
BUDGETS = ("100%", "50%", "25%", "0%")
BATCHES = (1, 8, 32)
CLOSE = 1e-3
TOKENS = 33  # a token count that fills no block of any kernel

# A call of 32 rows is to be one batch of 32 here, however long its rows are.
edgeml.batching.BATCH_TOKENS = 1 << 30


def choose(questions: Sequence[Questions], inputs: int) -> list[tuple[str, bool, list[Row]]]:
    """Task, whether it has pairs, and its first rows: whole batches of the largest size, together at least `inputs`."""
    share = -(-inputs // len(questions))
    share = -(-share // max(BATCHES)) * max(BATCHES)
    return [(task.task.name, task.task.pair, task.rows[:share]) for task in questions]


def answer(session: Session, name: str, pair: bool, rows: Sequence[Row], size: int) -> Floats:
    """Scores (rows, labels), asked for `size` rows at a time."""
    parts = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        inputs = {"pairs": [(row.text, row.pair or "") for row in chunk]} if pair else {"texts": [row.text for row in chunk]}
        scores = session.run(name, **inputs).scores
        assert scores is not None
        parts.append(scores)
    return np.concatenate(parts)


def same_bits(one: Floats, two: Floats) -> bool:
    return one.shape == two.shape and bool(np.array_equal(one.view(np.uint32), two.view(np.uint32)))


def whole_model(bundle: Path, chosen: list[tuple[str, bool, list[Row]]], threads: int | None) -> tuple[list[Verdict], dict[str, Any]]:
    """Every budget and batch size in turn, each in a session of its own."""
    total = sum(len(rows) for _, _, rows in chosen)
    runs = [(memory, max(BATCHES)) for memory in BUDGETS] + [("100%", size) for size in BATCHES[:-1]]
    tick = progress(total * len(runs), "whole model")
    found: dict[tuple[str, int], list[Floats]] = {}
    slots = {}
    for memory, size in runs:
        with open_session(bundle, memory, threads) as session:
            slots[memory] = session.budget.slots
            found[memory, size] = []
            for name, pair, rows in chosen:
                found[memory, size].append(answer(session, name, pair, rows, size))
                tick(len(rows))
    whole = found["100%", max(BATCHES)]
    budgets = {memory: _changed(whole, found[memory, max(BATCHES)]) for memory in BUDGETS[1:]}
    alone = found["100%", 1]
    batches = {str(size): _compared(alone, found["100%", size]) for size in BATCHES[1:]}
    labels = sum(entry["other_labels"] for entry in batches.values())
    largest = max(entry["largest_difference"] for entry in batches.values())
    verdicts = [
        verdict("inputs whose scores differ in any bit over the budgets", "0", sum(budgets.values()), not any(budgets.values())),
        verdict("labels that depend on the batch", "0", labels, labels == 0),
        verdict("largest difference of a score between alone and in a batch", f"<= {CLOSE}", largest, largest <= CLOSE),
    ]
    return verdicts, {"inputs": total, "slots": slots, "changed_by_budget": budgets, "alone_against_batches": batches}


def _changed(one: Sequence[Floats], two: Sequence[Floats]) -> int:
    """Rows with any bit changed."""
    return sum(int((a.view(np.uint32) != b.view(np.uint32)).any(-1).sum()) for a, b in zip(one, two, strict=True))


def _compared(one: Sequence[Floats], two: Sequence[Floats]) -> dict[str, Any]:
    return {
        "other_labels": sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in zip(one, two, strict=True)),
        "largest_difference": max(float(np.abs(a - b).max()) for a, b in zip(one, two, strict=True)),
        "rows_with_other_bits": _changed(one, two),
    }


def operators(path: Path) -> tuple[list[Verdict], dict[str, Any]]:
    """Every page of weights under every combination of kernels, threads and budget, against scalar kernels, one thread, all memory."""
    settings = list(itertools.product(native.backends(), (1, 2), BUDGETS))
    tick = progress(len(settings), "operators")
    differing: list[str] = []
    alone: list[str] = []
    expected: dict[str, Floats] = {}
    with Bundle.open(path) as bundle:
        manifest = load_manifest(bundle)
        for isa, threads, memory in settings:
            budget = plan_budget(bundle, manifest, memory, threads)
            sites = native_sites(manifest)
            options = {"slots": budget.slots, "threads": threads, "direct": not budget.complete, "isa": isa}
            context = native.Context(bundle.fd, bundle.index_bytes, sites, **options)
            for name, apply in _calls(bundle, sites, context):
                together = apply(slice(None))
                if name not in expected:
                    expected[name] = together
                where = f"{name}, {isa}, {threads} threads, {memory}"
                if not same_bits(together, expected[name]):
                    differing.append(where)
                one_by_one = np.concatenate([apply(slice(row, row + 1)) for row in range(0, TOKENS, 4)])
                if not same_bits(one_by_one, expected[name][::4]):
                    alone.append(where)
            context.close()
            tick(1)
    verdicts = [
        verdict("operator outputs that differ over budgets, threads or kernels", "0", len(differing), not differing, first=differing[:5]),
        verdict("operator outputs that differ between alone and together", "0", len(alone), not alone, first=alone[:5]),
    ]
    return verdicts, {"kernel_sets": native.backends(), "operators": len(expected), "settings": len(settings), "tokens": TOKENS}


def _calls(bundle: Bundle, sites: Sequence[native.Site], context: native.Context) -> Iterator[tuple[str, Callable[[slice], Floats]]]:
    """Each operator with its own random input, as a function of the rows it is given."""
    for page in bundle.pages:
        if page.kind == PageKind.LINEAR:
            x = _random(page.id, (TOKENS, page.matrices[0].cols))
            yield f"Linear page {page.id}", lambda rows, x=x, page=page: context.linear(page.id, x[rows])
    for number, site in enumerate(sites):
        x = _random(1 << 20 | number, (TOKENS, site.hidden))
        rng = np.random.default_rng(number)
        ids = np.stack([rng.permutation(len(site.experts))[: site.top_k] for _ in range(TOKENS)]).astype(np.int64)
        ids[0, -1] = -1  # an expert that is masked away
        weights = rng.random(ids.shape, np.float32) * (ids >= 0)
        yield (
            f"PagedExperts site {number}",
            lambda rows, number=number, x=x, ids=ids, weights=weights: context.experts(number, x[rows], ids[rows], weights[rows]),
        )


def _random(seed: int, shape: tuple[int, int]) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--bundle", type=Path, default=MODEL)
    options.add_argument("--data", type=Path, default=shared_text())
    options.add_argument("--inputs", type=int, default=500, help="at least this many rows over all tasks (default: 500)")
    options.add_argument("--threads", type=int, help="threads of the whole model (default: all processors)")
    chosen = options.parse_args()
    with open_session(chosen.bundle, "100%", chosen.threads) as session:
        questions = read_questions(chosen.data, session.manifest, str(chosen.bundle), None)
        settings = session.settings()
    rows = choose(questions, chosen.inputs)
    verdicts, figures = whole_model(chosen.bundle, rows, chosen.threads)
    found, more = operators(chosen.bundle)
    return finish("text-stability", verdicts + found, {"bundle": settings, "whole_model": figures, "operators": more}, chosen.records)


if __name__ == "__main__":
    run(main)
