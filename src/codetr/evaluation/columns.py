"""What an evaluation remembers of its images: a few arrays, however many images there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from codetr.errors import UserError
from codetr.types import Detections

OUTSIDE = 1e11  # an area that is in no range; the range of all ends at 1e10
BETWEEN = b"\n"  # of the run lengths of two objects; compressed run lengths are printable characters


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


class Columns(NamedTuple):
    """ids: [I]. sizes: [I, 2] (height, width) of the masks.

    found: [n, 6] xyxy, score, label. truth: [m, 7] xyxy, label, iscrowd, area. checked: [c, 2] the labels that an image
    was searched for without success, 0, and those of which it may have further objects, 1 (LVIS). found_runs,
    truth_runs: the characters of the compressed run lengths, if masks are evaluated.
    """

    ids: np.ndarray
    sizes: np.ndarray
    found: Ragged
    truth: Ragged
    checked: Ragged
    found_runs: Ragged
    truth_runs: Ragged

    def of(self, images: np.ndarray) -> Columns:
        """images: [I] bool."""
        return Columns(self.ids[images], self.sizes[images], *(ragged.of(images) for ragged in self[2:]))

    def arrays(self) -> list[np.ndarray]:
        return [self.ids, self.sizes, *(array for ragged in self[2:] for array in ragged)]

    @staticmethod
    def from_arrays(arrays: Sequence[np.ndarray]) -> Columns:
        ids, sizes, *rest = arrays
        return Columns(ids, sizes, *(Ragged(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)))

    @staticmethod
    def joined(parts: Sequence[Columns]) -> Columns:
        """Of an image that is there several times, the last one counts."""
        columns = zip(*(part.arrays() for part in (_NOTHING, *parts)), strict=True)
        whole = Columns.from_arrays([np.concatenate(pieces) for pieces in columns])
        last = np.zeros(len(whole.ids), bool)
        last[len(last) - 1 - np.unique(whole.ids[::-1], return_index=True)[1]] = True
        return whole if last.all() else whole.of(last)


def _ragged(dtype: type, *width: int) -> Ragged:
    return Ragged(np.empty((0, *width), dtype), np.empty(0, np.int64))


_NOTHING = Columns(
    ids=np.empty(0, np.int64),
    sizes=np.empty((0, 2), np.int64),
    found=_ragged(np.float32, 6),
    truth=_ragged(np.float32, 7),
    checked=_ragged(np.int64, 2),
    found_runs=_ragged(np.uint8),
    truth_runs=_ragged(np.uint8),
)


def columns_of(
    ids: Sequence[int],
    detections: Sequence[Detections],
    truth: Sequence[Mapping[str, Any]],
    masks: bool,
    federated: bool,
) -> Columns:
    """Of a batch, which leaves the device in one copy; numbers keep their precision."""
    scores = [d.mask_scores if masks and d.mask_scores is not None else d.scores for d in detections]
    found = [[d.boxes_xyxy for d in detections], scores, [d.labels for d in detections]]
    true = [*([t[name] for t in truth] for name in ("boxes", "labels", "iscrowd")), [_area(t) for t in truth]]
    found_runs, true_runs = ([d.runs or [] for d in detections], [t["runs"] for t in truth]) if masks else ([], [])
    pixels = [(*f, *t)[:1] for f, t in zip(found_runs, true_runs, strict=True)]
    sizes = [some[0]["size"] if some else (0, 0) for some in pixels] if masks else np.zeros((len(ids), 2))
    return Columns(
        ids=np.array(ids, np.int64),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        found=_stacked(found),
        truth=_stacked(true),
        checked=_stacked([[_checked(t) for t in truth]]) if federated else _none(len(ids), _NOTHING.checked),
        found_runs=_characters(found_runs) if masks else _none(len(ids), _NOTHING.found_runs),
        truth_runs=_characters(true_runs) if masks else _none(len(ids), _NOTHING.truth_runs),
    )


def _area(truth: Mapping[str, Any]) -> Tensor:
    """[n]; of ignored objects, as `difficult` ones of VOC, one outside of all ranges.

    So COCO counts them neither as found nor as missed, and what finds them neither as right nor as wrong.
    """
    ignored = truth.get("ignore")
    return truth["area"] if ignored is None else truth["area"].masked_fill(ignored, OUTSIDE)


def _stacked(columns: list[list[Tensor]]) -> Ragged:
    """columns: each of every image."""
    rows = torch.column_stack([torch.cat(column) for column in columns])
    return Ragged(rows.cpu().numpy(), np.array([len(own) for own in columns[0]], np.int64))


def _none(images: int, like: Ragged) -> Ragged:
    return Ragged(like.rows, np.zeros(images, np.int64))


def _checked(truth: Mapping[str, Any]) -> Tensor:
    if "neg_labels" not in truth:
        raise UserError(
            "metrics.federated=true needs images with the categories that they were searched for, as LVIS has them "
            "(neg_category_ids, not_exhaustive_category_ids); this data set has none: metrics.federated=false"
        )
    labels = [torch.as_tensor(truth[name], dtype=torch.int64) for name in ("neg_labels", "not_exhaustive_labels")]
    return torch.cat([torch.column_stack([own, torch.full_like(own, kind)]) for kind, own in enumerate(labels)])


def _characters(runs: list[list[dict[str, Any]]]) -> Ragged:
    """All run lengths end with BETWEEN."""
    texts = [b"".join(_text(one["counts"]) + BETWEEN for one in own) for own in runs]
    return Ragged(np.frombuffer(b"".join(texts), np.uint8), np.array([len(text) for text in texts], np.int64))


def _text(counts: str | bytes) -> bytes:
    return counts.encode() if isinstance(counts, str) else counts


def runs_of(characters: Ragged, objects: np.ndarray, sizes: np.ndarray) -> list[dict[str, Any]]:
    """Run lengths {size, counts} of every object of every image. objects: [I], their numbers."""
    counts = characters.rows.tobytes().split(BETWEEN)[:-1]
    owners = np.repeat(sizes, objects, axis=0).tolist()
    return [{"size": size, "counts": text} for size, text in zip(owners, counts, strict=True)]


def on_first_process(columns: Columns, group: dist.ProcessGroup) -> Columns | None:
    """The columns of all processes on process 0, as arrays and one after the other; elsewhere None.

    Of an image that several processes saw, the lowest one's counts. Every process sends as many arrays, some of them
    without rows, so none waits for another.
    """
    arrays = [np.ascontiguousarray(array) for array in columns.arrays()]
    shapes = torch.tensor([[len(array), array.itemsize] for array in arrays])
    every = [torch.empty_like(shapes) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, shapes, group=group)
    if dist.get_rank(group):
        for array in arrays:
            if array.size:
                dist.send(_bytes(array), dst=0, group=group)
        return None
    parts = [columns]
    for rank, theirs in enumerate(every[1:], start=1):
        received = []
        for like, (rows, item) in zip(arrays, theirs.tolist(), strict=True):
            array = np.empty((rows, *like.shape[1:]), np.dtype(f"{like.dtype.kind}{item}"))
            if array.size:
                dist.recv(_bytes(array), src=rank, group=group)
            received.append(array)
        parts.insert(0, Columns.from_arrays(received))
    return Columns.joined(parts)


def _bytes(array: np.ndarray) -> Tensor:
    """The array's own memory."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))
