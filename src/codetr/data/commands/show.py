"""Draw training images as the model sees them: augmented and padded, with their boxes, names and masks.

  python -m codetr.data show experiment=demo
  python -m codetr.data show data=custom data.train_annotations=... count=32 output=seen.png
  python -m codetr.data show data=coco augment@data=lsj_1024 data.masks=true original=true

Takes what training takes. The pictures are the first of epoch 0 of a training with the same seed and batch size, drawn
alike, in batches padded alike; grey is padding.

  count=16          how many images; the first batches of epoch 0
  split=train       train | val
  output=grid.png   the picture
  original=false    true: the image as in the file beside it
  columns=4         pictures in a row
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import PIL.Image
    from omegaconf import DictConfig

    from codetr.data.dataset import DetectionDataset
    from codetr.data.loader import BatchLoader
    from codetr.types import Batch

_PADDING = 128  # the grey that is drawn where a batch is padded
_CELL = 640  # pixels, the width of a picture in the grid


def main(overrides: list[str]) -> int:
    """Raises UserError for a configuration that is none, for bad data, and when the picture cannot be written."""
    from codetr import application
    from codetr.errors import UserError
    from codetr.visualize import grid

    config = application.compose("show", overrides)
    _check(config)
    loader, dataset, class_names = _open(config)
    pictures = list(islice(_pictures(loader, dataset, class_names, config.original), config.count))
    columns = max(1, config.columns // 2) if config.original else config.columns
    path = Path(config.output)
    try:
        grid(pictures, columns, _CELL * (2 if config.original else 1)).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"output={path} cannot be written ({error}): give the path of a PNG or JPEG") from error
    print(f"{len(pictures)} images of {len(dataset)}: {path}")
    return 0


def _check(config: DictConfig) -> None:
    from codetr.errors import UserError

    if config.split not in ("train", "val"):
        raise UserError(f"split={config.split}: must be train or val")
    for key in ("count", "columns"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise UserError(f"{key}={config[key]}: must be a number of pictures, 1 or more")


def _open(config: DictConfig) -> tuple[BatchLoader, DetectionDataset, tuple[str, ...]]:
    """The loader of training, which reads here rather than in workers, the images behind it, and their classes."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from codetr.derived import read_needed_masks
    from codetr.errors import UserError

    for key in ("images", "annotations"):
        if OmegaConf.is_missing(config.data, f"train_{key}"):
            raise UserError(f"data.train_{key} is not set: give the image folder and annotation file of the data set")
        if OmegaConf.is_missing(config.data, f"val_{key}"):
            config.data[f"val_{key}"] = config.data[f"train_{key}"]
    config.data.num_workers = 0
    read_needed_masks(config)
    data: Any = instantiate(config.data)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader() if config.split == "train" else data.val_dataloader()
    return loader, data.train_set if config.split == "train" else data.val_set, data.class_names


def _pictures(
    loader: BatchLoader, dataset: DetectionDataset, class_names: tuple[str, ...], original: bool
) -> Iterator[PIL.Image.Image]:
    from codetr.visualize import side_by_side

    index_of = {int(image_id): index for index, image_id in enumerate(dataset.image_ids)}
    for batch in loader:
        for i, image_id in enumerate(batch.image_ids.tolist()):
            seen = _as_seen(batch, i, class_names)
            if original:
                stored = _as_stored(dataset, index_of[image_id], class_names)
                stored = stored.resize((round(stored.width * seen.height / stored.height), seen.height))
                seen = side_by_side({f"{dataset.path(index_of[image_id]).name}": stored, "as the model sees it": seen})
            yield seen


def _as_seen(batch: Batch, i: int, class_names: tuple[str, ...]) -> PIL.Image.Image:
    from codetr.data.segmentations import encode
    from codetr.visualize import draw_boxes

    targets = batch.targets
    valid = targets.valid[i]
    image = batch.images[i].masked_fill(batch.padding[i], _PADDING)
    rle = encode(targets.masks[i][valid]) if targets.masks is not None and valid.any() else None
    return draw_boxes(image, targets.boxes_xyxy[i][valid], targets.labels[i][valid], class_names, rle=rle)


def _as_stored(dataset: DetectionDataset, index: int, class_names: tuple[str, ...]) -> PIL.Image.Image:
    from torch import Tensor

    from codetr.visualize import draw_boxes

    sample = dataset[index]
    return draw_boxes(sample.image.as_subclass(Tensor), sample.boxes.as_subclass(Tensor), sample.labels, class_names)
