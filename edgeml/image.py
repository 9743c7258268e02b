"""Images in and maps out: photographs to the model's input, and its maps to a coloured PNG. Pillow is loaded when it is needed.

An image is an array, uint8 (H, W) grey or (H, W, 3) red, green, blue; or the path of a PNG or JPEG. A file is turned upright as its
EXIF says; transparency is laid over white; a file of 16 bits keeps the upper 8. Grey becomes three equal channels, and colour becomes
grey (ITU-R 601), as the model asks. Resizing is bilinear over the area that falls on a pixel, so that reducing does not alias.

Palette of a written map: class i of a segmentation has colour i of `PALETTE`, classes past its end turn the hue by the golden
ratio, void is black; an edge task's probability runs from black over orange to white. The PNG is indexed: its pixels *are* the
class ids (or 255 times the probability), so a program reads answers where people see colours; its text `edgeml:classes` has names.
"""

from __future__ import annotations

import colorsys
import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.bundle_writer import write_file
from edgeml.errors import DataError, MissingExtra
from edgeml.manifest import ImagePreprocess, Task

__all__ = ["PALETTE", "ImageInput", "encode_images", "map_png", "palette", "read_image", "restore_map", "write_map"]

Bytes = NDArray[np.uint8]
#: What a caller gives as one image.
ImageInput = str | os.PathLike[str] | NDArray[Any]

#: More than any camera of a small device makes; a file that claims more is refused before its pixels are decoded.
PIXEL_LIMIT = 64_000_000
FILE_LIMIT = 256 << 20
#: Smaller than this, an image is a mistake; a model that reads still smaller ones sets its own bound.
MIN_SIDE = 8
VOID_COLOUR = (0, 0, 0)
PALETTE: tuple[tuple[int, int, int], ...] = (
    (86, 180, 233),
    (214, 96, 77),
    (240, 228, 66),
    (128, 100, 145),
    (231, 150, 190),
    (44, 140, 80),
    (255, 127, 14),
    (150, 110, 60),
    (31, 80, 180),
    (200, 20, 60),
    (0, 200, 190),
    (170, 210, 90),
    (120, 60, 220),
    (160, 160, 160),
    (255, 190, 130),
    (90, 30, 40),
)
_warnings_lock = Lock()


