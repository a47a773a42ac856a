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
    from codetr.inference import Exported, Model, Result
    from codetr.inference.outputs import Writer
    from codetr.inference.sources import Unreadable


def predict(config: DictConfig) -> Path:
    """Detect, draw and write; returns the path of predictions.json, or, with `annotations`, of results_bbox.json.

    Raises UserError for bad files and keys; what was found before is kept (see `Writer`).
    """
    # Imported here, so that --help and --cfg answer at once.
    from codetr.inference import load

    application.require(config, checkpoint="outputs/train/<date>/checkpoints/best.ckpt", images="photos")
    application.one_of(config, on_error=("stop", "skip"))
    trust = application.as_names(config.trust)
    model = load(config.checkpoint, device=config.device, weights=config.weights, trust=trust)
    if config.get("tiles"):
        from hydra.utils import instantiate

        model.tiles = instantiate(config.tiles)
    of_photos = config.annotations is None
    writer, sizes = _for_photos(config, model) if of_photos else _for_a_server(config, model)
    paths, threshold = writer.paths, config.score_threshold if of_photos else 0.0
    results = model.stream(paths, threshold, config.batch_size, config.num_workers, config.max_pixels, sizes)
    try:
        with writer:
            skipped = _write(results, writer, len(paths), config.on_error)
    except UserError as error:
        done = f"{writer.done} of {len(paths)} images were done before and are in {writer.records.path}"
        raise UserError(f"{error}; {done}") from error
    path = writer.records.path
    print(f"{writer.records.count} objects in {len(paths) - skipped} images, {skipped} skipped: {path}")
    return path


Sizes = dict[Path, tuple[int, int]]
"""(height, width) of files."""


def _for_photos(config: DictConfig, model: Model | Exported) -> tuple[Writer, Sizes]:
    """With running numbers for images, and the model's own category ids."""
    from codetr.data.readers.folder import find_images
    from codetr.inference.outputs import Writer

    if model.category_ids is None:
        print(
            f"{config.checkpoint} does not tell the category ids of its data set: category_id is 0 for the first class "
            "and so on; annotations=FILE takes the ids of a COCO file"
        )
    paths = find_images(config.images)
    return Writer(Path(config.out), paths, config.pictures, [model.path], drawn_from=config.score_threshold), {}


def _for_a_server(config: DictConfig, model: Model | Exported) -> tuple[Writer, Sizes]:
    """With the images and all ids of `annotations`; the model takes over those of the categories."""
    from codetr.data import numbering
    from codetr.inference.outputs import Writer

    file = Path(config.annotations)
    if not isinstance(config.images, str):
        raise UserError("images=[...]: with annotations=FILE give one folder, in which the images of that file lie")
    model.category_ids = tuple(numbering.category_ids(file, model.class_names))
    listed = numbering.listed_images(file, Path(config.images).expanduser(), absent=config.on_error == "skip")
    writer = Writer(
        Path(config.out),
        list(listed),
        config.pictures,
        [model.path, file],
        image_ids=[one.id for one in listed.values()],
        masks=model.finds_masks,
        drawn_from=config.score_threshold,
    )
    return writer, {path: one.size for path, one in listed.items()}


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
