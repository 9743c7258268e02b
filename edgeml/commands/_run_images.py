"""The part of `edgeml run` that answers images: lines for people or one JSON document, and maps as PNG files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from edgeml.commands._options import notes, printable
from edgeml.errors import UsageError
from edgeml.image import ImageInput, palette, read_image, restore_map, write_map
from edgeml.manifest import Task
from edgeml.measure import Timing, record
from edgeml.session import Result
from edgeml.session import open as open_session

#: Images answered at a time.
CHUNK_IMAGES = 32


def answer_images(
    bundle: str, tasks: Sequence[Task], images: Sequence[str], output: str | None, settings: dict[str, Any], quiet: bool, as_json: bool
) -> None:
    """Answer all tasks on all images, a backbone pass a chunk, and print or write what they say."""
    files = _files(tasks, images, output)
    answers: list[dict[str, Any]] = []
    timing = Timing()
    with open_session(bundle, **settings) as session:
        notes(session.notes, quiet)
        for task in tasks:
            session.load(task.name)
        for first in range(0, len(images), CHUNK_IMAGES):
            chunk = images[first : first + CHUNK_IMAGES]
            pixels: list[ImageInput] = [read_image(path) for path in chunk] if files else list(chunk)
            results = session.run_many([task.name for task in tasks], pixels)
            _count(timing, results[tasks[0].name])
            for number, path in enumerate(chunk):
                for task in tasks:
                    answer = _answer(task, results[task.name], number) | {"image": path}
                    if task.name in files:
                        _write(files[task.name], task, results[task.name], pixels[number])
                        answer["file"] = str(files[task.name])
                    answers.append(answer)
                    if not as_json:
                        click.echo("\n".join(_lines(task, answer, len(images) > 1)))
        if as_json:
            click.echo(json.dumps({"results": answers, "record": record(timing, session.settings())}, allow_nan=False))


def _files(tasks: Sequence[Task], images: Sequence[str], output: str | None) -> dict[str, Path]:
    """Where the map of each dense task goes: to `output`, or where there are several to `output` with the task's name."""
    if output is None:
        return {}
    dense = [task.name for task in tasks if task.dense]
    if not dense:
        raise UsageError(f"task '{tasks[0].name}' answers labels, so there is no map to write; leave out -o")
    if len(images) > 1:
        raise UsageError("-o is the map of one image: give one --image, or leave out -o")
    place = Path(output)
    if place.suffix.lower() != ".png":
        raise UsageError(f"-o writes a PNG: name a file that ends in .png, not {output!r:.80}")
    files = {name: place if len(dense) == 1 else place.with_name(f"{place.stem}-{name}{place.suffix}") for name in dense}
    for file in files.values():
        if os.path.realpath(file) == os.path.realpath(images[0]):
            raise UsageError(f"-o would overwrite the image {images[0]}; name another file")
    return files


def _count(timing: Timing, result: Result) -> None:
    timing.warm.add(result.latency_s, result.counters)
    timing.warm.latency_s[-1:] = result.row_s


def _answer(task: Task, result: Result, number: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"task": task.name}
    if result.maps is not None:
        answer |= {"file": None, "classes": _shares(task, result.maps[number])}
    elif result.scores is not None:
        scores = [float(value) for value in result.scores[number]]
        answer |= {"label": result.labels[number], "score": max(scores), "scores": dict(zip(task.labels, scores, strict=True))}
    elif result.vectors is not None:
        answer["vector"] = [float(value) for value in result.vectors[number]]
    return answer | {"latency_s": result.row_s[number]}


def _shares(task: Task, answer: Any) -> dict[str, float]:
    """The share of the map that each class has, void left out."""
    values = (answer >= 0.5).astype(np.uint8) if task.kind == "edge" else answer
    counts = np.bincount(values.ravel(), minlength=len(task.labels)) / values.size
    return {label: float(counts[number]) for number, label in enumerate(task.labels) if number != task.void}


def _write(file: Path, task: Task, result: Result, pixels: Any) -> None:
    assert result.maps is not None
    write_map(file, restore_map(result.maps[0], pixels.shape[:2], task.kind), task)


def _lines(task: Task, answer: dict[str, Any], many: bool) -> Iterator[str]:
    if "vector" in answer:
        vector = answer["vector"]
        said = f"{len(vector)} numbers: {' '.join(f'{value:.4f}' for value in vector[:6])} ..."
    elif "label" in answer:
        said = f"{printable(answer['label'])}\t{answer['score']:.3f}"
    else:
        largest = sorted(answer["classes"].items(), key=lambda item: -item[1])
        said = ", ".join(f"{printable(label)} {share:.1%}" for label, share in largest[:3] if share)
        said += f"\t{printable(answer['file'])}" if answer["file"] else ""
    yield f"{answer['task']}\t{said}\t{answer['latency_s'] * 1e3:.1f} ms" + (f"\t{printable(answer['image'])}" if many else "")
    if answer.get("file"):
        yield from _legend(task, answer["classes"])


def _legend(task: Task, classes: dict[str, float]) -> Iterator[str]:
    """What the colours of a written map mean: those that occur, the largest first."""
    colours = palette(task)
    if task.kind == "edge":
        yield "  black is no edge, over orange to white the probability of one"
        return
    for label, share in sorted(classes.items(), key=lambda item: -item[1]):
        if share:
            red, green, blue = colours[task.labels.index(label)]
            yield f"  #{red:02x}{green:02x}{blue:02x}  {share:>6.1%}  {printable(label)}"
