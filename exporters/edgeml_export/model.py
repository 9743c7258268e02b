"""What an export starts from: a torch model with its tasks and tokenizer, as the function in `file.py:function` returns it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeml.data import TaskData, find_tasks
from edgeml.errors import DataError, EdgemlError, UsageError
from edgeml_export.upcycle import MultiTaskMixture

if TYPE_CHECKING:
    from edgeml_export.vision.model import VisionModel

__all__ = ["Model", "TaskSpec", "load_source"]


@dataclass(frozen=True)
class TaskSpec:
    """A task the model has a head for; `metric` is accuracy or macro_f1."""

    name: str
    domain: str
    labels: tuple[str, ...]
    metric: str
    pair: bool = False

    @classmethod
    def of(cls, data: TaskData) -> TaskSpec:
        """The same task without its place on this disk."""
        return cls(data.name, data.domain, data.labels, data.metric, data.pair)


@dataclass
class Model:
    """A mixture ready to be exported.

    `tasks` are in the order of the module's heads and of `task_bias`; `embedding` names the task that answers with sentence
    vectors (None: there is none). `reference_scores` are test scores of this module in torch, in [0, 1], measured earlier; what is
    missing is measured at export. `dense_scores` are the test scores of the dense model it was made from, for the record.
    """

    module: MultiTaskMixture
    tasks: Sequence[TaskSpec]
    tokenizer: bytes
    max_tokens: int
    embedding: str | None = "embed"
    reference_scores: Mapping[str, float] = field(default_factory=dict)
    dense_scores: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        heads = {name: int(head.out_features) for name, head in self.module.heads.items()}  # type: ignore[arg-type]
        if {task.name: len(task.labels) for task in self.tasks} != heads or [task.name for task in self.tasks] != list(heads):
            raise UsageError("the model's tasks must be its heads, in the same order and with as many labels as outputs")
        if self.embedding in heads:
            raise UsageError(f"'{self.embedding}' is the name of a task, so sentence vectors need another one")
        if not 1 <= self.max_tokens <= self.module.encoder.config.positions:
            raise UsageError(f"max_tokens must be from 1 to the encoder's {self.module.encoder.config.positions} positions")
        self.module.eval()

    def find_data(self, root: Path) -> list[TaskData]:
        """The tasks' directories below `root`. Raises `DataError` where one is missing or has other labels than the model."""
        found = find_tasks(root, [f"{task.domain}/{task.name}" for task in self.tasks])
        for task, data in zip(self.tasks, found, strict=True):
            if task != TaskSpec.of(data):
                raise DataError(f"{data.path}: labels, metric or pair of task '{task.name}' are not those the model was trained with")
        return found


def load_source(source: str) -> Model | VisionModel:
    """Call `file.py:function` and return its `Model` or `VisionModel`. The file may import its neighbours.

    Raises `UsageError` when there is no such function, it fails, or it returns something else.
    """
    file, _, function = source.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not function:
        raise UsageError(
            f"{source}: give the model as file.py:function, where the function returns an edgeml_export.Model, or as model.onnx"
        )
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the model as file.py:function")
    try:
        with _neighbours(path.resolve().parent):
            model = _function(path, function)()
    except EdgemlError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file may do
        raise UsageError(f"{source}: it failed with {type(error).__name__}: {error}") from error
    if isinstance(model, Model):
        return model
    from edgeml_export.vision.model import VisionModel

    if not isinstance(model, VisionModel):
        raise UsageError(f"{source}: the function returned {type(model).__name__}, not an edgeml_export.Model (or vision.VisionModel)")
    return model


def _function(path: Path, name: str) -> Callable[[], Any]:
    """The function of that name in a file, which is run as a module of its own."""
    title = f"edgeml_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(title, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: this cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    found: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"{path}: there is no function '{name}' in it")
    return found


@contextmanager
def _neighbours(directory: Path) -> Iterator[None]:
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))
