"""The stage graphs say what the torch module does, whether NumPy's oracles run our operators or the native ones do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edgeml_export.assemble import assemble
from edgeml_export.dense import export_dense_onnx, export_dense_onnx_int8
from edgeml_export.encoder import Encoder, EncoderConfig, MultiTaskModel
from edgeml_export.model import Model, TaskSpec
from edgeml_export.quantize import QuantizePlan
from edgeml_export.reference import Batch, Reference
from edgeml_export.trace import Tracer
from edgeml_export.upcycle import MixtureConfig, MultiTaskMixture

from edgeml import native
from edgeml.bundle import Bundle, write_bundle
from edgeml.data import TaskData, find_tasks
from edgeml.layout import PageKind
from edgeml.manifest import load_manifest

F32 = QuantizePlan("f32", "f32", "f32", "f32")
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not hasattr(native, "Context"), reason="the extension is not built"))


@pytest.fixture(scope="module")
def tasks(data: Path) -> list[TaskData]:
    return find_tasks(data, ["vision/colour", "logic/same"])


@pytest.fixture(scope="module")
def batch(model: Model, tasks: list[TaskData]) -> Batch:
    """Rows of different lengths, so that there is padding."""
    return next(Reference(model).batches(tasks[0].rows("test", 12), False))


@pytest.fixture(scope="module", params=["oracle", NATIVE])
def stages(request: pytest.FixtureRequest, model: Model, tmp_path_factory: pytest.TempPathFactory, oracle: Any) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("f32") / "m.edgeml"
    write_bundle(path, *assemble(model, F32, {}, {}, {}))
    with Bundle.open(path) as bundle:
        runner = oracle.Oracle(bundle) if request.param == "oracle" else Tracer(bundle)
        yield runner
        runner.close()


def inputs(batch: Batch) -> dict[str, Any]:
    return {"ids": batch.ids, "types": batch.types, "mask": batch.mask}


@torch.no_grad()
def expected(model: Model, batch: Batch, bias: torch.Tensor) -> torch.Tensor:
    ids, mask, types = (torch.from_numpy(value) for value in (batch.ids, batch.mask, batch.types))
    return model.module.encoder(ids, mask, types, bias.expand(len(batch.ids), -1, -1))


def test_a_task_answers_as_in_torch(stages: Any, model: Model, batch: Batch) -> None:
    hidden = expected(model, batch, model.module.task_bias[0])
    found = stages.run(("embed", "router_colour", "trunk_ids", "head_colour"), inputs(batch))
    real = batch.mask > 0
    np.testing.assert_allclose(found["hidden"][real], hidden.numpy()[real], atol=1e-4)
    for site, part in enumerate(model.module.sites()):
        ids = found[f"ids_{site}"]
        assert (ids[~real] == -1).all()  # padding brings no expert in
        assert (np.sort(ids[real]) == np.nonzero(part.chosen.numpy()[real])[1].reshape(-1, 2)).all()
    scores = model.module.heads["colour"](_pooled(model, batch, hidden)).softmax(-1)
    np.testing.assert_allclose(found["scores"], scores.detach().numpy(), atol=1e-4)


def test_the_sentence_vector_is_that_of_torch(stages: Any, model: Model, batch: Batch) -> None:
    hidden = expected(model, batch, model.module.task_bias[-1])
    found = stages.run(("embed", "router_embed", "trunk", "head_embed"), inputs(batch))
    vector = model.module.vector(_pooled(model, batch, hidden)).detach().numpy()
    np.testing.assert_allclose(found["vector"], vector, atol=1e-4)
    assert "ids_0" not in found


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_masked_experts_add_nothing(stages: Any, model: Model, batch: Batch, kept: int) -> None:
    """Fewer than k that may be chosen: id -1; none: the shared expert alone, its bias once."""
    bias = model.module.task_bias[0].clone()
    bias[:, kept:] = -torch.inf
    hidden = expected(model, batch, bias)
    start = inputs(batch) | {"bias": np.repeat(bias.numpy()[None], len(batch.ids), 0)}
    found = stages.run(("embed", "trunk_ids"), start)
    real = batch.mask > 0
    np.testing.assert_allclose(found["hidden"][real], hidden.numpy()[real], atol=1e-4)
    ids = found["ids_1"][real]
    assert ids.max(initial=-1) < kept
    assert ((ids >= 0).sum(-1) == min(kept, 2)).all()


def test_padding_changes_no_answer(stages: Any, batch: Batch) -> None:
    names = ("embed", "router_colour", "trunk", "head_colour")
    together = stages.run(names, inputs(batch))["scores"]
    for row in (0, len(batch.ids) - 1):
        length = int(batch.mask[row].sum())
        alone = stages.run(names, {key: value[row : row + 1, :length] for key, value in inputs(batch).items()})["scores"]
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


def test_without_a_shared_expert_the_bias_is_added_by_the_graph(oracle: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = MultiTaskMixture(Encoder(EncoderConfig(20, 64, 1, 2, 64, 16)), {"t": 2}, MixtureConfig(0, 2, 32, 1)).eval()
    alone = Model(module, [TaskSpec("t", "d", ("a", "b"), "accuracy")], b"{}", 8, embedding=None)
    path = tmp_path / "m.edgeml"
    write_bundle(path, *assemble(alone, F32, {}, {}, {}))
    ids = torch.arange(6)[None]
    with Bundle.open(path) as bundle, torch.no_grad():
        found = oracle.Oracle(bundle).run(
            ("embed", "router_t", "trunk"), {"ids": ids.numpy(), "types": 0 * ids.numpy(), "mask": np.ones((1, 6), np.float32)}
        )
        hidden = module.encoder(ids, torch.ones(1, 6), 0 * ids, module.task_bias[:1])
    np.testing.assert_allclose(found["hidden"], hidden.numpy(), atol=1e-4)


def test_the_quantized_bundle_is_close(model: Model, batch: Batch, oracle: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.edgeml"
    write_bundle(path, *assemble(model, QuantizePlan(), {}, {}, {}))
    hidden = expected(model, batch, model.module.task_bias[0]).numpy()
    with Bundle.open(path) as bundle:
        found = oracle.Oracle(bundle).run(("embed", "router_colour", "trunk"), inputs(batch))["hidden"]
    real = batch.mask > 0
    assert np.square(found[real] - hidden[real]).mean() < 0.01 * np.square(hidden[real]).mean()


def test_graphs_pass_the_checker_and_their_bytes_repeat(model: Model, tmp_path: Path) -> None:
    pages, manifest = assemble(model, QuantizePlan(), {}, {}, {})
    again, _ = assemble(model, QuantizePlan(), {}, {}, {})
    assert [page.data for page in pages] == [page.data for page in again]
    for page in pages:
        if page.kind == PageKind.ONNX:
            graph = onnx.load_from_string(page.data)
            assert graph.ir_version == 8
            assert {opset.domain: opset.version for opset in graph.opset_import} in ({"": 17}, {"": 17, "edgeml": 1})
    write_bundle(tmp_path / "m.edgeml", pages, manifest)
    with Bundle.open(tmp_path / "m.edgeml") as bundle:
        assert [site.name for site in load_manifest(bundle).sites] == ["layer.0", "layer.1"]


@pytest.mark.filterwarnings("ignore")  # onnxruntime's quantizer has some of its own
def test_the_dense_graph_is_the_dense_model(tmp_path: Path) -> None:
    torch.manual_seed(2)
    dense = MultiTaskModel(Encoder(EncoderConfig(20, 64, 2, 2, 96, 16)), {"t": 3}).eval()
    ids = torch.randint(0, 20, (2, 7))
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    tensors = {"ids": ids.numpy(), "types": 0 * ids.numpy(), "mask": mask.numpy()}
    with torch.no_grad():
        scores = dense.heads["t"](dense.pooled(ids, mask, 0 * ids)).softmax(-1).numpy()
    export_dense_onnx(dense, tmp_path / "f32.onnx", 16, "t")
    export_dense_onnx_int8(dense, tmp_path / "int8.onnx", 16, "t")
    for name, tolerance in (("f32", 1e-5), ("int8", 0.05)):
        session = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, tensors)[0], scores, atol=tolerance)


@torch.no_grad()
def _pooled(model: Model, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    mask = torch.from_numpy(batch.mask)
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
