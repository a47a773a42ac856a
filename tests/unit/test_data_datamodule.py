"""The data module under a real Trainer: resumed runs see what the uninterrupted run sees."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from coco_files import document, write, write_image
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torchvision.transforms import v2

from codetr.data.copy_paste import CopyPaste
from codetr.data.datamodule import DetectionDataModule
from codetr.data.readers import coco
from codetr.data.sampling import Uniform
from codetr.errors import UserError
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
        "reader": coco.read,
        "cache": None,
        "train_transform": flip_and_scale,
        "val_transform": v2.Resize(32, max_size=64),
        "batch_size": 2,
        "eval_batch_size": 2,
        "size_divisor": 8,
        "num_workers": 0,
        "seed": 11,
        "sampling": Uniform,
        "aspect_ratio_grouping": False,
        "classes": None,
        "on_error": "stop",
        "verify": "complete",
        "masks": False,
        "val_masks": False,
        "prepare": None,
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


def test_a_resumed_run_can_be_resumed_within_the_same_epoch(folder: Path) -> None:
    save = partial(ModelCheckpoint, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole = fit(folder, save(folder / "ckpt"))
    for step in (2, 4):
        for later in (folder / "ckpt").glob("*.ckpt"):
            if later.stem != f"step={step}":
                later.unlink()
        rest = fit(folder, save(folder / "ckpt"), folder / "ckpt" / f"step={step}.ckpt")
        assert steps(rest) == steps(whole)[step:]


def test_a_checkpoint_in_mid_epoch_refuses_another_order(folder: Path) -> None:
    save = partial(ModelCheckpoint, folder / "ckpt", every_n_train_steps=3, filename="{step}")
    fit(folder, save(), max_epochs=1, limit_train_batches=3)
    data = module(folder, seed=12)
    data.setup("fit")
    loader = data.train_dataloader()
    state = torch.load(folder / "ckpt" / "step=3.ckpt")["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    assert (state["epoch"], state["images"]) == (0, 6)
    with pytest.raises(UserError, match=r"middle of epoch 0.*changed: seed 11 -> 12; resume with the former"):
        loader.load_state_dict(state)
    loader.load_state_dict(state | {"images": 2 * BATCHES})


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_does_not_move_the_global_random_state(folder: Path, workers: int) -> None:
    data = module(folder, num_workers=workers)
    data.setup("fit")
    before = torch.get_rng_state()
    assert len(list(data.train_dataloader())) == BATCHES
    assert len(list(data.val_dataloader())) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_follow_the_training_set(folder: Path) -> None:
    doc = document(5, seed=1)
    doc["categories"] = doc["categories"][::-1]
    (folder / "val.json").write_text(json.dumps(doc))
    alone, both = module(folder), module(folder)
    alone.setup("validate")
    assert alone.class_names == ("star", "square", "disc")
    both.setup("fit")
    assert both.class_names == ("disc", "square", "star")
    assert both.val_set is not None
    assert both.val_set.category_ids == (7, 3, 12)


def test_classes_are_those_of_the_training_file(folder: Path) -> None:
    """Truth and labels of a class that the validation file does not list, or lists elsewhere, by brute force."""
    doc = document(5, seed=1)
    doc["annotations"] = [a for a in doc["annotations"] if a["category_id"] != 7]
    doc["categories"] = [{"id": 99, "name": "moon"}, {"id": 1, "name": "star"}, {"id": 3, "name": "square"}]
    for record in doc["annotations"]:
        record["category_id"] = {12: 1}.get(record["category_id"], record["category_id"])
    (folder / "fewer.json").write_text(json.dumps(doc))
    data = module(folder, val_annotations="fewer.json")
    data.setup("fit")
    assert data.class_names == data.val_set.class_names == ("disc", "square", "star")
    assert data.val_set.category_ids == (-1, 3, 1)
    kept = [a for a in doc["annotations"] if not a["iscrowd"]]
    expected = {"disc": 0, "square": 0, "star": 0}
    for record in kept:
        expected[{3: "square", 1: "star"}[record["category_id"]]] += 1
    assert data.val_set.label_counts == expected
    found = [data.val_set.class_names[i] for n in range(len(data.val_set)) for i in data.val_set[n].labels.tolist()]
    assert sorted(found) == sorted(name for name, count in expected.items() for _ in range(count))
    alone = module(folder, val_annotations="fewer.json", classes=["disc", "square", "star"])
    alone.setup("validate")  # as `eval` does, with the classes of a checkpoint
    assert alone.val_set.label_counts == expected
    with pytest.raises(UserError, match=r"fewer\.json has none of the classes \['cat', 'dog'\], only \['moon', 's"):
        module(folder, val_annotations="fewer.json", classes=["cat", "dog"]).setup("validate")


def test_unusable_settings_are_named(folder: Path) -> None:
    doc = document(5, seed=1)
    doc["categories"] = [*doc["categories"], {"id": 99, "name": "moon"}]
    (folder / "more.json").write_text(json.dumps(doc))
    module(folder, val_annotations="more.json").setup("fit")  # it has no object
    doc["annotations"].append({**doc["annotations"][0], "id": 1, "category_id": 99, "iscrowd": 0})
    (folder / "more.json").write_text(json.dumps(doc))
    with pytest.raises(UserError, match=r"more\.json has objects of \['moon'\], which the training file does not name"):
        module(folder, val_annotations="more.json").setup("fit")
    module(folder, val_annotations="more.json", classes=["disc", "star"]).setup("fit")
    doc["annotations"] = [a for a in doc["annotations"] if a["category_id"] != 3]
    (folder / "none.json").write_text(json.dumps(doc))
    with pytest.raises(UserError, match=r"no training label is left in .*none\.json"):
        module(folder, train_images="val", train_annotations="none.json", classes=["square"]).setup("fit")
    data = module(folder, batch_size=16)
    data.setup("fit")
    with pytest.raises(UserError, match=r"15 usable images, fewer than one step takes \(16 x 1 processes\)"):
        data.train_dataloader()


def compose(name: str, *overrides: str) -> Any:
    from hydra import compose, initialize_config_module

    with initialize_config_module("codetr.conf", version_base="1.3"):
        return compose("train", [f"data={name}", *overrides]).data


def test_own_data_from_the_config(folder: Path) -> None:
    paths = {"train_images": "train", "train_annotations": "train.json"}
    paths |= {"val_images": "val", "val_annotations": "val.json"}
    config = compose("custom", f"data.root={folder}", *(f"data.{k}={v}" for k, v in paths.items()))
    data = instantiate(config, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert all(side % 32 == 0 for side in batch.images.shape[-2:])
    assert min(batch.targets.frames.sizes.amin(1)) >= 480
    assert next(iter(data.val_dataloader())).targets.frames.sizes.amin(1).tolist() == [800] * 4


def test_own_data_needs_three_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of both splits in one folder; annotations wherever they are, also below the working directory."""
    for split, seed in (("train", 0), ("val", 1)):
        doc = document(4, seed)
        for image in doc["images"]:
            image["file_name"] = f"{split}-{image['file_name']}"
        write(tmp_path, doc, "images")
        (tmp_path / "images.json").rename(tmp_path / f"{split}.json")
    monkeypatch.chdir(tmp_path)
    paths = (
        f"data.root={tmp_path}/images",
        "data.train_annotations=train.json",
        f"data.val_annotations={tmp_path}/val.json",
    )
    data = instantiate(compose("custom", *paths), num_workers=0)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (4, 4)
    assert data.class_names == ("disc", "square", "star")


