"""Conditional DETR, DAB-DETR and Deformable DETR against the `transformers` library: features to boxes, and losses.

Weights are random and move from their model to ours, which is composed from conf/.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor, nn
from transformers import ResNetConfig
from transformers.models.conditional_detr.configuration_conditional_detr import ConditionalDetrConfig
from transformers.models.conditional_detr.modeling_conditional_detr import ConditionalDetrForObjectDetection
from transformers.models.dab_detr.configuration_dab_detr import DabDetrConfig
from transformers.models.dab_detr.modeling_dab_detr import DabDetrForObjectDetection
from transformers.models.deformable_detr.configuration_deformable_detr import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrForObjectDetection
from transformers_weights import CONDITIONAL, DAB, DEFORMABLE, Renames, ours

from codetr.assign.hungarian import MatchingCost
from codetr.criterion import Criterion
from codetr.losses import Focal
from codetr.models.detector import Detector
from codetr.types import Output, QueryContext, Targets

WIDTH, HEADS, FFN, LAYERS, QUERIES, CLASSES = 32, 4, 48, 3, 9, 5
CHANNELS = [8, 16, 24, 32]
COMMON = {
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
    "encoder_layers": 2,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    "num_queries": QUERIES,
    "num_labels": CLASSES,
    "dropout": 0.0,
}


@dataclass(frozen=True)
class Pair:
    """Our preset and their classes. stages: of the backbone. options: of their configuration. eps: of the inverse
    sigmoid, which theirs has at 1e-5 everywhere."""

    preset: str
    model: type[nn.Module]
    config: type
    renames: Renames
    stages: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def theirs(self, **options: Any) -> nn.Module:
        body = ResNetConfig(
            embedding_size=8,
            hidden_sizes=CHANNELS,
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=[f"stage{i}" for i in self.stages],
        )
        torch.manual_seed(0)
        model = self.model(self.config(**{**COMMON, **self.options, **options}, backbone_config=body)).eval()
        for name, parameter in model.named_parameters():  # so that queries differ, layer after layer
            std = 1.5 if "query_" in name and "embeddings" in name else 0.3
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=std)
        return model

    def ours(self) -> Detector:
        values = {"width": WIDTH, "num_heads": HEADS, "ffn_width": FFN, "num_classes": CLASSES, "eps": 1e-5}
        overrides = [f"model={self.preset}", *(f"model.{key}={value}" for key, value in values.items())]
        overrides += ["model.detector.encoder.num_layers=2", f"model.detector.decoder.num_layers={LAYERS}"]
        overrides += [f"model.detector.main.num_queries={QUERIES}", "model/backbone=resnet10_small"]
        overrides += [f"model.detector.backbone.out_indices={list(self.stages)}"]
        overrides += [f"model.detector.backbone.arguments.channels={CHANNELS}"]
        with initialize_config_module("codetr.conf", version_base="1.3"):
            config = compose("train", overrides)
        return instantiate(config.model.detector, _convert_="all").eval()


CONDITIONAL_PAIR = Pair(
    "conditional_detr",
    ConditionalDetrForObjectDetection,
    ConditionalDetrConfig,
    CONDITIONAL,
    (4,),
    {"d_model": WIDTH, "attention_dropout": 0.0, "activation_dropout": 0.0},
)
DAB_PAIR = Pair("dab_detr", DabDetrForObjectDetection, DabDetrConfig, DAB, (4,), {"hidden_size": WIDTH})


def deformable(preset: str, **options: Any) -> Pair:
    options |= {"d_model": WIDTH, "num_feature_levels": 4, "two_stage_num_proposals": QUERIES}
    model = DeformableDetrForObjectDetection
    return Pair(preset, model, DeformableDetrConfig, DEFORMABLE, (2, 3, 4), options)


PAIRS = [
    CONDITIONAL_PAIR,
    DAB_PAIR,
    deformable("deformable_detr"),
    deformable("deformable_detr_refine", with_box_refine=True),
    deformable("deformable_detr_two_stage", with_box_refine=True, two_stage=True),
]
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.preset)


def moved(pair: Pair, theirs: nn.Module) -> Detector:
    """Our detector with their weights; none is left over on either side."""
    detector = pair.ours()
    weights = ours(theirs.state_dict(), pair.renames, LAYERS)
    own = {name for name, _ in detector.named_parameters() if not name.startswith("backbone.")}
    assert own <= set(weights)
    used = {weights[name].data_ptr() for name in own}
    assert all(weights[name].data_ptr() in used for name in set(weights) - own)  # a shared head under several names
    detector.load_state_dict({name: weights[name] for name in own}, strict=False)
    return detector


def images(height: int, width: int, sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W], zero on the padding, and a mask [B, H, W] that is 1 on the images."""
    mask = torch.zeros(len(sizes), height, width, dtype=torch.long)
    for one, (h, w) in zip(mask, sizes, strict=True):
        one[:h, :w] = 1
    return torch.randn(len(sizes), 3, height, width, generator=torch.Generator().manual_seed(1)) * mask[:, None], mask


