"""Files of detections in further formats, read back by the libraries whose formats they are."""

from __future__ import annotations

import csv
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import supervision
import torch
from PIL import Image

from codetr.data.readers import yolo as yolo_reader
from codetr.errors import UserError
from codetr.inference import Result
from codetr.inference.formats import COLUMNS, FORMATS, Parquet
from codetr.inference.outputs import Writer
from codetr.types import Detections

NAMES, IDS = ("ant", '../bee, "b"', "cat"), (7, 3, 12)
SIZES = {"one.png": (40, 60), "below/two.png": (50, 30), "three.png": (20, 20)}  # height, width


@pytest.fixture
def results(tmp_path: Path) -> list[Result]:
    found = []
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        draws = torch.Generator().manual_seed(seed)
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (height, width, 3), generator=draws, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
        corners = torch.rand(6, 2, 2, generator=draws).sort(1).values * torch.tensor([width, height])
        count = 0 if name == "three.png" else 6
        scores = torch.rand(count, generator=draws).sort(descending=True).values
        labels = torch.randint(3, (count,), generator=draws)
        boxes = corners[:count].reshape(-1, 4)
        found.append(
            Result(Detections(scores, labels, boxes), (height, width), NAMES, IDS, path, pixels.permute(2, 0, 1))
        )
    return found


def write(out: Path, results: list[Result], *formats: str, **more: object) -> None:
    with Writer(out, [one.path for one in results], False, formats=formats, **more) as writer:
        for one in results:
            writer.add(one)


def expected(results: list[Result], threshold: float = 0.0) -> list[tuple]:
    return [
        (i, name, IDS[label], NAMES[label], score, *box)
        for i, (name, one) in enumerate(zip(SIZES, results, strict=True))
        for label, score, box in zip(one.labels.tolist(), one.scores.tolist(), one.boxes_xyxy.tolist(), strict=True)
        if score >= threshold
    ]


def test_csv_is_read_by_csv_and_pandas(results: list[Result], tmp_path: Path) -> None:
    write(tmp_path / "out", results, "csv", drawn_from=0.3)
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert tuple(head) == COLUMNS
    kinds = (int, str, int, str, *[float] * 5)
    own = [tuple(kind(value) for kind, value in zip(kinds, row, strict=True)) for row in rows]
    assert own == expected(results, 0.3)
    assert 0 < len(own) < 12


@pytest.mark.parametrize("textual", [False, True])
def test_parquet_is_read_by_arrow_in_groups(
    results: list[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, textual: bool
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="not installed: codetr[parquet]")
    monkeypatch.setattr("codetr.inference.formats._GROUP", 5)
    ids = ["x1", "x2", "x3"] if textual else None
    write(tmp_path / "out", results, "parquet", image_ids=ids)
    path = tmp_path / "out" / "predictions.parquet"
    assert parquet.ParquetFile(path).num_row_groups >= 2
    table = parquet.read_table(path)
    rows = list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))
    assert rows == [(ids[row[0]] if ids else row[0], *row[1:]) for row in expected(results)]
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_yolo_is_read_by_supervision_and_by_our_reader(results: list[Result], tmp_path: Path) -> None:
    write(tmp_path / "out", results, "yolo")
    home = tmp_path / "out" / "yolo"
    (home / "images").symlink_to(tmp_path / "images")
    document = yolo_reader.read(home / "data.yaml" / "train")
    names = {c["id"]: c["name"] for c in document["categories"]}
    files = {i["id"]: i["file_name"].removeprefix("images/") for i in document["images"]}
    own = [(files[a["image_id"]], names[a["category_id"]], *a["bbox"]) for a in document["annotations"]]
    flat = [(n, c, x0, y0, x1 - x0, y1 - y0) for _, n, _, c, _, x0, y0, x1, y1 in expected(results)]
    assert sorted(row[:2] for row in own) == sorted(row[:2] for row in flat)
    np.testing.assert_allclose(sorted(row[2:] for row in own), sorted(row[2:] for row in flat), atol=1e-4)
    top = supervision.DetectionDataset.from_yolo(
        str(home / "images"), str(home / "labels"), str(home / "data.yaml"), show_progress=False
    )
    assert tuple(top.classes) == NAMES
    theirs = {Path(path).name: found for path, found in top.annotations.items()}["one.png"]
    np.testing.assert_allclose(theirs.xyxy, results[0].boxes_xyxy, atol=1e-3)
    assert theirs.class_id.tolist() == results[0].labels.tolist()


