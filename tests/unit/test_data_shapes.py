"""codetr.shapes: what is drawn, what is annotated, and that the files can be relied upon."""

import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

from codetr.data.dataset import DetectionDataset
from codetr.errors import UserError
from codetr.shapes import PRESETS, Preset, generate
from codetr.shapes.generate import HARD
from codetr.shapes.outlines import SHAPES, Shape, deform, frequencies
from codetr.shapes.regions import loops, run_lengths, segmentation
from codetr.shapes.scene import Scene, rasterise

# pycocotools' own, in `decode`, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SPLITS = ("train", "val")
SAMPLE = Preset(train=220, val=60, long_side=160, difficulty=HARD)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "tiny"
    generate(root, PRESETS["tiny"], seed=0, workers=1)
    return root


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, COCO]:
    """`demo`, but fewer images."""
    root = tmp_path_factory.mktemp("shapes") / "sample"
    generate(root, SAMPLE, seed=0, workers=1)
    return {split: COCO(root / "annotations" / f"instances_{split}.json") for split in SPLITS}


def files(root: Path) -> dict[str, bytes]:
    """Of the set; whoever reads it leaves a table of its annotations there."""
    paths = (p for p in sorted(root.rglob("*")) if p.is_file() and ".codetr_cache" not in p.parts)
    return {str(p.relative_to(root)): p.read_bytes() for p in paths}


def objects(sample: dict[str, COCO]) -> list[dict[str, Any]]:
    return [a for coco in sample.values() for a in coco.dataset["annotations"] if not a["iscrowd"]]


def test_same_seed_same_bytes_for_any_number_of_workers(tiny: Path, tmp_path: Path) -> None:
    generate(tmp_path / "again", PRESETS["tiny"], seed=0, workers=2)
    generate(tmp_path / "other", PRESETS["tiny"], seed=1, workers=1)
    reference, other = files(tiny), files(tmp_path / "other")
    assert files(tmp_path / "again") == reference
    assert other.keys() == reference.keys()
    assert not set(other.values()) & set(reference.values())


def test_an_image_does_not_depend_on_the_others(tiny: Path, tmp_path: Path) -> None:
    generate(tmp_path / "fewer", Preset(train=3, val=1, long_side=96, difficulty=HARD), seed=0, workers=1)
    for image in sorted((tmp_path / "fewer" / "train").iterdir()):
        assert image.read_bytes() == (tiny / "train" / image.name).read_bytes()


def test_is_read_by_the_ordinary_reader(tiny: Path) -> None:
    train, val = (
        DetectionDataset(tiny / s, tiny / "annotations" / f"instances_{s}.json", verify="decode") for s in SPLITS
    )
    assert (len(train), len(val)) == (PRESETS["tiny"].train, PRESETS["tiny"].val)
    assert set(train.class_names) == {s.name for s in SHAPES}
    assert not train.report.counts + val.report.counts


def test_every_file_decodes_to_its_recorded_size_and_ids_are_unique(tiny: Path) -> None:
    images, annotations = [], []
    for split in SPLITS:
        document = json.loads((tiny / "annotations" / f"instances_{split}.json").read_text())
        for record in document["images"]:
            with Image.open(tiny / split / record["file_name"]) as image:
                image.load()
                assert (image.format, image.mode, *image.size) == ("JPEG", "RGB", record["width"], record["height"])
            assert record["license"] in {entry["id"] for entry in document["licenses"]}
        images += [r["id"] for r in document["images"]]
        annotations += [(split, a["id"]) for a in document["annotations"]]
        ids = [c["id"] for c in document["categories"]]
        assert len(ids) == len(set(ids)) == len(SHAPES)
        assert min(ids) > 0
        assert max(ids) > len(ids)
    assert len(set(images)) == len(images) == PRESETS["tiny"].train + PRESETS["tiny"].val
    assert len(set(annotations)) == len(annotations)


def test_boxes_are_tight_areas_right_and_masks_disjoint(sample: dict[str, COCO]) -> None:
    for coco in sample.values():
        for image_id, image in coco.imgs.items():
            seen = np.zeros((image["height"], image["width"]), int)
            for annotation in coco.imgToAnns[image_id]:
                mask = coco.annToMask(annotation).astype(bool)
                seen += mask
                y, x = np.nonzero(mask)
                assert annotation["area"] == mask.sum() >= 12
                assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert seen.max(initial=0) <= 1


def test_holds_everything_a_real_data_set_does(sample: dict[str, COCO]) -> None:
    found = objects(sample)
    sizes = [(i["width"], i["height"]) for coco in sample.values() for i in coco.dataset["images"]]
    images = {i["id"]: i for coco in sample.values() for i in coco.dataset["images"]}
    counts = [len(coco.imgToAnns[i]) for coco in sample.values() for i in coco.imgs]
    crowds = [a for coco in sample.values() for a in coco.dataset["annotations"] if a["iscrowd"]]
    polygons = [a["segmentation"] for a in found if isinstance(a["segmentation"], list)]
    compressed = [a["segmentation"] for a in found if isinstance(a["segmentation"], dict)]
    longest = np.array([max(a["bbox"][2:]) for a in found])
    at_border = [
        x == 0 or y == 0 or x + w == images[a["image_id"]]["width"] or y + h == images[a["image_id"]]["height"]
        for a in found
        for x, y, w, h in [a["bbox"]]
    ]
    assert {max(s) for s in sizes} == {SAMPLE.long_side}
    assert min(min(s) for s in sizes) >= 0.75 * SAMPLE.long_side
    assert {w > h for w, h in sizes} == {True, False}
    assert 0.01 < np.mean(np.array(counts) == 0) < 0.09
    assert max(counts) >= 9
    assert 0.01 < len(crowds) / len(images) < 0.09
    assert all(isinstance(c["segmentation"]["counts"], list) for c in crowds)
    assert any(len(p) > 1 for p in polygons)
    assert all(isinstance(c["counts"], str) for c in compressed)
    assert len(polygons) > 3 * len(compressed) > 30
    assert np.mean(longest < 32) > 0.5
    assert longest.min() <= 10
    assert longest.max() > 0.8 * SAMPLE.long_side
    assert 0.05 < np.mean(at_border) < 0.4


