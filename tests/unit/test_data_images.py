"""The fast decoder against Pillow, on every kind of JPEG; what it must leave to Pillow."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from codetr.data import images
from codetr.data.images import UnreadableImage, read_image, seen_size
from codetr.inspection.files import examine

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


RAMP = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) / (HEIGHT * WIDTH - 1)  # 0 to 1
# pixels in the file -> the grey that they mean, of 255
DEPTHS = {
    "floats to 1.tif": (RAMP.astype(np.float32), RAMP * 255),
    "floats to 0.3.tif": ((RAMP * 0.3).astype(np.float32), RAMP * 0.3 * 255),
    "floats to 255.tif": ((RAMP * 255).astype(np.float32), RAMP * 255),
    "floats to 17.tif": ((RAMP * 17).astype(np.float32), RAMP * 17),
    "16 bit.png": ((RAMP * 65535).astype(np.uint16), RAMP * 65535 / 257),
    "16 bit.tif": ((RAMP * 65535).astype(np.uint16), RAMP * 65535 / 257),
    "16 bit, dark.png": ((RAMP * 3000).astype(np.uint16), RAMP * 3000 / 257),
    "32 bit.tif": ((RAMP * 65535).astype(np.int32), RAMP * 65535 / 257),
    "32 bit, black.tif": (np.zeros((HEIGHT, WIDTH), np.int32), RAMP * 0),
    "floats, black.tif": (np.zeros((HEIGHT, WIDTH), np.float32), RAMP * 0),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_grey_of_other_depths_has_its_brightness(tmp_path: Path, name: str) -> None:
    pixels, grey = DEPTHS[name]
    Image.fromarray(pixels).save(tmp_path / name)
    image = read_image(tmp_path / name, (HEIGHT, WIDTH)).numpy().astype(float)
    assert np.abs(image - grey).max() <= 1


@pytest.mark.parametrize(("order", "bits", "inverted"), [("<", 16, 0), ("<", 16, 1), ("<", 12, 0), (">", 16, 0)])
def test_tiffs_of_other_depths_byte_by_byte(tmp_path: Path, order: str, bits: int, inverted: int) -> None:
    """One strip, of 12 or 16 bits per pixel, in which black or white is zero; what Pillow reads of these."""
    values = (RAMP * (2**bits - 1)).astype(np.uint16)[:, :74]
    pixels = values.astype(f"{order}u2").tobytes()
    if bits == 12:
        first, second = values[:, 0::2].astype(int), values[:, 1::2].astype(int)
        packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
        pixels = packed.astype(np.uint8).tobytes()
    size = {256: 74, 257: HEIGHT, 258: bits}
    tags = size | {259: 1, 262: 1 - inverted, 273: 122, 277: 1, 278: HEIGHT, 279: len(pixels)}
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "a.tif").write_bytes(start + entries + bytes(4) + pixels)
    grey = values / (2**bits - 1) * 255
    image = read_image(tmp_path / "a.tif", (HEIGHT, 74)).numpy().astype(float)
    assert np.abs(image - (255 - grey if inverted else grey)).max() <= 1


AMBIGUOUS = {
    "floats to 1000.tif": (RAMP * 1000).astype(np.float32),
    "negative floats.tif": (RAMP - 0.5).astype(np.float32),
    "not a number.tif": np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32),
    "infinite.tif": np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32),
    "small 16 bit.tif": (RAMP * 200).astype(np.uint16),
    "small 16 bit.png": (RAMP * 200).astype(np.uint16),
    "small 32 bit.tif": (RAMP * 200).astype(np.int32),
    "large 32 bit.tif": (RAMP * 100_000).astype(np.int32),
    "negative 32 bit.tif": (RAMP * 500 - 1).astype(np.int32),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_values_of_which_no_brightness_follows_are_refused(tmp_path: Path, name: str) -> None:
    Image.fromarray(AMBIGUOUS[name]).save(tmp_path / name)
    with pytest.raises(UnreadableImage, match=rf"{name} cannot be decoded: it.* rescale them to 0\.\."):
        read_image(tmp_path / name, (HEIGHT, WIDTH))


@pytest.mark.parametrize("mode", ["RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "LA", "PA", "1", "L", "P"])
def test_every_mode_of_a_tiff_shows_the_picture(tmp_path: Path, mode: str) -> None:
    """To within what each of these colour spaces rounds: LAB of 8 bits where colours are dark and pure."""
    base = picture("L").convert("RGB") if mode in ("1", "L", "LA") else picture()
    stored = ImageCms.profileToProfile(base, *PROFILES, outputMode="LAB") if mode == "LAB" else base.convert(mode)
    stored.save(tmp_path / "a.tif")
    expected = np.asarray(base).astype(int)
    if mode == "1":
        expected = np.asarray(stored)[..., None] * 255
    elif mode in ("P", "PA"):
        expected = np.array(stored.getpalette("RGB")).reshape(-1, 3)[np.asarray(stored.getchannel(0))]
    difference = np.abs(read_image(tmp_path / "a.tif", (HEIGHT, WIDTH)).permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= (40 if mode == "LAB" else 3)
    assert difference.mean() <= 1.5


PROFILES = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")


def test_a_transparent_palette_and_16_bit_colour(tmp_path: Path) -> None:
    picture("P").save(tmp_path / "p.png", transparency=0)
    np.testing.assert_array_equal(read(tmp_path / "p.png"), as_pillow_reads(tmp_path / "p.png"))
    high = np.asarray(picture())
    rows = np.stack([high, np.full_like(high, 7)], -1).reshape(HEIGHT, -1)  # the high byte comes first
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    png = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    for kind, chunk in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        png += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", zlib.crc32(kind + chunk))
    (tmp_path / "16.png").write_bytes(png)
    image = read_image(tmp_path / "16.png", (HEIGHT, WIDTH))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), high)


def broken_orientations() -> dict[str, bytes]:
    """EXIF blocks whose orientation is none."""
    cases = {"0": exif(0), "9": exif(9), "65535": exif(65535)}
    text = b"Exif\0\0MM\0*" + struct.pack(">IHHHI4sI", 8, 1, 0x0112, 2, 4, b"top\0", 0)
    found = {name: tags.tobytes() for name, tags in cases.items()} | {"text": text}
    whole = exif(6).tobytes()
    return found | {
        "rubbish": b"Exif\0\0" + b"\xff" * 40,
        "cut": whole[:-9],
        "empty": b"Exif\0\0",
        "header": whole[:12],
    }


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read", "ignore:Metadata Warning")
@pytest.mark.parametrize("name", broken_orientations())
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_prediction_training_and_check_agree_on_a_broken_orientation(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    picture().save(path, exif=broken_orientations()[name])
    with Image.open(path) as image:
        stored = np.asarray(image.convert("RGB")).astype(int)
    assert seen_size(path) == (HEIGHT, WIDTH)
    read_as = read_image(path, seen_size(path)).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(read_as - stored).max() <= 1
    for decode in (False, True):
        (found,) = examine([(path, (WIDTH, HEIGHT))], decode)
        assert (found.fault, found.orientation) == (None, 1)
