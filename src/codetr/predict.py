"""Detections for image files, from a checkpoint alone: `python -m codetr.predict checkpoint=FILE images=FOLDER`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from codetr import application
from codetr.errors import UserError
from codetr.names import shown_lines

if TYPE_CHECKING:
    from codetr.inference import Found, Trained, Unreadable, Writer


def predict(config: DictConfig) -> Path:
    """Detect, draw and write; returns the path of predictions.json. Raises UserError for bad files and keys.

    What was found before an error is in predictions.json all the same.
    """
    # Imported here, so that --help and --cfg answer at once.

    from codetr import inference
    from codetr.application import build
    from codetr.data.readers.folder import find_images

    inference.require(config, images="photos")
    inference.one_of(config, on_error=("stop", "skip"))
    trained = inference.open_checkpoint(config)
    paths = find_images(config.images)
    device = inference.pick_device(config.device)
    results = inference.detect(
        inference.finder(
            trained.detector.to(device), build(trained.config["postprocess"], config.checkpoint), config.score_threshold
        ),
        inference.ImageFiles(
            paths, build(trained.config["data"].get("val_transform"), config.checkpoint), config.max_pixels
        ),
        device=device,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        size_divisor=trained.size_divisor,
    )
    with _writer(config, paths, trained) as writer:
        try:
            skipped = _write(results, writer, len(paths), config.on_error)
        except UserError as error:
            done = f"{writer.done} of {len(paths)} images were done before and are in {writer.results.path}"
            raise UserError(f"{error}; {done}") from error
    path = writer.results.path
    print(f"{writer.results.count} objects in {len(paths) - skipped} images, {skipped} skipped: {path}")
    return path


def _writer(config: DictConfig, paths: list[Path], trained: Trained) -> Writer:
    """With the ids of `annotations`, or else those of the checkpoint's data set and running numbers."""
    from codetr.data import numbering
    from codetr.inference import Writer

    ids: Sequence[int] = trained.category_ids or range(len(trained.class_names))
    numbers: Sequence[int] = range(len(paths))
    inputs = [Path(config.checkpoint)]
    if config.annotations is not None:
        file = Path(config.annotations)
        inputs.append(file)
        ids, numbers = numbering.category_ids(file, trained.class_names), numbering.image_ids(file, paths)
    elif trained.category_ids is None:
        print(
            f"{config.checkpoint} does not tell the category ids of its data set: category_id is 0 for the first class "
            "and so on; annotations=FILE takes the ids of a COCO file"
        )
    names, threshold = trained.class_names, config.score_threshold
    return Writer(Path(config.out), paths, numbers, names, ids, threshold, config.pictures, inputs)


def _write(results: Iterable[Found | Unreadable], writer: Writer, total: int, on_error: str) -> int:
    """Returns how many files were skipped."""
    from rich.progress import track

    from codetr.inference import Found

    skipped = 0
    for one in track(results, "images", total=total):
        if isinstance(one, Found):
            writer.add(one)
        elif on_error == "stop":
            raise UserError(f"{one.reason}; on_error=skip goes on without it")
        else:
            skipped += 1
            print(f"skipped: {shown_lines(one.reason)}")
    return skipped


def main() -> None:
    application.run(predict, config_name="predict")


if __name__ == "__main__":
    main()