# Set -> (image folders in its root, annotation file, the name in it of an image of the first folder).
LAYOUTS = {
    "coco": (["train2017", "val2017"], "annotations/instances_{}2017.json", {"file_name": "{}.jpg"}),
    "lvis": (["train2017", "val2017"], "annotations/lvis_v1_{}.json", {"coco_url": "http://a.org/{}2017/{}.jpg"}),
    "objects365": (
        ["train/patch0", "val/patch0"],
        "annotations/zhiyuan_objv2_{}.json",
        {"file_name": "images/v2/patch0/{}.jpg"},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_standard_layouts_need_their_root(tmp_path: Path, name: str) -> None:
    folders, annotations, names = LAYOUTS[name]
    (tmp_path / "annotations").mkdir()
    for split, folder in zip(("train", "val"), folders, strict=True):
        doc = document(4)
        for i, image in enumerate(doc["images"]):
            write_image(tmp_path / folder / f"{i}.jpg", image["width"], image["height"])
            del image["file_name"]
            (key, form), *_ = names.items()
            image[key] = form.format(split, i) if form.count("{}") == 2 else form.format(i)
        (tmp_path / annotations.format(split)).write_text(json.dumps(doc))
    data = instantiate(compose(name, f"data.root={tmp_path}"), num_workers=0)
    data.setup("fit")
    for dataset, folder in ((data.train_set, folders[0]), (data.val_set, folders[1])):
        assert dataset.report.errors == {}
        assert [dataset.path(i).resolve() for i in range(4)] == [tmp_path / folder / f"{i}.jpg" for i in range(4)]
        assert len(dataset[3].labels) > 0


def test_drawn_data_from_the_config(tmp_path: Path) -> None:
    data = instantiate(compose("shapes_tiny", f"paths.data_dir={tmp_path}"))
    data.prepare_data()
    data.setup("fit")
    assert (tmp_path / "shapes-tiny" / "train").is_dir()
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        assert batch.targets.valid.any()
        assert batch.targets.frames.sizes.max() <= 96


@pytest.mark.parametrize("name", ["coco", "lvis", "objects365", "shapes_demo", "shapes_full"])
def test_configs_build(tmp_path: Path, name: str) -> None:
    data = instantiate(compose(name, f"paths.data_dir={tmp_path}"))
    with pytest.raises(UserError, match="does not exist"):
        data.setup("validate")


@pytest.mark.parametrize("most", [None, 1, 99])
def test_places_for_the_objects_of_any_image(folder: Path, most: int | None) -> None:
    """Of the whole training set, and as many as are pasted onto one."""
    file = folder / "train.json"
    annotated = json.loads(file.read_text())
    for own in annotated["annotations"]:
        x, y, w, h = own["bbox"]
        own["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    file.write_text(json.dumps(annotated))
    paste = None if most is None else CopyPaste(most=most, moved=10, visible=0)
    data = module(folder, pad_objects=True, train_transform=v2.Resize((48, 48)), copy_paste=paste)
    data.setup("fit")
    assert data.train_set is not None
    counts = [len(data.train_set[i].labels) for i in range(len(data.train_set))]
    places = max(counts) + (0 if most is None else min(most, max(counts)))
    assert min(counts) < max(counts)
    assert {batch.targets.boxes.shape for batch in data.train_dataloader()} == {(2, places, 4)}


@pytest.mark.parametrize("grouped", [False, True])
def test_the_largest_batch_is_known_before_any_is_made(folder: Path, grouped: bool) -> None:
    """By making those of many epochs: none is larger, and without groups one is as high, another as wide."""
    data = module(folder, aspect_ratio_grouping=grouped)
    data.setup("fit")
    (height, width), objects = data.largest_sample(150)
    assert height % 8 == width % 8 == 0
    loader, shapes, counts = data.train_dataloader(), [], []
    for epoch in range(30):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            shapes.append(batch.images.shape[-2:])
            counts.append(int(batch.targets.counts.max()))
    assert max(h * w for h, w in shapes) <= height * width
    assert max(counts) <= objects
    if not grouped:
        assert (max(h for h, _ in shapes), max(w for _, w in shapes)) == (height, width)
