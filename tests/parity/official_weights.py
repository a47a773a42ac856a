"""Detectors composed from conf/ with the official code's weights, and what that code computed with them.

The official names are mapped here. The backbone is replaced by its recorded output, and has a test of its own.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import open_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import box_convert

from codetr.convert.official import split, table
from codetr.criterion import Criterion
from codetr.models.detector import Detector
from codetr.ops.gather import take
from codetr.postprocess import PostProcess
from codetr.types import Known, Memory, Positives, Prediction, QueryContext, QueryGroup, Targets

HEADS = ("faster_rcnn", "atss")  # in the order of the official code's numbers


def ours(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official weights under the detector's names, without the backbone."""
    names = table("faster_rcnn", num_layers=2)
    found = {names.to_ours(name): tensor.float() for name, tensor in split(weights).items()}
    assert None not in {names.to_ours(name) for name in split(weights) if not name.startswith("backbone.")}
    found.pop(None, None)
    return found


class RecordedBackbone(nn.Module):
    """Feature maps that the official backbone computed."""

    def __init__(self, features: list[Tensor], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.features, self.strides = features, strides
        self.channels = tuple(feature.shape[1] for feature in features)

    def normalize(self, images: Tensor, padding: Tensor) -> Tensor:
        return images

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.features


@dataclass
class Case:
    """A detector with criterion and post-processing, composed; the official inputs, eval mode and training step."""

    folder: Path
    detector: Detector
    criterion: Criterion
    postprocess: PostProcess
    inputs: dict[str, Tensor]
    forward: dict[str, Tensor]
    train: dict[str, Tensor]
    padding: Tensor
    memory: Memory
    targets: Targets

    def denoising(self, prefix: str = "train") -> QueryGroup:
        """Our denoising queries with the recorded random draws."""
        targets = self.targets
        blocks = 2 * int(self.train["train.dn.num_groups"])
        image, slot = targets.valid.nonzero().unbind(1)  # repeated as a whole, images in order
        place = (image.repeat(blocks), torch.arange(blocks).repeat_interleave(len(slot)), slot.repeat(blocks))

        def on_slots(draws: Tensor) -> Tensor:
            shape = (*targets.valid.shape[:1], blocks, targets.valid.shape[1], *draws.shape[1:])
            return draws.new_zeros(shape).index_put(place, draws).unflatten(1, (blocks // 2, 2))

        select, labels, signs, amounts = (
            self.train[f"{prefix}.random.{name}"]
            for name in ("0.rand_like", "1.randint_like", "2.randint_like", "3.rand_like")
        )
        every = labels.new_zeros(len(select)).masked_scatter(select < 0.25, labels)
        integers = iter([on_slots(signs), on_slots(every)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, **__: on_slots(select))
            patch.setattr(torch, "randint_like", lambda *_: next(integers))
            patch.setattr(torch, "rand_like", lambda *_: on_slots(amounts))
            return self.detector.queries["denoising"](QueryContext(self.memory, targets))

    def main(self) -> QueryGroup:
        return self.detector.queries["main"](QueryContext(self.memory, self.targets))

    def collaborative(self, number: int, prefix: str = "train", found: Positives | None = None) -> QueryGroup:
        """The recorded positive queries of auxiliary head 0 or 1, embedded by our query source.

        found: what our head hands over; the features then come from there, with their gradients.
        """
        record = {k.split(".")[-1]: v for k, v in self.train.items() if k.startswith(f"{prefix}.aux_query.{number}.")}
        boxes, labels = record["coords"], record["labels"]
        labels = labels.masked_fill(labels == self.train["train.cls_logits"].shape[-1], -1)
        features = record.get("feats", torch.empty(0))
        if found is not None:
            recorded, features = features, take(found.features, torch.cdist(features, found.features).argmin(-1))
            close(features, recorded)
        content, position = self.detector.queries[HEADS[number]]._embed(boxes, features)
        return QueryGroup(content, boxes, Known(labels, record.get("targets", boxes)), position)


def load_case(folder: Path, model: str, finest_stride: int, *overrides: str) -> Case:
    """Compose `model` at the size of the bundle in `folder`; `finest_stride` of its backbone features."""
    sizes = json.loads((folder / "config.json").read_text())
    small = {
        "num_classes": sizes["num_classes"],
        "width": sizes["embed_dims"],
        "num_heads": sizes["num_heads"],
        "num_points": sizes["num_points"],
        "ffn_width": sizes["ffn_dim"],
        "detector.encoder.num_layers": sizes["enc_layers"],
        "detector.decoder.num_layers": sizes["dec_layers"],
        "detector.main.num_queries": sizes["num_query"],
        "detector.heads.faster_rcnn.box_head.hidden_width": sizes["fc_dim"],
        "detector.heads.faster_rcnn.num_samples": sizes["rcnn_sample_num"],
        "detector.heads.faster_rcnn.rpn.num_samples": sizes["rpn_sample_num"],
        "detector.heads.faster_rcnn.proposals.per_level": sizes["rpn_nms_pre"],
        "detector.heads.faster_rcnn.proposals.count": sizes["rpn_max_per_img"],
    }
    if "num_dn_queries" in sizes:
        small["detector.queries.denoising.num_queries"] = sizes["num_dn_queries"]
    if sizes.get("with_masks"):
        overrides += ("model/head@model.detector.heads.faster_rcnn=mask_rcnn",)
        small["detector.heads.faster_rcnn.mask.num_convs"] = sizes["mask_convs"]
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", [f"model={model}", *overrides, *(f"model.{k}={v}" for k, v in small.items())])
    inputs, forward, train = (load_file(folder / f"{f}.safetensors") for f in ("inputs", "forward", "train"))
    features = [forward[name] for name in sorted(forward) if name.startswith("backbone.")]
    strides = tuple(finest_stride * 2**i for i in range(len(features)))
    with open_dict(config):
        del config.model.detector.backbone
    build = instantiate(config.model.detector, _convert_="all", _partial_=True)
    detector = build(backbone=RecordedBackbone(features, strides))
    detector.load_state_dict(ours(load_file(folder / "weights.safetensors")))
    detector.heads["faster_rcnn"].priority = detector.heads["faster_rcnn"].rpn.priority = fixed_order
    rows, columns = (torch.arange(n) for n in inputs["img"].shape[2:])
    shape = inputs["img_shape"]
    padding = (rows >= shape[:, :1])[:, :, None] | (columns >= shape[:, 1:])[:, None, :]
    detector.eval()
    with torch.no_grad():
        memory = detector.encode(inputs["img"], padding)
    criterion, postprocess = instantiate(config.criterion), instantiate(config.postprocess)
    return Case(
        folder, detector, criterion, postprocess, inputs, forward, train, padding, memory, padded_targets(inputs)
    )


def fixed_order(rank: Tensor) -> Tensor:
    """The bundles' stand-in for a random permutation."""
    return rank * 7919 % 104729


def padded_targets(inputs: dict[str, Tensor]) -> Targets:
    """The bundle's two images."""
    counts = [len(inputs[f"gt_labels.{i}"]) for i in range(2)]
    shape = (2, max(counts))
    targets = Targets(
        torch.full((*shape, 4), 0.5),
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.bool),
        inputs["img_shape"].long(),
    )
    for i, count in enumerate(counts):
        scale = inputs["img_shape"][i].flip(0).repeat(2)
        targets.boxes[i, :count] = box_convert(inputs[f"gt_boxes.{i}"] / scale, "xyxy", "cxcywh")
        targets.labels[i, :count], targets.valid[i, :count] = inputs[f"gt_labels.{i}"], True
    if "gt_masks.0" in inputs:
        masks = [inputs[f"gt_masks.{i}"].bool() for i in range(2)]
        targets.masks = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    return targets


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` times the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def close_levels(case: Case) -> None:
    """Neck, masks, position encoding and valid ratios of every level."""
    levels = case.detector.neck(case.detector.backbone(case.padding))
    flat = case.detector.encoder.flatten(levels, case.padding)
    start = 0
    for i, level in enumerate(levels):
        close(level, case.forward[f"neck.{i}"])
        cells = level.shape[2] * level.shape[3]
        mask = case.forward[f"mask.{i}"].flatten(1)
        assert torch.equal(flat.padding[:, start : start + cells], mask)
        position = flat.position[:, start : start + cells] - case.detector.encoder.level_embedding[i]
        close(position[~mask], case.forward[f"pos.{i}"].flatten(2).transpose(1, 2)[~mask])
        start += cells
    close(flat.valid_ratios, case.forward["valid_ratios"])


def close_matching(case: Case, solved: dict[str, Known], class_agnostic: tuple[str, ...] = ()) -> None:
    """solved: per official layer name, labels [B, N] and boxes [B, N, 4] found by our matcher."""
    for name, known in solved.items():
        for image in range(2):
            owner = case.train[f"train.match.{name}.img{image}.gt_inds"] - 1
            labels = case.targets.labels[image] * (name not in class_agnostic)
            assert torch.equal(known.labels[image], labels[owner.clamp(min=0)].masked_fill(owner < 0, -1))
            positive = owner >= 0
            assert torch.equal(known.boxes[image, positive], case.targets.boxes[image, owner[positive]])


def close_losses(case: Case, losses: dict[str, Tensor], prefix: str = "train", tolerance: float = 1e-5) -> None:
    """Every loss of the query groups by its official name; a loss of zero must be exactly zero."""
    for name, value in losses.items():
        group, layer, term = name.split("/")
        stem = {"encoder": "enc_", "0": "d0.", "1": ""}[layer] + "dn_" * (group == "denoising")
        stem += {"class": "loss_cls", "l1": "loss_bbox", "giou": "loss_iou"}[term]
        suffix = f"_aux{HEADS.index(group)}" if group in HEADS else ""
        close(value, case.train[f"{prefix}.loss.{stem}{suffix}"], tolerance)


def close_gradients(case: Case, total: Tensor, which: str = "train") -> None:
    """The norm of every parameter's gradient behind the backbone.

    The worst of these norms has an error of 1e-4 in the official run itself (float32 against float64).
    """
    names, parameters = zip(*case.detector.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(total, parameters), strict=True))
    norms = json.loads((case.folder / "train.json").read_text())["grad_norm"][which]
    weights = load_file(case.folder / "weights.safetensors")
    squares: dict[tuple[str, ...], float] = defaultdict(float)  # some of ours are several of theirs, or the reverse
    for name, norm in norms.items():
        squares[tuple(ours({name: weights[name]}))] += norm**2
    del squares[()]
    noise = 1e-6 * max(squares.values()) ** 0.5  # float32, where a large gradient cancels to a small one
    assert {name for together in squares for name in together} == gradients.keys()
    for together, square in squares.items():
        own = torch.cat([gradients[name].flatten() for name in together]).norm()
        assert abs(own - square**0.5) <= 2e-4 * square**0.5 + noise, together


def stacked(prediction: Prediction) -> Prediction:
    """One layer as a stack of layers."""
    return Prediction(prediction.logits[None], prediction.boxes[None])
