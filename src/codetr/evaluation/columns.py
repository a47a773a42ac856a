"""What an evaluation remembers of its images: a few arrays, however many images there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_convert

from codetr.errors import UserError

OUTSIDE = 1e11  # an area that is in no range; the range of all ends at 1e10
BETWEEN = b"\n"  # of the run lengths of two objects; compressed run lengths are printable characters
UNNAMED = -1  # stands for an image that came without an id
FIRST_UNNAMED = -(2**62)  # where the ids that such images get begin

# What a metric keeps, here without images. images: [I, 8] id, height and width of the masks, and how many rows of each
# of the others are the image's. found: [n, 6] xyxy, score, label. truth: [m, 7] xyxy, label, iscrowd, area, that is NaN
# where the box or the mask tells it. checked: [c, 2] the labels that an image was searched for without success, 0, and
# those of which it may have further objects, 1 (LVIS). found_runs, truth_runs: characters of compressed run lengths.
STATES = {
    "images": torch.empty(0, 8, dtype=torch.int64),
    "found": torch.empty(0, 6),
    "truth": torch.empty(0, 7),
    "checked": torch.empty(0, 2, dtype=torch.int64),
    "found_runs": torch.empty(0, dtype=torch.uint8),
    "truth_runs": torch.empty(0, dtype=torch.uint8),
}


class Ragged(NamedTuple):
    """rows: [n, ...] of all images, one after the other. counts: [I], how many of them are each image's."""

    rows: np.ndarray
    counts: np.ndarray

    @property
    def owners(self) -> np.ndarray:
        """[n]: the index of the row's image."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)

    def of(self, images: np.ndarray) -> Ragged:
        """images: [I] bool."""
        return Ragged(self.rows[np.repeat(images, self.counts)], self.counts[images])

    def parts(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Ragged]:
        """Views of the images [first, last) of each range."""
        ends = np.cumsum([0, *self.counts])
        for first, last in ranges:
            yield Ragged(self.rows[ends[first] : ends[last]], self.counts[first:last])


class Columns(NamedTuple):
    """The images of an evaluation, each once.

    ids: [I].
    sizes: [I, 2] (height, width) of the masks. The rest: `STATES`, with every area.
    """

    ids: np.ndarray
    sizes: np.ndarray
    found: Ragged
    truth: Ragged
    checked: Ragged
    found_runs: Ragged
    truth_rle: Ragged

    def of(self, images: np.ndarray) -> Columns:
        """images: [I] bool."""
        return Columns(self.ids[images], self.sizes[images], *(ragged.of(images) for ragged in self[2:]))

    @staticmethod
    def from_states(images: Tensor, *rows: Tensor) -> Columns:
        """The columns of gathered states. Of an image that is there several times, the last one counts."""
        table = numbered(images, 0, 1).numpy()
        counts = table[:, 3:].T
        ragged = (Ragged(own.numpy(), count) for own, count in zip(rows, counts, strict=True))
        whole = Columns(table[:, 0], table[:, 1:3], *ragged)
        last = np.zeros(len(table), bool)
        last[len(last) - 1 - np.unique(whole.ids[::-1], return_index=True)[1]] = True
        return whole if last.all() else whole.of(last)

    def labelled(self, found: np.ndarray, truth: np.ndarray) -> Columns:
        """The same columns with other labels, [n] and [m]."""
        rows, true_rows = self.found.rows.copy(), self.truth.rows.copy()
        rows[:, 5], true_rows[:, 4] = found, truth
        return self._replace(found=self.found._replace(rows=rows), truth=self.truth._replace(rows=true_rows))

    def with_areas(self, masks: bool) -> Columns:
        """The same columns, with the area of the box or of the mask where no other is known."""
        rows = self.truth.rows
        unknown = np.isnan(rows[:, 6])
        if not unknown.any():
            return self
        rle = rle_of(self.truth_rle, self.truth.counts, self.sizes) if masks else None
        own = np.where(unknown, areas(rows, rle), rows[:, 6])
        return self._replace(truth=self.truth._replace(rows=np.column_stack([rows[:, :6], own])))


def numbered(images: Tensor, process: int, processes: int) -> Tensor:
    """`images` with ids for those that came without: as a DistributedSampler deals out images to `processes`."""
    ids = FIRST_UNNAMED + torch.arange(len(images)) * processes + process
    return torch.column_stack([torch.where(images[:, 0] == UNNAMED, ids, images[:, 0]), images[:, 1:]])


def columns_of(
    preds: Sequence[dict[str, Any]],
    target: Sequence[dict[str, Any]],
    box_format: str,
    iou_types: Sequence[str],
    given_areas: bool,
    federated: bool,
) -> dict[str, Tensor]:
    """The rows of a batch that are appended to `STATES`.

    The batch leaves the device in one copy; numbers keep their precision.

    given_areas: areas hold even where they are 0, which otherwise stands for that of the box or mask.
    """
    boxes, true_boxes = (
        [_boxes(image, box_format, "bbox" in iou_types) for image in images] for images in (preds, target)
    )
    found = [boxes, *([image[name] for image in preds] for name in ("scores", "labels"))]
    crowd = [image.get("iscrowd", torch.zeros_like(image["labels"])) for image in target]
    truth = [true_boxes, [image["labels"] for image in target], crowd, [_area(t, given_areas) for t in target]]
    checked = [_checked(image) for image in target] if federated else [STATES["checked"]] * len(target)
    rle, true_rle = (
        [_rle(image["masks"]) if "segm" in iou_types else [] for image in images] for images in (preds, target)
    )
    texts, true_texts = ([_characters(own) for own in every] for every in (rle, true_rle))
    table = [
        (int(image.get("image_id", UNNAMED)), *next((o["size"] for o in (*f, *t)), (0, 0)), *map(len, lengths))
        for image, f, t, *lengths in zip(
            target, rle, true_rle, boxes, true_boxes, checked, texts, true_texts, strict=True
        )
    ]
    return {
        "images": torch.tensor(table, dtype=torch.int64),
        "found": _stacked(found),
        "truth": _stacked(truth),
        "checked": torch.cat(checked),
        "found_runs": torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy()),
        "truth_runs": torch.from_numpy(np.frombuffer(b"".join(true_texts), np.uint8).copy()),
    }


def _boxes(image: dict[str, Any], box_format: str, wanted: bool) -> Tensor:
    """[n, 4] xyxy. Sums of other formats are of 64 bits, so that widths stay what they were."""
    if not wanted:
        return torch.zeros(len(image["labels"]), 4, device=image["labels"].device)
    boxes = image["boxes"].reshape(-1, 4)
    return boxes if box_format == "xyxy" else box_convert(boxes.double(), box_format, "xyxy")


def _area(image: dict[str, Any], given: bool) -> Tensor:
    """[n], NaN where it is not known; of ignored objects, as `difficult` ones of VOC, one outside of all ranges.

    So COCO counts them neither as found nor as missed, and what finds them neither as right nor as wrong.
    """
    labels = image["labels"]
    area = image.get("area", torch.full((len(labels),), torch.nan, device=labels.device))
    if not given:
        area = area.where(area > 0, torch.nan)
    return area if image.get("ignore") is None else area.masked_fill(image["ignore"], OUTSIDE)


def _stacked(columns: list[list[Tensor]]) -> Tensor:
    """columns: each of every image. Of 32 bits at least, which hold the labels."""
    whole = [torch.cat(column) for column in columns]
    return torch.column_stack([whole[0].to(torch.promote_types(whole[0].dtype, torch.float32)), *whole[1:]]).cpu()


def _checked(image: dict[str, Any]) -> Tensor:
    if "neg_labels" not in image:
        raise UserError(
            "metrics.federated=true needs images with the categories that they were searched for, as LVIS has them "
            "(neg_category_ids, not_exhaustive_category_ids); this data set has none: metrics.federated=false"
        )
    labels = [torch.as_tensor(image[name], dtype=torch.int64) for name in ("neg_labels", "not_exhaustive_labels")]
    return torch.cat([torch.column_stack([own, torch.full_like(own, kind)]) for kind, own in enumerate(labels)])


def _rle(masks: Tensor | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The run lengths of [n, H, W] masks; run lengths stay as they are."""
    if not isinstance(masks, Tensor):
        return masks
    if not masks.numel():
        return []
    columns = masks.transpose(1, 2).contiguous().to(torch.uint8).cpu().numpy()
    return coco_mask.encode(columns.transpose(2, 1, 0))


