"""Evaluation of a checkpoint: `codetr eval checkpoint=FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from codetr import application
from codetr.errors import UserError

if TYPE_CHECKING:
    from codetr.inference import Exported, Model
    from codetr.validation import Validation


def evaluate(config: DictConfig) -> float:
    """Returns mAP. Raises UserError for a checkpoint, data or key that is wrong."""
    # Imported here, so that --help and --cfg answer at once.
    from hydra.utils import instantiate
    from lightning import seed_everything

    from codetr.inference import Exported, load
    from codetr.ops.distributed import meet_anew
    from codetr.trainer import build_trainer
    from codetr.trust import build

    meet_anew()
    application.require(config, checkpoint="outputs/train/<date>/checkpoints/best.ckpt")
    application.one_of(config, split=("val", "train"))
    trust = application.as_names(config.trust)
    model = load(config.checkpoint, device="cpu", weights=config.weights, trust=trust)  # the trainer moves it
    seed_everything(config.seed, workers=True, verbose=False)
    task = _of_exported(config, model) if isinstance(model, Exported) else _of_checkpoint(config, model)
    given = data_config(config, model.config["data"], model.class_names)
    given.val_masks = model.finds_masks
    data = build(given, model.path)
    trainer = build_trainer(
        config.trainer,
        callbacks=list(instantiate(callbacks_config(config, model.step)).values()),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.validate(task, datamodule=data, verbose=False)
    return task.metrics["val"].evaluations["bbox"].numbers["map"]


def _of_checkpoint(config: DictConfig, model: Model) -> Validation:
    from hydra.utils import instantiate

    from codetr.task import DetectionTask
    from codetr.trust import build as build_part

    saved, build = model.config, partial(build_part, source=model.path)
    model.detector.keep_group(config.group)
    kept = _with_enough(saved["postprocess"], config.metrics.max_detections)
    return DetectionTask(
        detector=model.detector,
        criterion=build(saved["criterion"]),
        postprocess=instantiate(config.postprocess) if config.get("postprocess") else build(kept),
        metrics=instantiate(config.metrics, model.class_names),
        evaluate_heads=config.evaluate_heads,
        optimizer=build(saved["optimizer"]),
        schedule=build(saved["schedule"]),
        settings={},
        normalise_over_step=False,
        views=application.views(config, model.views),
    )


def _of_exported(config: DictConfig, model: Exported) -> Validation:
    from hydra.utils import instantiate

    from codetr.validation import Validated

    for key, plain in {"postprocess": None, "evaluate_heads": False, "group": 1}.items():
        if config.get(key, plain) != plain:
            raise UserError(f"{key}: {model.path} is an exported file, whose graph is what it is; give its checkpoint")
    counted, kept = config.metrics.max_detections, model.about.max_detections
    if kept < counted:
        raise UserError(
            f"metrics.max_detections={counted} counts more detections of an image than the {kept} that {model.path} "
            f"finds: evaluate with metrics.max_detections={kept}, or export with max_detections={counted}"
        )
    metrics = instantiate(config.metrics, model.class_names)
    masks = metrics(iou_type="segm") if model.finds_masks else None
    views = application.views(config, model.views)
    return Validated(partial(model.detect, score_threshold=0.0), metrics(), masks, views)


def _with_enough(postprocess: dict[str, Any], counted: int) -> dict[str, Any]:
    """The checkpoint's, keeping at least as many detections of an image as the evaluation counts."""
    most = postprocess.get("max_detections")
    return postprocess if most is None else {**postprocess, "max_detections": max(most, counted)}


def data_config(config: DictConfig, saved: dict[str, Any], class_names: Sequence[str]) -> DictConfig:
    """The data set given, or the checkpoint's with the values given; labels are those of the checkpoint."""
    given = application.plain(config).get("data") or {}
    data: DictConfig = OmegaConf.create(given if "_target_" in given else {**saved, **given})
    data.classes = list(class_names)
    if config.split == "train":
        data.val_images, data.val_annotations = data.get("train_images"), data.get("train_annotations")
    # The training set is not read, and may be absent.
    data.train_images, data.train_annotations = data.get("val_images"), data.get("val_annotations")
    return data


def callbacks_config(config: DictConfig, step: int) -> DictConfig:
    """The callbacks; the report says what was evaluated."""
    callbacks = config.callbacks.copy()
    if "report" in callbacks:
        with open_dict(callbacks):
            about = {key: config[key] for key in ("checkpoint", "weights", "split")}
            callbacks.report.about = {**callbacks.report.about, **about, "step": step}
    return callbacks


def main() -> None:
    application.run(evaluate, config_name="eval")


if __name__ == "__main__":
    main()
