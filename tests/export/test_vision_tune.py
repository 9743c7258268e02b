"""Training: repeatable, resumed where it stopped, and losses that cannot serve are named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from edgeml_export.vision import Training, VisionModel, VisionTask, fit
from edgeml_export.vision.model import task_loss

from edgeml.errors import InputError, UsageError

HOW = Training(epochs=3, rate=0.05, batch=32, seed=4)


@pytest.fixture(scope="module")
def toy(vision: VisionModel) -> Any:
    return sys.modules["edgeml_source_vision_source"]  # loaded by `vision`


def trained(toy: Any, **options: Any) -> dict[str, torch.Tensor]:
    module, (x, labels) = toy.network(1), toy.tensors("validation")
    losses = {task.name: task_loss(task) for task in toy.TASKS}
    fit(module, x, labels, losses, HOW, **options)
    assert not module.training
    state: dict[str, torch.Tensor] = module.state_dict()
    return state


def test_an_interrupted_training_ends_with_the_same_weights(toy: Any, tmp_path: Path) -> None:
    checkpoint, losses = tmp_path / "t.ckpt", list[float]()

    def stop(epoch: int, loss: float) -> None:
        losses.append(loss)
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(toy, checkpoint=checkpoint, progress=stop)
    resumed = trained(toy, checkpoint=checkpoint, progress=lambda _epoch, loss: losses.append(loss))
    assert len(losses) == 3
    whole = trained(toy)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert [path.name for path in tmp_path.iterdir()] == ["t.ckpt"]


def test_what_is_no_checkpoint_is_named(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "t.ckpt").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"t\.ckpt: this is no checkpoint of this training"):
        trained(toy, checkpoint=tmp_path / "t.ckpt")


def test_batches_are_changed_by_the_seed_alone(toy: Any) -> None:
    def shifted(x: Any, labels: Any, random: torch.Generator) -> Any:
        return torch.roll(x, int(torch.randint(-1, 2, (), generator=random)), 3), labels

    first, second = trained(toy, augment=shifted), trained(toy, augment=shifted)
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_a_loss_that_is_no_number_names_its_task(toy: Any) -> None:
    module, (x, labels) = toy.network(1), toy.tensors("validation")
    losses = {task.name: task_loss(task) for task in toy.TASKS} | {"size": lambda output, _label: output.mean() / 0}
    with pytest.raises(UsageError, match="the loss of task 'size' is no longer a number"):
        fit(module, x, labels, losses, HOW)


def test_void_counts_nothing_in_a_loss() -> None:
    segmentation = task_loss(VisionTask("s", "d", ("a", "b", "void"), "miou", "segmentation", 2))
    edge = task_loss(VisionTask("e", "d", ("no edge", "edge"), "edge_f1", "edge", 2))
    logits, label = torch.randn(1, 2, 1, 4), torch.tensor([[[0, 1, 2, 2]]])
    changed = logits.clone()
    changed[..., 2:] = 50
    assert segmentation(logits, label) == segmentation(changed, label)
    assert edge(logits[:, :1], label) == edge(changed[:, :1], label)
    assert float(edge(logits[:, :1], torch.full_like(label, 2))) == 0
