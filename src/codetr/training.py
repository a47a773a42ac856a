"""Training: `codetr train experiment=...`, and `codetr.train("experiment=...")` in Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from codetr import application, resume, run_directory
from codetr.derived import read_needed_masks
from codetr.errors import UserError

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer

    from codetr.data.datamodule import DetectionDataModule
    from codetr.inference import Model
    from codetr.models.detector import Detector
    from codetr.task import DetectionTask

AUTO = "auto"  # of data.batch_size
PROBES = 64  # images that tell how large a batch can be


@dataclass(frozen=True)
class Run:
    """A training that is over.

    folder: its configuration, checkpoints, logs, tables and pictures. best: the checkpoint of the best validation, None
    where none was written. metrics: of that checkpoint on the validation images, by name: "map", "map_50", ...,
    "ap/<class>". score: its value of `optimized_metric`.
    """

    folder: Path
    best: Path | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None

    def model(self) -> Model:
        """The best checkpoint, opened. Raises UserError where there is none."""
        from codetr.inference.model import load_checkpoint

        if self.best is None:
            raise UserError(f"{self.folder}: no best checkpoint was written; train for at least one validation")
        return load_checkpoint(self.best)


def train(*overrides: str, config_dir: str | None = None) -> Run:
    """Train a detector, as `codetr train` does with the same overrides, and wait for its end.

    overrides: "experiment=demo", "data.root=/data/coco", "trainer.max_epochs=3", ... (`codetr train --help` lists
    groups and examples). config_dir: a folder with configurations of your own. With several devices each process runs
    your program, so that `run_dir` has to be given.

    Raises UserError for a configuration or data that is wrong.
    """
    from hydra.errors import HydraException

    from codetr import failure

    config = application.start(overrides, "train", config_dir)
    try:
        return fit(config)
    except HydraException as error:
        if refused := failure.refusal(error):
            raise refused from error
        raise


def fit(config: DictConfig) -> Run:
    """Train, then evaluate the best checkpoint."""
    # Imported here, so that --help and --cfg answer at once.
    from hydra.utils import instantiate
    from lightning import seed_everything

    from codetr.callbacks.dashboards import log_configuration
    from codetr.callbacks.resume import AtomicCheckpointIO
    from codetr.checkpoint import newest_whole
    from codetr.ops.distributed import meet_anew
    from codetr.trainer import build_trainer

    meet_anew()
    read_needed_masks(config)
    if config.compile and not config.static_shapes:
        raise UserError(f"compile={config.compile}: every other shape is compiled anew; set static_shapes=true, too")
    _expect_warnings()
    checkpoint = run_directory.resume_from(config)
    if checkpoint is not None:
        checkpoint, earlier = newest_whole(checkpoint)
        if config.data.batch_size == AUTO:
            config.data.batch_size = earlier["codetr"]["config"]["data"]["batch_size"]
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
    data = _data(config, trainer)
    train_set = data.train_set
    assert train_set is not None, "_data sets it up"
    about: dict[str, Any] = {"class_names": list(data.class_names), "train_set": train_set.fingerprint}
    if checkpoint is not None:
        _compare(config, lambda: resume.check_data(checkpoint, earlier, **about), earlier)
        del earlier  # the file stays mapped as long as its tensors
    category_ids = list(map(int, train_set.category_ids))
    settings = {"config": application.plain(config), "category_ids": category_ids, **about}
    task = _task(config, data, settings)
    if checkpoint is None:
        _initialise(config, task.detector, data.class_names)
    for logger in trainer.loggers:
        log_configuration(logger, settings["config"])
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return _with_best(config, trainer, task, data)


def _expect_warnings() -> None:
    # Every process has the numbers of all: the metric gathers. (Averaging them costs a collective per class.)
    warnings.filterwarnings("ignore", "It is recommended to use .*sync_dist=True")
    # What `freeze` names is meant to be.
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode at the start of training")
    # Nothing changes a prediction in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")


def _data(config: DictConfig, trainer: Trainer) -> DetectionDataModule:
    """Read for training; `config` learns the number of classes, and the size of a batch that it leaves to us."""
    from hydra.utils import instantiate

    automatic = config.data.batch_size == AUTO
    if automatic:
        _check_automatic(trainer)
        config.data.batch_size = 1
    data: DetectionDataModule = instantiate(config.data)
    data.prepare_data()
    data.setup("fit")
    config.model.num_classes = len(data.class_names)
    if automatic:
        config.data.batch_size = data.batch_size = _batch_size(config, data, trainer.strategy.root_device)
    return data


def _with_best(config: DictConfig, trainer: Trainer, task: DetectionTask, data: DetectionDataModule) -> Run:
    """The run with the numbers of its best checkpoint, which is evaluated once more."""
    from codetr.callbacks.resume import Checkpoints
    from codetr.checkpoint import load_weights

    saved, folder = [own for own in trainer.checkpoint_callbacks if isinstance(own, Checkpoints)], Path(config.run_dir)
    best = saved[0].best_model_path if saved else ""
    if not best or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return Run(folder)
    task.load_detector(load_weights(best).weights)
    trainer.validate(task, datamodule=data, verbose=False)
    numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
    of_best = {name.removeprefix("val/"): value for name, value in numbers.items() if name.startswith("val/")}
    return Run(folder, Path(best), of_best, numbers[config.optimized_metric])


def _check_automatic(trainer: Trainer) -> None:
    """Raises UserError for a device whose memory nobody can ask, and for several, which each would find another."""
    if trainer.strategy.root_device.type != "cuda":
        raise UserError(
            "data.batch_size=auto asks a GPU for its memory, and there is none: give a number (codetr estimate "
            "says what batches take)"
        )
    if trainer.world_size > 1:
        raise UserError(
            f"data.batch_size=auto chooses for one device, and there are {trainer.world_size}: give a number (codetr "
            "estimate says what batches take)"
        )


def _batch_size(config: DictConfig, data: DetectionDataModule, device: torch.device) -> int:
    """As many images of these data as the device holds, and no more than there are."""
    import torch
    from rich import print

    from codetr.costs.automatic import fitting_batch

    assert data.train_set is not None, "setup() comes first"
    size, objects = data.largest_sample(PROBES)
    memory = torch.cuda.mem_get_info(device)[0]
    found = fitting_batch(config, len(data.class_names), objects, size, device, memory)
    found = min(found, len(data.train_set))
    print(
        f"data.batch_size={found}: images of up to {size[0]} x {size[1]} pixels with up to {objects} objects, "
        f"{memory / 2**30:.1f} GiB free; optimizer.lr stays {config.optimizer.lr:g}"
    )
    return found


def _task(config: DictConfig, data: DetectionDataModule, settings: dict[str, Any]) -> DetectionTask:
    """settings: what its checkpoints say about their model."""
    from hydra.utils import instantiate

    from codetr.task import DetectionTask

    assert data.train_set is not None, "setup() comes first"
    task = DetectionTask(
        detector=instantiate(config.model.detector, _convert_="all"),
        criterion=instantiate(config.criterion, _convert_="all"),
        postprocess=instantiate(config.postprocess),
        metrics=instantiate(config.metrics, data.class_names),
        evaluate_heads=config.evaluate_heads,
        optimizer=instantiate(config.optimizer),
        schedule=instantiate(config.schedule),
        settings=settings,
        normalise_over_step=config.normalise_over_step,
        compile=config.compile,
        views=application.views(config, ()),
    )
    task.detector.freeze([config.freeze] if isinstance(config.freeze, str) else config.freeze)
    if task.criterion.fed_loss is not None:
        task.criterion.fed_loss.weigh(list(data.train_set.image_counts.values()))
    return task


def _compare(config: DictConfig, check: Callable[[], list[str]], earlier: Mapping[str, Any]) -> None:
    """Say what has changed since the checkpoint `earlier`; when it is refused, the run keeps its own configuration."""
    from lightning.pytorch.utilities import rank_zero_info

    try:
        lines = check()
    except UserError:
        run_directory.keep_configuration(config, earlier["codetr"]["config"])
        raise
    for line in lines:
        rank_zero_info(f"resumed with a change: {line}")


def _initialise(config: DictConfig, detector: Detector, class_names: tuple[str, ...]) -> None:
    if config.initialise.checkpoint is None:
        return
    from rich import print

    from codetr.checkpoint import initialise_from, load_weights

    weights = load_weights(Path(config.initialise.checkpoint), config.initialise.average)
    print(initialise_from(detector, weights, class_names, config.initialise.strict).table(weights.path))


def main() -> None:
    """From the command line; a sweep maximises what this returns."""
    application.run(lambda config: fit(config).score, config_name="train")
