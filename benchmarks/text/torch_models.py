"""The torch models that the bundle is compared with: the dense reference, the fp32 mixture, and the untouched encoder's probe.

A model is named by a training run's `model.pt`, by the example's `mixture.safetensors`, or, as for `edgeml export`, by
`file.py:function` whose function returns an `edgeml_export.Model`. Only `file.pt` needs to be told whether it is dense.
"""

from __future__ import annotations

import hashlib
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from answers import Cache, Labels, Questions
from benchlib import ROOT, progress
from edgeml_export import Model, TaskSpec
from edgeml_export.encoder import MultiTaskModel, load_bert
from edgeml_export.model import load_source
from edgeml_export.reference import Reference
from edgeml_export.upcycle import MultiTaskMixture
from torch import Tensor

from edgeml.data import Row, find_tasks
from edgeml.errors import InputError, UsageError

EXAMPLE = ROOT / "examples" / "multitask_text"
# As the shared linear probe does it: tokens, training rows (half of them for pairs), test rows, inverse regularisation.
PROBE_TOKENS, PROBE_TRAIN, PROBE_TEST, PROBE_C = 64, 1200, 400, 10.0


def load_model(source: str | None, kind: str, questions: Sequence[Questions]) -> Model:
    """The model that `source` names; `kind` (dense or mixture) says what a `.pt` file holds. None: one as it is before training."""
    if source is None:
        _example()
        return _from_run(None, kind, questions)
    path = Path(source)
    if ".py:" in source:
        return load_source(source)
    if not path.is_file():
        raise UsageError(f"{source}: no such file; give a model.pt, a mixture.safetensors, or file.py:function")
    _example()
    if path.suffix == ".safetensors":
        import model as example

        loaded: Model = example.load(path)
        return loaded
    return _from_run(path, kind, questions)


def source_model(source: str | None) -> Model:
    """The untouched encoder, as a model without tasks: that of the example, or what `file.py:function` returns."""
    if source is not None:
        return load_source(source)
    _example()
    from corpus import source_directory

    directory = source_directory()
    return Model(MultiTaskModel(load_bert(directory), {}), [], (directory / "tokenizer.json").read_bytes(), PROBE_TOKENS)


def predictions(model: Model, questions: Sequence[Questions], cache: Cache, label: str) -> list[Labels]:
    """Predicted labels of every task's rows, in f32 and without masks. Raises `UsageError` for a model of other tasks."""
    for task in questions:
        if TaskSpec.of(task.task) not in model.tasks:
            raise UsageError(f"the {label} has no task '{task.task.name}' with the labels and metric that the data and the bundle have")
    key, reference = f"torch-{fingerprint(model)}", Reference(model)
    tick = progress(sum(len(task.rows) for task in questions), label)
    return [cache.get(key, task, lambda task=task: _predict(reference, task, tick), tick) for task in questions]


def probe_predictions(model: Model, questions: Sequence[Questions], cache: Cache) -> list[Labels]:
    """The linear probe's labels of the first test rows of every task: logistic regression on frozen, mean-pooled states."""
    tick = progress(len(questions), "linear probe")
    model = replace(model, max_tokens=min(PROBE_TOKENS, model.module.encoder.config.positions))
    key, found = f"probe-{fingerprint(model)}", []
    for task in questions:
        found.append(cache.get(key, task, lambda task=task: _probe(model, task), lambda _: None))
        tick(1)
    return found


def fingerprint(model: Model) -> str:
    """Sixteen hexadecimal digits that name the weights and what the tokenizer does."""
    sha = hashlib.sha256(model.tokenizer + str(model.max_tokens).encode())
    for name, value in sorted(model.module.state_dict().items()):
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().numpy())
    return sha.hexdigest()[:16]


def _example() -> None:
    """The example's files import their neighbours by name."""
    if str(EXAMPLE) not in sys.path:
        sys.path.append(str(EXAMPLE))


