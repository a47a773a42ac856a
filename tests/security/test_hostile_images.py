"""Small files that unpack to gigabytes: refused by their headers, in training, the check and prediction."""

import json
import struct
import zlib
from pathlib import Path

import PIL.Image
import pytest
import torch
from PIL import ImageFile

from codetr.data.dataset import DetectionDataset
from codetr.data.images import UnreadableImage, read_image, seen_size
from codetr.errors import UserError
from codetr.inference.sources import MAX_PIXELS, Images, Unreadable, find_sources
from codetr.inspection.files import examine

LIMIT = MAX_PIXELS


def bomb(path: Path, width: int, height: int) -> Path:
    """A black PNG whose rows are all there: 140 kB for 12,000 x 12,000 pixels."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width * 3)) for _ in range(height)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


@pytest.fixture
def _nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(image: ImageFile.ImageFile) -> None:
        raise AssertionError(f"{image} was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = bomb(tmp_path_factory.mktemp("bombs") / "large.png", 12_000, 12_000)
    assert path.stat().st_size < 500_000
    return path


@pytest.mark.usefixtures("_nothing_is_decoded")
class TestRefused:
    def test_by_its_size(self, large: Path) -> None:
        assert seen_size(large) == (12_000, 12_000)
        with pytest.raises(UnreadableImage, match=r"large\.png .*12000x12000.*max_pixels=80000000.*data\.max_pixels"):
            read_image(large, (12_000, 12_000), LIMIT)

    def test_beyond_the_limit_of_the_library(self, tmp_path: Path) -> None:
        path = bomb(tmp_path / "larger.png", 20_000, 10_000)
        with pytest.raises(UnreadableImage, match=r"larger\.png .*20000x10000.*max_pixels"):
            read_image(path, (10_000, 20_000), LIMIT)

    def test_by_another_size_than_annotated(self, large: Path) -> None:
        with pytest.raises(UnreadableImage, match="holds 12000x12000 pixels, but the annotations say 64x48"):
            read_image(large, (48, 64))

    def test_by_the_check(self, large: Path) -> None:
        for decode in (False, True):
            (file,) = examine([(large, (12_000, 12_000))], decode, LIMIT)
            assert file.fault is not None
            assert file.fault[0] == "unreadable image file"
            assert "12000x12000" in file.fault[1]

    def test_by_prediction(self, large: Path) -> None:
        (item,) = Images([large], lambda sample: sample)
        assert isinstance(item, Unreadable)
        assert "max_pixels" in item.reason

    def test_by_prediction_of_a_pillow_image(self, large: Path) -> None:
        with PIL.Image.open(large) as image, pytest.raises(UserError, match=r"large\.png .*12000x12000.*max_pixels"):
            find_sources(image)

    def test_by_training(self, large: Path, tmp_path: Path) -> None:
        image = {"id": 1, "file_name": large.name, "width": 12_000, "height": 12_000}
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
        content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
        (tmp_path / "truth.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"1 bad record.*(?s:.)*12000x12000"):
            DetectionDataset(large.parent, tmp_path / "truth.json", max_pixels=LIMIT)


def test_a_larger_limit_lets_it_pass(tmp_path: Path) -> None:
    path = bomb(tmp_path / "meant.png", 60, 40)
    with pytest.raises(UnreadableImage, match="max_pixels=2399"):
        read_image(path, (40, 60), 2399)
    for limit in (2400, None):
        assert torch.equal(read_image(path, (40, 60), limit), torch.zeros(3, 40, 60, dtype=torch.uint8))
