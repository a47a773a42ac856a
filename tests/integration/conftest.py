"""A small checkpoint whose own detections are the truth of a small data set."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hydra.utils import instantiate
from PIL import Image

from codetr import application
from codetr.export import export
from codetr.inference import Model, load
from toy_model import NARROW, SIZES

NAMES = ["circle", "square", "star"]
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


@dataclass
class Trained:
    """checkpoint: a file. images: a folder with five images; its annotations lie beside it in truth.json."""

    checkpoint: Path
    images: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Random weights; the averaged ones (EMA) made the annotations, so they find most of it and the raw ones do not."""
    return make(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def segmenting(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The same with a mask head, whose masks the annotations have."""
    mask_head = ("model/mask_head=refine_mask", "model.detector.mask_head.iou.hidden_width=16")
    return make(tmp_path_factory.mktemp("segmenting"), *mask_head)


@pytest.fixture(scope="session")
def sure(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A detector of toy size with masks, and scores of all sizes: random weights alone are sure of nothing."""
    mask_head = ("model/mask_head=refine_mask", "model.detector.mask_head.iou.hidden_width=16")
    model = load(make(tmp_path_factory.mktemp("sure"), *mask_head, *SIZES, NARROW).checkpoint, device="cpu")
    assert isinstance(model, Model)
    for head in model.detector.decoder.class_heads:
        head.bias.data += 3
        head.weight.data += 0.1 * torch.randn_like(head.weight)
    return model


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The same of a detector whose graph is small, and soon exported; with heads that only train."""
    model = ("conditional_detr_tiny", "model.detector.decoder.num_layers=2", "model.detector.main.num_queries=40")
    heads = "model/auxiliary_head=[faster_rcnn_small,atss]"
    return make(tmp_path_factory.mktemp("small"), f"model={model[0]}", *model[1:], heads, noise=0.05)


@pytest.fixture(scope="session")
def eager(small: Trained) -> Model:
    model = load(small.checkpoint, device="cpu")
    assert isinstance(model, Model)
    return model


@pytest.fixture(scope="session")
def onnx_file(small: Trained, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """`small` in ONNX: exported once for all processes of pytest, whose checkpoints are the same."""
    base = tmp_path_factory.getbasetemp()
    path = (base if worker_id == "master" else base.parent) / "exported" / "model.onnx"
    with FileLock(path.parent.with_suffix(".lock")):
        if not path.exists():
            export(application.compose("export", [f"checkpoint={small.checkpoint}", f"out={path}"]))
    return path


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """Eight images of three sizes; behind the resize some are wide, some high."""
    rng = np.random.default_rng(5)
    sizes = (((96, 128), (128, 100), (70, 160))[i % 3] for i in range(8))
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)) for _ in range(8)]
    return [np.asarray(one.resize((width, height))) for one, (height, width) in zip(coarse, sizes, strict=True)]


def make(folder: Path, *model: str, noise: float = 0.0) -> Trained:
    """noise: added to the first weights, some of which are zero, so that queries differ."""
    torch.manual_seed(0)
    (folder / "images").mkdir()
    for i in range(5):
        pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8), (96, 128), mode="bilinear")[0]
        Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(folder / "images" / f"{i}.png")
    overrides = [f"data.{key}_images={folder}/images" for key in ("train", "val")]
    overrides += [f"data.{key}_annotations={folder}/truth.json" for key in ("train", "val")]
    overrides += [
        "data=custom",
        "model=co_deformable_tiny",
        "data.val_transform.size=96",
        f"model.num_classes={len(NAMES)}",
        *model,
    ]
    config = application.plain(application.compose("train", [*overrides, "data.num_workers=0", "run_dir=nowhere"]))
    config["model"]["detector"]["backbone"]["pretrained"] = False
    raw, average = (instantiate(config["model"]["detector"], _convert_="all") for _ in range(2))
    for parameter in (*raw.parameters(), *average.parameters()) if noise else ():
        parameter.data.add_(torch.randn_like(parameter), alpha=noise)
    checkpoint = folder / "best.ckpt"
    content = {
        "state_dict": {f"detector.{name}": value for name, value in raw.state_dict().items()},
        "ema": {"weights": average.state_dict()},
        "codetr": {"config": config, "class_names": NAMES},
        "global_step": 7,
    }
    torch.save(content, checkpoint)
    (folder / "truth.json").write_text(json.dumps(annotate(checkpoint, sorted((folder / "images").iterdir()))))
    return Trained(checkpoint, folder / "images")


def annotate(checkpoint: Path, paths: list[Path]) -> dict:
    """A COCO instances file with the three best detections of each image, with their masks if there are any, and
    category ids in reverse order."""
    found = load(checkpoint, device="cpu").predict(paths, score_threshold=0, batch_size=1)
    images, annotations = [], []
    for number, one in enumerate(found, start=100):
        before = len(annotations)
        images.append({"id": number, "file_name": one.path.name, "height": 96, "width": 128})
        for (x0, y0, x1, y1), label in zip(one.boxes_xyxy[:3].tolist(), one.labels, strict=False):
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": 9 - int(label), "iscrowd": 0}
            annotations.append(entry | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
            if one.detections.rle is not None:
                annotations[-1]["segmentation"] = one.detections.rle[len(annotations) - 1 - before]
    categories = [{"id": 9 - i, "name": name} for i, name in reversed(list(enumerate(NAMES)))]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, which keeps what pages complain about."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("no Chromium here")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()
