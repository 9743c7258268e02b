"""A made bundle of 230 kB answers through onnxruntime, and the answers are those of plain NumPy.

The oracle below shares with the runtime only the file: weights come from pages and initializers, steps are written out again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

import edgeml
from edgeml.bundle import Bundle
from edgeml.kernels import expert, linear
from edgeml.layout import Activation, WeightType
from edgeml.made import EPSILON, TOY, make_mixture
from edgeml.manifest import ExpertRef, Task, load_manifest
from edgeml.preprocess import TextPreprocessor

Floats = NDArray[np.float32]
TEXTS = [
    "Will it rain tomorrow?",
    "a warm and sunny day by the sea",
    "fog",
    "The wind is cold, and there is snow on the trees in the city; my car will not start this morning.",
    "I love this book!",
    "no, that was a very bad film: zzz 42",
]


class Oracle:
    """The made mixture in NumPy, one text at a time and without padding."""

    def __init__(self, path: Path) -> None:
        self.bundle = Bundle.open(path)
        self.manifest = load_manifest(self.bundle)
        self.stages = {stage.name: onnx.load_from_string(self.bundle.read(stage.page)) for stage in self.manifest.stages}

    def weights(self, stage: str) -> dict[str, NDArray[Any]]:
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in self.stages[stage].graph.initializer}

    def attribute(self, stage: str, op: str, number: int = 0) -> int:
        """The page or site of the `number`-th node of a kind."""
        node = [node for node in self.stages[stage].graph.node if node.op_type == op][number]
        return int(node.attribute[0].i)

    def answer(self, task: str, text: str, mask: Floats | None = None) -> tuple[Floats, list[NDArray[np.int64]]]:
        """The head's output (labels or d,) and the experts chosen at each site (T, k); `mask` (S, E) is added to the bias."""
        entry = next(entry for entry in self.manifest.tasks if entry.name == task)
        h = self.embed(entry, text)
        bias = np.zeros((len(self.manifest.sites), len(self.manifest.sites[0].experts)), np.float32)
        if entry.stages.router is not None:
            router = self.weights(entry.stages.router)
            bias = (norm(h.mean(0)) @ router["by_text"]).reshape(bias.shape) + router["by_task"]
        if mask is not None:
            bias = bias + mask
        chosen = []
        for site in range(len(self.manifest.sites)):
            h, ids = self.layer(h, bias[site], site)
            chosen.append(ids)
        pooled = norm(h.mean(0))
        if entry.kind == "embedding":
            return pooled / np.linalg.norm(pooled), chosen
        logits = pooled @ self.weights(entry.stages.head)["weights"]
        scores = np.exp(logits - logits.max())
        return scores / scores.sum(), chosen

    def labels(self, task: str) -> tuple[str, ...]:
        return next(entry.labels for entry in self.manifest.tasks if entry.name == task)

    def embed(self, task: Task, text: str) -> Floats:
        tokens = TextPreprocessor(self.bundle.read(task.preprocess.tokenizer), task.preprocess.max_tokens).encode([text])
        page = self.bundle.pages[self.attribute("embed", "EmbedRows")]
        rows = np.frombuffer(self.bundle.read(page.id), np.uint8).reshape(-1, page.stride)[tokens.ids[0]]
        scale = np.ascontiguousarray(rows[:, :4]).view("<f4")
        return (scale * np.ascontiguousarray(rows[:, 4:-4]).view(np.int8)).astype(np.float32)

    def layer(self, h: Floats, bias: Floats, site: int) -> tuple[Floats, NDArray[np.int64]]:
        if any(node.op_type == "Linear" for node in self.stages["trunk"].graph.node):
            page = self.bundle.pages[self.attribute("trunk", "Linear", site)]
            h = h + linear(self.bundle.read(page.id), page.matrices, norm(h))
        n = norm(h)
        logits = n @ self.weights("trunk")[f"router_{site}"] + bias
        entry = self.manifest.sites[site]
        ids = np.argsort(-logits, axis=-1, kind="stable")[:, : entry.top_k]
        values = np.take_along_axis(logits, ids, -1)
        ids = np.where(np.isneginf(values), -1, ids)
        out = np.zeros_like(h)
        for shared in entry.shared:
            out += self.expert(shared, n)
        for token in range(len(h)):
            for value, index in zip(values[token], ids[token], strict=True):
                if index >= 0:
                    out[token] += 1 / (1 + np.exp(-value)) * self.expert(entry.experts[index], n[token : token + 1])[0]
        return h + out, ids

    def expert(self, ref: ExpertRef, x: Floats) -> Floats:
        page = self.bundle.pages[ref.page]
        data = self.bundle.read(page.id)[ref.sub * page.stride : (ref.sub + 1) * page.stride]
        return expert(data, page.matrices, page.activation, x)


