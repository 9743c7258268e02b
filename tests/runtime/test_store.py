"""Budgets: what `memory=` means in bytes and pages, and what this machine can spare."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeml import store
from edgeml.bundle import Bundle
from edgeml.errors import BudgetError, UsageError
from edgeml.manifest import load_manifest
from edgeml.store import Budget, available_bytes, open_context, plan_budget, resolve_threads

PAGES = 16


def plan(path: Path, memory: int | str | None, threads: int = 1) -> Budget:
    with Bundle.open(path) as bundle:
        return plan_budget(bundle, load_manifest(bundle), memory, threads)


@pytest.mark.parametrize(("memory", "pages"), [("0%", 0), ("25%", 4), ("50%", 8), ("99%", 15), ("100%", 16)])
def test_a_share_is_of_the_pageable_pages(toy: Path, memory: str, pages: int) -> None:
    budget = plan(toy, memory)
    assert (budget.pages, budget.slots, budget.pageable_pages) == (pages, max(pages, 1), PAGES)
    assert budget.total_bytes == budget.pinned_bytes + budget.scratch_bytes + budget.slots * budget.slot_bytes
    assert budget.complete == (pages == PAGES)


def test_bytes_hold_as_many_pages_as_fit(toy: Path) -> None:
    floor = plan(toy, "0%")
    assert plan(toy, floor.total_bytes).pages == 1
    assert plan(toy, floor.total_bytes + floor.slot_bytes).pages == 2
    assert plan(toy, floor.total_bytes + floor.slot_bytes - 1).pages == 1
    assert plan(toy, "1GiB").pages == PAGES


def test_a_budget_never_holds_more_than_it_says(toy: Path) -> None:
    for memory in ("400KiB", "400000", 450_000):
        asked = memory if isinstance(memory, int) else {"400KiB": 409_600, "400000": 400_000}[memory]
        assert plan(toy, memory).total_bytes <= asked


def test_below_the_floor_is_refused_and_the_floor_named(toy: Path) -> None:
    floor = plan(toy, "0%").total_bytes
    with pytest.raises(BudgetError, match=r"below the floor of .* pinned, .* scratch, one page .* give at least 1MiB") as caught:
        plan(toy, floor - 1)
    assert str(toy) in str(caught.value)
    assert plan(toy, "1MiB").pages > 0


def test_what_is_planned_is_what_is_held(toy: Path) -> None:
    with Bundle.open(toy) as bundle:
        context, _, budget = open_context(bundle, "50%", 2)
        held = context.stats()
        context.close()
    assert (held["slots"], held["slot_bytes"]) == (budget.slots, budget.slot_bytes)
    assert held["pinned_bytes"] + held["scratch_bytes"] == budget.pinned_bytes + budget.scratch_bytes


def test_auto_takes_everything_where_there_is_room(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(toy, None).asked == "auto"
    assert plan(toy, "AUTO").complete
    monkeypatch.setattr(store, "available_bytes", lambda: store.AUTO_RESERVE_BYTES + 500_000)
    small = plan(toy, "auto")
    assert small.total_bytes <= 400_000
    assert not small.complete
    assert any("free memory" in note for note in small.notes("exact"))
    monkeypatch.setattr(store, "available_bytes", lambda: 1000)
    with pytest.raises(BudgetError, match="this machine can spare"):
        plan(toy, "auto")


def test_a_budget_below_a_token_s_needs_is_noted(toy: Path) -> None:
    (note,) = plan(toy, "0%").notes("exact")
    assert "1 of the 4 pages" in note
    assert "100 MB/s" in note
    assert not plan(toy, "0%").notes("masked")
    assert not plan(toy, "25%").notes("exact")


def test_the_environment_speaks_where_the_caller_does_not(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEML_MEMORY", "25%")
    monkeypatch.setenv("EDGEML_THREADS", "3")
    assert plan(toy, None).pages == 4
    assert plan(toy, "50%").pages == 8
    assert (resolve_threads(None), resolve_threads(2)) == (3, 2)
    monkeypatch.setenv("EDGEML_MEMORY", "lots")
    with pytest.raises(UsageError, match="lots"):
        plan(toy, None)
    for text in ("0", "257", "two", "-1", "1" * 30, "\u0663"):
        monkeypatch.setenv("EDGEML_THREADS", text)
        with pytest.raises(UsageError, match="EDGEML_THREADS must be a number from 1 to 256"):
            resolve_threads(None)


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MIB = 1 << 20


@pytest.mark.parametrize(
    ("proc", "groups", "expected"),
    [
        ({"meminfo": "MemTotal: 9999999 kB\nMemAvailable:  102400 kB\n"}, {}, 100 * MIB),
        (
            {"meminfo": "MemAvailable: 102400 kB", "self/cgroup": "0::/a/b\n"},
            {"a/b/memory.max": "max", "a/b/memory.current": "1", "a/memory.max": f"{50 * MIB}", "a/memory.current": f"{20 * MIB}"},
            30 * MIB,
        ),
        (
            {"meminfo": "MemAvailable: 102400 kB", "self/cgroup": "0::/\n"},
            {"memory.max": f"{50 * MIB}", "memory.current": f"{45 * MIB}", "memory.stat": f"anon 5\ninactive_file {15 * MIB}\n"},
            20 * MIB,
        ),
        (
            {"meminfo": "MemAvailable: 102400 kB", "self/cgroup": "4:cpu:/x\n3:memory:/x\n"},
            {"memory/x/memory.limit_in_bytes": f"{8 * MIB}", "memory/x/memory.usage_in_bytes": f"{9 * MIB}"},
            0,
        ),
    ],
)
def test_what_a_machine_can_spare(tmp_path: Path, proc: dict[str, str], groups: dict[str, str], expected: int) -> None:
    assert available_bytes(files(tmp_path / "proc", proc), files(tmp_path / "groups", groups)) == expected


def test_without_any_information_the_physical_memory_counts(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) > 0
