"""The fast decoder against Pillow, on every kind of JPEG; what it must leave to Pillow."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from codetr.data import images
from codetr.data.images import UnreadableImage, read_image

WIDTH, HEIGHT = 75, 53  # no multiples of a block of 8 or 16 pixels
RNG = np.random.default_rng(0)


def picture(mode: str = "RGB") -> Image.Image:
    pixels = RNG.integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), np.uint8)
    return Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).convert(mode)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def as_pillow_reads(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def read(path: Path) -> np.ndarray:
    expected = as_pillow_reads(path)
    image = read_image(path, expected.shape[:2])
    assert image.dtype == torch.uint8
    assert image.permute(1, 2, 0).is_contiguous()
    image += 0  # writable
    return image.permute(1, 2, 0).numpy()


KINDS = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "progressive": {"progressive": True},
    "coarse": {"quality": 10},
    "restarts": {"restart_marker_blocks": 2},
    "rgb": {"keep_rgb": True},
    "comment": {"comment": b"taken by nobody"},
    "upright": {"exif": exif(1)},
    "exif without orientation": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_jpegs_read_fast_and_as_pillow_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str
) -> None:
    """Both use libjpeg-turbo: within the rounding of its inverse DCT, of whatever versions."""
    path = tmp_path / "a.jpg"
    picture(mode).save(path, **{"quality": 90, **KINDS[kind]})
    monkeypatch.setattr(images, "_decode", None)
    assert np.abs(read(path).astype(int) - as_pillow_reads(path)).max() <= 1


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("where", ["exif", "xmp"])
def test_turned_jpegs(tmp_path: Path, orientation: int, where: str) -> None:
    path = tmp_path / "a.jpg"
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    picture().save(path, **({"exif": exif(orientation)} if where == "exif" else {"xmp": xmp}))
    assert (as_pillow_reads(path).shape[0] == WIDTH) == (orientation > 4)
    np.testing.assert_array_equal(read(path), as_pillow_reads(path))


def test_a_turned_jpeg_annotated_as_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture().save(path, exif=exif(6))
    with Image.open(path) as image:
        stored = np.asarray(image)
    np.testing.assert_array_equal(read_image(path, (HEIGHT, WIDTH)).permute(1, 2, 0).numpy(), stored)


def test_other_kinds_are_pillows(tmp_path: Path) -> None:
    for name, mode in (("ink.jpg", "CMYK"), ("a.png", "RGBA"), ("a.webp", "RGB"), ("a.bmp", "P"), ("a.gif", "P")):
        picture(mode).save(tmp_path / name)
        np.testing.assert_array_equal(read(tmp_path / name), as_pillow_reads(tmp_path / name))
    picture().save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[picture()])
    np.testing.assert_array_equal(read(tmp_path / "phone.jpg"), as_pillow_reads(tmp_path / "phone.jpg"))


def test_jpegs_with_faults(tmp_path: Path) -> None:
    """Pillow decides: it reads past rubbish between the segments and behind the end, but asks for all of the pixels."""
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", quality=90)
    good, path = buffer.getvalue(), tmp_path / "a.jpg"
    for harmless in (good + b"\0" * 700, good[:20] + b"\0\0" + good[20:]):
        path.write_bytes(harmless)
        np.testing.assert_array_equal(read(path), as_pillow_reads(path))
    for end in (0, 1, 2, 30, 600, len(good) // 2, len(good) - 200, len(good) - 2):
        path.write_bytes(good[:end])
        with pytest.raises(UnreadableImage, match=r"a\.jpg cannot be decoded: .+"):
            read_image(path, (HEIGHT, WIDTH))
    with pytest.raises(UnreadableImage, match=r"none\.jpg cannot be decoded: .*No such file"):
        read_image(tmp_path / "none.jpg", (HEIGHT, WIDTH))
    path.write_bytes(good)
    with pytest.raises(UnreadableImage, match=rf"a\.jpg holds {WIDTH}x{HEIGHT} pixels, .* say {WIDTH}x{HEIGHT + 1}"):
        read_image(path, (HEIGHT + 1, WIDTH))
