"""Detections for image files, from a checkpoint alone: `python -m codetr.predict checkpoint=FILE images=FOLDER`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from codetr import application
from codetr.errors import UserError


def predict(config: DictConfig) -> Path:
    """Detect, draw and write; returns the path of predictions.json. Raises UserError for bad files and keys."""
    # Imported here, so that --help and --cfg answer at once.
    from rich.progress import track

    from codetr import inference
    from codetr.application import build
    from codetr.data.readers.folder import find_images

    inference.require(config, images="photos")
    inference.one_of(config, on_error=("stop", "skip"))
    trained = inference.open_checkpoint(config)
    paths = find_images(config.images)
    writer = inference.Writer(Path(config.out), paths, trained.class_names, config.score_threshold, config.pictures)
    device = inference.pick_device(config.device)
    results = inference.detect(
        inference.finder(
            trained.detector.to(device), build(trained.config["postprocess"], config.checkpoint), config.score_threshold
        ),
        inference.ImageFiles(paths, build(trained.config["data"].get("val_transform"), config.checkpoint)),
        device=device,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        size_divisor=trained.size_divisor,
    )
    skipped = 0
    for one in track(results, "images", total=len(paths)):
        if isinstance(one, inference.Found):
            writer.add(one)
        elif config.on_error == "stop":
            raise UserError(f"{one.reason}; on_error=skip goes on without it")
        else:
            skipped += 1
            print(f"skipped: {one.reason}")
    path = writer.close()
    print(f"{len(writer.results)} objects in {len(paths) - skipped} images, {skipped} skipped: {path}")
    return path


def main() -> None:
    application.run(predict, config_name="predict")


if __name__ == "__main__":
    main()
