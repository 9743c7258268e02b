"""From a model to a bundle with evidence, or to nothing at all.

Everything is written in a hidden folder beside the output, `.NAME.export`, which this process holds a lock on. The candidate is
measured there and takes the output's name by one rename at the very end; whatever happens before (a broken limit, a full disk,
Ctrl-C) takes the folder away and leaves an earlier file as it was. What a killed export left behind is cleared by the next.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch

from edgeml import metrics
from edgeml.bundle import Bundle, replace_manifest, write_bundle
from edgeml.data import SPLITS, TaskData, majority_label
from edgeml.errors import DeviceError, UsageError
from edgeml_export.assemble import assemble
from edgeml_export.evidence import CHOICES, INPUTS, evaluate, measured_sizes
from edgeml_export.model import Model, load_source
from edgeml_export.passes import Bar, Job, View
from edgeml_export.recipe import Recipe, default_recipe, read_recipe

__all__ = ["export"]

#: What may lie in the hidden folder.
FILES = ("candidate.edgeml", CHOICES, INPUTS)


def export(
    source: str | Model,
    out: str | os.PathLike[str],
    recipe: str | os.PathLike[str] | Recipe | None = None,
    data: str | os.PathLike[str] | None = None,
    experts: str | None = None,
    dense: str | None = None,
    bar: Bar | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """Export a model (`file.py:function` or a `Model`) and return the evidence that stands in the bundle.

    `experts` and `dense` (int4, int8, f32) go before the recipe's. Without `data` nothing is measured and no usage recorded.
    `bar` shows progress, and `show` lets the measuring process show its own on standard error.
    Raises `QualityRefused` when a limit is broken; then, as after any error, `out` is as it was.
    """
    target = Path(out)
    root = None if data is None else Path(data)
    steps = recipe if isinstance(recipe, Recipe) else default_recipe(root is not None) if recipe is None else read_recipe(Path(recipe))
    steps.check(root is not None)
    with _folder(target) as folder:
        model = load_source(source) if isinstance(source, str) else source
        job = Job(model, folder, bar or (lambda _label, _length: nullcontext(lambda _more: None)), show)
        tasks = model.find_data(root) if root is not None else []
        views = {} if root is None else {split: View(root, tasks, split) for split in SPLITS}
        job.plan = job.plan.override(experts, dense)
        for step in steps.passes:
            if "bundle" in step.requires and job.bundle is None:
                _write(job, steps, views)
            step.apply(job, None if step.split is None else views[step.split])
            job.plan = job.plan.override(experts, dense)
        if job.bundle is None:
            _write(job, steps, views)
        evidence = _evidence(job, views.get("test"))
        _publish(job.written(), target, evidence)
    return evidence


def _write(job: Job, recipe: Recipe, views: Mapping[str, View]) -> None:
    test = views.get("test")
    chances = {} if test is None else {task.name: _chance(task) for task in test.tasks}
    pages, manifest = assemble(job.model, job.plan, job.usage, chances, _provenance(job, recipe, [] if test is None else test.tasks))
    path = job.folder / FILES[0]
    write_bundle(path, pages, manifest)
    job.bundle = path


def _chance(task: TaskData) -> float:
    labels = numpy.array([row.label for row in task.rows("test")])
    return metrics.chance(task.metric, labels, majority_label(task.rows("train")))


def _provenance(job: Job, recipe: Recipe, tasks: Sequence[TaskData]) -> dict[str, Any]:
    """Where the model comes from, in words that are the same for the next export of the same thing."""
    return {
        **job.model.provenance,
        "recipe": {**recipe.as_json(), "stored": vars(job.plan)},
        "versions": {"numpy": numpy.__version__, "onnx": onnx.__version__, "torch": torch.__version__},
        "data": {task.name: {"licence": task.licence, **{split: _hash(task, split) for split in SPLITS}} for task in tasks},
    }


def _hash(task: TaskData, split: str) -> str:
    """SHA-256 of a split's file."""
    for suffix in (".jsonl.gz", ".jsonl"):
        file = task.path / f"{split}{suffix}"
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
    raise UsageError(f"{task.path}: no {split}.jsonl.gz or {split}.jsonl there")


def _evidence(job: Job, test: View | None) -> dict[str, Any]:
    """Scores on the test split, and sizes. What passes measured is already there."""
    evidence = {**job.evidence, **measured_sizes(job.model, job.written())}
    if test is None:
        return evidence
    found = evaluate(job.written(), test, None, job.show)
    known = dict(job.model.reference_scores)
    if not set(found) <= set(known):
        known = job.reference_scores(test)
    keys = ("score", "metric", "n")
    tasks = {name: {**{key: task[key] for key in keys}, "reference_score": known[name]} for name, task in found.items()}
    for name, score in job.model.dense_scores.items():
        if name in tasks:
            tasks[name]["dense_score"] = score
    means = {f"mean_{key}": sum(task[key] for task in tasks.values()) / len(tasks) for key in ("score", "reference_score")}
    return {**evidence, "tasks": tasks, "split": test.split, **means}


def _publish(candidate: Path, target: Path, evidence: Mapping[str, Any]) -> None:
    """Put the evidence into the manifest and give the candidate its name."""
    with Bundle.open(candidate) as opened:
        manifest = {**opened.manifest, "evidence": evidence}
    replace_manifest(candidate, manifest)
    with _reporting(target):
        os.rename(candidate, target)
        fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot sync a directory; the rename itself stands
                raise
        finally:
            os.close(fd)


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """The hidden folder of an export to `target`: empty, locked, and gone afterwards."""
    if target.is_dir():
        raise UsageError(f"{target}: this is a directory; name a file to write")
    folder = target.with_name(f".{target.name}.export")
    with _reporting(target):
        fd = _lock(folder)
    try:
        with _reporting(target):
            _clear(folder)
        try:
            yield folder
        except OSError as error:
            raise DeviceError(f"{target}: the export failed ({error.strerror or error}); nothing was changed") from error
        finally:
            _clear(folder)
            folder.rmdir()
    finally:
        os.close(fd)


def _lock(folder: Path) -> int:
    """Make and lock the folder. The caller owns the descriptor; closing it gives up the lock."""
    while True:
        folder.mkdir(exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(fd), folder.stat()):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise UsageError(f"{folder}: another process is exporting to this file; wait for it to finish") from None
        os.close(fd)  # its last owner took it away between our two calls


def _clear(folder: Path) -> None:
    """Remove what an export leaves; anything else there is not ours to touch."""
    for left in folder.iterdir():
        if left.name.lstrip(".").removesuffix(".part") not in FILES:
            raise UsageError(f"{left}: this is in the way and is not left by an export; move it")
        left.unlink()


@contextmanager
def _reporting(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise UsageError(f"{target}: cannot be written there ({error.strerror}); choose a folder that exists") from error
        raise DeviceError(f"{target}: cannot be written ({error.strerror}); nothing was changed") from error