def test_classes_have_a_long_tail(sample: dict[str, COCO]) -> None:
    p = frequencies(tail=1)
    assert p.sum() == pytest.approx(1)
    assert (np.diff(p) < 0).all()
    assert p[0] / p[-1] == pytest.approx(15)
    counted = Counter(a["category_id"] for a in objects(sample))
    counts = np.array([counted[s.category_id] for s in SHAPES])
    assert counts.min() > 0
    assert counts.argmax() == 0
    # Objects that do not fit are given up; that must not bend the law by more than chance (4 sigma) allows.
    expected = p * counts.sum()
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_painted_area_is_the_area_of_the_outline(shape: Shape) -> None:
    rng = np.random.default_rng(3)
    outline = [polygon * 90 + 70 for polygon in deform(shape.draw(rng), rng, tilt=3.2)]
    areas = [abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2 for x, y in (p.T for p in outline)]
    assert rasterise(outline)[1].sum() == pytest.approx(areas[0] - sum(areas[1:]), rel=0.03)
    assert np.ptp(outline[0], 0).max() == pytest.approx(90)


def test_nothing_hides_an_object_too_much() -> None:
    rng = np.random.default_rng(0)
    scene = Scene(np.full((3, 64, 64), 0.5, np.float32), np.zeros((64, 64), np.int16), np.ones(2), False, HARD)
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    assert scene.add([square * 20 + 20], SHAPES[2], rng)
    before = scene.canvas.copy()
    assert not scene.add([square * 30 + 15], None, rng)
    assert not scene.add([square * 20 + (20, 15)], SHAPES[2], rng)
    assert not scene.add([square * 20 + (56, 56)], SHAPES[2], rng)  # 16 % of it inside the image
    assert (scene.canvas == before).all()
    assert len(scene.instances) == 1
    assert scene.add([square * 20 + (30, 20)], SHAPES[2], rng)
    assert [int(scene.mask(i).sum()) for i in range(2)] == [200, 400]
    changed = (scene.canvas != before).any(0)
    # Edges are antialiased: the paint may reach half a pixel beyond the mask, never further.
    assert (changed >= scene.mask(1)).all()
    assert (changed <= ndimage.binary_dilation(scene.mask(1), np.ones((3, 3)))).all()


def test_segmentations_say_exactly_what_the_mask_is() -> None:
    rng = np.random.default_rng(0)
    for trial in range(400):
        height, width = rng.integers(2, 30, 2)
        mask = np.kron(rng.random((height, width)) < rng.uniform(0.05, 0.95), np.ones((1 + trial % 3,) * 2)) > 0
        if not mask.any():
            continue
        pieces = ndimage.label(mask, np.ones((3, 3)))[1]
        holes = ndimage.label(~np.pad(mask, 1))[1] - 1
        assert len(loops(mask)) == pieces + holes
        written = segmentation(mask, crowd=False)
        assert isinstance(written, dict) == (holes > 0)
        rles = [written] if holes else coco_mask.frPyObjects(written, *mask.shape)
        assert (coco_mask.decode(coco_mask.merge(rles)) == mask).all()
        crowd = coco_mask.frPyObjects(segmentation(mask, crowd=True), *mask.shape)
        assert (coco_mask.decode(crowd) == mask).all()


def test_run_lengths_start_with_zeros() -> None:
    assert run_lengths(np.array([[1, 0], [1, 1]], bool)) == {"size": [2, 2], "counts": [0, 2, 1, 1]}
    assert run_lengths(np.array([[0, 0], [0, 1]], bool)) == {"size": [2, 2], "counts": [3, 1]}


def test_done_work_is_kept_and_other_work_replaced(tmp_path: Path) -> None:
    root, preset = tmp_path / "x", Preset(train=3, val=2, long_side=64, difficulty=HARD)
    generate(root, preset, seed=0, workers=1)
    first, stamp = files(root), (root / "shapes.json").stat().st_ino
    generate(root, preset, seed=0, workers=1)
    assert (root / "shapes.json").stat().st_ino == stamp
    next((root / "val").iterdir()).unlink()
    generate(root, preset, seed=0, workers=1)
    assert files(root) == first
    generate(root, preset, seed=5, workers=1)
    assert files(root).keys() == first.keys()
    assert files(root) != first


def test_a_killed_generation_is_redone(tmp_path: Path) -> None:
    root, partial = tmp_path / "x", tmp_path / ".x.partial"
    command = [sys.executable, "-m", "codetr.shapes", "--preset", "full", "--root", str(root), "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(partial.glob("train/*.jpg")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    assert list(partial.glob("train/*.jpg"))
    assert not root.exists()
    generate(root, Preset(train=2, val=1, long_side=64, difficulty=HARD), seed=0, workers=1)
    assert not partial.exists()
    assert len(list(root.glob("*/*.jpg"))) == 3


def test_askers_at_once_get_the_same(tiny: Path, tmp_path: Path) -> None:
    root = tmp_path / "x"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: generate(root, PRESETS["tiny"], seed=0, workers=1), range(3)))
    assert files(root) == files(tiny)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(UserError, match="something else"):
        generate(tmp_path, PRESETS["tiny"], seed=0, workers=1)
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"
