"""Mask2Former against the `transformers` library: pixels to masks of every layer, losses and gradients.

Weights are random, and come to ours as the command converts what the library saves.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.mask2former.configuration_mask2former import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentation
from transformers.models.resnet.configuration_resnet import ResNetConfig
from transformers.models.swin.configuration_swin import SwinConfig

from codetr import application
from codetr.convert import huggingface, weights
from codetr.mask_criterion import MaskCriterion
from codetr.models.detector import Detector
from codetr.types import Frames, Known, Output, Prediction, QueryContext, Targets

LAYERS, QUERIES, CLASSES, POINTS = 4, 7, 5, 150
HEIGHT, WIDTH = 64, 96
STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "ResNet": ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], out_features=STAGES
    ),
    "Swin": SwinConfig(
        embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], drop_path_rate=0.0, out_features=STAGES
    ),
}
SIZES = {
    "feature_size": 64,
    "mask_feature_size": 48,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 40,
    "dim_feedforward": 56,
    "num_attention_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": LAYERS + 1,
    "num_queries": QUERIES,
    "num_labels": CLASSES,
    "train_num_points": POINTS,
}


@dataclass(frozen=True)
class Models:
    theirs: Any
    ours: Detector
    criterion: MaskCriterion


@pytest.fixture(scope="module", params=["ResNet", "Swin"])
def models(request: pytest.FixtureRequest) -> Models:
    """Both with their weights; none is left over on either side."""
    torch.manual_seed(0)
    theirs = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=BACKBONES[request.param], **SIZES))
    theirs.eval()
    with torch.no_grad():  # so that every tensor matters
        for name, parameter in theirs.named_parameters():
            if name.startswith("model.pixel_level_module.encoder."):
                if parameter.dim() == 1:  # norms start at nothing there
                    parameter.copy_(0.1 * torch.randn_like(parameter) + ("norm" in name and name.endswith("weight")))
            else:
                parameter += 0.05 * torch.randn_like(parameter)
        for name, buffer in theirs.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand_like(buffer) + name.endswith("var"))
    saved = revert_weight_conversion(theirs, theirs.state_dict())
    assert huggingface.model(saved) == "mask2former"
    settings = huggingface.settings(saved, "mask2former", theirs.config.to_dict())
    small = [f"criterion.points.count={POINTS}", f"criterion.matching_cost.num_points={POINTS}"]
    config = application.compose("train", [*settings, *small])
    detector = instantiate(config.model.detector, _convert_="all").eval()
    converted, report = huggingface.to_ours(saved, "mask2former", detector)
    report.require_fit(request.param)
    detector.load_state_dict(converted)
    return Models(theirs, detector, instantiate(config.criterion))


def pixels(batch: int) -> Tensor:
    return torch.randn(batch, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def detect(detector: Detector, images: Tensor) -> Output:
    """What `Detector.forward` does with images whose colours are normalised already."""
    padding = torch.zeros(len(images), HEIGHT, WIDTH, dtype=torch.bool)
    memory = detector.encoder(detector.neck(detector.backbone(images)), padding)
    groups = {"main": detector.queries["main"](QueryContext(memory))}
    return Output(groups, detector.decoder(groups, memory), memory=memory)


def dense(prediction: Prediction) -> Tensor:
    """[L, B, N, h, w]."""
    assert prediction.masks is not None
    return torch.einsum("lbnc,bchw->lbnhw", prediction.masks.embeddings, prediction.masks.pixels.maps)


def their_layers(theirs: Any, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Logits of classes and masks: before the first layer, and behind every one."""
    out = theirs(images, output_auxiliary_logits=True)
    first = [(one["class_queries_logits"], one["masks_queries_logits"]) for one in out.auxiliary_logits]
    return [*first, (out.class_queries_logits, out.masks_queries_logits)]


def close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


@torch.no_grad()
def test_classes_and_masks_of_every_layer(models: Models) -> None:
    found = detect(models.ours, pixels(2)).predictions["main"]
    expected = their_layers(models.theirs, pixels(2))
    assert len(found.logits) == len(expected) == LAYERS + 1
    for logits, masks, (their_logits, their_masks) in zip(found.logits, dense(found), expected, strict=True):
        close(logits, their_logits)
        close(masks, their_masks)
    assert (dense(found)[-1] > 0).float().mean() > 0.05  # some cells are inside, some are not
    assert (dense(found)[-1] < 0).float().mean() > 0.05


def test_the_way_back(models: Models) -> None:
    """To the very tensors that the library saves, but for what it computes on its own."""
    saved = revert_weight_conversion(models.theirs, models.theirs.state_dict())
    back, report = weights.to_official(models.ours.state_dict(), models.ours)
    report.require_fit("ours")
    left_out = re.compile(r"criterion\.|num_batches_tracked|swin\.layernorm")
    assert back.keys() == {name for name in saved if not left_out.search(name)}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in back.items())


