"""Reading checkpoints: weights, class names, and a start from a detector of other classes."""

from __future__ import annotations

import logging
import pickle
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from codetr.errors import UserError
from codetr.files import check_archive
from codetr.models.detector import MAIN, Detector
from codetr.nn.class_rows import ClassRows, declared_rows
from codetr.tensor_report import TensorReport, misshapen

_log = logging.getLogger(__name__)

PREFIX = "detector."
TRAINING_ONLY = "missing or unexpected, training only"
ADVICE = "Compose the model that they belong to, or load what fits with initialise.strict=false."


@dataclass
class Checkpoint:
    """weights: of the detector. config: plain containers; class_names: of label 0, 1, ..., category_ids: theirs in the
    data set; None when unknown."""

    path: Path
    weights: dict[str, Tensor]
    config: dict[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    step: int = 0
    category_ids: tuple[int, ...] | None = None


def load_weights(path: str | Path, average: bool = True) -> Checkpoint:
    """Read a checkpoint of `codetr.train`, or a plain file of named tensors, onto the CPU.

    average: take the averaged weights (EMA) where the file has them, the live ones otherwise. Nothing in the file
    is executed. Raises UserError for a file that is missing, truncated or something else.
    """
    path = Path(path)
    content = read(path)
    state = content.get("state_dict", content.get("model", content))
    # Beside the detector, a checkpoint may have the weights of classes that federated loss draws by.
    own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    weights = own or dict(state)
    if average and "ema" in content:
        weights |= content["ema"]["weights"]
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: holds no named tensors; give a checkpoint of codetr.train or a converted one")
    about = content.get("codetr", {})
    names, ids = about.get("class_names"), about.get("category_ids")
    return Checkpoint(
        path,
        weights,
        about.get("config"),
        tuple(names) if names else None,
        int(content.get("global_step", 0)),
        tuple(map(int, ids)) if names and ids and len(ids) == len(names) else None,
    )


def generation(newest: Path, age: int) -> Path:
    """last.ckpt, last.1.ckpt (written before it), last.2.ckpt, ..."""
    return newest if age == 0 else newest.with_name(f"{newest.stem}.{age}{newest.suffix}")


def _generations(newest: Path) -> list[Path]:
    """`newest`, and those before it that are there."""
    numbers = [path.stem.removeprefix(f"{newest.stem}.") for path in newest.parent.glob(f"{newest.stem}.*")]
    return [generation(newest, age) for age in sorted({0, *(int(n) for n in numbers if n.isdecimal())})]


def newest_whole(newest: Path) -> tuple[Path, dict[str, Any]]:
    """The newest generation that can be read, and what it holds; the damaged ones are named on the way.

    Raises UserError without any.
    """
    complaints = []
    for path in _generations(newest):
        try:
            content = read(path)
        except UserError as error:
            complaints.append(str(error))
        else:
            for complaint in complaints:
                _log.warning("%s", complaint)
            if complaints:
                _log.warning("going on with %s, the newest that is whole, from step %d", path, content["global_step"])
            return path, content
    raise UserError("\n".join(complaints))


def read(path: Path) -> dict[str, Any]:
    """What a file of tensors holds: PyTorch's formats or safetensors. Nothing in it is executed.

    Raises UserError for a file that is missing, damaged or something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        if _is_archive(path):
            check_archive(path)  # before anything in it is believed; a mapped file is not read again
        content = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds objects that run code when they are read, and is not read for safety; save its tensors "
            f'alone, torch.save({{"state_dict": ...}}) ({_first_line(error)})'
        ) from error
    except (RuntimeError, EOFError, BadZipFile, SafetensorError, ValueError, KeyError, OSError, zlib.error) as error:
        raise UserError(
            f"{path}: is damaged, truncated or changed while it was written, kept or copied; take another one "
            f"({_first_line(error)})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def _unpickle(path: Path) -> Any:
    # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path))


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" or is_zipfile(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@torch.no_grad()
def initialise_from(
    detector: Detector, checkpoint: Checkpoint, class_names: Sequence[str], strict: bool = True
) -> TensorReport:
    """Copy the checkpoint's weights into `detector`, whose label 0, 1, ... are `class_names`.

    Rows that belong to a class follow its name, whatever its case and word separators; classes that the checkpoint does
    not know keep their fresh initialisation. Where the checkpoint names no classes and their number differs, class rows
    stay fresh. Raises UserError for what is missing, unexpected or misshapen, except in training-only parts, unless
    `strict` is false.
    """
    report = TensorReport()
    class_names = [_spelled_alike(name) for name in class_names]
    old = None if checkpoint.class_names is None else [_spelled_alike(name) for name in checkpoint.class_names]
    shared = len(set(old or ()) & set(class_names))
    own, declared, number = detector.state_dict(), declared_rows(detector), _number_of_classes(checkpoint)
    for name in own.keys() & checkpoint.weights.keys():
        value, target = checkpoint.weights[name], own[name]
        rows = declared.get(name)
        if rows is not None and not _fit(rows, value, target, number, len(class_names)):
            rows = None
        if rows is not None and rows.agnostic:
            rows.move(value, target, [], [])
            report.taken.append(name)
        elif rows is not None and old is not None and old != class_names:
            rows.move(value, target, old, class_names)
            report.note(f"moved by class name ({shared} classes in common)", name)
        elif value.shape == target.shape:
            target.copy_(value)
            report.taken.append(name)
        elif rows is not None:
            report.note("re-initialised, class names unknown", name)
        else:
            report.misshapen.append(misshapen(name, value.shape, target.shape))
    _compare_names(report, own, checkpoint.weights, detector.training_only_prefixes())
    if strict:
        report.require_fit(checkpoint.path, ADVICE)
    return report


def _spelled_alike(name: str) -> str:
    """COCO's traffic light, LVIS' traffic_light and Objects365's Traffic Light are one class."""
    return re.sub(r"[\s_/-]+", " ", name.casefold()).strip()


def _number_of_classes(checkpoint: Checkpoint) -> int | None:
    if checkpoint.class_names is not None:
        return len(checkpoint.class_names)
    head = checkpoint.weights.get("decoder.class_heads.0.weight")
    return None if head is None else len(head)


def _fit(rows: ClassRows, value: Tensor, target: Tensor, old: int | None, new: int) -> bool:
    """Whether both have the rows that these numbers of classes have."""
    if old is None or value.ndim == 0 or value.shape[1:] != target.shape[1:]:
        return False
    return (len(value), len(target)) == (rows.count(old), rows.count(new))


def _compare_names(
    report: TensorReport, own: dict[str, Tensor], given: dict[str, Tensor], training_only: tuple[str, ...]
) -> None:
    # The checkpoint's own training-only query sources are not known here: every source but the main one may be.
    tolerated = ("heads.", "adapter.")
    for name in sorted(own.keys() - given.keys()):
        if name.startswith(training_only):
            report.note(TRAINING_ONLY, name)
        else:
            report.missing.append(name)
    for name in sorted(given.keys() - own.keys()):
        if name.startswith(tolerated) or (name.startswith("queries.") and not name.startswith(f"queries.{MAIN}.")):
            report.note(TRAINING_ONLY, name)
        else:
            report.unexpected.append(name)