def assert_close(actual: Floats | None, expected: Floats) -> None:
    """Every row to 1e-3 and all but one to 1e-4: where the two norms differ in a last bit, an activation may be rounded the other way."""
    assert actual is not None
    worst = np.abs(actual - expected).max(-1)
    assert worst.max() < 1e-3
    assert np.sort(worst)[-2] < 1e-4


def norm(x: Floats) -> Floats:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(EPSILON))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("toy") / "toy.edgeml"
    make_mixture(path)
    return path


def test_the_oracle_has_finite_and_varied_answers(toy: Path) -> None:
    oracle = Oracle(toy)
    answers = [oracle.answer("weather", text) for text in TEXTS]
    assert all(np.isfinite(scores).all() for scores, _ in answers)
    assert len({int(scores.argmax()) for scores, _ in answers}) > 1
    used = np.unique(np.concatenate([ids[0].ravel() for _, ids in answers]))
    assert TOY.experts // 2 <= len(used) <= TOY.experts


def test_masked_experts_are_not_chosen(toy: Path) -> None:
    oracle = Oracle(toy)
    mask = np.full((TOY.layers, TOY.experts), -np.inf, np.float32)
    scores, chosen = oracle.answer("weather", TEXTS[0], mask)
    assert np.isfinite(scores).all()
    assert all((ids == -1).all() for ids in chosen)
    mask[:, 3] = 0
    assert all((ids == [3, -1]).all() for ids in oracle.answer("weather", TEXTS[0], mask)[1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert_type": WeightType.INT8, "gated": True, "activation": Activation.SILU, "per_page": 3, "shared": 2},
        {"expert_type": WeightType.F32, "dense_type": WeightType.F32, "activation": Activation.RELU, "mixing": False, "shared": 0},
        {"dense_type": WeightType.INT4, "expert_bias": False, "ids": False, "top_k": 3, "layers": 3},
    ],
    ids=["toy", "gated", "float", "deep"],
)
def test_the_session_answers_what_numpy_computes(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "m.edgeml"
    make_mixture(path, **changes)
    oracle = Oracle(path)
    with edgeml.open(path, threads=1) as session:
        for task in ("weather", "mood"):
            result = session.run(task, texts=TEXTS)
            expected = np.stack([oracle.answer(task, text)[0] for text in TEXTS])
            assert_close(result.scores, expected)
            assert result.labels == [oracle.labels(task)[index] for index in expected.argmax(-1)]
        assert_close(session.run("vector", texts=TEXTS).vectors, np.stack([oracle.answer("vector", text)[0] for text in TEXTS]))


def test_a_masked_answer_is_the_oracles_under_the_same_mask(toy: Path) -> None:
    oracle = Oracle(toy)
    with edgeml.open(toy, memory="50%", threads=1, residency="masked") as session:
        chosen = session.resident_set("weather")
        assert 0 < len(chosen.pages) < TOY.layers * TOY.experts
        scores = session.run("weather", texts=TEXTS).scores
    assert_close(scores, np.stack([oracle.answer("weather", text, chosen.mask)[0] for text in TEXTS]))


@pytest.mark.parametrize("memory", ["100%", "50%", "0%"])
def test_an_exact_answer_does_not_depend_on_the_budget(toy: Path, memory: str) -> None:
    with edgeml.open(toy, memory="100%", threads=1) as session:
        expected = session.run("weather", texts=TEXTS).scores
    with edgeml.open(toy, memory=memory, threads=2) as session:
        result = session.run("weather", texts=TEXTS)
    assert result.scores is not None
    assert expected is not None
    assert result.scores.tobytes() == expected.tobytes()
    assert result.counters.hits + result.counters.misses > 0