def read_image(path: str | os.PathLike[str]) -> Bytes:
    """The pixels of a PNG or JPEG, upright: uint8 (H, W) or (H, W, 3). Raises `DataError` naming the file, `MissingExtra`."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as stream:
            content = stream.read(FILE_LIMIT + 1)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > FILE_LIMIT:
        raise DataError(f"{name}: the file is larger than {FILE_LIMIT >> 20} MiB; give a smaller picture")
    return _decoded(content, name)


def _decoded(content: bytes, name: str) -> Bytes:
    if not content:
        raise DataError(f"{name}: the file is empty; give a PNG or JPEG picture")
    if not (content.startswith(b"\x89PNG\r\n\x1a\n") or content.startswith(b"\xff\xd8\xff")):
        raise DataError(f"{name}: neither a PNG nor a JPEG picture; convert it first")
    image_module, operations = _pillow()
    try:
        # Pillow warns of large images by itself; the bound here is lower and an error. Filters are the process's, hence the lock.
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = image_module.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        _check_size(image.width, image.height, name)
        image = operations.exif_transpose(image)
        return _flat(image, image_module)
    except (DataError, MemoryError):
        raise
    except image_module.DecompressionBombError:
        raise DataError(f"{name}: it claims more than the limit of {PIXEL_LIMIT} pixels; reduce it first") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more for broken files
        raise DataError(f"{name}: the picture is damaged or cut short ({' '.join(str(error).split())[:120]})") from None


def _flat(image: Any, image_module: Any) -> Bytes:
    """Grey or colour without transparency, 8 bits a channel."""
    if image.mode.startswith("I"):
        return np.asarray(np.clip(np.asarray(image, np.int64) >> 8, 0, 255), np.uint8)
    if image.mode in ("1", "L"):
        return np.array(image.convert("L"), np.uint8)
    if "A" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = image_module.alpha_composite(image_module.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.array(image.convert("RGB"), np.uint8)


def encode_images(images: Sequence[ImageInput], recipe: ImagePreprocess, first: int = 0) -> NDArray[np.float32]:
    """The model's input: (n, channels, height, width) float32. `first` is the number of the first image, for messages.

    Raises `DataError` naming the image for a wrong type, shape or size and for a file that is no picture.
    """
    mean, std = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (recipe.mean, recipe.std))
    pixels = np.empty((len(images), recipe.channels, recipe.height, recipe.width), np.float32)
    for number, image in enumerate(images):
        array = read_image(image) if isinstance(image, str | os.PathLike) else _checked(image, f"image {first + number}")
        where = os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {first + number}"
        least = min(MIN_SIDE, recipe.height, recipe.width)
        if min(array.shape[:2]) < least:
            raise DataError(
                f"{where}: {array.shape[1]} x {array.shape[0]} pixels are too few to see anything; give at least {least} a side"
            )
        pixels[number] = _fitted(array, recipe).transpose(2, 0, 1)
    encoded: NDArray[np.float32] = (pixels / np.float32(255) - mean) / std
    return encoded


def _checked(image: Any, where: str) -> Bytes:
    if not isinstance(image, np.ndarray):
        raise DataError(f"{where}: an image is a path or an array of uint8, not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)) or 0 in image.shape:
        raise DataError(f"{where}: an image array is uint8 of shape (H, W) or (H, W, 3), not {image.dtype} {image.shape}")
    _check_size(image.shape[1], image.shape[0], where)
    return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > PIXEL_LIMIT:
        raise DataError(f"{where}: {width} x {height} pixels are more than the limit of {PIXEL_LIMIT}; reduce it first")


def _fitted(array: Bytes, recipe: ImagePreprocess) -> Bytes:
    """(height, width, channels), as the model reads it."""
    if recipe.channels == 3 and array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    elif recipe.channels == 1 and array.ndim == 3:
        array = ((array.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32) + 32768) >> 16).astype(np.uint8)
    if array.shape[:2] != (recipe.height, recipe.width):
        image_module, _ = _pillow()
        image = image_module.fromarray(np.ascontiguousarray(array))
        array = np.array(image.resize((recipe.width, recipe.height), image_module.Resampling.BILINEAR), np.uint8)
    return array.reshape(recipe.height, recipe.width, recipe.channels)


def palette(task: Task) -> list[tuple[int, int, int]]:
    """256 colours for the values a map of this task can have, as the head of this module states."""
    if task.kind == "edge":
        return [(min(255, 2 * value), value * value // 255, max(0, 2 * value - 255)) for value in range(256)]
    colours = list(PALETTE[:256])
    for number in range(len(colours), 256):
        red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.55 + 0.15 * (number % 3), 0.6 + 0.2 * (number % 2))
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    if task.void is not None:
        colours[task.void] = VOID_COLOUR
    return colours


def restore_map(answer: NDArray[Any], size: tuple[int, int], dense_kind: str) -> NDArray[Any]:
    """A map (h, w) at the photograph's size (height, width): probabilities are interpolated, of classes the most present wins."""
    if answer.shape == size:
        return answer
    image_module, _ = _pillow()

    def enlarged(layer: NDArray[np.float32]) -> NDArray[np.float32]:
        image = image_module.fromarray(layer)
        return np.asarray(image.resize((size[1], size[0]), image_module.Resampling.BILINEAR), np.float32)

    if dense_kind == "edge":
        return enlarged(np.ascontiguousarray(answer, np.float32))
    best, restored = np.full(size, -1, np.float32), np.zeros(size, np.uint8)
    for value in np.unique(answer):
        presence = enlarged((answer == value).astype(np.float32))
        restored[presence > best] = value
        best = np.maximum(best, presence)
    return restored


def map_png(answer: NDArray[Any], task: Task) -> bytes:
    """An indexed PNG of a map: class ids uint8 (h, w), or an edge task's probabilities float (h, w)."""
    image_module, _ = _pillow()
    from PIL.PngImagePlugin import PngInfo

    values = np.rint(np.clip(answer, 0, 1) * 255).astype(np.uint8) if task.kind == "edge" else np.asarray(answer, np.uint8)
    image = image_module.fromarray(np.ascontiguousarray(values)).convert("L")
    image.putpalette([part for colour in palette(task) for part in colour])
    notes = PngInfo()
    notes.add_itxt("edgeml:classes", json.dumps({"task": task.name, "labels": list(task.labels)}, ensure_ascii=False))
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=notes, optimize=False)
    return out.getvalue()


def write_map(path: str | os.PathLike[str], answer: NDArray[Any], task: Task) -> None:
    """Write `map_png` to a file, whole or not at all. Raises `DeviceError` when the disk is full or fails."""
    write_file(Path(path), [map_png(answer, task)])


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingExtra("reading and writing pictures", "image") from error
    return Image, ImageOps
