"""`python -m codetr.data show`: the pictures are those that training sees, boxes where the objects are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import document, write
from hydra.utils import instantiate
from PIL import Image

from codetr import application
from codetr.data.__main__ import run
from codetr.data.commands import show
from codetr.errors import UserError
from codetr.types import Batch


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    write(tmp_path, document(7), "train")
    return [
        "data=custom",
        "augment@data=tiny",
        f"data.root={tmp_path}/train",
        f"data.train_annotations={tmp_path}/train.json",
        "data.batch_size=2",
        "data.num_workers=1",
        "data.cache=null",
        f"output={tmp_path}/seen.png",
    ]


def test_the_grid_holds_the_first_batches_of_training(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Batch, int]] = []
    draw = show._as_seen

    def note(batch: Batch, i: int, names: tuple[str, ...]) -> Any:
        seen.append((batch, i))
        return draw(batch, i, names)

    monkeypatch.setattr(show, "_as_seen", note)
    assert run(["show", *given, "count=3"]) == 0
    assert f"3 images of 7: {tmp_path}/seen.png" in capsys.readouterr().out
    data = instantiate(application.compose("train", [*given[:-1], f"data.val_annotations={tmp_path}/train.json"]).data)
    data.setup("fit")
    expected = [(batch, i) for batch in data.train_dataloader() for i in range(2)][:3]
    for (a, i), (b, j) in zip(seen, expected, strict=True):
        assert i == j
        assert a.images.equal(b.images)
        assert a.targets.boxes.equal(b.targets.boxes)
    assert width(tmp_path / "seen.png") > 3 * 600


def width(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.width


def test_a_painted_object_lies_under_its_frame(given: list[str], tmp_path: Path) -> None:
    """Of a black image with a white object, whatever the scale, all white lies inside the box, to the frame's width."""
    batch, i = next((b, 0) for b in show._open(application.compose("show", given))[0] if b.targets.valid[0].any())
    batch.images[:] = 0
    x1, y1, x2, y2 = batch.targets.boxes_xyxy[i][0].round().int().tolist()
    batch.targets.valid[i, 1:] = False
    batch.images[i, :, y1:y2, x1:x2] = 255
    picture = np.asarray(show._as_seen(batch, i, ("disc", "square", "star"))).astype(int)
    scale = picture.shape[1] / batch.images.shape[-1]
    white = (picture > 240).all(2)
    rows, columns = white.nonzero()
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / scale
    assert np.abs(found - [x1, y1, x2, y2]).max() <= 5 / scale + 1
    padded = batch.padding[i]
    if padded.any():
        row, column = (int(v) for v in padded.nonzero()[-1])
        assert (picture[int((row + 0.5) * scale), int((column + 0.5) * scale)] == 128).all()


def test_original_beside_it_and_the_other_split(given: list[str], tmp_path: Path) -> None:
    assert run(["show", *given, "count=2", "original=true"]) == 0
    both = width(tmp_path / "seen.png")
    assert run(["show", *given, "count=2", "split=val", "columns=1"]) == 0
    assert both > width(tmp_path / "seen.png")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["split=test"], "split=test: must be train or val"),
        (["count=0"], "count=0: must be"),
        (["count=many"], "count=many: must be"),
        (["output=none/of/these/seen.png"], "output=none/of/these/seen.png cannot be written"),
        (["output=seen.odd"], "output=seen.odd cannot be written"),
        (["cuont=3"], "(?s)cuont.*Did you mean count"),
        (["data.train_annotations=???"], "data.train_annotations is not set"),
    ],
)
def test_what_is_wrong_is_said(given: list[str], wrong: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(["show", *given, *wrong])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", "--help"]) == 0
    assert "python -m codetr.data show data=coco" in capsys.readouterr().out
