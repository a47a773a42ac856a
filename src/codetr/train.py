"""Training: `python -m codetr.train experiment=...`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from codetr import application, resume
from codetr.errors import UserError

if TYPE_CHECKING:
    from codetr.models.detector import Detector


def train(config: DictConfig) -> float | None:
    """Train, then evaluate the best checkpoint. Returns the best value of `optimized_metric`."""
    # Imported here, so that --help and --cfg answer at once.
    from hydra.utils import instantiate
    from lightning import seed_everything

    from codetr.callbacks.resume import AtomicCheckpointIO, Checkpoints
    from codetr.checkpoint import load_weights, newest_whole
    from codetr.ops.distributed import meet_anew
    from codetr.task import DetectionTask
    from codetr.trainer import build_trainer

    meet_anew()
    # Every process has the numbers of all: the metric gathers. (Averaging them costs a collective per class.)
    warnings.filterwarnings("ignore", "It is recommended to use .*sync_dist=True")
    # Nothing changes a prediction in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    checkpoint = application.resume_from(config)
    if checkpoint is not None:
        checkpoint, earlier = newest_whole(checkpoint)
        config.resumed_step = earlier["global_step"]
        config.model.num_classes = len(earlier["codetr"]["class_names"])
        _compare(config, lambda: resume.check_configuration(checkpoint, earlier, application.plain(config)), earlier)
    elif config.resume:  # a run that was killed before its first checkpoint: all that it logged is logged again
        config.resumed_step = 0
    seed_everything(config.seed, workers=True, verbose=False)
    # Before any data is read: it may refuse.
    trainer = build_trainer(
        config.trainer,
        callbacks=list(instantiate(config.callbacks).values()),
        logger=list(instantiate(config.logger).values()),
        plugins=[AtomicCheckpointIO()],
    )
    data = instantiate(config.data)
    data.prepare_data()
    data.setup("fit")
    config.model.num_classes = len(data.class_names)
    about: dict[str, Any] = {"class_names": list(data.class_names), "train_set": data.train_set.fingerprint}
    if checkpoint is not None:
        _compare(config, lambda: resume.check_data(checkpoint, earlier, **about), earlier)
        del earlier  # the file stays mapped as long as its tensors
    category_ids = list(map(int, data.train_set.category_ids))
    settings = {"config": application.plain(config), "category_ids": category_ids, **about}
    task = DetectionTask(
        detector=instantiate(config.model.detector, _convert_="all"),
        criterion=instantiate(config.criterion, _convert_="all"),
        postprocess=instantiate(config.postprocess),
        metrics=instantiate(config.metrics, data.class_names),
        branches=config.branches,
        optimizer=instantiate(config.optimizer),
        schedule=instantiate(config.schedule),
        settings=settings,
    )
    if task.criterion.fed_loss is not None:
        task.criterion.fed_loss.weigh(list(data.train_set.image_counts.values()))
    if checkpoint is None:
        _initialise(config, task.detector, data.class_names)
    for logger in trainer.loggers:
        logger.log_hyperparams(settings["config"])
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    saved = trainer.checkpoint_callback
    best = saved.best_model_path if isinstance(saved, Checkpoints) else ""
    if not best or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    task.load_detector(load_weights(best).weights)
    trainer.validate(task, datamodule=data, verbose=False)
    return float(trainer.callback_metrics[config.optimized_metric])


def _compare(config: DictConfig, check: Callable[[], list[str]], earlier: Mapping[str, Any]) -> None:
    """Say what has changed since the checkpoint `earlier`; when it is refused, the run keeps its own configuration."""
    from lightning.pytorch.utilities import rank_zero_info

    try:
        lines = check()
    except UserError:
        application.keep_configuration(config, earlier["codetr"]["config"])
        raise
    for line in lines:
        rank_zero_info(f"resumed with a change: {line}")


def _initialise(config: DictConfig, detector: Detector, class_names: tuple[str, ...]) -> None:
    if config.initialise.checkpoint is None:
        return
    from rich import print

    from codetr.checkpoint import initialise_from, load_weights

    weights = load_weights(Path(config.initialise.checkpoint), config.initialise.average)
    print(initialise_from(detector, weights, class_names, config.initialise.strict).table())


def main() -> None:
    application.run(train, config_name="train")


if __name__ == "__main__":
    main()
