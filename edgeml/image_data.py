"""Image data: folders with `image.json` and `{train,validation,test}.npz`, each a set whose images several tasks label.

    DIR/images/NAME, DIR/NAME or NAME itself
    image.json   "labels": names of the classes, or an object of them by array; other keys are for people
    SPLIT.npz    x uint8 (n, H, W) or (n, H, W, 3), and a task an array beside it, as long as x:
                 (n,)        a classification
                 (n, h, w)   `edge`: 0, or 1 where there is an edge; any other name: a segmentation

A task is called like its array, without a leading `y_`; plain `y` like its set. A last class called "void" is not scored, and
where a segmentation is void the edges of that set are void too (label 2). **Where there is no validation file, validation is the
last tenth of the training file and train is the rest**, here and for everybody who reads through this module.

Files are untrusted: nothing is unpickled, and every array's size is checked against its file before memory is taken for it.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import DataError
from edgeml.strict_json import StrictJsonError, decode_object

__all__ = ["EDGE_VOID", "ImageRows", "ImageSet", "ImageTask", "commonest_label", "find_image_sets", "read_image_set"]

SPLITS = ("train", "validation", "test")
EDGE_VOID = 2
ARRAY_LIMIT = 1 << 30
METRICS = {"classification": "accuracy", "segmentation": "miou", "edge": "edge_f1"}


@dataclass(frozen=True)
class ImageTask:
    """What is labelled in a set: `array` in its files, `void` the label that is not scored."""

    name: str
    array: str
    kind: str
    labels: tuple[str, ...]
    metric: str
    void: int | None


@dataclass(frozen=True)
class ImageRows:
    """`images` uint8 (n, H, W) or (n, H, W, 3); `labels` by task, uint8 (n,) or (n, h, w)."""

    images: NDArray[np.uint8]
    labels: Mapping[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class ImageSet:
    """A folder of images and the tasks on them."""

    name: str
    path: Path
    tasks: tuple[ImageTask, ...]
    licence: str | None

    def rows(self, split: str, limit: int | None = None) -> ImageRows:
        """A split, or its first `limit` images. Raises `DataError` naming the file and the array."""
        if split not in SPLITS:
            raise DataError(f"there is no split '{split}': choose one of {', '.join(SPLITS)}")
        file, part = self.path / f"{split}.npz", slice(None)
        if split != "test" and not (self.path / "validation.npz").is_file():
            file = self.path / "train.npz"
        arrays = _read(file, ["x", *(task.array for task in self.tasks)])
        if file.name != f"{split}.npz":
            part = slice(_train_rows(len(arrays["x"])), None)
        elif split == "train" and not (self.path / "validation.npz").is_file():
            part = slice(0, _train_rows(len(arrays["x"])))
        images = _checked_images(arrays["x"], file)
        labels = {task.name: _checked_labels(arrays[task.array], task, len(images), file)[part][:limit] for task in self.tasks}
        return ImageRows(images[part][:limit], _with_void(self.tasks, labels))


def find_image_sets(root: Path) -> list[ImageSet]:
    """The sets at or below `root`, sorted by name; none where there is no image.json. Raises `DataError` for a broken one."""
    if (root / "image.json").is_file():
        return [read_image_set(root)]
    files = {file for pattern in ("*/image.json", "images/*/image.json") for file in root.glob(pattern)}
    return [read_image_set(file.parent) for file in sorted(files)]


def read_image_set(path: Path) -> ImageSet:
    """A folder's `image.json`; what is labelled comes from the arrays of its training or test file."""
    file = path / "image.json"
    try:
        document = decode_object(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except StrictJsonError as error:
        raise DataError(f"{file}: {error}") from None
    name, named = document.get("name", path.name), document.get("labels")
    if not isinstance(name, str) or not isinstance(named, dict | list):
        raise DataError(f"{file}: 'name' must be a string and 'labels' a list of class names, or an object of them")
    source = next((path / f"{split}.npz" for split in SPLITS if (path / f"{split}.npz").is_file()), None)
    if source is None:
        raise DataError(f"{path}: no train.npz, validation.npz or test.npz there")
    shapes = _shapes(source)
    tasks = tuple(_task(name, array, shape, named, file) for array, shape in shapes.items() if array != "x")
    if "x" not in shapes or not tasks:
        raise DataError(f"{source}: it must hold images 'x' and labels beside them")
    return ImageSet(name, path, tasks, document.get("licence"))


def commonest_label(labels: NDArray[np.uint8], void: int | None) -> int:
    """The commonest label that is scored, the lowest on a tie: what chance predicts."""
    counts = np.bincount(labels.ravel(), minlength=1)
    if void is not None and void < len(counts):
        counts[void] = 0
    return int(counts.argmax())


def _task(name: str, array: str, shape: tuple[int, ...], named: dict[str, Any] | list[Any], file: Path) -> ImageTask:
    kind = "classification" if len(shape) == 1 else "edge" if array == "edge" else "segmentation"
    labels: Any = ["no edge", "edge"] if kind == "edge" else named.get(array) if isinstance(named, dict) else named
    if not isinstance(labels, list) or not 2 <= len(labels) <= 256 or not all(isinstance(label, str) for label in labels):
        raise DataError(f"{file}: the labels of '{array}' must be a list of 2 to 256 class names")
    void = len(labels) - 1 if labels[-1] == "void" else None
    called = name if array == "y" else array.removeprefix("y_")
    return ImageTask(called, array, kind, tuple(labels), METRICS[kind], EDGE_VOID if kind == "edge" else void)


def _with_void(tasks: Sequence[ImageTask], labels: dict[str, NDArray[np.uint8]]) -> dict[str, NDArray[np.uint8]]:
    """Edges are not scored where a segmentation of the same pixels is void."""
    for edge in (task for task in tasks if task.kind == "edge"):
        for other in (task for task in tasks if task.kind == "segmentation" and task.void is not None):
            if labels[other.name].shape == labels[edge.name].shape:
                labels[edge.name] = np.where(labels[other.name] == other.void, np.uint8(EDGE_VOID), labels[edge.name])
    return labels


def _train_rows(count: int) -> int:
    """How many of a training file's images are for training where it has to give validation as well."""
    return count - count // 10


def _checked_images(x: NDArray[Any], file: Path) -> NDArray[np.uint8]:
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)) or 0 in x.shape:
        raise DataError(f"{file}: images 'x' must be uint8 (n, H, W) or (n, H, W, 3), not {x.dtype} {x.shape}")
    return x


