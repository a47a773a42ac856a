"""What an evaluation leaves in its run's directory, so that reports are written and written again without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import orjson

from codetr.errors import UserError
from codetr.evaluation.columns import Columns, Ragged
from codetr.evaluation.engines import Objects, Rules, Scene, scenes
from codetr.files import atomically

FILES = {"bbox": "evaluation_bbox.npz", "segm": "evaluation_segm.npz"}
_RAGGED = Columns._fields[2:]


@dataclass(frozen=True)
class About:
    """What is known beside the boxes.

    limit, masks, federated: as of `Rules`.
    images: how many were evaluated, of which some may be stored.
    frequency: of each class, r(are), c(ommon) or f(requent), in LVIS.
    train_objects: of each class, in the training set; empty where that is not read.
    sizes: (height, width) of each stored image's file, and `files` their paths; empty where nobody knows them.
    step, epoch: of the weights. machine: versions, hardware, seed and command, by what they are called.
    """

    class_names: list[str]
    limit: int
    masks: bool
    federated: bool
    images: int
    frequency: list[str] = field(default_factory=list)
    train_objects: list[int] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    step: int | None = None
    epoch: int | None = None
    machine: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """Detections and truth of an evaluation, its images in the order of their ids."""

    columns: Columns
    about: About

    @property
    def rules(self) -> Rules:
        return Rules((self.about.limit,), masks=self.about.masks, federated=self.about.federated)

    def scene(self) -> Scene:
        """Everything that counts, in 64 bits; its images are numbered as the rows of `columns`. Of masks, the boxes are
        those around them."""
        rules, columns = self.rules, self.columns.with_areas(self.about.masks)
        (whole,) = scenes(columns, rules, [(0, len(self.about.class_names))])
        found = whole.found
        assert found.scores is not None
        kept = _among_the_best(found.image, found.label, found.scores, self.about.limit)
        return replace(whole, found=_with_boxes(found.of(kept)), truth=_with_boxes(whole.truth))

    def save(self, folder: Path) -> None:
        """Raises UserError where that cannot be written."""
        columns = self.columns
        arrays: dict[str, Any] = {}
        for name in _RAGGED:
            ragged: Ragged = getattr(columns, name)
            arrays |= {f"{name}_rows": ragged.rows, f"{name}_counts": ragged.counts}
        about = np.frombuffer(orjson.dumps(asdict(self.about)), np.uint8)
        path = folder / FILES["segm" if self.about.masks else "bbox"]
        with atomically(path) as part, part.open("wb") as file:
            np.savez(file, about=about, ids=columns.ids, sizes=columns.sizes, **arrays)


def _with_boxes(objects: Objects) -> Objects:
    from hotcoco import mask

    return replace(objects, boxes=np.asarray(mask.to_bbox(objects.rle)).reshape(-1, 4)) if objects.rle else objects


def load(folder: Path, kind: str) -> Stored | None:
    """kind: "bbox" or "segm". None where the run has not stored such an evaluation.

    Raises UserError for a file that is none of ours.
    """
    path = folder / FILES[kind]
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            ragged = (Ragged(file[f"{name}_rows"], file[f"{name}_counts"]) for name in _RAGGED)
            columns = Columns(file["ids"], file["sizes"], *ragged)
            return Stored(columns, About(**orjson.loads(file["about"].tobytes())))
    except (OSError, KeyError, ValueError, TypeError, BadZipFile) as error:
        raise UserError(f"{path} is no evaluation that codetr stored ({error}); evaluate again: codetr eval") from error


def sample(columns: Columns, most: int) -> Columns:
    """At most so many of the images, spread evenly over their ids, in this order; the same ones of every run."""
    order = np.argsort(columns.ids, kind="stable")
    chosen = order if len(order) <= most else order[np.linspace(0, len(order) - 1, most).round().astype(int)]
    if np.array_equal(chosen, np.arange(len(columns.ids))):
        return columns
    return Columns(columns.ids[chosen], columns.sizes[chosen], *(_taken(own, chosen) for own in columns[2:]))


def _taken(ragged: Ragged, images: np.ndarray) -> Ragged:
    """The rows of some images, in their order."""
    ends = np.cumsum([0, *ragged.counts])
    counts = ragged.counts[images]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return Ragged(ragged.rows[np.repeat(ends[images], counts) + within], counts)


def _among_the_best(image: np.ndarray, label: np.ndarray, scores: np.ndarray, limit: int) -> np.ndarray:
    """[n] bool: the detections that are among the best `limit` of their image and class, as COCO counts them."""
    if np.bincount(image, minlength=1).max() <= limit:
        return np.ones(len(image), bool)
    order = np.lexsort((-scores, image, label))
    place = image[order].astype(np.int64) + (label[order].astype(np.int64) << 32)
    first = np.flatnonzero(np.concatenate([[True], place[1:] != place[:-1]]))
    kept = np.empty(len(order), bool)
    lengths = np.diff(np.concatenate([first, [len(order)]]))
    kept[order] = np.arange(len(order)) - np.repeat(first, lengths) < limit
    return kept


def of_columns(
    columns: Columns, most: int, about: About, ids: Sequence[int], sizes: np.ndarray, files: Sequence[str]
) -> Stored:
    """What is stored of an evaluation: at most `most` of its images, with what is known of them.

    ids, sizes, files: of the images of the data set; empty where there is none.
    """
    kept = sample(columns, most)
    row = {image: i for i, image in enumerate(ids)}
    rows = [row[i] for i in kept.ids.tolist() if i in row]
    known = len(rows) == len(kept.ids)
    about = replace(
        about,
        images=len(columns.ids),
        sizes=np.asarray(sizes)[rows].tolist() if known and rows else [],
        files=[files[i] for i in rows] if known else [],
    )
    return Stored(kept, about)
