"""Files in, boxes in their pixels out: with a detector that sees one bright rectangle and nothing else."""

import json
import resource
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import Resize

from codetr.data.readers.folder import find_images
from codetr.errors import UserError
from codetr.inference import Model, Result
from codetr.inference.outputs import PICTURE_SUFFIXES, Records, Writer, picture_names
from codetr.inference.sources import MAX_PIXELS, Images, Unreadable
from codetr.postprocess import PostProcess
from codetr.types import MAIN, Output, Prediction


def paint(path: Path, size: tuple[int, int], box: tuple[int, int, int, int], orientation: int = 1) -> Path:
    """A black image of (width, height) `size` with a white box, as a camera held upright or turned writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), box)
    if orientation == 6:  # "rotate by 90 degrees clockwise to view"
        image = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


class Brightest(nn.Module):
    """A detector whose only layer finds the bounding box of what is bright, as class 1 of 2, normalised by the image
    without its padding."""

    mask_head, finds_masks = None, False

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor, padding: Tensor) -> Output:
        last = brightest(images, padding)
        return Output({}, {MAIN: Prediction(last.logits[None], last.boxes[None])})


def brightest(images: Tensor, padding: Tensor) -> Prediction:
    boxes = []
    for image, pad in zip(images, padding, strict=True):
        height, width = (~pad).any(1).sum(), (~pad).any(0).sum()
        rows, columns = torch.nonzero(image.float().mean(0) > 127, as_tuple=True)
        edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        x0, y0, x1, y1 = edges / torch.stack([width, height, width, height])
        boxes.append(torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]))
    return Prediction(torch.tensor([[[-9.0, 2.0]]]).repeat(len(images), 1, 1), torch.stack(boxes)[:, None])


def model() -> Model:
    return Model(
        path=Path("brightest.ckpt"),
        detector=Brightest(),
        class_names=("cat", "dog"),
        category_ids=(3, 7),
        transform=Resize(64, max_size=100),
        size_divisor=32,
        postprocess=PostProcess(1, None),
        config={},
        step=0,
    )


def run(paths: list[Path], num_workers: int = 0, score_threshold: float = 0.5) -> list[Result | Unreadable]:
    return list(model().stream(paths, score_threshold, batch_size=3, num_workers=num_workers, max_pixels=MAX_PIXELS))


def writer_of(out: Path, paths: list[Path], pictures: bool = True, inputs: Sequence[Path] = ()) -> Writer:
    return Writer(out, paths, pictures, inputs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    paint(tmp_path / "in" / "a.png", (128, 128), (32, 16, 64, 96))
    paint(tmp_path / "in" / "b.JPG", (256, 128), (64, 32, 192, 96))
    paint(tmp_path / "in" / "c.jpg", (128, 256), (32, 64, 96, 192), orientation=6)
    (tmp_path / "in" / "d.jpg").write_bytes(b"not an image")
    (tmp_path / "in" / "notes.txt").write_text("not meant")
    return tmp_path / "in"


TRUTH = {"a.png": (32, 16, 64, 96), "b.JPG": (64, 32, 192, 96), "c.jpg": (32, 64, 96, 192)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_boxes_come_in_pixels_of_the_file_as_it_is_seen(folder: Path, num_workers: int) -> None:
    results = run(find_images(str(folder)), num_workers)
    found = {one.path.name: one for one in results if isinstance(one, Result)}
    assert found.keys() == TRUTH.keys()
    for name, one in found.items():
        boxes = one.boxes_xyxy
        assert torch.allclose(boxes, torch.tensor([TRUTH[name]]).float(), atol=3.0), name  # blurred by resizing
    failed = [one for one in results if isinstance(one, Unreadable)]
    assert [one.path.name for one in failed] == ["d.jpg"]
    assert failed[0].reason


def test_a_batch_without_a_readable_image_is_no_batch(folder: Path) -> None:
    results = run([folder / "d.jpg"] * 3 + [folder / "a.png"])
    assert [type(one) for one in results] == [Unreadable] * 3 + [Result]


def test_results_are_coco_results_with_names(folder: Path, tmp_path: Path) -> None:
    paths = find_images(str(folder))
    out = tmp_path / "out"
    with writer_of(out, paths) as writer:
        for one in run(paths):
            if isinstance(one, Result):
                writer.add(one)
    records = json.loads((out / "predictions.json").read_text())
    assert [(r["file_name"], r["image_id"], r["category_id"], r["category_name"]) for r in records] == [
        ("a.png", 0, 7, "dog"),
        ("b.JPG", 1, 7, "dog"),
        ("c.jpg", 2, 7, "dog"),
    ]
    for record in records:
        x0, y0, x1, y1 = TRUTH[record["file_name"]]
        assert record["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=4)
        assert record["score"] == pytest.approx(0.8808, abs=1e-4)  # sigmoid(2)
        with Image.open(out / record["file_name"]) as picture:
            assert max(picture.size) == 512


@pytest.mark.parametrize(("threshold", "count"), [(0.88, 1), (0.89, 0)])
def test_the_threshold_holds_for_files_and_pictures(tmp_path: Path, threshold: float, count: int) -> None:
    path = paint(tmp_path / "in" / "a.png", (512, 512), (10, 10, 60, 60))
    (one,) = run([path], score_threshold=threshold)  # of a score of 0.8808
    assert isinstance(one, Result)
    with writer_of(tmp_path / "out", [path], pictures=False) as writer:
        writer.add(one)
    assert [r["category_name"] for r in json.loads(writer.records.path.read_text())] == ["dog"] * count
    assert bool((np.asarray(one.plot()) != one.pixels.permute(1, 2, 0).numpy()).any()) == bool(count)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.json"]


def test_equal_names_in_two_folders_do_not_meet(tmp_path: Path) -> None:
    paths = [paint(tmp_path / "in" / side / "a.png", (64, 64), (8, 8, 56, 56)) for side in ("left", "right")]
    with writer_of(tmp_path / "out", paths) as writer:
        for one in run(paths):
            assert isinstance(one, Result)
            writer.add(one)
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")) == [
        "left/a.png",
        "right/a.png",
    ]


def everything_below(folder: Path) -> dict[str, bytes | str]:
    """Of every entry: where a link leads, or what a file holds."""
    entries = [p for p in sorted(folder.rglob("*")) if p.is_symlink() or p.is_file()]
    return {str(p): str(p.readlink()) if p.is_symlink() else p.read_bytes() for p in entries}


def layouts(root: Path) -> dict[str, tuple[str, str]]:
    """images and out of each layout, below root; `store/hash*.png` are what links lead to."""
    store, links = root / "store", root / "links"
    for i, name in enumerate(("hash1", "hash2")):
        paint(store / f"{name}.png", (64, 64), (8, 8, 40 + i, 56))
    links.mkdir()
    for name, target in (("a.png", "hash1.png"), ("b.png", "hash1.png"), ("c.png", "hash2.png")):
        (links / name).symlink_to(Path("..") / "store" / target)
    (root / "folder").symlink_to(store, target_is_directory=True)
    (root / "chain").mkdir()
    (root / "chain" / "hash1.png").symlink_to(links / "a.png")
    (root / "middle").mkdir()
    (root / "middle" / "a.png").symlink_to(links / "a.png")
    (root / "hard").mkdir()
    (root / "hard" / "hash1.png").hardlink_to(store / "hash1.png")
    paint(root / "deep" / "in" / "x.png", (64, 64), (8, 8, 56, 56))
    (root / "deep" / "x.png").symlink_to(root / "deep" / "in" / "x.png")
    (root / "sub").mkdir()
    (root / "sub" / "left").symlink_to(root / "deep" / "in", target_is_directory=True)
    return {
        "into the folder of the targets": ("chain", "store"),
        "into the folder of the links": ("links", "links"),
        "into the same folder by a link": ("store", "folder"),
        "from a folder by a link": ("folder", "store"),
        "onto a link in the middle": ("middle", "links"),
        "onto a hard link": ("store", "hard"),
        "onto a link beside": ("deep/in", "deep"),
        "into a new folder": ("links", "new"),
        "into a folder in it": ("store", "store/found"),
        "into the folder above": ("links", "."),
        "by a way around": ("store", "store/../store/."),
    }


REFUSED = {
    "into the folder of the targets",
    "into the folder of the links",
    "into the same folder by a link",
    "from a folder by a link",
    "onto a link in the middle",
    "onto a hard link",
    "by a way around",
}
OTHERS = ("onto a link beside", "into a new folder", "into a folder in it", "into the folder above")


@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize("layout", [*sorted(REFUSED), *OTHERS])
def test_no_input_is_ever_written_to(tmp_path: Path, layout: str, pictures: bool) -> None:
    images, out = layouts(tmp_path)[layout]
    paths = find_images(str(tmp_path / images))
    before, contents = everything_below(tmp_path), [p.read_bytes() for p in paths]
    if layout in REFUSED and pictures:
        with pytest.raises(UserError, match="would be overwritten"):
            writer_of(tmp_path / out, paths)
        assert everything_below(tmp_path) == before
        return
    with writer_of(tmp_path / out, paths, pictures=pictures) as writer:
        for one in run(paths):
            writer.add(one)
    after = everything_below(tmp_path)
    assert [p.read_bytes() for p in paths] == contents
    changed = {name for name in before if after[name] != before[name]}
    assert changed == ({str(tmp_path / "deep" / "x.png")} if layout == "onto a link beside" and pictures else set())
    if pictures:
        assert {p.name for p in paths} == {p.name for p in (tmp_path / out).glob("*.png")}, "names that the user gave"


def test_a_link_in_the_place_of_an_output_is_replaced_and_not_followed(tmp_path: Path) -> None:
    path = paint(tmp_path / "in" / "a.png", (64, 64), (8, 8, 56, 56))
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "out").mkdir()
    for name in ("a.png", "predictions.json"):
        (tmp_path / "out" / name).symlink_to(precious)
    with writer_of(tmp_path / "out", [path]) as writer:
        writer.add(run([path])[0])
    assert precious.read_text() == "mine"
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.is_symlink()) == ["a.png", "predictions.json"]


def test_annotations_and_checkpoint_are_inputs_too(tmp_path: Path) -> None:
    path = paint(tmp_path / "in" / "a.png", (64, 64), (8, 8, 56, 56))
    precious = tmp_path / "out" / "predictions.json"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(UserError, match=r"predictions\.json is an input and would be overwritten"):
        writer_of(tmp_path / "out", [path], inputs=[precious])
    assert precious.read_text() == "mine"


def test_no_input_is_taken_for_the_draft_of_a_picture(tmp_path: Path) -> None:
    path = paint(tmp_path / "in" / "a.png", (64, 64), (8, 8, 56, 56))
    precious = tmp_path / "out" / ".a.part.png"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(UserError, match=r"\.a\.part\.png is an input and would be overwritten"):
        writer_of(tmp_path / "out", [path], inputs=[precious])
    assert precious.read_text() == "mine"


def test_no_two_pictures_share_a_file() -> None:
    given = [
        "a.bmp",
        "a.png",
        "a.bmp.png",
        "A.PNG",
        "a_2.png",
        "e\u0301.jpg",
        "\xe9.jpg",
        "x/a.bmp",
        "x/a.tif",
        "a.jpg",
    ]
    names = picture_names([Path(name) for name in given])
    folded = {unicodedata.normalize("NFC", str(n)).casefold() for n in names}
    assert len(folded) == len(given)
    kept = {"a.png", "a_2.png", "x/a.bmp.png", "x/a.tif.png", "a.jpg"}
    assert kept <= set(map(str, names))
    assert all(n.suffix.lower() in PICTURE_SUFFIXES for n in names)
    assert [n.parent for n in names] == [Path(name).parent for name in given]


def test_what_lies_before_a_damaged_file_in_its_batch_is_found(folder: Path) -> None:
    results = run([folder / "a.png", folder / "d.jpg", folder / "b.JPG", folder / "c.jpg"])
    assert [one.path.name for one in results] == ["a.png", "b.JPG", "d.jpg", "c.jpg"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk: the kernel takes a part of a write and refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", range(150, 400, 7))
def test_a_full_disk_leaves_whole_results(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "predictions.json"
    path.write_text("an older run")
    results, records = Records(path), [{"image_id": i, "score": 1 / (i + 1)} for i in range(40)]
    refused = pytest.raises(UserError, match=r"cannot write .*predictions\.json: File too large")
    with files_of_at_most(limit), refused:
        list(map(results.add, (records[i : i + 2] for i in range(0, 40, 2))))
    assert not path.exists()
    results.close()
    assert json.loads(path.read_text()) == records[: results.count]
    assert 0 < results.count < 40
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_without_space_is_not_there_at_all(tmp_path: Path) -> None:
    paths = [paint(tmp_path / "in" / f"{i}.png", (64, 64), (8, 8, 56, 56)) for i in range(2)]
    pixels = torch.randint(0, 256, (3, 600, 600), dtype=torch.uint8)
    found = [replace(one, pixels=pixels) for one in run(paths)]
    writer = writer_of(tmp_path / "out", paths)
    with (
        writer,
        files_of_at_most(100_000),
        pytest.raises(UserError, match=r"out/0\.png: there is no room for it"),
    ):
        writer.add(found[0])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["predictions.json"]
    assert [r["file_name"] for r in json.loads(writer.records.path.read_text())] == ["0.png"]


@pytest.mark.parametrize(("size", "box"), [((10, 20000), (0, 4000, 10, 12000)), ((200, 1), (50, 0, 150, 1))])
def test_the_thinnest_images_keep_a_pixel(
    tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    (one,) = run([paint(tmp_path / "a.png", size, box)])
    assert isinstance(one, Result)
    (found,) = one.boxes_xyxy.tolist()
    steps = [max(1, side / 100) for side in size] * 2  # a pixel of the network
    assert all(abs(a - b) <= 2 * step for a, b, step in zip(found, box, steps, strict=True)), found


def test_a_transform_that_fails_is_the_files_fault(tmp_path: Path) -> None:
    paths = [paint(tmp_path / f"{i}.png", (size, 64), (1, 1, 9, 9)) for i, size in enumerate((64, 65))]
    files = Images(paths, lambda parts: {**parts, "image": parts["image"].reshape(3, 64, 64)})
    assert not isinstance(files[0], Unreadable)
    assert isinstance(files[1], Unreadable)
    assert files[1].reason.startswith(f"{paths[1]} (65x64 pixels) cannot be transformed: ")


def test_files_of_other_kinds_are_named(folder: Path) -> None:
    for name in ("e.heic", "f.MP4", "g.avif", ".h.heic"):
        (folder / name).write_bytes(b"\0\0\0\x1cftypheic")
    Image.new("RGB", (64, 64)).save(folder / "ppm.ppm")
    paths = find_images(str(folder))
    files = Images(paths, Resize(64, max_size=100))
    items = {p.name: files[i] for i, p in enumerate(paths)}
    bad = {name: item.reason for name, item in items.items() if isinstance(item, Unreadable)}
    assert bad.keys() == {"d.jpg", "e.heic", "f.MP4", "g.avif"}
    for name, reason in bad.items():
        assert reason.startswith(f"{folder / name} cannot be decoded: not an image of a kind that can be read here")
    assert "ppm.ppm" in items, "Pillow reads it"


def test_images_are_found_by_file_folder_and_pattern(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.png", "b.JPG", "c.jpg", "d.jpg"]
    assert [p.name for p in find_images(str(folder))] == names
    assert [p.name for p in find_images(f"{folder}/*.jpg")] == ["c.jpg", "d.jpg"]
    assert [p.name for p in find_images(f"{folder.parent}/**/*.png")] == ["a.png"]
    assert find_images(f"{folder}/a.png") == [folder / "a.png"]
    mixed = [f"{folder}/*.jpg", f"{folder}/a.png", str(folder), f"{folder}/../in/a.png"]
    assert [p.name for p in find_images(mixed)] == ["c.jpg", "d.jpg", "a.png", "b.JPG"]
    with pytest.raises(UserError, match=r"absent\.png: no such file"):
        find_images([str(folder), f"{folder}/absent.png"])
    with pytest.raises(UserError, match="names no image"):
        find_images([])
    for nothing in (f"{folder}/*.webp", f"{folder}/absent.jpg", f"{folder}/absent"):
        with pytest.raises(UserError, match="no such file"):
            find_images(nothing)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no image in this folder"):
        find_images(f"{folder}/empty")
