"""Convert a data set: Pascal VOC or YOLO into COCO, and back.

  python -m codetr.data convert from=voc to=coco source=VOCdevkit/VOC2012 target=voc-coco
  python -m codetr.data convert from=yolo to=coco source=mine target=mine-coco
  python -m codetr.data convert from=coco to=yolo source=coco target=coco-yolo images=copy splits=[val]
  python -m codetr.data convert from=custom to=voc source=. target=mine-voc data.train_annotations=a.json ...

  from=FORMAT         voc, yolo, coco, or another value of data= for training
  to=FORMAT           coco, voc or yolo
  source=FOLDER       data.root of training; data.train_annotations=... and so on say where it is not as usual
  target=FOLDER       what to make; must not exist
  images=link         link: hard links, which take no space | copy | none: annotations alone, images stay in place
  splits=[train,val]  which to convert
  overwrite=false     true: replace `target`, if this command made it

data.on_error=skip leaves bad records out and says how many; python -m codetr.data check tells more about them.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from codetr.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from codetr.data.writers import Split

_OWN = {"from": None, "to": None, "source": None, "target": None}
_DEFAULTS = {"images": "link", "splits": ["train", "val"], "overwrite": False}
_FORMATS = ("coco", "voc", "yolo")
_IMAGES = {"coco": "{split}", "voc": "JPEGImages", "yolo": "images/{split}"}
_STAMP = "converted.json"


def main(overrides: list[str]) -> int:
    from codetr.data import writers

    options, of_data = _options(overrides)
    source, target, form = Path(options.source), Path(options.target), options.to
    _refuse_target(source, target, options.overwrite)
    config = _data_config(options["from"], source, of_data)
    splits = {name: _read(config, name) for name in options.splits}
    _name_images(splits, form, keep=options.images == "none")
    partial = target.absolute().with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write = {"coco": writers.write_coco, "voc": writers.write_voc, "yolo": writers.write_yolo}[form]
    lost = write(partial, splits)
    if options.images != "none":
        for name, split in splits.items():
            _place_images(split, partial / _IMAGES[form].format(split=name), options.images, name)
    (partial / _STAMP).write_text(json.dumps({"from": options["from"], "source": str(source.absolute()), "to": form}))
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _tell(splits, lost, form, target, options.images)
    return 0


def _options(overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """Our own, and those of the data set. Raises UserError for what is missing or unknown."""
    from omegaconf import OmegaConf

    known = [*_OWN, *_DEFAULTS]
    of_data = [o for o in overrides if o.lstrip("+~").startswith(("data.", "data@", "augment"))]
    own = [o for o in overrides if o not in of_data]
    for override in own:
        key = override.partition("=")[0]
        if key not in known or "=" not in override:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"give {', '.join(known)}, or data.KEY"
            raise UserError(f"{override}: {meant}")
    options = OmegaConf.create({**_OWN, **_DEFAULTS})
    options.merge_with_dotlist(own)
    if missing := [key for key in _OWN if options[key] is None]:
        example = "from=voc to=coco source=VOCdevkit/VOC2012 target=voc-coco"
        raise UserError(f"{' and '.join(missing)} not given: python -m codetr.data convert {example}")
    if isinstance(options.splits, str):
        options.splits = [options.splits]
    choices = {"to": _FORMATS, "images": ("link", "copy", "none")}
    for key, values in choices.items():
        if options[key] not in values:
            raise UserError(f"{key}={options[key]}: must be one of {', '.join(values)}")
    if wrong := [s for s in options.splits if s not in ("train", "val")]:
        raise UserError(f"splits={wrong}: there are train and val")
    if options.to == "yolo" and options.images == "none":
        raise UserError("images=none: YOLO finds labels beside the images, so that these must be linked or copied")
    return options, of_data


def _refuse_target(source: Path, target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UserError(f"target={target}: is there already; overwrite=true replaces it, if this command made it")
    if not (target / _STAMP).is_file() or source.resolve().is_relative_to(target.resolve()):
        raise UserError(f"target={target}: was not made by this command, or holds the source; name another")


def _data_config(name: str, source: Path, overrides: list[str]) -> DictConfig:
    from hydra.utils import instantiate

    from codetr import application

    config = application.compose("train", [f"data={name}", *overrides])
    config.data.root = str(source)
    if config.data.prepare is not None:
        instantiate(config.data.prepare)()
    return config.data


def _read(config: DictConfig, name: str) -> Split:
    """The good records of one split. Raises UserError where others are found and data.on_error is not skip."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from codetr.data.findings import Findings
    from codetr.data.judged import judged
    from codetr.data.readers import locate
    from codetr.data.writers import Split

    for key in (f"{name}_images", f"{name}_annotations"):
        if OmegaConf.is_missing(config, key):
            raise UserError(f"data.{key} is not given; splits=[...] leaves a split out")
    root, source = (locate(config.root, config[f"{name}_{what}"]) for what in ("images", "annotations"))
    document = instantiate(config.reader)(source)
    findings = Findings(source)
    split = Split(root, *judged(document, root, findings), names={})
    findings.raise_or_log(config.on_error)
    return split


def _name_images(splits: Mapping[str, Split], form: str, keep: bool) -> None:
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


def _place_images(split: Split, folder: Path, how: str, name: str) -> None:
    from codetr.data.readers.folder import progress

    for image in progress(iter(split.images), len(split.images), f"{name} images"):
        source, path = (split.root / image["file_name"]).resolve(), folder / split.names[image["id"]]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, path) if how == "link" else shutil.copyfile(source, path)
        except OSError as error:
            advice = "; images=copy works across file systems" if how == "link" else ""
            raise UserError(f"{source} cannot be put into {path.parent} ({error.strerror}){advice}") from error


def _tell(splits: Mapping[str, Split], lost: Counter[str], form: str, target: Path, images: str) -> None:
    for name, split in splits.items():
        print(f"{name}: {len(split.images)} images, {len(split.annotations)} objects")
    for what, count in lost.items():
        if count:
            print(f"left out: {count} {what}, which {form.upper()} has no place for")
    settings = [f"data={'custom' if form == 'coco' else form}", f"data.root={target}"]
    for name, split in splits.items():
        if images == "none":
            settings.append(f"data.{name}_images={split.root.absolute()}")
        elif form == "coco":
            settings.append(f"data.{name}_images={name}")
        if form == "coco":
            settings.append(f"data.{name}_annotations=annotations/instances_{name}.json")
    print(f"wrote {target}. Next:\n  python -m codetr.data check {shlex.join(settings)}")
    if len(splits) == 2:
        print(f"  python -m codetr.train {shlex.join(settings)}")
