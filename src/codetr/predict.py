"""Detections for image files, from a checkpoint alone: `codetr predict checkpoint=FILE images=FOLDER`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from codetr import application
from codetr.errors import UserError
from codetr.names import shown_lines

if TYPE_CHECKING:
    from codetr.inference import Model, Result
    from codetr.inference.outputs import Writer
    from codetr.inference.sources import Unreadable


def predict(config: DictConfig) -> Path:
    """Detect, draw and write; returns the path of predictions.json. Raises UserError for bad files and keys.

    What was found before an error is in predictions.json all the same.
    """
    # Imported here, so that --help and --cfg answer at once.
    from codetr.data.readers.folder import find_images
    from codetr.inference import load

    application.require(config, checkpoint="outputs/train/<date>/checkpoints/best.ckpt", images="photos")
    application.one_of(config, on_error=("stop", "skip"))
    trust = application.as_names(config.trust)
    model = load(config.checkpoint, device=config.device, weights=config.weights, trust=trust)
    paths = find_images(config.images)
    with _writer(config, paths, model) as writer:
        results = model.stream(paths, config.score_threshold, config.batch_size, config.num_workers, config.max_pixels)
        try:
            skipped = _write(results, writer, len(paths), config.on_error)
        except UserError as error:
            done = f"{writer.done} of {len(paths)} images were done before and are in {writer.records.path}"
            raise UserError(f"{error}; {done}") from error
    path = writer.records.path
    print(f"{writer.records.count} objects in {len(paths) - skipped} images, {skipped} skipped: {path}")
    return path


def _writer(config: DictConfig, paths: list[Path], model: Model) -> Writer:
    """With the ids of `annotations`, which the model takes over, or else running numbers and its own category ids."""
    from codetr.data import numbering
    from codetr.inference.outputs import Writer

    numbers, inputs = list(range(len(paths))), [Path(config.checkpoint)]
    if config.annotations is not None:
        file = Path(config.annotations)
        inputs.append(file)
        model.category_ids = tuple(numbering.category_ids(file, model.class_names))
        numbers = numbering.image_ids(file, paths)
    elif model.category_ids is None:
        print(
            f"{config.checkpoint} does not tell the category ids of its data set: category_id is 0 for the first class "
            "and so on; annotations=FILE takes the ids of a COCO file"
        )
    return Writer(Path(config.out), paths, numbers, config.pictures, inputs)


def _write(results: Iterable[Result | Unreadable], writer: Writer, total: int, on_error: str) -> int:
    """Returns how many files were skipped."""
    from rich.progress import track

    from codetr.inference import Result

    skipped = 0
    for one in track(results, "images", total=total):
        if isinstance(one, Result):
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