def _checked_labels(labels: NDArray[Any], task: ImageTask, count: int, file: Path) -> NDArray[np.uint8]:
    axes = 1 if task.kind == "classification" else 3
    if labels.dtype.kind not in "biu" or labels.ndim != axes or len(labels) != count or labels.size == 0:
        raise DataError(
            f"{file}: '{task.array}' must be whole numbers with {axes} axes for {count} images, not {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= len(task.labels):
        raise DataError(f"{file}: '{task.array}' has a label outside 0 to {len(task.labels) - 1}")
    return labels.astype(np.uint8)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with _opened(file) as archive:
        return {name: _header(archive, name, file)[0] for name in _names(archive)}


def _read(file: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    with _opened(file) as archive:
        there = _names(archive)
        missing = [name for name in names if name not in there]
        if missing:
            raise DataError(f"{file}: the array '{missing[0]}' is missing; it has {', '.join(there) or 'none'}")
        return {name: _array(archive, name, file) for name in names}


class _opened:
    """An archive, with everything that can be wrong inside it as a `DataError`."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> zipfile.ZipFile:
        try:
            self._archive = zipfile.ZipFile(self._file)
        except OSError as error:
            raise DataError(f"{self._file}: cannot be read ({error.strerror or error})") from None
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise DataError(f"{self._file}: not an .npz archive ({error})") from None
        return self._archive

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._archive.close()
        faults = (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)
        if isinstance(error, faults) and not isinstance(error, DataError):
            raise DataError(f"{self._file}: the archive is damaged ({' '.join(str(error).split())[:120]})") from None


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _header(archive: zipfile.ZipFile, name: str, file: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order, type and length of an array, agreed with what the archive says it holds."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
        start = stream.tell()
    length = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or not 0 <= length <= ARRAY_LIMIT or info.file_size != start + length:
        raise DataError(f"{file}: the array '{name}' is of {dtype} {shape}, which does not agree with its {info.file_size} bytes")
    return shape, fortran, dtype, start


def _array(archive: zipfile.ZipFile, name: str, file: Path) -> NDArray[Any]:
    shape, fortran, dtype, start = _header(archive, name, file)
    content = archive.read(f"{name}.npy")
    return np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
