"""Detections for image files, from a checkpoint alone: `codetr predict checkpoint=FILE images=FOLDER`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from rich.progress import Progress

from codetr import application
from codetr.errors import UserError
from codetr.names import shown_lines

if TYPE_CHECKING:
    from codetr.inference import Exported, Model, Result
    from codetr.inference.outputs import Writer
    from codetr.inference.sources import Unreadable

_WORTH_A_BAR = 20  # batches of views


def predict(config: DictConfig) -> Path:
    """Detect, draw and write; returns the path of predictions.json, or, with `annotations`, of results_bbox.json.

    Raises UserError for bad files and keys; what was found before is kept (see `Writer`).
    """
    # Imported here, so that --help and --cfg answer at once.
    from codetr.inference import load
    from codetr.inference.film import is_film

    application.require(config, checkpoint="outputs/train/<date>/checkpoints/best.ckpt", images="photos")
    application.one_of(config, on_error=("stop", "skip"))
    trust = application.as_names(config.trust)
    model = load(config.checkpoint, device=config.device, weights=config.weights, trust=trust)
    model.views = application.views(config, model.views)
    if is_film(config.images):
        return _film(config, model)
    of_photos = config.annotations is None
    writer, sizes = _for_photos(config, model) if of_photos else _for_a_server(config, model)
    paths, threshold = writer.paths, config.score_threshold if of_photos else 0.0
    options = config.batch_size, config.num_workers, config.max_pixels, sizes
    try:
        with writer, Progress() as progress:
            track = partial(_track, progress)
            results = model.stream(paths, threshold, *options, track=track)
            skipped = _write(progress.track(results, len(paths), description="images"), writer, config.on_error)
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

    if model.category_ids is None:
        print(
            f"{config.checkpoint} does not tell the category ids of its data set: category_id is 0 for the first class "
            "and so on; annotations=FILE takes the ids of a COCO file"
        )
    paths = find_images(config.images)
    return _writer(config, paths, [model.path]), {}


def _writer(config: DictConfig, paths: list[Path], inputs: list[Path], **more: Any) -> Writer:
    from codetr.inference.outputs import Writer

    kinds = [config.formats] if isinstance(config.formats, str) else list(config.formats)
    shown = {"drawn_from": config.score_threshold, "formats": kinds}
    return Writer(Path(config.out), paths, config.pictures, inputs, **shown, **more)


def _for_a_server(config: DictConfig, model: Model | Exported) -> tuple[Writer, Sizes]:
    """With the images and all ids of `annotations`; the model takes over those of the categories."""
    from codetr.data import numbering

    file = Path(config.annotations)
    if not isinstance(config.images, str):
        raise UserError("images=[...]: with annotations=FILE give one folder, in which the images of that file lie")
    model.category_ids = tuple(numbering.category_ids(file, model.class_names))
    listed = numbering.listed_images(file, Path(config.images).expanduser(), absent=config.on_error == "skip")
    ids = [one.id for one in listed.values()]
    writer = _writer(config, list(listed), [model.path, file], image_ids=ids, masks=model.finds_masks)
    return writer, {path: one.size for path, one in listed.items()}


def _film(config: DictConfig, model: Model | Exported) -> Path:
    """Of a film, a stream or a camera; returns the path of the JSON lines."""
    from codetr.inference.film import Film
    from codetr.inference.film_outputs import FilmWriter
    from codetr.inference.film_run import Tracks, watch

    if config.annotations is not None or config.formats:
        raise UserError("annotations and formats are for images: of a film come lines of JSON and a film")
    film = Film(str(config.images), config.every, config.start, config.end)
    tracks = Tracks(film.rate / config.every, config.score_threshold) if config.track else None
    with FilmWriter(Path(config.out), film, config.pictures, [model.path]) as writer:
        print(watch(model, film, writer, tracks, config.score_threshold, config.batch_size))
    return writer.path


def _track(progress: Progress, items: Iterable[Any], total: int) -> Iterator[Any]:
    """With a bar below that of the images, of the views of one, where these take a while."""
    task = progress.add_task("views", total=total, visible=total >= _WORTH_A_BAR)
    for item in items:
        yield item
        progress.advance(task)
    progress.remove_task(task)


def _write(results: Iterable[Result | Unreadable], writer: Writer, on_error: str) -> int:
    """Returns how many files were skipped."""
    from codetr.inference import Result

    skipped = 0
    for one in results:
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
