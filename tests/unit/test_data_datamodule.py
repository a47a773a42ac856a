"""The data module under a real Trainer: resumed runs see what the uninterrupted run sees."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from coco_files import document, write
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torchvision.transforms import v2

from codetr.data.datamodule import DetectionDataModule
from codetr.types import Batch

pytestmark = [
    # Lightning 2.6 calls what this version of PyTorch deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    # Two workers on a machine with few cores, and the advice to use more of them.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*This DataLoader will create .* worker processes"),
    pytest.mark.filterwarnings("ignore:.*os.fork"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]
EPOCHS, BATCHES = 3, 7


class Recorder(pl.LightningModule):
    """Notes what every training step sees; its one weight moves with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, list[int], int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        pixels = int(batch.images.sum())
        self.seen.append((self.current_epoch, batch_idx, batch.image_ids.tolist(), pixels))
        return (self.weight - pixels % 97) ** 2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch.image_ids.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, document(2 * BATCHES + 1), "train")
    write(tmp_path, document(5, seed=1), "val")
    return tmp_path


def module(folder: Path, **changes: Any) -> DetectionDataModule:
    flip_and_scale = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomShortestSize([32, 40, 48], 64)])
    arguments: dict[str, Any] = {
        "root": str(folder),
        "train_images": "train",
        "train_annotations": "train.json",
        "val_images": "val",
        "val_annotations": "val.json",
        "train_transform": flip_and_scale,
        "val_transform": v2.Resize(32, max_size=64),
        "batch_size": 2,
        "eval_batch_size": 2,
        "size_divisor": 8,
        "num_workers": 0,
        "seed": 11,
        "classes": None,
        "on_error": "stop",
        "verify": "complete",
    }
    return DetectionDataModule(**arguments | changes)


def fit(folder: Path, save: ModelCheckpoint, resume: Path | None = None, workers: int = 0, **trainer: Any) -> Recorder:
    recorder = Recorder()
    pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[save],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **({"max_epochs": EPOCHS} | trainer),
    ).fit(recorder, module(folder, num_workers=workers), ckpt_path=resume)
    return recorder


def steps(recorder: Recorder) -> list[tuple[int, list[int], int]]:
    return [(epoch, ids, pixels) for epoch, _, ids, pixels in recorder.seen]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("accumulate", "every"), [(1, 5), (1, 7), (1, 10), (2, 2), (2, 5), (3, 4)], ids=lambda v: str(v)
)
def test_a_run_resumed_anywhere_sees_the_rest(folder: Path, workers: int, accumulate: int, every: int) -> None:
    """`every` optimizer steps: in the middle of an epoch, at its end, in a later epoch, after whole accumulations."""
    save = partial(
        ModelCheckpoint, every_n_train_steps=every, save_top_k=-1, filename="{step}", enable_version_counter=False
    )
    trainer = {"accumulate_grad_batches": accumulate, "workers": workers}
    whole = fit(folder, save(folder / "ckpt"), **trainer)
    assert len(whole.seen) == EPOCHS * BATCHES
    rest = fit(folder, save(folder / "ckpt"), folder / "ckpt" / f"step={every}.ckpt", **trainer)
    assert 0 < len(rest.seen) < len(whole.seen)
    assert steps(rest) == steps(whole)[-len(rest.seen) :]
    per_epoch = -(-BATCHES // accumulate)
    done = every // per_epoch * BATCHES + every % per_epoch * accumulate
    assert len(rest.seen) == EPOCHS * BATCHES - done
    assert rest.weight.item() == whole.weight.item()
    assert set(rest.validated) == {100, 103, 106, 109, 112}
