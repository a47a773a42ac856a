"""Cut large images with their objects into overlapping tiles, as a data set in COCO's format.

  python -m codetr.data tile from=voc source=aerial target=tiles size=400
  python -m codetr.data tile from=custom source=slides target=tiles size=1024 data.train_annotations=a.json ...

Training takes the tiles; validation can take whole images, tile by tile (views=tiles), so that every object is
counted once: by default only the images of the training split are cut.

  from=FORMAT         voc, yolo, coco, or another value of data= for training
  source=FOLDER       data.root of training; data.train_annotations=... and so on say where it is not as usual
  target=FOLDER       what to make; must not exist
  size=512            height and width of a tile, in pixels; a smaller image is one tile
  overlap=0.25        of neighbouring tiles, at least, a share of the size: as much as the largest objects, so that some
                      tile shows each whole
  visible=0.4         share of an object's area (of its mask, where there are masks) that a tile must show for the part
                      to be trained and counted there; smaller parts are ignored
  splits=[train,val]  which to take over
  whole=[val]         of these, whose images are not cut
  overwrite=false     true: replace `target`, if this command made it

data.on_error=skip leaves bad records out and says how many; python -m codetr.data check tells more about them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from codetr.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_DEFAULTS = {
    **{"from": None, "source": None, "target": None, "size": 512, "overlap": 0.25, "visible": 0.4},
    **{"splits": ["train", "val"], "whole": ["val"], "overwrite": False},
}
_EXAMPLE = "python -m codetr.data tile from=voc source=aerial target=tiles size=400"


def main(overrides: list[str]) -> int:
    from codetr.data import conversion, tiling, writers

    options, of_data = conversion.options(overrides, _DEFAULTS, {}, _EXAMPLE)
    _check(options)
    source, target = Path(options.source), Path(options.target)
    conversion.refuse_target(source, target, options.overwrite)
    splits = conversion.read(options["from"], source, of_data, options.splits)
    conversion.name_images(splits, "coco", keep=False)
    with conversion.written(target, {"from": options["from"], "source": str(source.absolute())}) as partial:
        for name, split in splits.items():
            if name in options.whole:
                conversion.place_images(split, partial / name, "copy", name)
            else:
                splits[name], tally = tiling.tile_split(split, partial / name, *_cutting(options))
                print(*(f"{name}: {number} {what}" for what, number in tally.items() if number), sep="\n")
        writers.write_coco(partial, splits)
    conversion.tell(splits, "coco", target, placed=True)
    return 0


def _cutting(options: DictConfig) -> tuple[int, float, float]:
    return options.size, options.overlap, options.visible


def _check(options: DictConfig) -> None:
    if not isinstance(options.size, int) or options.size < 16:
        raise UserError(f"size={options.size}: must be a number of pixels, 16 or more")
    for key, most in (("overlap", 0.5), ("visible", 1.0)):
        if not isinstance(options[key], (int, float)) or not 0 <= options[key] <= most:
            raise UserError(f"{key}={options[key]}: must be from 0 to {most}")