def _from_run(path: Path | None, kind: str, questions: Sequence[Questions]) -> Model:
    from corpus import source_directory
    from train_mixture import CONFIG

    recipe = tomllib.loads((EXAMPLE / "tasks.toml").read_text("utf-8"))
    root = questions[0].task.path.parents[1]
    tasks = [TaskSpec.of(task) for task in find_tasks(root, recipe["tasks"])]
    classes = {task.name: len(task.labels) for task in tasks}
    encoder = load_bert(source_directory())
    module = MultiTaskModel(encoder, classes) if kind == "dense" else MultiTaskMixture(encoder, classes, CONFIG)
    try:
        if path is not None:
            module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
    except (RuntimeError, KeyError) as error:
        raise InputError(f"{path}: this is not a {kind} model of the example ({str(error).splitlines()[0]})") from error
    return Model(module, tasks, (source_directory() / "tokenizer.json").read_bytes(), recipe["max_tokens"])


@torch.no_grad()
def _predict(reference: Reference, task: Questions, tick: Callable[[int], None]) -> Labels:
    module, number = reference.model.module, reference.names.index(task.task.name)
    out = np.zeros(len(task.rows), np.int64)
    for batch in reference.batches(task.rows, task.task.pair):
        bias = module.task_bias[number].expand(len(batch.ids), -1, -1) if isinstance(module, MultiTaskMixture) else None
        pooled = module.pooled(torch.from_numpy(batch.ids), torch.from_numpy(batch.mask), torch.from_numpy(batch.types), bias)
        out[batch.rows] = module.heads[task.task.name](pooled).argmax(-1).numpy()
        tick(len(batch.rows))
    return out


def _probe(model: Model, task: Questions) -> Labels:
    train = task.task.rows("train", PROBE_TRAIN // 2 if task.task.pair else PROBE_TRAIN)
    weight, bias, classes = _fit(_features(model, train, task.task.pair), torch.tensor([row.label for row in train]))
    answers = _features(model, task.rows[:PROBE_TEST], task.task.pair) @ weight.T + bias
    predicted: Labels = classes[answers.argmax(-1)].numpy()
    return predicted


@torch.no_grad()
def _features(model: Model, rows: Sequence[Row], pair: bool) -> Tensor:
    """Mean-pooled states u of single texts, (u, v, |u - v|, u v) of pairs, each text read by itself. (rows, d or 4d) float64."""
    reference = Reference(model)

    def pooled(texts: list[Row]) -> Tensor:
        out = torch.zeros(len(texts), model.module.encoder.config.hidden, dtype=torch.float64)
        for batch in reference.batches(texts, False):
            out[batch.rows] = model.module.pooled(*map(torch.from_numpy, (batch.ids, batch.mask, batch.types))).double()
        return out

    u = pooled([Row(row.text) for row in rows])
    if not pair:
        return u
    v = pooled([Row(row.pair or "") for row in rows])
    return torch.cat([u, v, (u - v).abs(), u * v], 1)


def _fit(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logistic regression, C times the summed loss plus half the squared weights; returns weight (classes, f), bias and classes.

    Solved to its one optimum; the shared script's solver stops a little before, which moves a task's score by some tenths of a
    point either way. Two classes have one weight vector, as there.
    """
    classes, y = labels.unique(return_inverse=True)
    rows = 1 if len(classes) == 2 else len(classes)
    parameters = torch.zeros(rows, x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    tolerances = {"tolerance_grad": 1e-7, "tolerance_change": 1e-13}
    solver = torch.optim.LBFGS([parameters], max_iter=2000, history_size=20, line_search_fn="strong_wolfe", **tolerances)

    def logits() -> Tensor:
        z = x @ parameters[:, :-1].T + parameters[:, -1]
        return torch.cat([torch.zeros_like(z), z], 1) if rows == 1 else z

    def loss() -> Tensor:
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(logits(), y) + parameters[:, :-1].square().sum() / (2 * PROBE_C * len(x))
        value.backward()
        return value

    solver.step(loss)
    fitted = parameters.detach()
    if rows == 1:
        fitted = torch.cat([torch.zeros_like(fitted), fitted])
    return fitted[:, :-1], fitted[:, -1], classes
