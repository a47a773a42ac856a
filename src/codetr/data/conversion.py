"""What the commands that make one data set out of another share: options, reading, and a folder that is whole or not
there."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from codetr import application
from codetr.data.findings import Findings
from codetr.data.judged import judged
from codetr.data.readers import locate
from codetr.data.readers.folder import progress
from codetr.data.writers import Split
from codetr.errors import UserError

_STAMP = "converted.json"


def options(
    overrides: Sequence[str], defaults: Mapping[str, Any], choices: Mapping[str, Sequence[str]], example: str
) -> tuple[DictConfig, list[str]]:
    """A command's own options, and those of the data set.

    defaults: of all its options; None where one must be given. choices: what some may be. example: of a whole command,
    for messages. Raises UserError for what is missing or unknown.
    """
    of_data = [o for o in overrides if o.lstrip("+~").startswith(("data.", "data@", "augment"))]
    own = [o for o in overrides if o not in of_data]
    for override in own:
        key = override.partition("=")[0]
        if key not in defaults or "=" not in override:
            near = difflib.get_close_matches(key, defaults, n=1)
            meant = f"did you mean {near[0]}?" if near else f"give {', '.join(defaults)}, or data.KEY"
            raise UserError(f"{override}: {meant}")
    found = OmegaConf.create(dict(defaults))
    found.merge_with_dotlist(own)
    if missing := [key for key, value in defaults.items() if value is None and found[key] is None]:
        raise UserError(f"{' and '.join(missing)} not given: {example}")
    for key, values in choices.items():
        if found[key] not in values:
            raise UserError(f"{key}={found[key]}: must be one of {', '.join(values)}")
    if isinstance(found.splits, str):
        found.splits = [found.splits]
    if wrong := [s for s in found.splits if s not in ("train", "val")]:
        raise UserError(f"splits={wrong}: there are train and val")
    return found, of_data


def refuse_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raises UserError for a target that is there, unless it was made by such a command and is to be written over."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(f"target={target}: is there already; overwrite=true replaces it, if this command made it")
    if not (target / _STAMP).is_file() or source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"target={target}: was not made by this command, or holds the source; name another")


def read(form: str, source: Path, overrides: Sequence[str], names: Sequence[str]) -> dict[str, Split]:
    """The good records of splits. form: a value of `data` for training. overrides: of the data set. Raises UserError
    where bad ones are found and data.on_error is not skip."""
    config = application.compose("train", [f"data={form}", *overrides]).data
    config.root = str(source)
    if config.prepare is not None:
        instantiate(config.prepare)()
    return {name: _read(config, name) for name in names}


def _read(config: DictConfig, name: str) -> Split:
    for key in (f"{name}_images", f"{name}_annotations"):
        if OmegaConf.is_missing(config, key):
            raise UserError(f"data.{key} is not given; splits=[...] leaves a split out")
    root, source = (locate(config.root, config[f"{name}_{what}"]) for what in ("images", "annotations"))
    document = instantiate(config.reader)(source)
    findings = Findings(source)
    split = Split(root, *judged(document, root, findings), names={})
    findings.raise_or_log(config.on_error)
    return split


def name_images(splits: Mapping[str, Split], form: str, keep: bool) -> None:
    """Names in the new folders: without the folders that all share. keep: as they are.

    VOC has one folder for all splits: where names meet there, each split has a folder in it. Raises UserError when two
    images of a folder would share their labels.
    """
    for split in splits.values():
        files = [_below(i["file_name"], split.root) for i in split.images]
        common = "" if keep or not files else os.path.commonpath([f.parent for f in files])
        split.names = {i["id"]: f.relative_to(common).as_posix() for i, f in zip(split.images, files, strict=True)}
    if form == "voc" and not keep and _shared([n for s in splits.values() for n in s.names.values()]):
        for name, split in splits.items():
            split.names = {i: f"{name}/{n}" for i, n in split.names.items()}
    for split in splits.values():
        if form != "coco" and (shared := _shared(split.names.values())):
            raise UserError(f"{split.root}: {' and '.join(shared)} would share one file of labels: rename one of them")


def _below(name: str, root: Path) -> PurePosixPath:
    """The place of an image below the folder of the images.

    Raises UserError for one that lies elsewhere: its name would lead out of the target, too.
    """
    place = os.path.relpath(os.path.join(root, name), root)
    if place.partition(os.sep)[0] == os.pardir:
        raise UserError(
            f"{name} lies outside of {root}, the folder of the images, and so would its copy of the target: name the "
            "folder that holds all images, data.train_images=... and data.val_images=..."
        )
    return PurePosixPath(Path(place).as_posix())


def _shared(names: Any) -> list[str]:
    """Names that differ from one another in their suffix at most: the first such, or none."""
    groups: dict[PurePosixPath, list[str]] = {}
    for name in names:
        groups.setdefault(PurePosixPath(name).with_suffix(""), []).append(name)
    return next((g for g in groups.values() if len(g) > 1), [])


def place_images(split: Split, folder: Path, how: str, name: str) -> None:
    for image in progress(iter(split.images), len(split.images), f"{name} images"):
        source, path = (split.root / image["file_name"]).resolve(), folder / split.names[image["id"]]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, path) if how == "link" else shutil.copyfile(source, path)
        except OSError as error:
            advice = "; images=copy works across file systems" if how == "link" else ""
            raise UserError(f"{source} cannot be put into {path.parent} ({error.strerror}){advice}") from error


def is_written(target: Path, about: Mapping[str, Any]) -> bool:
    """Whether `written` made it, with the same `about`."""
    try:
        return bool(json.loads((target / _STAMP).read_text()) == dict(about))
    except (OSError, ValueError):
        return False


@contextmanager
def written(target: Path, about: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end. about: how it was made, for a file in it."""
    partial = target.absolute().with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    (partial / _STAMP).write_text(json.dumps(dict(about)))
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def tell(splits: Mapping[str, Split], form: str, target: Path, placed: bool) -> None:
    """How much was written, and the commands that come next. placed: whether the images lie in `target`, too."""
    for name, split in splits.items():
        print(f"{name}: {len(split.images)} images, {len(split.annotations)} objects")
    settings = [f"data={'custom' if form == 'coco' else form}", f"data.root={target}"]
    for name, split in splits.items():
        if not placed:
            settings.append(f"data.{name}_images={split.root.absolute()}")
        elif form == "coco":
            settings.append(f"data.{name}_images={name}")
        if form == "coco":
            settings.append(f"data.{name}_annotations=annotations/instances_{name}.json")
    print(f"wrote {target}. Next:\n  python -m codetr.data check {shlex.join(settings)}")
    if len(splits) == 2:
        print(f"  python -m codetr.train {shlex.join(settings)}")
