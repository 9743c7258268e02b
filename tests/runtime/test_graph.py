"""Graphs: every way a stage can be wrong is a sentence about the bundle, and nothing is printed by anybody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeml
from edgeml.bundle import Bundle
from edgeml.errors import BundleError, DeviceError, PageError
from edgeml.graph import Graphs, check_stages
from edgeml.graph_bytes import Node, graph
from edgeml.manifest import load_manifest

HEAD_IN = {"hidden": ("float32", ("B", "T", 64)), "mask": ("float32", ("B", "T"))}
OPSETS = {"": 17, "edgeml": 1}


def head(nodes: list[Node], shape: tuple[Any, ...] = ("B", 2), kind: str = "float32", name: str = "scores") -> bytes:
    return graph(nodes, HEAD_IN, {name: (kind, shape)}, {}, OPSETS)


def stage_page(path: Path, name: str) -> int:
    with Bundle.open(path) as bundle:
        return next(stage.page for stage in load_manifest(bundle).stages if stage.name == name)


def check(path: Path) -> list[str]:
    with Bundle.open(path) as bundle:
        return list(check_stages(bundle, load_manifest(bundle)))


def test_every_graph_of_a_good_bundle_loads(toy: Path) -> None:
    with Bundle.open(toy) as bundle:
        assert check(toy) == [stage.name for stage in load_manifest(bundle).stages]


@pytest.mark.parametrize("content", [b"not a graph", b"\x08\x07", bytes(100)])
def test_what_is_no_graph_is_refused(toy: Path, rebuild: Any, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    path = rebuild({stage_page(toy, "head_mood"): content})
    with pytest.raises(BundleError, match=r"stage 'head_mood' \(page \d+\) is not a graph that runs"):
        check(path)
    assert capfd.readouterr() == ("", "")


def test_a_graph_with_other_inputs_than_declared_is_refused(toy: Path, rebuild: Any) -> None:
    path = rebuild(
        {
            stage_page(toy, "head_mood"): graph(
                [Node("Identity", ["ids"], ["scores"])], {"ids": ("float32", ("B", 2))}, {"scores": ("float32", ("B", 2))}, {}, OPSETS
            )
        }
    )
    with pytest.raises(BundleError, match="declares other inputs or outputs"):
        check(path)
    with edgeml.open(path) as session:
        for _ in range(2):
            with pytest.raises(BundleError, match="declares other inputs or outputs"):
                session.run("mood", text="rain")
        assert session.run("weather", text="rain").labels


def test_an_operator_that_does_not_exist_is_refused(toy: Path, rebuild: Any, capfd: pytest.CaptureFixture[str]) -> None:
    path = rebuild({stage_page(toy, "head_mood"): head([Node("Nonsense", ["hidden"], ["scores"], {}, "edgeml")])})
    with pytest.raises(BundleError, match="is not a graph that runs"):
        check(path)
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_fails_while_it_runs(toy: Path, rebuild: Any, capfd: pytest.CaptureFixture[str]) -> None:
    nodes = [
        Node("Constant", [], ["shape"], {"value": np.array([7, 11, 13], np.int64)}),
        Node("Reshape", ["hidden", "shape"], ["wide"]),
        Node("ReduceMean", ["wide"], ["scores"], {"axes": [1], "keepdims": 0}),
    ]
    path = rebuild({stage_page(toy, "head_mood"): head(nodes)})
    with edgeml.open(path) as session, pytest.raises(BundleError, match=r"stage 'head_mood' failed: .*Reshape"):
        session.run("mood", text="rain")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shape", ["rows", "labels", "rank", "type"])
def test_a_head_of_the_wrong_shape_is_refused(toy: Path, rebuild: Any, shape: str) -> None:
    value = np.zeros(
        {"rows": (3, 2), "labels": (1, 5), "rank": (1, 1, 2), "type": (1, 2)}[shape], np.float16 if shape == "type" else np.float32
    )
    nodes = [Node("Constant", [], ["scores"], {"value": value})]
    path = rebuild({stage_page(toy, "head_mood"): head(nodes, value.shape, "float16" if shape == "type" else "float32")})
    with edgeml.open(path) as session, pytest.raises(BundleError, match="the head of task 'mood' answers"):
        session.run("mood", text="rain")


def test_answers_that_are_not_finite_are_refused(toy: Path, rebuild: Any) -> None:
    value = np.array([[np.nan, 1]], np.float32)
    path = rebuild({stage_page(toy, "head_mood"): head([Node("Constant", [], ["scores"], {"value": value})], (1, 2))})
    with edgeml.open(path) as session, pytest.raises(BundleError, match="not finite"):
        session.run("mood", text="rain")


def test_a_router_of_the_wrong_shape_is_refused(toy: Path, rebuild: Any) -> None:
    bias = graph(
        [Node("Constant", [], ["bias"], {"value": np.zeros((1, 3), np.float32)})],
        {"hidden0": ("float32", ("B", "T", 64)), "mask": ("float32", ("B", "T"))},
        {"bias": ("float32", (1, 3))},
        {},
        OPSETS,
    )
    with Bundle.open(toy) as bundle:
        inputs = next(stage.inputs for stage in load_manifest(bundle).stages if stage.name == "router_mood")

    def declare(manifest: dict[str, Any]) -> None:
        for stage in manifest["stages"]:
            if stage["name"] == "router_mood":
                stage["inputs"] = ["hidden0", "mask"]

    assert set(inputs) <= {"hidden0", "mask"}
    path = rebuild({stage_page(toy, "router_mood"): bias}, declare)
    with (
        edgeml.open(path, memory="0%", residency="masked") as session,
        pytest.raises(BundleError, match="the router of task 'mood' answers"),
    ):
        session.run("mood", text="rain")


def test_a_page_that_cannot_be_read_is_the_error(flipped: Callable[[int], Path], toy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with edgeml.open(toy) as session:
        session.run("weather", text="rain")
        page = session.stats()["resident"][0]
    said = rf"flipped.edgeml: page {page} at offset \d+: .*checksum"
    with edgeml.open(flipped(page)) as session, pytest.raises(PageError, match=said) as caught:
        session.run("weather", text="rain")
    assert "ONNXRuntime" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_running_out_of_memory_is_the_machine_s_fault(toy: Path) -> None:
    with Bundle.open(toy) as bundle:
        graphs = Graphs(bundle, load_manifest(bundle), object(), 1)  # type: ignore[arg-type]
        failure = graphs._failure("stage 'trunk' failed", RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"))
    assert isinstance(failure, DeviceError)
