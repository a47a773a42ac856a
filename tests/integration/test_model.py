"""Three lines of Python: images in every form, with the results of `codetr predict`."""

from __future__ import annotations

import inspect
import io
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import codetr
from codetr.application import compose
from codetr.errors import UserError
from codetr.inference import Model, Result
from codetr.predict import predict
from codetr.visualize import class_color

if TYPE_CHECKING:
    from conftest import Trained

PYTHON_MD = Path(__file__).parents[2] / "docs" / "python.md"
FORMS = {"photo.jpg": "RGB", "turned.jpg": "RGB", "grey.png": "L", "palette.png": "P", "alpha.png": "RGBA"}


@pytest.fixture(scope="module")
def model(trained: Trained) -> Model:
    return codetr.load(trained.checkpoint, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One scene as files of several kinds; in one the camera was held upright."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(3).integers(0, 256, (5, 7, 3), np.uint8)
    scene = Image.fromarray(pixels).resize((140, 100), Image.Resampling.BICUBIC)
    for name, mode in FORMS.items():
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "turned.jpg" else 1
        scene.convert(mode).save(folder / name, exif=exif)
    return folder


def same(one: Result, other: Result) -> bool:
    pairs = [(getattr(r, key) for r in (one, other)) for key in ("boxes_xyxy", "scores", "labels")]
    return one.size == other.size and len(one) > 0 and all(torch.equal(a, b) for a, b in pairs)


def test_results_are_those_of_the_command(trained: Trained, photos: Path, tmp_path: Path) -> None:
    given = [f"checkpoint={trained.checkpoint}", f"images={photos}", f"out={tmp_path}", "device=cpu"]
    written = json.loads(predict(compose("predict", [*given, "score_threshold=0.02", "num_workers=0"])).read_text())
    results = codetr.load(trained.checkpoint).predict(photos, score_threshold=0.02)
    assert [one.path.name for one in results] == sorted(FORMS)
    own = [record for i, one in enumerate(results) for record in one.to_coco(i)]
    assert own == written
    assert len(own) > len(FORMS)
    for one in results:  # both draw alike; a PNG keeps what was drawn
        if one.path.suffix == ".png":
            drawn = Image.open(tmp_path / one.path.name)
            assert np.array_equal(np.asarray(one.plot()), np.asarray(drawn))


def test_defaults_are_those_of_the_command() -> None:
    config = compose("predict", ["checkpoint=x", "images=y"])
    for name in ("score_threshold", "batch_size", "max_pixels"):
        assert inspect.signature(Model.predict).parameters[name].default == config[name]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_an_image_gives_the_same_result(model: Model, photos: Path, name: str) -> None:
    """A picture of Pillow as it was opened, and what is left when somebody else has read the file."""
    path = photos / name
    opened = Image.open(path)
    upright = ImageOps.exif_transpose(opened)
    pixels = np.asarray(upright.convert("RGB"))
    backwards = np.ascontiguousarray(pixels[..., ::-1])  # as OpenCV has it
    forms: list[Any] = [
        str(path),
        path,
        f"{photos}/{name[:-1]}*",
        opened,
        upright.convert("RGB"),
        pixels,
        backwards[..., ::-1],
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous(),
        [path],
    ]
    results = [model.predict(form, score_threshold=0.01) for form in forms]
    assert [len(found) for found in results] == [1] * len(forms)
    ((expected,), *others) = results
    assert expected.size == ((140, 100) if name == "turned.jpg" else (100, 140))
    assert all(same(one, expected) for (one,) in others)
    mixed = model.predict([pixels, path, opened], score_threshold=0.01, batch_size=1)
    assert all(same(one, expected) for one in mixed)


def test_one_result_per_image_in_their_order(model: Model, photos: Path, trained: Trained) -> None:
    names = [photos / "grey.png", trained.images / "2.png", photos / "grey.png"]
    results = model.predict(names, score_threshold=0, batch_size=2)
    assert [one.path for one in results] == names
    assert model.predict([], score_threshold=0) == []
    assert len(model.predict([photos, trained.images / "2.png"])) == len(FORMS) + 1
    assert repr(results[0].above(2)) == f"Result({photos}/grey.png, 140x100 pixels: nothing)"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((9, 9), np.uint8), r"images is a ndarray \(uint8 \[9, 9\]\): give .*\[height, width, 3\]"),
        (np.zeros((9, 9, 3)), r"float64 \[9, 9, 3\]"),
        (torch.zeros(3, 9, 9), r"images is a Tensor \(torch.float32 \[3, 9, 9\]\)"),
        (torch.zeros(2, 3, 9, 9, dtype=torch.uint8), r"\[2, 3, 9, 9\]"),
        ([torch.zeros(3, 9, 9, dtype=torch.uint8), 7], r"images\[1\] is a int \(7\)"),
        ("absent.jpg", "no such file"),
    ],
)
def test_what_is_no_image_is_named(model: Model, image: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.predict(image)


def test_a_damaged_image_is_named(model: Model, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes((photos / "alpha.png").read_bytes()[:2000])
    with Image.open(tmp_path / "half.png") as opened:
        for image in (tmp_path / "half.png", opened):
            with pytest.raises(UserError, match=r"half\.png cannot be decoded"):
                model.predict(image)


def test_other_forms_of_a_result(model: Model, photos: Path) -> None:
    import supervision

    (one,) = model.predict(photos / "photo.jpg", score_threshold=0.02)
    assert one.names == [model.class_names[label] for label in one.labels]
    (left, top, right, bottom), *_ = one.boxes_xyxy.tolist()
    first = one.to_coco(image_id=5)[0]
    assert first["bbox"] == pytest.approx([left, top, right - left, bottom - top])
    assert (first["image_id"], first["category_name"], first["file_name"]) == (5, one.names[0], "photo.jpg")
    theirs = one.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert np.array_equal(theirs.xyxy, one.boxes_xyxy)
    assert np.array_equal(theirs.confidence, one.scores)
    assert list(theirs["class_name"]) == one.names
    assert theirs.mask is None
    assert len(model.predict(photos / "photo.jpg", score_threshold=1.0)[0].to_supervision()) == 0


def test_without_supervision_a_sentence_says_what_to_install(
    model: Model, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    (one,) = model.predict(photos / "photo.jpg")
    with pytest.raises(UserError, match=r"pip install 'codetr\[supervision\]'"):
        one.to_supervision()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:IPython")
def test_a_notebook_shows_the_picture(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first lines of docs/python.md in cells, of which IPython displays the last value as a notebook does."""
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.ckpt").symlink_to(trained.checkpoint)
    (tmp_path / "photo.jpg").symlink_to(photos / "photo.jpg")
    Image.open(photos / "photo.jpg").resize((700, 660)).save("map.tif")
    shell = InteractiveShell()
    for block in re.findall(r"```python\n(.*?)```", PYTHON_MD.read_text(), re.DOTALL)[:2]:
        shell.run_cell(block, silent=True).raise_error()
    (found,) = codetr.load(trained.checkpoint).predict(photos / "photo.jpg", score_threshold=0.02)
    shown, _ = shell.display_formatter.format(found)
    assert shown["text/plain"].startswith("Result(")
    pixels = np.asarray(Image.open(io.BytesIO(shown["image/png"])))
    assert pixels.shape == (366, 512, 3)
    assert (pixels == class_color(int(found.labels[0]))).all(-1).sum() > 100
    with Image.open("found.jpg") as picture:
        assert picture.size == (512, 366)


def test_half_precision_finds_the_same_to_its_rounding(trained: Trained, photos: Path) -> None:
    whole, halved = (codetr.load(trained.checkpoint, device="cpu") for _ in range(2))
    assert halved.half() is halved
    assert {p.dtype for p in halved.detector.parameters()} == {torch.float16}
    constants = dict(whole.detector.named_buffers())
    kept = [n for n, b in halved.detector.named_buffers() if n.endswith("mean") and "running" not in n]
    assert all(torch.equal(constants[n], halved.detector.get_buffer(n)) for n in kept)  # to the last digit
    assert kept
    best, other = (m.predict(photos / "photo.jpg", score_threshold=0)[0] for m in (whole, halved))
    assert best.scores.dtype == other.scores.dtype == torch.float32
    assert not torch.equal(best.scores, other.scores)
    torch.testing.assert_close(best.scores[:10], other.scores[:10], rtol=0, atol=1e-2)
    for box, label in zip(best.boxes_xyxy[:10], best.labels, strict=False):
        nearest = (other.boxes_xyxy[other.labels == label] - box).abs().amax(1).min()
        assert nearest < 0.5


def test_what_is_opened_is_all_that_the_file_says(trained: Trained) -> None:
    averaged, raw = codetr.load(trained.checkpoint), codetr.load(trained.checkpoint, weights="raw", device="cpu")
    assert averaged.class_names == ("circle", "square", "star")
    assert (averaged.category_ids, averaged.step, averaged.size_divisor) == (None, 7, 32)
    assert averaged.config["model"]["num_classes"] == 3
    assert not averaged.detector.training
    saved = torch.load(trained.checkpoint, weights_only=True)
    for opened, weights in ((raw, saved["state_dict"]), (averaged, saved["ema"]["weights"])):
        name = next(n for n in opened.detector.state_dict() if n.endswith("class_heads.0.weight"))
        expected = weights[name] if name in weights else weights[f"detector.{name}"]
        assert torch.equal(opened.detector.state_dict()[name].cpu(), expected)
    with pytest.raises(UserError, match="device=quantum"):
        averaged.to("quantum")
