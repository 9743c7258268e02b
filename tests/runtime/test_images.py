"""Images in and maps out: what becomes of pixels, what is refused, and PNG files that hold the answer they show."""

from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeml.errors import DataError, MissingExtra, UsageError
from edgeml.image import PALETTE, PIXEL_LIMIT, encode_images, map_png, palette, read_image, restore_map, write_map
from edgeml.manifest import ImagePreprocess, ImageStages, Task

pil = pytest.importorskip("PIL.Image", reason="the extra `image` is not installed")

GREY = ImagePreprocess("image", 12, 16, 1, (0.5,), (0.25,), "stretch")
COLOUR = ImagePreprocess("image", 12, 16, 3, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0), "stretch")
STREET = Task("street", "made", "segmentation", False, ("sky", "road", "void"), "miou", None, ImageStages("b", "h"), COLOUR, 2)
EDGE = replace(STREET, name="edge", kind="edge", labels=("no edge", "edge"), metric="edge_f1")


def drawn(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def saved(path: Path, image: Any, **options: Any) -> Path:
    (image if hasattr(image, "save") else pil.fromarray(image)).save(path, **options)
    return path


# ---- pixels ----


def test_pixels_become_numbers_as_the_manifest_says() -> None:
    pixels = drawn(12, 16, 3)
    encoded = encode_images([pixels], COLOUR)
    assert (encoded.shape, encoded.dtype) == ((1, 3, 12, 16), np.float32)
    for channel in range(3):
        expected = (pixels[..., channel] / 255 - COLOUR.mean[channel]) / COLOUR.std[channel]
        assert np.allclose(encoded[0, channel], expected, atol=1e-6)


def test_grey_becomes_three_channels_and_colour_becomes_grey() -> None:
    grey = drawn(12, 16)
    assert np.array_equal(encode_images([grey], COLOUR), encode_images([np.stack([grey] * 3, -1)], COLOUR))
    assert np.array_equal(encode_images([grey], GREY), encode_images([grey[..., None]], GREY))
    colour = drawn(12, 16, 3)
    luma = np.array(pil.fromarray(colour).convert("L"), np.uint8)
    assert np.array_equal(encode_images([colour], GREY), encode_images([luma], GREY))


def test_other_sizes_are_stretched_without_aliasing() -> None:
    stripes = np.zeros((120, 160), np.uint8)
    stripes[:, ::2] = 255
    encoded = encode_images([stripes], GREY)
    assert encoded.shape == (1, 1, 12, 16)
    assert np.abs(encoded[..., 1:-1]).max() < 0.2


def test_native_size_needs_no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert encode_images([drawn(12, 16)], GREY).shape == (1, 1, 12, 16)
    with pytest.raises(MissingExtra, match=r"pip install 'edgeml-runtime\[image\]'"):
        encode_images([drawn(13, 16)], GREY)


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (drawn(12, 16).astype(np.float32), "uint8"),
        (drawn(12, 16, 4), "uint8 of shape"),
        (drawn(1, 12, 16, 3), "uint8 of shape"),
        (drawn(12), "uint8 of shape"),
        (drawn(0, 16), "uint8 of shape"),
        (drawn(1, 1), "too few"),
        (drawn(500, 2, 3), "too few"),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000)), "more than the limit"),
        (b"pixels", "not bytes"),
        (None, "not NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_are_no_image(image: Any, word: str) -> None:
    with pytest.raises(DataError, match=f"^image 1: .*{word}"):
        encode_images([drawn(12, 16), image], GREY)


# ---- files ----


def test_files_are_read_as_people_see_them(tmp_path: Path) -> None:
    colour = drawn(20, 30, 3)
    assert np.array_equal(read_image(saved(tmp_path / "a.png", colour)), colour)
    assert read_image(saved(tmp_path / "a.jpg", colour)).shape == (20, 30, 3)
    assert np.array_equal(read_image(saved(tmp_path / "g.png", colour[..., 0])), colour[..., 0])
    indexed = pil.fromarray(colour).quantize(8)
    assert np.array_equal(read_image(saved(tmp_path / "p.png", indexed)), np.array(indexed.convert("RGB")))
    deep = (colour[..., 0].astype(np.uint16) << 8) + 77
    assert np.array_equal(read_image(saved(tmp_path / "d.png", deep)), colour[..., 0])


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((9, 9, 4), np.uint8)
    pixels[:4, :, 3] = 255
    seen = read_image(saved(tmp_path / "t.png", pixels))
    assert (seen[:4] == 0).all()
    assert (seen[4:] == 255).all()


def test_a_turned_photograph_is_upright(tmp_path: Path) -> None:
    exif = pil.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "turned.jpg", drawn(20, 30, 3), exif=exif)
    assert read_image(path).shape == (30, 20, 3)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", before: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def broken_files() -> dict[str, tuple[bytes, str]]:
    out = io.BytesIO()
    pil.fromarray(drawn(40, 40, 3)).save(out, "PNG")
    whole = out.getvalue()
    out = io.BytesIO()
    pil.fromarray(drawn(40, 40, 3)).save(out, "JPEG")
    return {
        "empty": (b"", "empty"),
        "text": (b"hello", "neither a PNG nor a JPEG"),
        "gif": (b"GIF89a" + bytes(100), "neither a PNG nor a JPEG"),
        "truncated png": (whole[: len(whole) // 2], "damaged or cut short"),
        "header alone": (whole[:40], "damaged or cut short"),
        "signature alone": (whole[:8], "damaged or cut short"),
        "truncated jpeg": (out.getvalue()[:300], "damaged or cut short"),
        "pixels missing": (png(40, 40, bytes(10)), "damaged or cut short"),
        "flipped bytes": (whole[:60] + bytes(40) + whole[100:], "damaged or cut short"),
        "a bomb": (png(60_000, 60_000), "limit"),
        "a smaller bomb": (png(10_000, 9_500), "limit"),
        "a text bomb": (png(40, 40, bytes(41 * 40), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))), "damaged or cut short"),
        "no width": (png(0, 40), "damaged or cut short"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_a_sentence(name: str, tmp_path: Path) -> None:
    content, word = broken_files()[name]
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"broken.png: .*{word}") as caught:
        encode_images([path], COLOUR)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path, "a\0b"):
        with pytest.raises(DataError, match="cannot be read"):
            read_image(path)


