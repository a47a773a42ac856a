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

from pathlib import Path

from codetr.errors import UserError

_OWN = {"from": None, "to": None, "source": None, "target": None}
_DEFAULTS = {"images": "link", "splits": ["train", "val"], "overwrite": False}
_FORMATS = ("coco", "voc", "yolo")
_CHOICES = {"to": _FORMATS, "images": ("link", "copy", "none")}
_EXAMPLE = "python -m codetr.data convert from=voc to=coco source=VOCdevkit/VOC2012 target=voc-coco"
_IMAGES = {"coco": "{split}", "voc": "JPEGImages", "yolo": "images/{split}"}


def main(overrides: list[str]) -> int:
    from codetr.data import conversion, writers

    options, of_data = conversion.options(overrides, {**_OWN, **_DEFAULTS}, _CHOICES, _EXAMPLE)
    if options.to == "yolo" and options.images == "none":
        raise UserError("images=none: YOLO finds labels beside the images, so that these must be linked or copied")
    source, target, form = Path(options.source), Path(options.target), options.to
    conversion.refuse_target(source, target, options.overwrite)
    splits = conversion.read(options["from"], source, of_data, options.splits)
    conversion.name_images(splits, form, keep=options.images == "none")
    with conversion.written(target, {"from": options["from"], "source": str(source.absolute()), "to": form}) as partial:
        write = {"coco": writers.write_coco, "voc": writers.write_voc, "yolo": writers.write_yolo}[form]
        lost = write(partial, splits)
        if options.images != "none":
            for name, split in splits.items():
                conversion.place_images(split, partial / _IMAGES[form].format(split=name), options.images, name)
    for what, count in lost.items():
        if count:
            print(f"left out: {count} {what}, which {form.upper()} has no place for")
    conversion.tell(splits, form, target, placed=options.images != "none")
    return 0
