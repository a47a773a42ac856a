"""What follows from other keys of a training's configuration."""

from __future__ import annotations

from omegaconf import DictConfig


def read_needed_masks(config: DictConfig) -> None:
    """Fill `data.masks` and `data.val_masks` where they are null: whether the model has a use for the objects' masks.

    Mask R-CNN's branch, a mask head and a decoder of masks learn from those of the training set; only what the last two
    find is compared with those of the validation set.
    """
    data, detector = config.data, config.model.detector
    of_queries = "mask_width" in detector.decoder
    predicts = of_queries or detector.get("mask_head") is not None
    learns = of_queries or learns_from_regions(config)
    data.masks = learns if data.masks is None else data.masks
    data.val_masks = predicts if data.val_masks is None else data.val_masks


def learns_from_regions(config: DictConfig) -> bool:
    """Whether masks of regions are learned, which are as many as images show: by Mask R-CNN's branch or a mask head."""
    detector = config.model.detector
    heads = detector.heads.values()
    return detector.get("mask_head") is not None or any(head.get("mask") is not None for head in heads)
