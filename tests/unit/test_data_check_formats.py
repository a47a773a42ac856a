"""Bad input in Pascal VOC's XML files and in YOLO's text files: found by `check` and by training, with the place."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from coco_files import write_image
from hydra.utils import instantiate

from codetr import application
from codetr.data.commands.check import inspect
from codetr.errors import UserError

WIDTH, HEIGHT = 60, 50
NOT_FOUR = "box that is not 4 finite numbers"

VOC: dict[str, tuple[Callable[[str], str], str, str]] = {
    "no XML": (lambda t: t[:40], "bad image record", r"1\.xml: cannot be read as XML"),
    "other size": (
        lambda t: t.replace("<width>60", "<width>61"),
        "image of another size",
        "holds 60x50 pixels, not 61x50",
    ),
    "no name": (lambda t: t.replace("<name>cat</name>", ""), "unknown category id", r"1\.xml, object 1: no <name>"),
    "corner missing": (lambda t: t.replace("<xmax>20</xmax>", ""), NOT_FOUR, "object 1: no number as xmax in <bndbox>"),
    "corner of words": (lambda t: t.replace("<xmax>20", "<xmax>wide"), NOT_FOUR, "object 1: no number as xmax"),
    "corner NaN": (lambda t: t.replace("<xmax>20", "<xmax>nan"), NOT_FOUR, "object 1: no number as xmax"),
    "no box": (lambda t: re.sub("<bndbox>.*?</bndbox>", "", t, count=1), NOT_FOUR, "object 1: no number as xmin, ymin"),
    "inverted": (lambda t: t.replace("<xmax>20", "<xmax>3"), "inverted box", r"1\.xml, object 1: bbox \[9, 9, -6"),
    "outside": (
        lambda t: t.replace("<xmin>10", "<xmin>70").replace("<xmax>20", "<xmax>80"),
        "box outside its image",
        r"1\.xml, object 1: bbox \[69, 9, 11, 11\] in 60x50",
    ),
}

YOLO: dict[str, tuple[str, str, str]] = {
    "words": ("cat 0.5 0.5 0.2 0.2", "box that|category", "line 1: not only numbers"),
    "three numbers": ("0 0.5 0.5", NOT_FOUR, "line 1: 3 numbers, neither 5"),
    "pixels": ("0 30 25 10 10", NOT_FOUR, "line 1: coordinates must be divided"),
    "NaN": ("0 nan 0.5 0.2 0.2", NOT_FOUR, "line 1: coordinates must be divided"),
    "class with a fraction": ("0.5 0.5 0.5 0.2 0.2", "unknown category id", "line 1: 0.5 is no class number"),
    "unknown class": ("7 0.5 0.5 0.2 0.2", "unknown category id", r"line 1 \(category 7\)"),
    "negative class": ("-1 0.5 0.5 0.2 0.2", "unknown category id", r"line 1 \(category -1\)"),
    "no width": ("0 0.5 0.5 0 0.2", "box without area", "line 1: bbox"),
    "negative width": ("0 0.5 0.5 -0.005 0.2", "inverted box", "line 1: bbox"),
}


def xml(name: str) -> str:
    boxes = ((10, 10, 20, 20), (30, 12, 50, 40))
    corners = (
        "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), b, strict=True)) for b in boxes
    )
    objects = "".join(
        f"<object><name>{n}</name><bndbox>{c}</bndbox></object>" for n, c in zip(("cat", "dog"), corners, strict=True)
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"


def agree(overrides: list[str], kind: str, pattern: str) -> None:
    """`check` finds the one fault, and training names the same place, or skips and counts."""
    config = application.compose("check", [*overrides, "data.num_workers=0"])
    train, val = inspect(config)
    assert train.findings.total("error") >= 1
    assert val.findings.total("error") == 0, val.findings.examples
    found = [e.record for k, examples in train.findings.examples.items() if re.search(kind, k) for e in examples]
    assert any(re.search(pattern, record) for record in found), train.findings.examples
    config.data.on_error = "stop"
    with pytest.raises(UserError, match=r"(?s)1 bad record\n.*1\.(xml|txt|jpg)"):
        instantiate(config.data).setup("fit")
    config.data.on_error = "skip"
    data = instantiate(config.data)
    data.setup("fit")
    assert sum(data.train_set.report.errors.values()) == 1


@pytest.mark.parametrize("name", VOC)
def test_voc(tmp_path: Path, name: str) -> None:
    (tmp_path / "Annotations").mkdir()
    for i in range(5):
        write_image(tmp_path / "JPEGImages" / f"{i}.jpg", WIDTH, HEIGHT, seed=i)
        (tmp_path / "Annotations" / f"{i}.xml").write_text(xml(str(i)))
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n2\n")
    (lists / "val.txt").write_text("3\n4\n")
    change, kind, pattern = VOC[name]
    (tmp_path / "Annotations" / "1.xml").write_text(change(xml("1")))
    agree(["data=voc", f"data.root={tmp_path}"], kind, pattern)


@pytest.mark.parametrize("name", YOLO)
def test_yolo(tmp_path: Path, name: str) -> None:
    for split, count in (("train", 3), ("val", 2)):
        (tmp_path / "labels" / split).mkdir(parents=True)
        for i in range(count):
            write_image(tmp_path / "images" / split / f"{i}.jpg", WIDTH, HEIGHT, seed=i + 10 * (split == "val"))
            (tmp_path / "labels" / split / f"{i}.txt").write_text("0 0.5 0.5 0.25 0.5\n1 0.3 0.4 0.2 0.2\n")
    settings = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(settings))
    line, kind, pattern = YOLO[name]
    (tmp_path / "labels" / "train" / "1.txt").write_text(f"{line}\n0 0.5 0.5 0.25 0.5\n")
    agree(["data=yolo", f"data.root={tmp_path}"], kind, pattern)