def test_voc_is_read_by_supervision(results: list[Result], tmp_path: Path) -> None:
    write(tmp_path / "out", results, "voc")
    root = ElementTree.parse(tmp_path / "out" / "voc" / "below" / "two.xml").getroot()
    assert (root.findtext("filename"), root.findtext("size/width"), root.findtext("size/height")) == (
        "two.png",
        "30",
        "50",
    )
    boxes = [
        [float(node.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        for node in root.iter("object")
    ]
    np.testing.assert_allclose(np.array(boxes) - [1, 1, 0, 0], results[1].boxes_xyxy, atol=1e-4)
    assert [node.findtext("name") for node in root.iter("object")] == results[1].names
    theirs = supervision.DetectionDataset.from_pascal_voc(
        str(tmp_path / "images"), str(tmp_path / "out" / "voc"), show_progress=False
    )
    found = {Path(path).name: own for path, own in theirs.annotations.items()}["one.png"]
    np.testing.assert_allclose(found.xyxy, results[0].boxes_xyxy, atol=1.01)
    assert [theirs.classes[i] for i in found.class_id] == results[0].names


def test_crops_show_what_is_in_the_boxes(results: list[Result], tmp_path: Path) -> None:
    write(tmp_path / "out", results, "crops")
    folder = tmp_path / "out" / "crops"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    called = {0: "0_ant", 1: "1_.._bee_ _b_", 2: "2_cat"}
    names = [
        f"{called[label]}/{Path(name).with_name(f'{Path(name).stem}_{i}.jpg')}"
        for name, one in zip(SIZES, results, strict=True)
        for i, label in enumerate(one.labels.tolist())
    ]
    assert files == sorted(names)
    (left, top, right, bottom), label = results[0].boxes_xyxy[0].tolist(), int(results[0].labels[0])
    with Image.open(folder / called[label] / "one_0.jpg") as crop:
        assert crop.size == (round(right) - int(left), round(bottom) - int(top))
        shown = np.asarray(crop.convert("L"), float)
    pixels = Image.fromarray(results[0].pixels.permute(1, 2, 0).numpy()).convert("L")
    there = np.asarray(pixels, float)[int(top) : round(bottom), int(left) : round(right)]
    assert np.abs(shown - there).mean() < 20


def test_what_was_found_before_an_error_is_kept(results: list[Result], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="not installed: codetr[parquet]")
    from pyarrow.parquet import read_table

    paths = [one.path for one in results]
    writer = Writer(tmp_path / "out", paths, False, formats=["csv", "parquet"])
    writer.add(results[0])
    writer.__exit__(RuntimeError)
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 7
    assert read_table(tmp_path / "out" / "predictions.parquet").num_rows == 6


def test_no_input_is_written_over(results: list[Result], tmp_path: Path) -> None:
    crops = tmp_path / "out" / "crops" / "0_ant"
    crops.mkdir(parents=True)
    (crops / "one_0.jpg").symlink_to(results[0].path)
    paths = [crops / "one_0.jpg"]
    with pytest.raises(UserError, match=r"is an input and would be overwritten"):
        Writer(tmp_path / "out", paths, False, formats=["crops"])
    annotation = tmp_path / "out" / "voc" / "one.xml"
    annotation.parent.mkdir()
    annotation.write_text("mine")
    with pytest.raises(UserError, match=r"one\.xml is an input and would be overwritten"):
        Writer(tmp_path / "out", [results[0].path], False, inputs=[annotation], formats=["voc"])


def test_mistakes_are_named(results: list[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results[0].path
    with pytest.raises(UserError, match=r"formats=\['xml'\]: xml is none of csv, yolo"):
        Writer(tmp_path / "out", [path], False, formats=["xml"])
    twin = path.with_suffix(".jpg")
    for name in ("yolo", "voc"):
        with pytest.raises(UserError, match=rf"formats=\[{name}\]: one\.png and one\.jpg would share"):
            Writer(tmp_path / "out", [path, twin], False, formats=[name])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'codetr\[parquet\]'"):
        Parquet(tmp_path, [])
    assert set(FORMATS) == {"csv", "yolo", "voc", "parquet", "crops"}