def test_a_single_pixel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dot.png: 1 x 1 pixels are too few"):
        encode_images([saved(tmp_path / "dot.png", drawn(1, 1, 3))], COLOUR)
    tiny = replace(GREY, height=4, width=4)
    assert encode_images([drawn(4, 4)], tiny).shape == (1, 1, 4, 4)


def test_the_limit_is_below_pillows_own() -> None:
    assert PIXEL_LIMIT < pil.MAX_IMAGE_PIXELS


# ---- maps ----


def test_a_written_map_shows_colours_and_holds_classes(tmp_path: Path) -> None:
    answer = np.array([[0, 1], [1, 2]], np.uint8)
    write_map(tmp_path / "map.png", answer, STREET)
    with pil.open(tmp_path / "map.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image), answer)
        assert np.array_equal(np.array(image.convert("RGB")), np.array([[PALETTE[0], PALETTE[1]], [PALETTE[1], (0, 0, 0)]]))
        assert json.loads(image.text["edgeml:classes"]) == {"task": "street", "labels": ["sky", "road", "void"]}
    assert map_png(answer, STREET) == (tmp_path / "map.png").read_bytes()


def test_an_edge_map_runs_from_black_to_white() -> None:
    image = pil.open(io.BytesIO(map_png(np.array([[0, 0.5, 1, 1.5]], np.float32), EDGE)))
    assert np.array(image).tolist() == [[0, 128, 255, 255]]
    colours = np.array(image.convert("RGB"))[0]
    assert colours[0].tolist() == [0, 0, 0]
    assert colours[2].tolist() == [255, 255, 255]
    assert colours[1][0] > colours[1][1] > colours[1][2]


def test_classes_have_colours_of_their_own() -> None:
    many = replace(STREET, labels=tuple(f"c{number}" for number in range(64)), void=None)
    colours = np.array(palette(many)[:64], np.int64)
    assert len({tuple(colour) for colour in colours.tolist()}) == 64
    first = colours[: len(PALETTE)]
    apart = np.abs(first[:, None] - first[None]).sum(-1) + 1000 * np.eye(len(first), dtype=np.int64)
    assert apart.min() > 60
    assert (np.abs(first).sum(-1) > 60).all()


def test_a_map_takes_the_photographs_size() -> None:
    answer = np.zeros((6, 8), np.uint8)
    answer[:, 4:] = 2
    restored = restore_map(answer, (60, 83), "segmentation")
    assert (restored.shape, restored.dtype) == ((60, 83), np.uint8)
    assert set(np.unique(restored)) == {0, 2}
    assert (restored[:, :40] == 0).all()
    assert (restored[:, 43:] == 2).all()
    edges = restore_map(answer.astype(np.float32) / 2, (60, 83), "edge")
    assert edges.min() >= 0
    assert edges.max() <= 1
    assert restore_map(answer, (6, 8), "segmentation") is answer


def test_a_map_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose a folder that exists"):
        write_map(tmp_path / "absent" / "map.png", np.zeros((2, 2), np.uint8), STREET)
