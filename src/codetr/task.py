"""What Lightning calls: a detector with its losses, its evaluation and its optimizer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codetr import resume
from codetr.criterion import GroupCriterion
from codetr.errors import UserError
from codetr.evaluation.mean_ap import MeanAveragePrecision
from codetr.instances import with_masks
from codetr.models.detector import Detector
from codetr.ops.normaliser import measure, normalised_by
from codetr.optim import Schedule, set_again, settings_of
from codetr.postprocess import MaskPostProcess, PostProcess
from codetr.trainer import fused_optimizer
from codetr.types import MAIN, Batch, Seen, Targets
from codetr.validation import Validation
from codetr.views import Found, Views


class DetectionTask(Validation):
    """Trains and evaluates `detector`.

    metrics: (iou_type="bbox" or "segm") -> metric. The task's `metrics` are a dict of them, by the names under which
    their numbers are logged: "val", of boxes; "val/segm", of masks, where the detector finds and the validation set has
    masks (`data.val_masks`); "val/branch/<head>", with `evaluate_heads`, of every auxiliary head on its own, with its
    suppression (Co-DETR, table 11). optimizer: (module, fused) -> optimizer. settings: what a checkpoint says about its
    model: plain containers. normalise_over_step: where gradients of several batches are accumulated, losses are divided
    by what all of them hold together, for which each is first run without gradients; False: each by what it holds.
    compile: the backend of `torch.compile` for the losses of a step; None: as they are. Validation stays as it is.
    views: by which validation images are looked at, see `codetr.views`; none: as they come in batches.
    Raises UserError where fewer detections of an image are kept than `metrics` counts, and for losses or detections
    that are not of what the detector predicts.
    Losses go to the loggers every `log_every_n_steps` steps of the trainer, in one device-to-host copy.
    """

    def __init__(
        self,
        detector: Detector,
        criterion: GroupCriterion,
        postprocess: PostProcess | MaskPostProcess,
        metrics: Callable[..., MeanAveragePrecision],
        evaluate_heads: bool,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Schedule,
        settings: dict[str, Any],
        normalise_over_step: bool,
        compile: str | None = None,
        views: Sequence[Views] = (),
    ) -> None:
        super().__init__({"val": metrics()}, views)
        require_alike(detector, criterion, postprocess)
        if detector.finds_masks:
            self.metrics["val/segm"] = metrics(iou_type="segm")
        if evaluate_heads:
            self.metrics |= {f"val/branch/{name}": metrics() for name in detector.heads}
        if not views:  # of several each may keep fewer
            require_enough(postprocess, self.counted, detector if evaluate_heads else None)
        self.detector, self.criterion, self.postprocess = detector, criterion, postprocess
        self.evaluate_heads = evaluate_heads
        self.optimizer, self.schedule = optimizer, schedule
        self.settings, self.normalise_over_step = settings, normalise_over_step
        self._step_losses = self._losses if compile is None else compiled(self._losses, compile)
        self._means: list[Tensor] | None = None  # by which the losses of the step's batches are normalised
        self.seen: deque[Seen] = deque(maxlen=0)  # of the batches since the last optimizer step
        self._logged_step = -1
        self._steps_ahead = 0

    def configure_model(self) -> None:
        """Shard (FSDP2) when the strategy has a device mesh: each layer, the backbone, and the rest."""
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = self.device_mesh["data_parallel"]
        detector = self.detector
        stacks = [detector.get_submodule(f"{part}.layers") for part in ("encoder", "decoder")]
        layers = [layer for stack in stacks for layer in stack.children()]
        for parameter in detector.parameters():  # shards are rows, whatever the format in memory
            parameter.data = parameter.data.contiguous()
        for module in (*layers, detector.get_submodule("backbone"), detector):
            if not isinstance(module, FSDPModule):
                fully_shard(module, mesh=mesh)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        optimizer = self.optimizer(self.detector, fused=fused_optimizer(self.trainer))
        self._steps_per_epoch = -(-self._batches() // self.trainer.accumulate_grad_batches)
        scheduler = self.schedule.attach(optimizer, self._position)
        self._optimizer_settings = settings_of(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _position(self, step: int) -> tuple[float, float]:
        """Of a step, in epochs; and epochs in all."""
        trainer, steps = self.trainer, self._steps_per_epoch
        epochs = float("inf") if trainer.max_epochs in (None, -1) else float(trainer.max_epochs)
        if trainer.max_steps != -1:
            epochs = min(epochs, (trainer.max_steps + self._steps_ahead) / steps)
        return (step + self._steps_ahead) / steps, epochs

    def _batches(self) -> int:
        """Of an epoch, on this process.

        Not `trainer.estimated_stepping_batches`: that sets up the data before a resumed run knows its position in
        it, and Lightning then never tells the loader.
        """
        trainer = self.trainer
        batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        limit = trainer.limit_train_batches
        return max(1, min(batches, limit) if isinstance(limit, int) else int(batches * limit))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sampler = self.trainer.datamodule.train_dataloader().batch_sampler  # type: ignore[attr-defined]
        batches, accumulate = self._batches(), self.trainer.accumulate_grad_batches
        self._steps_ahead = resume.go_on(checkpoint, sampler, batches, accumulate)

    def on_train_start(self) -> None:
        self.seen = deque(maxlen=self.trainer.accumulate_grad_batches)
        if self.trainer.fit_loop.restarted_on_epoch_end:
            resume.begin_next_epoch(self.trainer.fit_loop)
        set_again(self.lr_schedulers(), self._optimizer_settings)  # type: ignore[arg-type]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        accumulate = self.trainer.accumulate_grad_batches
        first = batch_idx // accumulate * accumulate
        batches = min(accumulate, int(self.trainer.num_training_batches) - first)  # the last step of an epoch has fewer
        if batch_idx == first:
            together = self.normalise_over_step and batches > 1
            self._means = self._measure([batch, *batch.ahead[: batches - 1]]) if together else None
        with normalised_by(self._means):
            losses = self._step_losses(batch.images, batch.padding, batch.targets)
        terms = torch.stack(list(losses.values()))
        loss = terms.sum()
        self.seen.append(Seen(tuple(losses), terms.detach(), batch.image_ids))
        self.log("train/loss", loss.detach(), prog_bar=True, logger=False)
        self._log_losses({"loss": loss, **losses})
        # A factor of one; NaN where the loss is not finite: then its gradient is not either, and every process sees it.
        # Lightning divides by `accumulate`, also where the step has fewer batches.
        return loss * (loss.detach() * 0 + 1) * (accumulate / batches)

    def _losses(self, images: Tensor, padding: Tensor, targets: Targets) -> dict[str, Tensor]:
        return self.criterion(self.detector(images, padding, targets), targets)

    @torch.no_grad()
    def _measure(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The normalisers of a step. Leaves random states and running statistics as they were: the draws repeat."""
        buffers = list(self.detector.buffers())
        before = [buffer.clone() for buffer in buffers]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            here = (batch.to(self.device) for batch in batches)
            means = measure(partial(self._losses, batch.images, batch.padding, batch.targets) for batch in here)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        torch.clear_autocast_cache()  # casts of the weights that no gradient flows through
        return means

    def _log_losses(self, losses: dict[str, Tensor]) -> None:
        """Straight to the loggers: Lightning's own bookkeeping of a hundred names costs more than their losses."""
        step, every = self.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self._logged_step or step % every or not self.trainer.is_global_zero:
            return
        self._logged_step = step
        values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
        numbers = {f"train/{name}": value for name, value in zip(losses, values, strict=True)}
        numbers |= {"train/lr": self.trainer.optimizers[0].param_groups[0]["lr"], "epoch": self.current_epoch}
        for logger in self.loggers:
            logger.log_metrics(numbers, step)

    def find(self, batch: Batch, masks: bool) -> list[Found]:
        frames = batch.frames
        output = self.detector(batch.images, batch.padding)
        found = {"val": self.postprocess(output.predictions[MAIN].last, frames.sizes)}
        if self.evaluate_heads:
            by_head = self.detector.detect_with_heads(output.memory, frames.sizes)
            found |= {f"val/branch/{name}": own for name, own in by_head.items()}
        in_files = {name: frames.to_files(own) for name, own in found.items()}
        if masks or self.detector.decoder.predicts_masks:
            in_files["val"] = with_masks(self.detector, output.memory, found["val"], frames)
        return [dict(zip(in_files, one, strict=True)) for one in zip(*in_files.values(), strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["codetr"] = self.settings

    def load_detector(self, weights: dict[str, Any]) -> None:
        """Full weights into the detector, whose own may be shards."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(self.detector, weights, options=StateDictOptions(full_state_dict=True))


def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """By `torch.compile`. Random numbers stay PyTorch's own: the pass that measures a step's normalisers, which is not
    compiled, draws the same."""
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    return torch.compile(function, backend=backend, options=options)


def require_alike(detector: Detector, criterion: object, postprocess: object) -> None:
    """Raises UserError for losses or detections of boxes where masks are predicted, or of masks where boxes are."""
    masks = detector.decoder.predicts_masks
    for key, part in (("criterion", criterion), ("postprocess", postprocess)):
        if getattr(part, "of_masks", False) != masks:
            fitting = "masks" if masks else "focal" if key == "criterion" else "top_k"
            predicted = "masks" if masks else "boxes"
            raise UserError(
                f"{key}: {type(part).__name__} does not take the {predicted} that "
                f"model.detector.decoder predicts; choose {key}={fitting}"
            )


def require_enough(postprocess: PostProcess | MaskPostProcess, counted: int, evaluated: Detector | None) -> None:
    """counted: detections of an image that metrics count. evaluated: the detector whose heads are, too. What a part of
    another package keeps, it may not tell."""
    kept = {"postprocess": getattr(postprocess, "max_detections", None)}
    for name, head in evaluated.heads.items() if evaluated is not None else ():
        of_dense = hasattr(head, "selection")
        key = f"model.detector.heads.{name}{'.selection' * of_dense}"
        kept[key] = getattr(head.selection if of_dense else head, "max_detections", None)
    for key, most in kept.items():
        if most is not None and most < counted:
            raise UserError(
                f"metrics.max_detections={counted} counts more detections of an image than "
                f"{key}.max_detections={most} keeps: set both to the same number"
            )