def _characters(rle: list[dict[str, Any]]) -> bytes:
    """The characters of run lengths, all of which end with BETWEEN."""
    counts = (one["counts"] for one in rle)
    return b"".join((text.encode() if isinstance(text, str) else text) + BETWEEN for text in counts)


def places(found: Ragged) -> np.ndarray:
    """[n]: of each detection by its score, among those of its image, from 0; of equal scores, the first ones."""
    owners = found.owners
    order = np.lexsort((-found.rows[:, 4], owners))
    start = np.cumsum(found.counts) - found.counts
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - start[owners[order]]
    return place


def xywh(rows: np.ndarray) -> np.ndarray:
    """[n, 4 or more] xyxy, ... -> [n, 4]."""
    return np.concatenate([rows[:, :2], rows[:, 2:4] - rows[:, :2]], 1)


def rle_of(characters: Ragged, objects: np.ndarray, sizes: np.ndarray) -> list[dict[str, Any]]:
    """Run lengths {size, counts} of every object of every image. objects: [I], their numbers."""
    counts = characters.rows.tobytes().split(BETWEEN)[:-1]
    owners = np.repeat(sizes, objects, axis=0).tolist()
    return [{"size": size, "counts": text} for size, text in zip(owners, counts, strict=True)]


def areas(rows: np.ndarray, rle: list[Any] | None) -> np.ndarray:
    """[n]: of the masks if there are any, else of the boxes."""
    if rle is not None:
        return mask_areas(rle)
    boxes = rows[:, :4].astype(float)
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def mask_areas(rle: list[Any]) -> np.ndarray:
    """[n] pixels. pycocotools' own function stops at more than 255 masks."""
    from hotcoco import mask

    return np.asarray(mask.area(rle), float).reshape(-1)
