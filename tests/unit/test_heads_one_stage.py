"""RetinaNet, FCOS, GFL and PAA against the official heads: assignment, losses and their gradients, 20 cases each."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.ops import box_convert

from codetr.heads.common import cell_strides, flatten
from codetr.heads.dense import Dense, Selection
from codetr.heads.fcos import FCOSHead
from codetr.heads.gfl import GFLHead
from codetr.heads.paa import PAAHead
from codetr.heads.retinanet import RetinaNetHead
from codetr.types import Frames, Positives, Pyramid, Targets

CLASSES, HEIGHT, WIDTH = 4, 96, 128
SELECTION = Selection(1000, 0.6, 100)


@dataclass(kw_only=True)
class ExactTargets(Targets):
    """With the recorded boxes to the last bit: many cases have ties, which a normalisation and back would break."""

    exact: Tensor

    @property
    def boxes_xyxy(self) -> Tensor:
        return self.exact


class Case(NamedTuple):
    data: dict[str, Tensor]
    pyramid: Pyramid
    targets: Targets

    def maps(self, name: str) -> list[Tensor]:
        """The recorded predictions of every level, as leaves of the graph."""
        count = len(self.pyramid.strides)
        return [self.data[f"{name}.{level}"].clone().requires_grad_() for level in range(count)]


def load(folder: Path, name: str, case: int, strides: tuple[int, ...]) -> Case:
    everything = load_file(folder / "assigners" / f"{name}.safetensors")
    data = {k.removeprefix(f"case{case}."): v for k, v in everything.items() if k.startswith(f"case{case}.")}
    levels = [torch.zeros(1, 16, *data[f"cls.{i}"].shape[-2:]) for i in range(len(strides))]
    count = len(data["gt_boxes"])
    rows = max(count, 1)
    boxes, labels = torch.tensor([0.0, 0, 8, 8]).repeat(1, rows, 1), torch.zeros(1, rows, dtype=torch.long)
    boxes[0, :count], labels[0, :count] = data["gt_boxes"], data["gt_labels"]
    frames = Frames.unscaled(torch.tensor([[HEIGHT, WIDTH]]))
    normalized = box_convert(boxes / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]), "xyxy", "cxcywh")
    targets = ExactTargets(normalized, labels, torch.arange(rows)[None] < count, frames, exact=boxes)
    return Case(data, Pyramid(levels, strides), targets)


def same_labels(assigned: Positives, data: dict[str, Tensor], key: str = "target.labels") -> None:
    expected = data[key].masked_fill(data[key] == CLASSES, -1)
    assert torch.equal(assigned.labels[0], expected)


def same_losses(losses: dict[str, Tensor], weights: dict[str, float], case: Case, names: dict[str, str]) -> None:
    for ours, theirs in names.items():
        expected = case.data[f"loss.{theirs}"].sum()
        torch.testing.assert_close(losses[ours] * weights[ours], expected, rtol=2e-5, atol=1e-6)


def same_gradients(losses: dict[str, Tensor], weights: dict[str, float], case: Case, maps: dict[str, list]) -> None:
    total = sum(value * weights[term] for term, value in losses.items())
    flat = [m for level in maps.values() for m in level]
    gradients = iter(torch.autograd.grad(total, flat, allow_unused=True))
    for name, levels in maps.items():
        norms = torch.stack([torch.zeros(()) if (g := next(gradients)) is None else g.norm() for _ in levels])
        torch.testing.assert_close(norms, case.data[f"{name}.grad_norm"], rtol=2e-5, atol=1e-6)


every_case = pytest.mark.parametrize("number", range(20))


@every_case
def test_retinanet(official: Path, number: int) -> None:
    case = load(official, "retina", number, (32, 64))
    scales = tuple(2 * 2 ** (i / 3) for i in range(3))
    ratios, stds = (0.5, 1.0, 2.0), (1.0, 1.0, 1.0, 1.0)
    head = RetinaNetHead(16, CLASSES, 1, 4, scales, ratios, stds, 0.5, 0.4, 0.25, 2.0, "l1", 1.0, 1.0, SELECTION)
    assigned = head.assign(case.pyramid, case.targets)
    same_labels(assigned, case.data)
    used = assigned.positive | assigned.negative
    assert torch.equal(used[0], case.data["target.label_weights"] > 0)
    encoded = head.coder.encode(assigned.boxes_xyxy, assigned.target_boxes_xyxy)[0]
    positive = assigned.positive[0]
    torch.testing.assert_close(encoded[positive], case.data["target.bbox_targets"][positive], rtol=1e-5, atol=1e-5)
    maps = {"cls": case.maps("cls"), "reg": case.maps("reg")}
    losses = head.losses(Dense(flatten(maps["cls"], 9), flatten(maps["reg"], 9), None), assigned)
    same_losses(losses, head.weights, case, {"class": "loss_cls", "l1": "loss_bbox"})
    same_gradients(losses, head.weights, case, maps)


@pytest.mark.parametrize("sampling", [False, True])
@every_case
def test_fcos(official: Path, number: int, sampling: bool) -> None:
    case = load(official, "fcos_center_sampling" if sampling else "fcos", number, (16, 32, 64))
    head = FCOSHead(16, CLASSES, 3, 1, 4, 8, 1.5 if sampling else None, 2, 0.25, 2.0, 1.0, 1.0, 1.0, SELECTION)
    assigned = head.assign(case.pyramid, case.targets)
    same_labels(assigned, case.data)
    maps = {name: case.maps(name) for name in ("cls", "reg", "centerness")}
    # With centre sampling the recorded distances count strides.
    pixels = [m * stride if sampling else m for m, stride in zip(maps["reg"], case.pyramid.strides, strict=True)]
    dense = Dense(flatten(maps["cls"], 1), flatten(pixels, 1), flatten(maps["centerness"], 1)[..., 0])
    losses = head.losses(dense, assigned)
    names = {"class": "loss_cls", "giou": "loss_bbox", "centerness": "loss_centerness"}
    same_losses(losses, head.weights, case, names)
    same_gradients(losses, head.weights, case, maps)


@every_case
def test_gfl(official: Path, number: int) -> None:
    case = load(official, "gfl", number, (16, 32))
    head = GFLHead(16, CLASSES, 2, 1, 4, 4, 9, 8, 2.0, 1.0, 2.0, 0.25, SELECTION)
    assigned = head.assign(case.pyramid, case.targets)
    same_labels(assigned, case.data)
    maps = {"cls": case.maps("cls"), "reg": case.maps("reg")}
    distances = flatten(maps["reg"], 1).unflatten(-1, (4, 8))
    losses = head.losses(flatten(maps["cls"], 1), distances, cell_strides(case.pyramid), assigned)
    same_losses(losses, head.weights, case, {"class": "loss_cls", "giou": "loss_bbox", "distribution": "loss_dfl"})
    same_gradients(losses, head.weights, case, maps)


@every_case
def test_paa(official: Path, number: int) -> None:
    case = load(official, "paa", number, (8, 16, 32))
    head = PAAHead(16, CLASSES, 3, 1, 4, 8, (0.1, 0.1, 0.2, 0.2), 0.1, 9, 0.25, 2.0, 1.0, 1.3, 0.5, SELECTION)
    maps = {name: case.maps(name) for name in ("cls", "reg", "iou")}
    dense = Dense(flatten(maps["cls"], 1), flatten(maps["reg"], 1), flatten(maps["iou"], 1)[..., 0])
    assigned = head.assign(dense, case.pyramid, case.targets)
    same_labels(assigned, case.data, "reassign.out.labels")
    losses = head.losses(dense, assigned)
    same_losses(losses, head.weights, case, {"class": "loss_cls", "giou": "loss_bbox", "iou": "loss_iou"})
    same_gradients(losses, head.weights, case, maps)
