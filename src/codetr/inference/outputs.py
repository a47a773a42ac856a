"""Files written beside inputs that are never written to: names that do not meet, files that are whole or not there."""

from __future__ import annotations

import io
import os
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor

from codetr.errors import UserError
from codetr.evaluation.results import FILES, entries
from codetr.files import atomically, part_of
from codetr.inference import formats
from codetr.inference.growing import Records, unfinished
from codetr.inference.result import Result

RESULTS = "predictions.json"
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}  # others are written as PNG


def names_below(paths: Sequence[Path]) -> list[Path]:
    """Each path, as given and whatever it links to, relative to the deepest common folder of all."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    root = os.path.commonpath([path.parent for path in absolute])
    return [path.relative_to(root) for path in absolute]


def picture_names(names: Sequence[Path]) -> list[Path]:
    """Names of pictures of the files `names`: the same, with ".png" behind a suffix that no picture has.

    Where two would be one file, also to a file system that does not tell letter cases apart, one gets a number.
    """
    wanted = [n if n.suffix.lower() in PICTURE_SUFFIXES else n.with_name(f"{n.name}.png") for n in names]
    # The names that need no change come first: no number may take one of them away.
    taken = {_folded(name): i for i, name in reversed(list(enumerate(wanted)))}
    chosen = []
    for i, name in enumerate(wanted):
        own, number = name, 2
        while taken.setdefault(_folded(own), i) != i:
            own = name.with_name(f"{name.stem}_{number}{name.suffix}")
            number += 1
        chosen.append(own)
    return chosen


def _folded(name: Path) -> str:
    return unicodedata.normalize("NFC", str(name)).casefold()


def refuse_inputs(targets: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raises UserError where a target is an input, or a link on the way to one, by whatever path.

    What is replaced is the entry of a folder (see `codetr.files.atomically`): another link to the same input may be a
    target, but other hard links cannot be told from the input's own name, and are refused.
    """
    guarded = {identity: path for path in inputs for identity in _identities(path)}
    for target in targets:
        try:
            status = target.lstat()
        except OSError:
            continue
        if path := guarded.get((status.st_dev, status.st_ino)):
            raise UserError(f"{path} is an input and would be overwritten by {target}: name another folder, out=...")


def _identities(path: Path) -> set[tuple[int, int]]:
    """Device and inode of the file, and of every symbolic link that leads to it."""
    found: set[tuple[int, int]] = set()
    while True:
        try:
            status = path.lstat()
        except OSError:
            return found
        identity = status.st_dev, status.st_ino
        if identity in found or not stat.S_ISLNK(status.st_mode):
            return found | {identity}
        found.add(identity)
        path = path.parent / path.readlink()


def _of_boxes(result: Result, image_id: int | str) -> list[dict[str, Any]]:
    found = result.detections
    return entries(*_columns(result, image_id, found.scores), found.boxes_xyxy.numpy())


def _of_masks(result: Result, image_id: int | str) -> list[dict[str, Any]]:
    found = result.detections
    assert found.mask_scores is not None, "a detector with a mask head gives masks and their scores"
    return entries(*_columns(result, image_id, found.mask_scores), None, found.rle)


def _columns(result: Result, image_id: int | str, scores: Tensor) -> tuple[list[int | str], list[int], list[float]]:
    labels = result.labels.tolist()
    return [image_id] * len(labels), [result.category_ids[label] for label in labels], scores.tolist()


@dataclass
class Writer:
    """Annotated pictures and results of one run, in the folder `out`, as a context.

    Without `image_ids` the results are predictions.json: running numbers for images, names beside all ids; at the end
    of the context, however it comes, the file holds what was added. With `image_ids` they are what COCO's server takes:
    results_bbox.json, and results_segm.json with `masks`. Where the context ends with an error, those are called
    results_bbox.part.json, ...

    paths: all files of the run, none twice; pictures keep their names, and their folders below the deepest common one.
    pictures: whether to draw at all.
    drawn_from: the least score of a drawn object.
    formats: further ones, by name (see `codetr.inference.formats`), of what is drawn.
    inputs: other files that the run reads.
    image_ids: of each path.
    masks: whether the model finds some.
    done: number of images so far.
    records: the first of the files of results.

    Raises UserError, before anything is written, where an input would be overwritten; and for what cannot be written.
    """

    out: Path
    paths: Sequence[Path]
    pictures: bool
    inputs: Sequence[Path] = ()
    image_ids: Sequence[int | str] | None = None
    masks: bool = False
    drawn_from: float = 0.0
    formats: Sequence[str] = ()
    done: int = 0

    def __post_init__(self) -> None:
        names = names_below(self.paths)
        targets = [self.out / name for name in picture_names(names)] if self.pictures else []
        of_server = [FILES["bbox"], FILES["segm"]] if self.masks else [FILES["bbox"]]
        own = [RESULTS] if self.image_ids is None else of_server
        files = [self.out / name for name in own]
        early = [] if self.image_ids is None else [unfinished(path) for path in files]
        self._others = formats.made(self.formats, self.out, names)
        further = [path for other in self._others for path in other.targets]
        refuse_inputs([*targets, *map(part_of, targets), *files, *early, *further], [*self.paths, *self.inputs])
        ids = range(len(names)) if self.image_ids is None else self.image_ids
        self._targets = dict(zip(self.paths, targets, strict=False))
        self._about = dict(zip(self.paths, zip(ids, names, strict=True), strict=True))
        self._files = [Records(path) for path in files]
        for path in early:  # of an earlier run
            path.unlink(missing_ok=True)
        self.records = self._files[0]

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        for other in self._others:
            other.close()
        for file in self._files:
            if kind is None or self.image_ids is None:
                file.close()
            else:
                file.close_early()

    def add(self, result: Result) -> None:
        """Write what was found in one of `paths`."""
        assert result.path is not None, "only files are written about"
        image_id, name = self._about[result.path]
        for file, records in zip(self._files, self._forms(result, image_id, name.as_posix()), strict=True):
            file.add(records)
        shown = result.above(self.drawn_from)
        for other in self._others:
            other.add(shown, image_id, name)
        if target := self._targets.get(result.path):
            # In memory: a full disk shows as what it is, not as an encoder's failure.
            content = io.BytesIO()
            picture = shown.plot()
            picture.save(content, PIL.Image.registered_extensions()[target.suffix.lower()], quality=92)
            with atomically(target) as part:
                part.write_bytes(content.getvalue())
        self.done += 1

    def _forms(self, result: Result, image_id: int | str, name: str) -> list[list[dict[str, Any]]]:
        """The records of each file."""
        if self.image_ids is None:
            return [result.to_coco(image_id, name)]
        forms = [_of_boxes, _of_masks] if self.masks else [_of_boxes]
        return [form(result, image_id) for form in forms]
