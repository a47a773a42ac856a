"""The mask head of the official instance models against tensors recorded from the official code: stages, chosen
regions, targets, losses, gradients and pasted masks; and the names and shapes of both published models."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle import close, fixed_order, padded_targets
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor

from codetr.convert.instance import RULES
from codetr.convert.names import NameTable
from codetr.heads.mask import region_masks
from codetr.heads.refine_mask import RefineMaskHead
from codetr.heads.regions import Regions, predicted_boxes, sample_regions
from codetr.types import Detections, Prediction, Pyramid, Targets

LAMBDA_2_X_LAYERS = 4
PUBLISHED = {"co_dino_5scale_vit_large_coco_instance": 80, "co_dino_5scale_lsj_vit_large_lvis_instance": 1203}


def composed(width: int, num_classes: int, **overrides: int) -> RefineMaskHead:
    given = [f"+model.width={width}", f"+model.num_classes={num_classes}"]
    given += [f"model.head.{name.replace('__', '.')}={value}" for name, value in overrides.items()]
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("model/head/refine_mask", given)
    return instantiate(config.model.head, _convert_="all")


def official_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the head under our names, each by a rule that leads back."""
    table = NameTable(RULES)
    ours = {}
    for name, value in weights.items():
        if name.startswith(("mask_head.", "mask_iou_head.")):
            own = table.to_ours(name)
            assert own is not None
            assert table.to_theirs(own) == name
            ours[own.removeprefix("mask_head.")] = value
    return ours


@dataclass
class Case:
    folder: Path
    head: RefineMaskHead
    pyramid: Pyramid
    targets: Targets
    inputs: dict[str, Tensor]
    forward: dict[str, Tensor]
    aux: dict[str, Tensor]
    train: dict[str, Tensor]

    def last_layer(self, which: str) -> Prediction:
        """The candidates of the official training step: with the denoising queries, or (no_cdn) without."""
        logits, boxes = self.train["train.cls_logits"][-1], self.train["train.boxes"][-1]
        own = slice(0 if which == "train" else -self.forward["boxes"].shape[2], None)
        return Prediction(logits[:, own], boxes[:, own])

    def recorded_regions(self) -> Regions:
        """The positive ones, padded."""
        found = Regions(torch.zeros(2, 30, 4), torch.full((2, 30), -1))
        for i in range(2):
            record = {k: self.train[f"train.instance_sample.img{i}.{k}"] for k in ("boxes", "pos_inds")}
            owner = self.train[f"train.instance_sample.img{i}.pos_assigned_gt_inds"]
            everything = torch.cat([self.inputs[f"gt_boxes.{i}"], record["boxes"][:, :4]])
            found.boxes[i, : len(owner)], found.owner[i, : len(owner)] = everything[record["pos_inds"]], owner
        return found


