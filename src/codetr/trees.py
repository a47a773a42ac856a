"""Trees in aerial photographs: a small real data set, made of the pictures that the package `deepforest` ships.

Four photographs of North American forests at 10 cm per pixel, with boxes drawn by hand (MIT licence; Weinstein et al.
2019, of NEON's airborne pictures). Three are cut into tiles for training, dead and living trees alike; the fourth, of
another place, stays whole for validation: `codetr train experiment=trees`. The package is read, not imported.
"""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from codetr.data import conversion, tiling, writers
from codetr.errors import UserError

PLACES = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2", "OSBS_029", "SOAP_061"),
    "val": ("2019_YELL_2_541000_4977000_image_crop",),
}
_INSTALL = "pip install --no-deps deepforest"  # what it imports is not needed
_OTHER_NAMES = ("Dead", "Alive")


def prepare(root: str, size: int, overlap: float, visible: float) -> None:
    """Write the set into the folder `root`, unless it is there.

    size, overlap, visible: of the tiles, see `codetr data tile`. Raises UserError without the package, and for a folder
    that holds something else.
    """
    photographs = photographs_folder()
    target = Path(root)
    made = {"from": f"deepforest {version('deepforest')}", "size": size, "overlap": overlap, "visible": visible}
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with target.absolute().with_name(f".{target.name}.lock").open("w") as lock, tempfile.TemporaryDirectory() as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if conversion.is_written(target, made):
            return
        conversion.refuse_target(photographs, target, overwrite=True)
        source = Path(folder)
        _as_voc(photographs, source)
        splits = conversion.read("voc", source, ["data.classes=[Tree]"], list(PLACES))
        conversion.name_images(splits, "coco", keep=False)
        with conversion.written(target, made) as partial:
            splits["train"], _ = tiling.tile_split(splits["train"], partial / "train", size, overlap, visible)
            conversion.place_images(splits["val"], partial / "val", "copy", "val")
            writers.write_coco(partial, splits)


def photographs_folder() -> Path:
    """Where the package keeps its photographs. Raises UserError without it."""
    found = importlib.util.find_spec("deepforest")
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the photographs of trees come with the package deepforest, which is not here: {_INSTALL}")
    folder = Path(found.submodule_search_locations[0], "data")
    if missing := [name for names in PLACES.values() for name in names if not (folder / f"{name}.xml").is_file()]:
        raise UserError(f"{folder} has no {missing[0]}.xml: this version of deepforest has other pictures; take 2.1.0")
    return folder


def _as_voc(photographs: Path, target: Path) -> None:
    """The photographs and their boxes in the layout of VOC, every tree a Tree."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (target / name).mkdir(parents=True)
    for split, names in PLACES.items():
        (target / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            text = (photographs / f"{name}.xml").read_text(encoding="utf-8")
            for other in _OTHER_NAMES:
                text = text.replace(f"<name>{other}</name>", "<name>Tree</name>")
            (target / "Annotations" / f"{name}.xml").write_text(text, encoding="utf-8")
            shutil.copyfile(photographs / f"{name}.png", target / "JPEGImages" / f"{name}.png")