BATCHES = {
    "one image": images(96, 128, [(96, 128)]),
    "padded": images(128, 160, [(128, 160), (100, 96), (64, 150)]),
    "odd sizes": images(118, 85, [(118, 85), (77, 60)]),
}


@torch.no_grad()
def features(theirs: nn.Module, pixels: Tensor, mask: Tensor) -> list[Tensor]:
    """Of their backbone, for ours too."""
    found = theirs.model.backbone(pixels, mask)
    levels = found[0] if isinstance(found, tuple) else found
    return [level[0] for level in levels]


def decode(detector: Detector, levels: list[Tensor], mask: Tensor, targets: Targets | None = None) -> Output:
    memory = detector.encoder(detector.neck(levels), mask == 0)
    groups = {"main": detector.queries["main"](QueryContext(memory, targets))}
    return Output(groups, detector.decoder(groups, memory), memory=memory)


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@every_pair
@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_logits_and_boxes_of_every_layer(pair: Pair, batch: str) -> None:
    pixels, mask = BATCHES[batch]
    theirs = pair.theirs(auxiliary_loss=True)
    detector = moved(pair, theirs)
    found = decode(detector, features(theirs, pixels, mask), mask).predictions["main"]
    if pair is CONDITIONAL_PAIR:
        expected = [_shortened(theirs, layers)(pixels, mask) for layers in range(1, LAYERS + 1)]
        logits, boxes = ([getattr(o, key) for o in expected] for key in ("logits", "pred_boxes"))
    else:
        out = theirs(pixels, mask, labels=_labels(_targets(pixels, mask)))
        steps = [*out.auxiliary_outputs, {"logits": out.logits, "pred_boxes": out.pred_boxes}]
        logits, boxes = ([step[key] for step in steps] for key in ("logits", "pred_boxes"))
    assert torch.stack(logits).std(2).mean() > 1e-2  # the queries differ
    for layer in range(LAYERS):
        close(found.logits[layer], logits[layer])
        close(found.boxes[layer], boxes[layer])


def _shortened(theirs: nn.Module, layers: int) -> nn.Module:
    """Their Conditional DETR feeds the normalised output of a layer to the next one when it is asked for all layers'
    outputs, unlike the original; so each layer's come from a model that ends there."""
    model = CONDITIONAL_PAIR.theirs(auxiliary_loss=False, decoder_layers=layers)
    model.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in model.state_dict()})
    return model


def _targets(pixels: Tensor, mask: Tensor) -> Targets:
    """3, 0 and 1 objects."""
    torch.manual_seed(2)
    batch = len(pixels)
    boxes = torch.cat([torch.rand(batch, 3, 2) * 0.4 + 0.3, torch.rand(batch, 3, 2) * 0.3 + 0.1], -1)
    valid = torch.arange(3) < torch.tensor([3, 0, 1])[:batch, None]
    sizes = torch.stack([mask[:, :, 0].sum(1), mask[:, 0].sum(1)], 1)
    return Targets(boxes, torch.randint(CLASSES, (batch, 3)) * valid, valid, sizes)


def _labels(targets: Targets) -> list[dict[str, Tensor]]:
    rows = zip(targets.boxes, targets.labels, targets.valid, strict=True)
    return [{"boxes": boxes[ok], "class_labels": labels[ok]} for boxes, labels, ok in rows]


@pytest.mark.parametrize("pair", PAIRS[1:], ids=lambda pair: pair.preset)
@torch.no_grad()
def test_losses_of_every_layer(pair: Pair) -> None:
    """Matching and losses in one: theirs are computed from their predictions, ours from ours."""
    pixels, mask = BATCHES["padded"]
    theirs = pair.theirs(auxiliary_loss=True, class_cost=2, bbox_cost=5, giou_cost=2)
    targets = _targets(pixels, mask)
    expected = theirs(pixels, mask, labels=_labels(targets)).loss_dict
    criterion = Criterion(MatchingCost(2.0, 5.0, 2.0, 0.25, 2.0), Focal(0.25, 2.0), 1.0, 1.0, 1.0, 2.0)
    output = decode(moved(pair, theirs), features(theirs, pixels, mask), mask, targets)
    losses = criterion(output, targets)
    names = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
    layers = {str(i): f"_{i}" for i in range(LAYERS - 1)} | {str(LAYERS - 1): ""}
    losses = {name: value for name, value in losses.items() if "/encoder/" not in name}  # theirs has no such loss
    for name, value in losses.items():
        _, layer, term = name.split("/")
        close(value, expected[names[term] + layers[layer]])
    assert len(losses) == len([k for k in expected if k.startswith(tuple(names.values()))])
