"""Training images per second of one core: our loader beside the usual pipeline, in turns, and where the time goes.

Both read the same 640 x 480 JPEGs with the recipe of DETR (flip, multi-scale with or without a crop, boxes) into
padded batches of two. The usual pipeline decodes with Pillow, transforms Pillow's images with torchvision's functional
API, and makes normalised float32 tensors in the worker. Ours hands over uint8; the device scales and normalises.

The time is what the processes spent on the core, so that neighbours do not count; --worker also measures a DataLoader
with one worker process, whose batches travel through shared memory (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from multiprocessing import active_children
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as F
from hydra.utils import instantiate
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import report
from codetr.application import compose
from codetr.data.dataset import Sample
from codetr.data.collate import collate
from codetr.data.datamodule import DetectionDataModule
from codetr.data.images import read_image
from codetr.data.transforms import TransformedDataset, transformed

WIDTH, HEIGHT, BATCH, DIVISOR = 640, 480, 2, 32
SCALES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def draw(folder: Path, count: int, width: int = WIDTH, height: int = HEIGHT) -> Path:
    """`count` pictures of ellipses on a soft background with the grain of a sensor, about 110 kB each, as COCO."""
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "ellipse"}]}
    for i in range(count):
        rng = np.random.default_rng(i)
        picture = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        pen = ImageDraw.Draw(picture)
        for _ in range(7):
            w, h = rng.integers(20, 220, 2).tolist()
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            pen.ellipse([x, y, x + w, y + h], fill=tuple(rng.integers(0, 256, 3).tolist()))
            box = {"id": len(document["annotations"]) + 1, "image_id": i, "category_id": 1, "bbox": [x, y, w, h]}
            document["annotations"].append(box | {"area": w * h, "iscrowd": 0})
        luminance, colour = rng.normal(0, 6.5, (height, width, 1)), rng.normal(0, 2.2, (height, width, 3))
        pixels = (np.asarray(picture) + luminance + colour).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
        document["images"].append({"id": i, "file_name": f"{i}.jpg", "width": width, "height": height})
    source = folder / "instances.json"
    source.write_text(json.dumps(document))
    return source


class UsualPipeline(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Pillow decodes, flips, resizes and crops; the worker makes normalised floats."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.coco = folder, COCO(source)
        self.ids = sorted(self.coco.imgs)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.normalised(*self.augmented(*self.read(index)))

    def read(self, index: int) -> tuple[Image.Image, dict[str, Tensor]]:
        image = Image.open(self.folder / self.coco.imgs[self.ids[index]]["file_name"]).convert("RGB")
        objects = self.coco.loadAnns(self.coco.getAnnIds(self.ids[index]))
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, image.width)
        boxes[:, 1::2].clamp_(0, image.height)
        labels = torch.tensor([o["category_id"] for o in objects])
        area = torch.tensor([o["area"] for o in objects])
        return image, {"boxes": boxes, "labels": labels, "area": area}

    def augmented(self, image: Image.Image, target: dict[str, Tensor]) -> tuple[Image.Image, dict[str, Tensor]]:
        if random.random() < 0.5:
            image = F.hflip(image)
            boxes = target["boxes"][:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
            target = {**target, "boxes": boxes + torch.tensor([image.width, 0, image.width, 0])}
        if random.random() < 0.5:
            image, target = self.resized(image, target, [400, 500, 600], None)
            image, target = self.cropped(image, target)
        return self.resized(image, target, SCALES, 1333)

    def resized(
        self, image: Image.Image, target: dict[str, Tensor], sides: list[int], longest: int | None
    ) -> tuple[Image.Image, dict[str, Tensor]]:
        new = F.resize(image, random.choice(sides), max_size=longest)
        ratio = torch.tensor([new.width / image.width, new.height / image.height])
        boxes, area = target["boxes"] * ratio.repeat(2), target["area"] * ratio.prod()
        return new, {**target, "boxes": boxes, "area": area}

    def cropped(self, image: Image.Image, target: dict[str, Tensor]) -> tuple[Image.Image, dict[str, Tensor]]:
        width, height = (random.randint(384, min(side, 600)) for side in image.size)
        left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
        boxes = target["boxes"] - torch.tensor([left, top, left, top])
        corners = torch.min(boxes.reshape(-1, 2, 2), torch.tensor([width, height])).clamp(min=0)
        area = (corners[:, 1] - corners[:, 0]).prod(1)
        target = {**target, "boxes": corners.reshape(-1, 4), "area": area}
        return F.crop(image, top, left, height, width), {k: v[area > 0] for k, v in target.items()}

    def normalised(self, image: Image.Image, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = F.normalize(F.to_tensor(image), MEAN, STD)
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)
        size = torch.tensor([image.width, image.height], dtype=torch.float32)
        return pixels, {**target, "boxes": boxes / size.repeat(2)}


def usual_collate(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    height, width = (max(s[0].shape[d] for s in samples) for d in (1, 2))
    images = torch.zeros(len(samples), 3, height, width)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    for i, (pixels, _) in enumerate(samples):
        images[i, :, : pixels.shape[1], : pixels.shape[2]].copy_(pixels)
        padding[i, : pixels.shape[1], : pixels.shape[2]] = False
    return images, padding, [target for _, target in samples]


Stages = dict[str, list[float]]


def usual_pass(data: UsualPipeline, stages: Stages) -> Iterator[float]:
    """Seconds per batch of a pass over the images; `stages` gets those of its parts per image."""
    for first in range(0, len(data), BATCH):
        clock = [time.process_time()]
        read = [data.read(i) for i in range(first, first + BATCH)]
        clock.append(time.process_time())
        augmented = [data.augmented(*r) for r in read]
        clock.append(time.process_time())
        normalised = [data.normalised(*a) for a in augmented]
        clock.append(time.process_time())
        usual_collate(normalised)
        clock.append(time.process_time())
        yield _note(clock, stages, ("decode", "augment", "float and normalise", "batch"))


def our_pass(data: TransformedDataset, epoch: int, stages: Stages) -> Iterator[float]:
    for first in range(0, len(data), BATCH):
        clock = [time.process_time()]
        samples: list[Sample] = [data[epoch, i] for i in range(first, first + BATCH)]
        clock.append(time.process_time())
        collate(samples, DIVISOR)
        clock.append(time.process_time())
        yield _note(clock, stages, ("decode and augment", "batch"))


def our_parts(data: TransformedDataset, stages: Stages) -> None:
    """What decode and augment take each. Draws need no seed of their own here."""
    reader = data.dataset
    for i in range(len(data)):
        clock = [time.process_time()]
        read_image(reader.path(i), (HEIGHT, WIDTH))
        clock.append(time.process_time())
        sample = reader[i]
        clock.append(time.process_time())
        transformed(sample, data.transform)
        clock.append(time.process_time())
        _note(clock, stages, ("decode", "decode, and boxes of the image", "augment"))


def _note(clock: list[float], stages: Stages, names: Iterable[str]) -> float:
    spent = np.diff(clock)
    for name, seconds in zip(names, spent, strict=True):
        stages.setdefault(name, []).append(float(seconds))
    return float(spent.sum())


def side_by_side(usual: UsualPipeline, ours: TransformedDataset, rounds: int) -> dict[str, Any]:
    """Images per second of core time; one pass over all images each, in turns, `rounds` times behind a first one."""
    rates: dict[str, list[float]] = {"usual": [], "ours": []}
    stages: dict[str, Stages] = {}
    for turn in range(rounds + 1):
        if turn <= 1:
            stages = {"usual": {}, "ours": {}, "our parts": {}}  # the first round only warms up
        rates["usual"].append(len(usual) / sum(usual_pass(usual, stages["usual"])))
        rates["ours"].append(len(ours) / sum(our_pass(ours, turn, stages["ours"])))
        our_parts(ours, stages["our parts"])
    size = {"usual": BATCH, "ours": BATCH, "our parts": 1}
    return {
        "images_per_second": {k: median(v[1:]) for k, v in rates.items()},
        "ratio": median(a / b for a, b in zip(rates["ours"][1:], rates["usual"][1:], strict=True)),
        "ratios": [a / b for a, b in zip(rates["ours"][1:], rates["usual"][1:], strict=True)],
        "milliseconds_per_image": {
            who: {name: 1e3 * float(np.mean(v)) / size[who] for name, v in parts.items()}
            for who, parts in stages.items()
        },
    }


def photographs(rounds: int, count: int = 2) -> dict[str, float]:
    """Milliseconds to read and augment an image of 4000 x 3000 pixels, decoded whole and at a fraction, in turns; how
    far the pixels differ, of 255 levels."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = our_data(folder, draw(folder, count, 4000, 3000)).train_dataloader().dataset
        scaled = TransformedDataset(whole.dataset, whole.transform, whole.seed, "stop", scaled_decoding=True)
        spent: dict[str, list[float]] = {"whole": [], "scaled": []}
        differences = []
        for turn in range(1, rounds * count + 1):
            images = {}
            for who, data in (("whole", whole), ("scaled", scaled)):
                start = time.process_time()
                images[who] = torch.as_tensor(data[turn, turn % count].image).int()
                spent[who].append(1e3 * (time.process_time() - start))
            differences.append((images["whole"] - images["scaled"]).abs().float())
    return {k: float(np.mean(v)) for k, v in spent.items()} | {
        "mean_difference": float(np.mean([d.mean() for d in differences])),
        "greatest_difference": float(max(d.max() for d in differences)),
    }


