"""Images that do not decode in the middle of a run, under a real Trainer with workers; what the batches are like."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from coco_files import document, write
from hydra.utils import instantiate
from torch import Tensor
from torchvision.transforms import v2

from codetr.application import compose
from codetr.data.datamodule import DetectionDataModule
from codetr.data.dataset import DetectionDataset
from codetr.data.images import UnreadableImage
from codetr.data.transforms import TransformedDataset
from codetr.types import Batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*This DataLoader will create .* worker processes"),
    pytest.mark.filterwarnings("ignore:.*os.fork"),
]


class Watcher(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[int] = []
        self.validated: dict[int, Tensor] = {}
        self.truth: dict[int, dict[str, Any]] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.trained += batch.image_ids.tolist()
        return self.weight**2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for i, image_id in enumerate(batch.image_ids.tolist()):
            self.validated[image_id], self.truth[image_id] = batch.images[i], batch.truth[i]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data(folder: Path, on_error: str, workers: int) -> DetectionDataModule:
    given = [f"data.{s}_images={folder}/{s}" for s in ("train", "val")]
    given += [f"data.{s}_annotations={folder}/{s}.json" for s in ("train", "val")]
    given += [f"data.num_workers={workers}", "data.verify=exists", f"data.on_error={on_error}", "data.cache=null"]
    return instantiate(compose("train", ["data=custom", "augment@data=tiny", *given]).data)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    write(tmp_path, document(8), "train")
    write(tmp_path, document(5, seed=1), "val")
    for name in ("train/002.jpg", "train/005.jpg", "val/003.jpg"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:300])
    return tmp_path


def fit(folder: Path, on_error: str, workers: int, out: Path) -> Watcher:
    watcher = Watcher()
    pl.Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
        default_root_dir=out,
    ).fit(watcher, data(folder, on_error, workers))
    return watcher


def test_training_finishes_and_reports_the_count(
    broken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "codetr"):
        watcher = fit(broken, "skip", 2, tmp_path)
    told = [r.message for r in caplog.records]
    files = [str(broken / name) for name in ("train/002.jpg", "train/005.jpg", "val/003.jpg")]
    assert f"2 of 8 training images could not be decoded: {files[0]}, {files[1]}" in told
    assert f"1 of 5 validation images could not be decoded: {files[2]}" in told
    ids = [100 + 3 * i for i in range(8)]
    assert len(watcher.trained) == 16
    assert not {ids[2], ids[5]} & set(watcher.trained)
    assert set(watcher.trained) == {i for k, i in enumerate(ids) if k not in (2, 5)}
    assert sorted(watcher.validated) == ids[:5]
    assert [bool(watcher.validated[i].any()) for i in ids[:5]] == [True, True, True, False, True]
    assert len(watcher.truth[ids[3]]["labels"]) == 4


def test_without_workers_every_file_is_named_once(
    broken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "codetr"):
        fit(broken, "skip", 0, tmp_path)
    for name, instead in (
        ("train/002", "the next image"),
        ("train/005", "the next image"),
        ("val/003", "a black image"),
    ):
        assert sum(f"{name}.jpg cannot be decoded" in r.message for r in caplog.records) == 1
        assert any(f"{name}.jpg" in r.message and f"{instead} takes its place" in r.message for r in caplog.records)


@pytest.mark.parametrize("workers", [0, 1])
def test_otherwise_it_stops_and_names_the_file(broken: Path, tmp_path: Path, workers: int) -> None:
    with pytest.raises(UnreadableImage, match=r"(train/00[25]|val/003)\.jpg cannot be decoded"):
        fit(broken, "stop", workers, tmp_path)


def test_batches_keep_the_layout_from_the_decoder_to_the_device(tmp_path: Path) -> None:
    """What the network's first convolution would otherwise have to copy; the fast resize needs it too."""
    write(tmp_path, document(4), "train")
    write(tmp_path, document(4), "val")
    module = data(tmp_path, "stop", workers=1)
    module.setup("fit")
    for loader in (module.train_dataloader(), module.val_dataloader()):
        for batch in loader:
            assert batch.images.dtype == torch.uint8
            assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_colour_is_applied_before_the_transform_to_training_images(tmp_path: Path) -> None:
    reader = DetectionDataset(*write(tmp_path, document(4)))
    pad = v2.Pad([0, 0, 5, 5], fill=7)
    plain, inverted = (TransformedDataset(reader, pad, 0, "stop", colour=c) for c in (None, v2.RandomInvert(1)))
    for i in range(4):
        expected = torch.as_tensor(plain[0, i].image).clone()
        expected[:, :-5, :-5] = 255 - expected[:, :-5, :-5]
        assert torch.equal(torch.as_tensor(inverted[0, i].image), expected)


@pytest.mark.parametrize("colour", ["jitter", "photometric"])
def test_colours_leave_the_objects_alone(tmp_path: Path, colour: str) -> None:
    write(tmp_path, document(6), "train")
    given = [f"data.{s}_annotations={tmp_path}/train.json" for s in ("train", "val")]
    config = compose("train", ["data=custom", *given, f"augment/colour@data.colour={colour}"]).data
    reader = DetectionDataset(tmp_path / "train", tmp_path / "train.json")
    plain = TransformedDataset(reader, v2.Identity(), 3, "stop")
    coloured = TransformedDataset(reader, v2.Identity(), 3, "stop", colour=instantiate(config.colour))
    changed = 0
    for key in [(epoch, i) for epoch in range(5) for i in range(6)]:
        a, b = plain[key], coloured[key]
        assert torch.equal(torch.as_tensor(a.boxes), torch.as_tensor(b.boxes))
        assert torch.equal(torch.as_tensor(coloured[key].image), torch.as_tensor(b.image))
        changed += not torch.equal(torch.as_tensor(a.image), torch.as_tensor(b.image))
    assert changed > 20
