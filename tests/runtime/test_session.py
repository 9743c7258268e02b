"""A session: the same answers at every budget, in every company and from every thread; and errors that stay with their request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml import native
from edgeml.batching import BATCH_ROWS, BATCH_TOKENS, batches
from edgeml.errors import BudgetError, UsageError
from edgeml.preprocess import TextBatch
from edgeml.session import WINDOW_ROWS, Session

WORDS = "rain sun snow fog wind storm bank money price doctor court car music dog tree love hate happy city water".split()  # noqa: SIM905


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 40 words."""
    drawn = np.random.default_rng(seed)
    return [" ".join(drawn.choice(WORDS, int(drawn.integers(1, 41)))) for _ in range(count)]


def scores(session: Session, task: str, given: list[str]) -> Any:
    return session.run(task, texts=given).scores


@pytest.fixture(scope="module")
def reference(toy: Path) -> Any:
    with edgeml.open(toy, threads=1) as session:
        return scores(session, "weather", texts(80))


# ---- same answers ----


@pytest.mark.parametrize("memory", ["0%", "7%", "25%", "50%", "100%"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_budget_and_the_threads_change_no_bit(toy: Path, reference: Any, memory: str, threads: int) -> None:
    with edgeml.open(toy, memory=memory, threads=threads) as session:
        assert np.array_equal(scores(session, "weather", texts(80)), reference)


@pytest.mark.parametrize("isa", native.backends())
def test_the_kernels_change_no_bit(toy: Path, reference: Any, isa: str) -> None:
    with edgeml.open(toy, isa=isa) as session:
        assert session.backend == isa
        assert np.array_equal(scores(session, "weather", texts(80)), reference)


def test_batch_mates_change_nothing_that_matters(toy: Path, reference: Any) -> None:
    with edgeml.open(toy) as session:
        alone = np.concatenate([scores(session, "weather", [text]) for text in texts(80)])
    assert np.abs(alone - reference).max() < 1e-4
    assert np.array_equal(alone.argmax(-1), reference.argmax(-1))


def test_answers_come_in_input_order_across_windows(toy: Path) -> None:
    given = texts(WINDOW_ROWS + 40, seed=3)
    with edgeml.open(toy) as session:
        result = session.run("weather", texts=given)
        for row in (0, 1, WINDOW_ROWS - 1, WINDOW_ROWS, len(given) - 1):
            one = session.run("weather", text=given[row])
            assert one.labels == [result.labels[row]]
            assert one.scores is not None
            assert result.scores is not None
            assert np.abs(one.scores[0] - result.scores[row]).max() < 1e-4
    assert len(result.labels) == len(result.truncated) == len(result.row_s) == len(given)
    assert all(seconds > 0 for seconds in result.row_s)
    assert sum(result.row_s) <= result.latency_s


def test_batches_are_bounded_and_the_longest_comes_first() -> None:
    lengths = [1, 64, 3, *[500] * 9, *[10] * 100]
    mask = (np.arange(500) < np.array(lengths)[:, None]).astype(np.float32)
    ids = np.arange(mask.size, dtype=np.int64).reshape(mask.shape)
    cut = list(batches(TextBatch(ids, np.zeros_like(ids), mask, (False,) * len(lengths))))
    assert sorted(row for rows, _ in cut for row in rows) == list(range(len(lengths)))
    for rows, batch in cut:
        assert len(rows) <= BATCH_ROWS
        assert batch.ids.size <= BATCH_TOKENS or len(rows) == 1
        assert batch.ids.shape[1] == max(lengths[row] for row in rows)
        assert np.array_equal(batch.ids[:, 0], ids[rows, 0])
    assert [batch.ids.shape[1] for _, batch in cut] == sorted((batch.ids.shape[1] for _, batch in cut), reverse=True)


def test_nothing_asked_nothing_answered(toy: Path) -> None:
    with edgeml.open(toy) as session:
        result = session.run("weather", texts=[])
        assert (result.labels, result.truncated) == ([], [])
        assert result.scores is not None
        assert result.scores.shape == (0, 4)


def test_a_vector_task_answers_vectors(toy: Path) -> None:
    with edgeml.open(toy) as session:
        result = session.run("vector", texts=texts(3))
    assert result.vectors is not None
    assert (result.vectors.shape, result.labels, result.scores) == ((3, 64), [], None)
    assert np.allclose(np.linalg.norm(result.vectors, axis=-1), 1, atol=1e-4)


def test_ids_answer_like_the_text_they_stand_for(toy: Path) -> None:
    text = "a warm and sunny day"
    with edgeml.open(toy) as session:
        batch = session.preprocessor(session.task("weather")).encode([text])
        from_text = session.run("weather", text=text).scores
        assert np.array_equal(session.run("weather", arrays={"ids": batch.ids}).scores, from_text)  # type: ignore[arg-type]
        padded = {"ids": np.pad(batch.ids, ((0, 0), (0, 5))), "mask": np.pad(batch.mask, ((0, 0), (0, 5)))}
        assert np.array_equal(session.run("weather", arrays=padded).scores, from_text)  # type: ignore[arg-type]


# ---- residency ----


def test_masked_at_nothing_uses_the_shared_experts_alone(toy: Path, reference: Any) -> None:
    with edgeml.open(toy, memory="0%", residency="masked") as session:
        result = session.run("weather", texts=texts(80))
        assert session.resident_set("weather").pages == ()
        assert (result.counters.hits, result.counters.misses, result.counters.page_in_bytes) == (0, 0, 0)
    assert not np.array_equal(result.scores, reference)


def test_masked_keeps_to_the_budget_and_reads_each_page_once(toy: Path) -> None:
    with edgeml.open(toy, memory="50%", residency="masked") as session:
        pages = session.resident_set("weather").pages
        assert len(pages) == 8
        session.run("weather", texts=texts(80))
        again = session.run("weather", texts=texts(80))
        assert again.counters.misses == 0
        assert set(session.stats()["resident"]) == set(pages)
        session.run("mood", texts=texts(20))
        assert set(session.stats()["resident"]) == set(session.resident_set("mood").pages)


def test_masked_with_everything_in_memory_is_exact(toy: Path, reference: Any) -> None:
    with edgeml.open(toy, memory="100%", residency="masked") as session:
        assert np.array_equal(scores(session, "weather", texts(80)), reference)


def test_masked_without_recorded_usage_is_refused(toy: Path, rebuild: Any) -> None:
    path = rebuild(change=lambda manifest: manifest["usage"].clear())
    with (
        edgeml.open(path, memory="50%", residency="masked") as session,
        pytest.raises(UsageError, match="records no usage for task 'weather'"),
    ):
        session.run("weather", text="rain")
    with edgeml.open(path, residency="masked", memory="100%") as session:
        assert session.run("weather", text="rain").labels


def test_a_site_with_nothing_left_is_refused(rebuild: Any) -> None:
    path = rebuild(change=lambda manifest: manifest["sites"][0].update(shared=[]))
    with edgeml.open(path, memory="0%", residency="masked") as session, pytest.raises(BudgetError, match="no expert of site"):
        session.run("weather", text="rain")


def test_counters_are_those_of_the_call(toy: Path) -> None:
    with edgeml.open(toy) as session:
        first = session.run("weather", texts=texts(40)).counters
        second = session.run("weather", texts=texts(40)).counters
        assert first.misses > 0
        assert first.page_in_bytes == first.misses * 5120
        assert (second.misses, second.page_in_bytes) == (0, 0)
        assert second.hits == first.hits + first.misses
        assert first.tokens == second.tokens > 40
        session.evict_all()
        again = session.run("weather", texts=texts(40)).counters
        assert again.page_in_bytes == first.page_in_bytes
        assert again.hits + again.misses == first.hits + first.misses
        assert again.misses <= first.misses, "some of it may be read ahead by now"
        total = session.stats()
        assert total["misses"] == first.misses + again.misses


def test_a_small_budget_is_noted(toy: Path) -> None:
    with edgeml.open(toy, memory="0%") as session:
        assert len(session.notes) == 1
    with edgeml.open(toy) as session:
        assert session.notes == []


def test_settings_say_what_was_resolved(toy: Path) -> None:
    with edgeml.open(toy, memory="50%", threads=1) as session:
        settings = session.settings()
    assert settings["memory"] == "50%"
    assert (settings["threads"], settings["residency"], settings["slots"]) == (1, "exact", 8)
    assert settings["bundle_id"] == session.bundle.id
    assert settings["memory_budget_bytes"] == settings["pinned_bytes"] + settings["scratch_bytes"] + 8 * settings["slot_bytes"]
    assert isinstance(settings["direct_reads"], bool)