def with_worker(usual: UsualPipeline, ours: DetectionDataModule, rounds: int) -> dict[str, float]:
    """Images per second of core time through a DataLoader with one worker process, the batch's way to us included."""
    loaders: dict[str, Iterable[Any]] = {
        "usual": DataLoader(
            usual, BATCH, shuffle=True, collate_fn=usual_collate, num_workers=1, persistent_workers=True
        ),
        "ours": ours.train_dataloader(),
    }
    rates: dict[str, list[float]] = {k: [] for k in loaders}
    for _ in range(rounds + 1):
        for name, loader in loaders.items():
            start = _family_time()
            count = sum(BATCH for _ in loader)
            rates[name].append(count / (_family_time() - start))
    return {k: median(v[1:]) for k, v in rates.items()}


def _family_time() -> float:
    """Seconds that this process and its workers have spent on a core, as Linux counts them."""
    threads = (t for p in active_children() for t in Path(f"/proc/{p.pid}/task").glob("*/schedstat"))
    return time.process_time() + sum(int(t.read_text().split()[0]) for t in threads) / 1e9


def our_data(folder: Path, source: Path) -> DetectionDataModule:
    """As `python -m codetr.train data=custom data.root=...` reads it, with one worker."""
    paths = [f"data.{split}_{what}" for split in ("train", "val") for what in ("images", "annotations")]
    given = [f"{key}={source if key.endswith('annotations') else folder}" for key in paths]
    config = compose(
        "train", ["data=custom", f"data.batch_size={BATCH}", "data.num_workers=1", "data.cache=null", *given]
    )
    data: DetectionDataModule = instantiate(config.data)
    data.setup("fit")
    return data