@pytest.fixture(scope="module")
def case(official: Path) -> Case:
    folder = official / "co_dino_5scale_vit_instance"
    files = {name: load_file(folder / f"{name}.safetensors") for name in ("inputs", "forward", "aux_forward", "train")}
    sizes = json.loads((folder / "config.json").read_text())
    head = composed(
        sizes["embed_dims"],
        sizes["num_classes"],
        num_candidates=sizes["max_per_img"],
        iou__hidden_width=sizes["fc_dim"],
        regions_per_pass=7,
    )
    weights = load_file(folder / "weights.safetensors")
    head.load_state_dict(official_names({name: tensor.float() for name, tensor in weights.items()}))
    head.priority = fixed_order
    forward = files["forward"]
    shapes = [forward[f"mask.{i}"].shape[1:] for i in range(5)]
    parts = forward["memory"].split([h * w for h, w in shapes], 1)
    levels = [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
    pyramid = Pyramid([*levels, forward["pyramid.5"]], (4, 8, 16, 32, 64, 128))
    return Case(
        folder, head, pyramid, padded_targets(files["inputs"], files["inputs"]["img_shape"].long()), *files.values()
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_published_weights(official: Path, name: str) -> None:
    keys = json.loads((official / "keys" / f"{name}.json").read_text())["keys"]
    with torch.device("meta"):
        theirs = official_names({key: torch.empty(shape) for key, shape, _ in keys})
        head = composed(256, PUBLISHED[name])
    assert {key: value.shape for key, value in head.state_dict().items()} == {k: v.shape for k, v in theirs.items()}


def test_stages_and_mask_iou(case: Case) -> None:
    rois, labels = case.aux["roi.rois"][:8], case.aux["instance.labels"]
    images, boxes = rois[:, 0].long(), rois[:, 1:]
    pooled = case.head.pool.regions(case.pyramid, images, boxes)
    close(pooled[:2], case.aux["instance.roi_feats"])
    with torch.no_grad():
        logits, iou = case.head(case.pyramid, case.head.semantics(case.pyramid), images, boxes, labels)
        every_class = case.head.iou(pooled, logits[1])
    assert [one.shape[-1] for one in logits] == [14, 28, 56, 112]
    for i, own in enumerate(logits):
        expected = case.aux[f"instance.stage_logits.{i}"][:, 0]
        close(own[: len(expected)], expected)
    close(every_class, case.aux["instance.mask_iou"])
    close(iou, case.aux["instance.mask_iou"][torch.arange(8), labels])


def test_regions_are_the_same(case: Case) -> None:
    """The boxes of the last layer's best pairs, and which of them, after the objects, own an object."""
    boxes, valid = predicted_boxes(case.last_layer("train"), case.targets.sizes, case.head.num_candidates)
    assert valid.all()
    found = sample_regions(boxes, valid, case.targets, 0.5, 128, 128, fixed_order)
    recorded = case.recorded_regions()
    for i in range(2):
        close(boxes[i], case.train[f"train.instance_sample.img{i}.boxes"][:, :4])
        own, expected = found.owner[i] >= 0, recorded.owner[i] >= 0
        assert torch.equal(found.owner[i, own], recorded.owner[i, expected])
        close(found.boxes[i, own], recorded.boxes[i, expected])


def test_targets_of_every_stage(case: Case) -> None:
    regions = case.recorded_regions()
    images, places = torch.where(regions.owner >= 0)
    given = (case.targets.masks, case.targets.valid, images, regions.owner[images, places])
    for i, size in enumerate((14, 28, 56, 112)):
        expected = case.train[f"train.instance_target.{i}"]
        shown = region_masks(*given, regions.boxes[images, places], size)[: len(expected)]
        assert torch.equal(shown, expected.float())


@pytest.mark.parametrize("which", ["train", "no_cdn"])
def test_losses_and_gradients(case: Case, which: str) -> None:
    """Both losses, and the norm of the gradient of every parameter of both heads."""
    losses = case.head.losses(case.pyramid, case.last_layer(which), case.targets)
    masks = sum(losses[f"stage{i}"] for i in range(4))
    close(masks * LAMBDA_2_X_LAYERS, case.train[f"{which}.loss.loss_mask"])
    close(losses["iou"] * LAMBDA_2_X_LAYERS, case.train[f"{which}.loss.loss_mask_iou"])
    names, parameters = zip(*case.head.named_parameters(), strict=True)
    gradients = torch.autograd.grad(sum(losses.values()) * LAMBDA_2_X_LAYERS, parameters)
    norms = json.loads((case.folder / "train.json").read_text())["grad_norm"][which]
    expected = official_names({name: torch.tensor(norm) for name, norm in norms.items() if norm is not None})
    assert expected.keys() == set(names)
    for name, gradient in zip(names, gradients, strict=True):
        close(gradient.norm(), expected[name])


def test_masks_of_detections(case: Case) -> None:
    """The official test, run for the first image: every mask's area, some masks, every score; by class there."""
    record = {
        name.removeprefix("simple_test.img0."): value
        for name, value in load_file(case.folder / "detections.safetensors").items()
        if name.startswith("simple_test.img0.")
    }
    rows = record["per_class"]
    detections = [Detections(rows[:, 4], rows[:, 5].long(), rows[:, :4])]
    pyramid = Pyramid([level[:1] for level in case.pyramid.levels], case.pyramid.strides)
    (found,) = case.head.segment(pyramid, detections, case.inputs["img_shape"][:1], case.inputs["ori_shape"][:1])
    assert found.masks.shape == (len(rows), 96, 240)
    for label in detections[0].labels.unique():
        own = detections[0].labels == label
        close(found.scores[own], record[f"mask_score.class{label}"])
        area = record[f"mask_area.class{label}"]
        assert torch.equal(found.masks[own].sum((1, 2)), area)
        packed = record[f"mask_first2_packed.class{label}"]
        assert np.array_equal(np.packbits(found.masks[own][:2].numpy(), axis=-1), packed.numpy())
