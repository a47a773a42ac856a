"""The mask head of the official instance models against tensors recorded from the official code: stages, chosen
regions, targets, losses, gradients and pasted masks."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle import Bundle, close, load, recorded_draws

from codetr.convert.weights import table
from codetr.heads.mask import region_masks
from codetr.heads.paste import paste_masks
from codetr.heads.refine_mask import RefineMaskHead
from codetr.heads.regions import Regions, sample_regions
from codetr.nn.boxes import best_pairs
from codetr.types import Detections, Prediction, Pyramid, box_scale

LAMBDA_2_X_LAYERS = 4


@dataclass
class Case:
    """The bundle, and the pyramid of its recorded memory."""

    bundle: Bundle
    pyramid: Pyramid

    @property
    def head(self) -> RefineMaskHead:
        return self.bundle.detector.mask_head

    def last_layer(self, which: str) -> Prediction:
        """The candidates of the official training step: with the denoising queries, or (no_cdn) without."""
        logits, boxes = (self.bundle.train[f"train.{name}"][-1] for name in ("cls_logits", "boxes"))
        own = slice(0 if which == "train" else -self.bundle.forward["boxes"].shape[2], None)
        return Prediction(logits[:, own], boxes[:, own])

    def recorded_regions(self) -> Regions:
        """The positive ones, padded."""
        train, found = self.bundle.train, Regions(torch.zeros(2, 30, 4), torch.full((2, 30), -1))
        for i in range(2):
            record = {k: train[f"train.instance_sample.img{i}.{k}"] for k in ("boxes", "pos_inds")}
            matched_index = train[f"train.instance_sample.img{i}.pos_assigned_gt_inds"]
            everything = torch.cat([self.bundle.inputs[f"gt_boxes.{i}"], record["boxes"][:, :4]])
            found.boxes[i, : len(matched_index)], found.matched_index[i, : len(matched_index)] = (
                everything[record["pos_inds"]],
                matched_index,
            )
        return found


@pytest.fixture(scope="module")
def case(official: Path) -> Case:
    bundle = load(official / "co_dino_5scale_vit_instance")
    bundle.detector.mask_head.regions_per_pass = 7  # fewer than there are
    with torch.no_grad():
        return Case(bundle, bundle.detector.adapter(replace(bundle.encode(), tokens=bundle.forward["memory"])))


def test_stages_and_mask_iou(case: Case) -> None:
    rois, labels = case.bundle.aux["roi.rois"][:8], case.bundle.aux["instance.labels"]
    images, boxes = rois[:, 0].long(), rois[:, 1:]
    pooled = case.head.pool.regions(case.pyramid, images, boxes)
    close(pooled[:2], case.bundle.aux["instance.roi_feats"])
    with torch.no_grad():
        logits, iou = case.head(case.pyramid, case.head.semantics(case.pyramid), images, boxes, labels)
        every_class = case.head.iou(pooled, logits[1])
    assert [one.shape[-1] for one in logits] == [14, 28, 56, 112]
    for i, own in enumerate(logits):
        expected = case.bundle.aux[f"instance.stage_logits.{i}"][:, 0]
        close(own[: len(expected)], expected)
    close(every_class, case.bundle.aux["instance.mask_iou"])
    close(iou, case.bundle.aux["instance.mask_iou"][torch.arange(8), labels])


def test_regions_are_the_same(case: Case) -> None:
    """The boxes of the last layer's best pairs, and which of them, after the objects, own an object."""
    scores, _, boxes = best_pairs(case.last_layer("train"), case.bundle.targets.frames.sizes, case.head.num_candidates)
    assert (scores > 0).all()
    with recorded_draws():
        found = sample_regions(boxes, scores > 0, case.bundle.targets, 0.5, 128, 128)
    recorded = case.recorded_regions()
    for i in range(2):
        close(boxes[i], case.bundle.train[f"train.instance_sample.img{i}.boxes"][:, :4])
        own, expected = found.matched_index[i] >= 0, recorded.matched_index[i] >= 0
        assert torch.equal(found.matched_index[i, own], recorded.matched_index[i, expected])
        close(found.boxes[i, own], recorded.boxes[i, expected])


def test_targets_of_every_stage(case: Case) -> None:
    regions = case.recorded_regions()
    images, places = torch.where(regions.matched_index >= 0)
    given = (case.bundle.targets.masks, case.bundle.targets.valid, images, regions.matched_index[images, places])
    for i, size in enumerate((14, 28, 56, 112)):
        expected = case.bundle.train[f"train.instance_target.{i}"]
        shown = region_masks(*given, regions.boxes[images, places], size)[: len(expected)]
        assert torch.equal(shown, expected.float())


@pytest.mark.parametrize("which", ["train", "no_cdn"])
def test_losses_and_gradients(case: Case, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both losses, and the norm of the gradient of every parameter of both heads. With torchvision's RoIAlign, as was
    recorded: added up in another order, a hidden unit next to zero changes sides, and norms by 1e-4."""
    monkeypatch.setenv("CODETR_ROI_ALIGN", "reference")
    with recorded_draws():
        losses = case.head.losses(case.pyramid, case.last_layer(which), case.bundle.targets)
    masks = sum(losses[f"stage{i}"] for i in range(4))
    close(masks * LAMBDA_2_X_LAYERS, case.bundle.train[f"{which}.loss.loss_mask"])
    close(losses["iou"] * LAMBDA_2_X_LAYERS, case.bundle.train[f"{which}.loss.loss_mask_iou"])
    names = table(case.bundle.detector)
    gradients = torch.autograd.grad(sum(losses.values()) * LAMBDA_2_X_LAYERS, list(case.head.parameters()))
    norms = case.bundle.account["grad_norm"][which]
    for (name, _), gradient in zip(case.head.named_parameters(), gradients, strict=True):
        close(gradient.norm(), torch.tensor(norms[names.to_theirs(f"mask_head.{name}")]))


def test_masks_of_detections(case: Case) -> None:
    """The official test, run for the first image: every mask's area, some masks, every score; by class there."""
    prefix, recorded = "simple_test.img0.", case.bundle.detections
    record = {name.removeprefix(prefix): value for name, value in recorded.items() if name.startswith(prefix)}
    rows = record["per_class"]
    scale = box_scale(case.bundle.inputs["img_shape"][:1]) / box_scale(case.bundle.inputs["ori_shape"][:1])
    detections = [Detections(rows[:, 4], rows[:, 5].long(), rows[:, :4] * scale)]
    pyramid = Pyramid([level[:1] for level in case.pyramid.levels], case.pyramid.strides)
    (found,) = case.head.segment(pyramid, detections)
    masks = paste_masks(found.inside, rows[:, :4], (96, 240))
    for label in detections[0].labels.unique():
        own = detections[0].labels == label
        close(found.scores[own], record[f"mask_score.class{label}"])
        area = record[f"mask_area.class{label}"]
        assert torch.equal(masks[own].sum((1, 2)), area)
        packed = record[f"mask_first2_packed.class{label}"]
        assert np.array_equal(np.packbits(masks[own][:2].numpy(), axis=-1), packed.numpy())
