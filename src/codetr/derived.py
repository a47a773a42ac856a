"""What follows from other keys of a training's configuration."""

from __future__ import annotations

from omegaconf import DictConfig


def read_needed_masks(config: DictConfig) -> None:
    """Fill `data.masks` and `data.val_masks` where they are null: whether the model has a use for the objects' masks.

    Mask R-CNN's branch, a mask head and a decoder of masks learn from those of the training set; only what the last two
    find is compared with those of the validation set.
    """
    data, detector = config.data, config.model.detector
    predicts = detector.get("mask_head") is not None or "mask_width" in detector.decoder
    learns = predicts or any(head.get("mask") is not None for head in detector.heads.values())
    data.masks = learns if data.masks is None else data.masks
    data.val_masks = predicts if data.val_masks is None else data.val_masks