class Theirs:
    """Records what the library draws and matches while it computes its losses: the last layer comes first."""

    def __init__(self, criterion: Any) -> None:
        self.criterion, self.points, self.pairs = criterion, [], []
        self.sample, self.match = criterion.sample_points_using_uncertainty, criterion.matcher.forward

    def __enter__(self) -> "Theirs":
        def sample(*given: Any) -> Tensor:
            self.points.append(self.sample(*given))
            return self.points[-1]

        def match(*given: Any) -> list:
            self.pairs.append(self.match(*given))
            return self.pairs[-1]

        self.criterion.sample_points_using_uncertainty, self.criterion.matcher.forward = sample, match
        return self

    def __exit__(self, *_: object) -> None:
        self.criterion.sample_points_using_uncertainty = self.sample
        self.criterion.matcher.forward = self.match

    def by_layer(self) -> Iterator[tuple[Tensor, list]]:
        order = [*range(1, len(self.points)), 0]
        return ((self.points[i], self.pairs[i]) for i in order)


@dataclass(frozen=True)
class Given:
    """Targets of every layer that somebody else has found."""

    targets: Known

    def problems(self, prediction: Prediction, class_agnostic: bool) -> list:
        return []

    def known(self, solutions: list[Known], num_layers: int) -> Known:
        return self.targets

    def most(self, num_objects: int, num_queries: int) -> int:
        return num_objects


def objects(counts: tuple[int, ...]) -> Targets:
    """Ellipses, one of them smaller than a cell of the masks."""
    draw = torch.Generator().manual_seed(3)
    most = max(*counts, 1)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    labels = torch.randint(CLASSES, (len(counts), most), generator=draw) * valid
    centre = torch.rand(len(counts), most, 2, generator=draw) * 0.6 + 0.2
    radius = torch.rand(len(counts), most, 2, generator=draw) * 0.3 + 0.1
    radius[0, 0] = 0.02
    x, y = (torch.arange(WIDTH) + 0.5) / WIDTH, ((torch.arange(HEIGHT) + 0.5) / HEIGHT)[:, None]
    (cx, cy), (rx, ry) = (part[..., None, None].unbind(2) for part in (centre, radius))
    masks = (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1) & valid[..., None, None]
    sizes = torch.tensor([[HEIGHT, WIDTH]] * len(counts))
    return Targets(torch.full((len(counts), most, 4), 0.5), labels, valid, Frames.unscaled(sizes), masks)


def their_losses(models: Models, images: Tensor, targets: Targets) -> tuple[dict[str, Tensor], Theirs]:
    """By our names, weighted."""
    layers = their_layers(models.theirs, images)
    masks = [own[ok].float() for own, ok in zip(targets.masks, targets.valid, strict=True)]
    labels = [own[ok] for own, ok in zip(targets.labels, targets.valid, strict=True)]
    auxiliary = [{"class_queries_logits": c, "masks_queries_logits": m} for c, m in layers[:-1]]
    with Theirs(models.theirs.criterion) as seen:
        found = models.theirs.get_loss_dict(layers[-1][1], layers[-1][0], masks, labels, auxiliary)
    names = {"class": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}
    suffixes = [*(f"_{i}" for i in range(LAYERS)), ""]
    return {
        f"main/{layer}/{term}": found[name + suffix]
        for layer, suffix in enumerate(suffixes)
        for term, name in names.items()
    }, seen


def given(seen: Theirs, targets: Targets) -> tuple[Given, Tensor]:
    """Their matching as ours, and their points [B, L, M, P, 2] in our order: objects by their query."""
    batch, most = targets.labels.shape
    labels = torch.full((LAYERS + 1, batch, QUERIES), -1)
    which = torch.zeros_like(labels)
    points = torch.rand(batch, LAYERS + 1, most, POINTS, 2)
    for layer, (own, pairs) in enumerate(seen.by_layer()):
        rows = iter(own)
        for image, (queries, matched) in enumerate(pairs):
            labels[layer, image, queries] = targets.labels[image, matched]
            which[layer, image, queries] = matched
            for place in range(len(queries)):
                points[image, layer, place] = next(rows)
    return Given(Known(labels, torch.zeros(*labels.shape, 4), which)), points


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0)], ids=str)
def test_losses_and_gradients(models: Models, counts: tuple[int, ...]) -> None:
    images, targets = pixels(len(counts)), objects(counts)
    models.theirs.zero_grad()
    models.ours.zero_grad()
    if not any(counts):  # of no objects the library cannot sample points
        losses = models.criterion(detect(models.ours, images), targets)
        assert all(losses[name] == 0 for name in losses if not name.endswith("class"))
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is not None for n, p in models.ours.named_parameters() if p.requires_grad), "as DDP needs"
        return
    expected, seen = their_losses(models, images, targets)
    output = detect(models.ours, images)
    output.groups["main"].targets, points = given(seen, targets)
    with_their_points = MaskCriterion(
        models.criterion.matching_cost, lambda logits: points.flatten(0, 2), 0.1, 2.0, 5.0, 5.0, 2.0, {}
    )
    losses = with_their_points(output, targets)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        close(value, expected[name])

    torch.stack(list(losses.values())).sum().backward()
    torch.stack(list(expected.values())).sum().backward()
    theirs = {name: _gradient(p) for name, p in models.theirs.named_parameters()}
    gradients, _ = huggingface.to_ours(revert_weight_conversion(models.theirs, theirs), "mask2former", models.ours)
    idle = []
    for name, parameter in models.ours.named_parameters():
        largest = float(gradients[name].abs().max())
        close(_gradient(parameter), gradients[name], 100 * max(largest, 1.0))  # 1e-3: pairs of norms nearly cancel
        idle += [name] if largest < 1e-6 else []
    assert all(name.endswith("key.bias") for name in idle), idle


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
