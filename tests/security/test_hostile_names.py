"""Names out of a stranger's files: on the terminal, in loggers' tags, and as paths that `convert` writes to."""

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codetr.data.__main__ import run
from codetr.errors import UserError
from codetr.names import plotted, shown, shown_lines, tags

NAMES = (
    "two\nlines",
    "return\rover",
    "\x1b[2J\x1b]0;title\x07",  # clears a terminal and renames it
    "\x9b31m",  # the same in one byte
    "\u202egnp.exe",  # read from right to left
    "\u2066isolated",
    "\x00",
    "[bold]markup[/]",
    "<script>alert(1)</script>",
    "$\\frac{1}{0}$",
    "../../etc",
    "/absolute",
)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_terminal_shows_them_and_obeys_none(name: str) -> None:
    for text in (shown(name), plotted(name), *shown_lines(name).split("\n")):
        assert not {"Cc", "Cf", "Zl", "Zp", "Cs"} & {unicodedata.category(c) for c in text}
    if "\\" not in name:  # nothing is lost
        assert shown(name).encode("ascii", "backslashreplace").decode("unicode_escape") == name
    assert plotted(name).count("$") == plotted(name).count(r"\$")


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("person", "traffic light", "Straße", "自転車", "سيارة", "naïve-1.5_x"):
        assert shown(name) == plotted(name) == name
        assert tags([name]) == {name: name}


def test_loggers_get_tags_that_are_no_paths_and_no_two_alike() -> None:
    found = tags([*NAMES, "a/b", "a_b", "a\\b"])
    assert len(set(found.values())) == len(NAMES) + 3
    assert all(re.fullmatch(r"[\w .-]+", tag) for tag in found.values())
    assert found["a_b"] != found["a/b"]


@pytest.mark.parametrize("form", ["coco", "voc", "yolo"])
@pytest.mark.parametrize("name", ["../outside.png", "a/../../outside.png", "{root}/outside.png"])
def test_convert_writes_nothing_outside_of_its_target(name: str, form: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "train" / "a").mkdir(parents=True)
    outside = root / "outside.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(outside)
    image = {"id": 1, "file_name": name.format(root=root), "width": 8, "height": 8}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
    (root / "train.json").write_text(json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    given = ["from=custom", f"to={form}", f"source={root}", f"target={tmp_path}/out", "splits=[train]", "images=copy"]
    with pytest.raises(UserError, match=r"lies outside of .*train, the folder of the images"):
        run(["convert", *given, "data.train_images=train", "data.train_annotations=train.json"])
    assert sorted(tmp_path.rglob("*")) == before