def table(result: dict[str, Any]) -> str:
    rate, parts = result["images_per_second"], result["milliseconds_per_image"]
    ours = {**parts["our parts"], "batch": parts["ours"]["batch"]}
    ours["boxes"] = ours.pop("decode, and boxes of the image") - ours["decode"]
    rows = [
        ("decode", parts["usual"]["decode"], ours["decode"]),
        ("boxes of the image to tensors", None, ours["boxes"]),
        ("augment", parts["usual"]["augment"], ours["augment"]),
        ("float and normalise", parts["usual"]["float and normalise"], None),
        ("pad into a batch", parts["usual"]["batch"], ours["batch"]),
    ]
    lines = [["images/s of a core", f"{rate['usual']:.0f}", f"{rate['ours']:.0f}", f"{result['ratio']:.1f} x"]]
    if worker := result.get("with_one_worker"):
        ratio = worker["ours"] / worker["usual"]
        numbers = [f"{worker['usual']:.0f}", f"{worker['ours']:.0f}", f"{ratio:.1f} x"]
        lines.append(["images/s through a worker process and shared memory", *numbers])
    lines += [[name, *("" if t is None else f"{t:.2f} ms" for t in times), ""] for name, *times in rows]
    large = result["photographs"]
    text = (
        f"JPEGs of 4000 x 3000 pixels, read and augmented: {large['whole']:.0f} ms an image decoded whole, "
        f"{large['scaled']:.0f} ms with `data.scaled_decoding=true`; pixels then differ by {large['mean_difference']:.2f} "
        f"of 255 levels on average, by {large['greatest_difference']:.0f} at most."
    )
    return report.table(["", "usual", "ours", ""], lines) + f"\n\n{text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", action="store_true", help="also through a DataLoader with one worker process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = draw(folder, options.images)
        usual, ours = UsualPipeline(folder, source), our_data(folder, source)
        kilobytes = sum(p.stat().st_size for p in folder.glob("*.jpg")) / options.images / 1000
        result = {"file_kilobytes": kilobytes, **side_by_side(usual, ours.train_dataloader().dataset, options.rounds)}
        result["photographs"] = photographs(options.rounds)
        if options.worker:
            result["with_one_worker"] = with_worker(usual, ours, options.rounds)
    about = (
        f"{options.images} images of {WIDTH} x {HEIGHT}, {kilobytes:.0f} kB, batches of {BATCH}, recipe of DETR "
        f"(conf/augment/multiscale.yaml); median of {options.rounds} passes in turns, time on the core; "
        f"{report.machine()}; `make bench NAME=data/loader`."
    )
    report.write("loader", f"{table(result)}\n\n{about}", result)
