"""Find what is wrong with a data set, before training on it.

  python -m codetr.data check data=custom data.train_images=... data.train_annotations=... data.val_images=... ...
  python -m codetr.data check experiment=demo
  python -m codetr.data check data=coco data.root=/data/coco decode=true strict=true

Takes what training takes, and tells how much there is of what, and every bad image, box, mask and category; which
images are there twice, or in both splits. Exit status: 0 clean, 1 errors, 2 wrong use.

  page=check.html   the page with pictures of every kind of finding; null: none
  report=null       a file for the findings as JSON
  decode=false      true: read every image to its end, and find copies by their pixels; takes longer
  strict=false      true: warnings too make the exit status 1
  fix=false         true: write NAME.clean.json (COCO files); what is bad is mended or clipped, what cannot be is
                    removed, all else stays as it is, the original too. Exit status 0 if that mends all errors
  output=null       the folder for it; null: beside the original
  examples=50       records that page and report list of each kind; all are counted
  pictures=6        of each kind on the page
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codetr.names import shown_lines

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from codetr.data.rules import Severity
    from codetr.inspection.files import File
    from codetr.inspection.split import Split


def main(overrides: list[str]) -> int:
    """Raises UserError for a configuration that is none, and for files that cannot be written."""
    from rich import get_console

    from codetr import application
    from codetr.inspection import page, summary
    from codetr.inspection.statistics import statistics

    config = application.compose("check", overrides)
    splits = inspect(config)
    numbers = [statistics(s) for s in splits]
    console = get_console()
    console.print(summary.tables(splits, numbers))
    if config.page:
        page.write(Path(config.page), splits, numbers, config.pictures)
    if config.report:
        _write_json(Path(config.report), summary.as_data(splits, numbers))
    mended = _fix(splits, config.output) if config.fix else {}
    for source, line in mended.items():
        console.print(shown_lines(f"{source}: {line}"), soft_wrap=True, highlight=False, markup=False)
    console.print(f"{summary.verdict(splits)}{f'; pictures in {config.page}' if config.page else ''}", highlight=False)
    grave: list[Severity] = ["error", "warning"] if config.strict else ["error"]
    return int(any(s.findings.total(g, unmended=config.fix) for s in splits for g in grave))


def inspect(config: DictConfig) -> list[Split]:
    """Both splits of a configuration of training, inspected; one where the other is not given."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from codetr.derived import read_needed_masks
    from codetr.errors import UserError
    from codetr.inspection import whole

    read_needed_masks(config)
    data = config.data
    if data.prepare is not None:
        instantiate(data.prepare)()
    classes = list(data.classes) if data.classes is not None else None
    names = [name for name in ("train", "val") if not OmegaConf.is_missing(data, f"{name}_annotations")]
    if not names:
        raise UserError("data.train_annotations is not set: give the images and annotations of the data set")
    splits = [_inspect_split(config, name, classes) for name in names]
    if len(splits) == 1:
        other = "val" if splits[0].name == "train" else "train"
        splits[0].add("split not given", f"data.{other}_annotations is not set")
    whole.find_copies(splits)
    whole.find_unnamed(splits)
    for split in splits:
        whole.inspect_balance(split, classes, data.batch_size)
    if len(splits) == 2 and all(s.categories for s in splits):
        whole.compare(splits[0], splits[1], classes)
    return splits


def _inspect_split(config: DictConfig, name: str, classes: Sequence[str] | None) -> Split:
    from hydra.utils import instantiate

    from codetr.data.findings import Findings
    from codetr.data.readers import locate
    from codetr.errors import UserError
    from codetr.inspection import masks, objects, records
    from codetr.inspection.split import Split

    data = config.data
    source = locate(data.root, data[f"{name}_annotations"])
    reads_masks = data.masks if name == "train" else data.val_masks
    split = Split(name, locate(data.root, data[f"{name}_images"]), Findings(source, config.examples, reads_masks))
    try:
        document = instantiate(data.reader)(source)
        split.categories, split.images = list(document["categories"]), list(document["images"])
        split.annotations = list(document["annotations"])
    except UserError as error:
        split.add("unusable annotation file", str(error))
        return split
    records.inspect_categories(split, classes if name == "train" else None)
    records.inspect_images(split, config.decode, _progress(name), config.data.max_pixels)
    objects.inspect_objects(split)
    masks.inspect_masks(split)
    return split


def _progress(name: str) -> Any:
    """A bar that counts images on the way, for a terminal only."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def show(files: Iterable[File], total: int) -> Iterable[File]:
        shown = console.is_terminal
        return track(files, f"{name} images", total, console=console, transient=True, disable=not shown)

    return show


def _write_json(path: Path, data: dict[str, Any]) -> None:
    import json

    from codetr.files import atomically

    with atomically(path, advice="choose another report=FILE") as part:
        part.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")


def _fix(splits: Sequence[Split], output: str | None) -> dict[Path, str]:
    """Original -> what was done about it. Raises UserError for files that are not COCO's."""
    from codetr.errors import UserError
    from codetr.inspection.clean import targets, write_clean

    readable = [s for s in splits if "unusable annotation file" not in s.findings.counts]
    for split in readable:
        if split.findings.source.suffix != ".json":
            raise UserError(
                f"{split.findings.source}: fix=true writes COCO files; see python -m codetr.data convert --help"
            )
    done = {}
    for split, target in zip(readable, targets(readable, Path(output) if output else None), strict=True):
        words = write_clean(split, target)
        left = {k: n for k, n in split.findings.unmended.items() if n and split.findings.severity(k) == "error"}
        rest = "".join(f"\n  not mended: {n} x {kind}" for kind, n in left.items())
        done[split.findings.source] = f"{words}; written to {target}{rest}"
    return done
