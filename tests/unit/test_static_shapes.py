"""Static shapes change neither what is learned nor its losses: places that are not taken count for nothing."""

from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.nn.functional import pad

from codetr.types import Frames, Output, Targets
from toy_model import compose

CO_DINO = ("model=co_dino", "model/backbone=resnet10_small", "criterion=quality_focal")
# A draw of another shape is another draw.
QUIET = ("model.detector.queries.denoising.label_noise=0", "model.detector.queries.denoising.box_noise=0")
HEADS = {"atss": "[atss]", "RoIs": "[faster_rcnn_small,atss]"}
IMAGES = 2


def batch(places: int) -> tuple[Tensor, Tensor, Targets]:
    """Three objects and two, and places for more."""
    torch.manual_seed(0)
    padding = torch.zeros(IMAGES, 64, 64, dtype=torch.bool)
    padding[1, :, 48:] = True
    boxes = torch.cat([torch.rand(IMAGES, 3, 2) * 0.4 + 0.3, torch.rand(IMAGES, 3, 2) * 0.3 + 0.1], -1)
    labels = torch.randint(3, (IMAGES, 3))
    valid = torch.tensor([[True, True, True], [True, True, False]])
    images = torch.randint(0, 256, (IMAGES, 3, 64, 64), dtype=torch.uint8)
    boxes = torch.cat([boxes, boxes.new_tensor([0.5, 0.5, 1, 1]).expand(IMAGES, places - 3, 4)], 1)
    labels, valid = (pad(x, (0, places - 3)) for x in (labels, valid))
    return images, padding, Targets(boxes, labels, valid, Frames.unscaled(torch.tensor([[64, 64], [64, 48]])))


def run(places: int, *overrides: str) -> tuple[Output, dict[str, Tensor], dict[str, Tensor]]:
    """Output, losses and gradients of a step, in float64."""
    config = compose("model.num_classes=3", *CO_DINO, *QUIET, *overrides)
    torch.manual_seed(0)
    detector: nn.Module = instantiate(config.model.detector, _convert_="all").double()
    criterion = instantiate(config.criterion)
    images, padding, targets = batch(places)
    torch.manual_seed(1)
    output = detector(images, padding, replace(targets, boxes=targets.boxes.double()))
    losses = criterion(output, targets)
    torch.stack(list(losses.values())).sum().backward()
    return output, losses, {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fill", ["none", "negatives"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_losses_and_gradients_are_those_without(head: str, fill: str) -> None:
    options = (f"model/auxiliary_head={head}", f"model.detector.collaborative.fill={fill}")
    _, losses, gradients = run(3, *options)
    output, same, also = run(3, *options, "static_shapes=true")
    torch.testing.assert_close(same, losses, rtol=1e-5, atol=1e-6)  # costs and losses are float32
    torch.testing.assert_close(also, gradients, rtol=1e-3, atol=1e-5)
    assert output.groups["atss"].content.shape[1] == 300
    assert output.groups["denoising"].content.shape[1] == 200


def test_places_for_objects_count_for_nothing() -> None:
    """A head that draws by its candidates, of which the objects are some, draws others."""
    _, losses, _ = run(3, "model/auxiliary_head=[atss]")
    output, same, _ = run(20, "model/auxiliary_head=[atss]", "static_shapes=true")
    torch.testing.assert_close(same, losses, rtol=1e-5, atol=1e-6)
    assert output.groups["denoising"].content.shape[1] == 200


@pytest.mark.parametrize("unused", ["masked", "background"])
@pytest.mark.parametrize("kind", ["denoising", "dn"])
def test_denoising_takes_as_many_blocks(kind: str, unused: str) -> None:
    """Of the same objects, whatever the number of places; more places than queries are one block."""
    options = (
        f"model/query@model.detector.queries.denoising={kind}",
        f"model.detector.queries.denoising.unused={unused}",
        "model/auxiliary_head=[]",
    )
    for queries in (2, 7, 100):
        number = f"model.detector.queries.denoising.num_queries={queries}"
        before, losses, _ = run(3, *options, number)
        after, same, _ = run(5, *options, number, "static_shapes=true")
        torch.testing.assert_close(same, losses, rtol=1e-5, atol=1e-6)
        dynamic, static = before.groups["denoising"], after.groups["denoising"]
        assert int(static.valid.sum()) == int(dynamic.valid.sum())
        assert int((static.targets.labels >= 0).sum()) == int((dynamic.targets.labels >= 0).sum())


def test_shapes_do_not_depend_on_the_batch() -> None:
    """Another number of objects, and none: the same shapes everywhere."""
    shapes = []
    for count in (3, 1, 0):
        config = compose("model.num_classes=3", *CO_DINO, "model/auxiliary_head=[atss]", "static_shapes=true")
        torch.manual_seed(0)
        detector = instantiate(config.model.detector, _convert_="all")
        images, padding, targets = batch(6)
        valid = targets.valid & (torch.arange(6) < count)
        output = detector(images, padding, replace(targets, valid=valid))
        shapes.append({name: (group.content.shape, group.valid is None) for name, group in output.groups.items()})
    assert shapes[0] == shapes[1] == shapes[2]
