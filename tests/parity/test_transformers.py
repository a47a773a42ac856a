"""Conditional DETR, DAB-DETR and Deformable DETR against the `transformers` library: pixels to losses and gradients.

Weights are random and move from their model to ours by the tables of codetr.convert, which also recognises the
composition of conf/ that they fit; the criterion is from conf/ too.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.models.conditional_detr.configuration_conditional_detr import ConditionalDetrConfig
from transformers.models.conditional_detr.modeling_conditional_detr import ConditionalDetrForObjectDetection
from transformers.models.dab_detr.configuration_dab_detr import DabDetrConfig
from transformers.models.dab_detr.modeling_dab_detr import DabDetrForObjectDetection
from transformers.models.deformable_detr.configuration_deformable_detr import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrForObjectDetection

from codetr import application
from codetr.convert import huggingface
from codetr.models.detector import Detector
from codetr.tensor_report import TensorReport
from codetr.types import Frames, Output, QueryContext, Targets

WIDTH, HEADS, FFN, LAYERS, QUERIES, CLASSES = 64, 4, 48, 3, 9, 5
COMMON = {
    "use_timm_backbone": True,
    "backbone": "resnet18",
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
LOSSES = {"class": ("loss_ce", 2.0), "l1": ("loss_bbox", 5.0), "giou": ("loss_giou", 2.0)}  # and their weights

# Without gradient by the mathematics: biases of keys, which softmax removes, and in a first layer whose contents are
# zero whatever self-attention weighs with. Any other idle weight would be one that these tests do not see.
IDLE = r"layers\.0\.self_attention\.(query_key|position|value\.weight)|cross_attention\.key(_position)?\.bias"


@dataclass(frozen=True)
class Pair:
    """Our preset and their classes. options: of their configuration."""

    preset: str
    model: type[nn.Module]
    config: type
    options: dict[str, Any] = field(default_factory=dict)

    def theirs(self) -> nn.Module:
        """Such weights that attention is neither uniform nor one-hot: then every one of them matters."""
        torch.manual_seed(0)
        model = self.model(self.config(**COMMON, **self.options)).eval()
        if self.preset == "deformable_detr_refine":  # theirs ties the class heads, the original clones them
            model.class_embed = nn.ModuleList(copy.deepcopy(head) for head in model.class_embed)
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                std = 1.5 if name.endswith(("embeddings.weight", "level_embed")) else 0.15
                nn.init.normal_(parameter, mean=_mean(name), std=std)
        for name, buffer in model.named_buffers():
            if "backbone" in name:  # the frozen batch norms
                buffer += 0.2 * torch.rand_like(buffer)
        return model

    def convert(
        self, theirs: nn.Module, tensors: dict[str, Tensor], detector: Detector
    ) -> tuple[dict[str, Tensor], TensorReport]:
        """tensors: their weights or gradients, by the names that they have in memory."""
        return huggingface.to_ours(revert_weight_conversion(theirs, dict(tensors)), self.preset, detector)


def _mean(name: str) -> float:
    """1 for the weights of norms; logits start near a probability of 0.01 (RetinaNet, sec. 4.1), as the papers' do."""
    if re.search(r"(class_embed|class_labels_classifier)\.(\d\.)?bias$", name):
        return -4.6
    return float("norm" in name and name.endswith("weight"))


CONDITIONAL_PAIR = Pair(
    "conditional_detr",
    ConditionalDetrForObjectDetection,
    ConditionalDetrConfig,
    {"d_model": WIDTH, "attention_dropout": 0.0, "activation_dropout": 0.0, "auxiliary_loss": False},
)
DAB_PAIR = Pair("dab_detr", DabDetrForObjectDetection, DabDetrConfig, {"hidden_size": WIDTH, "auxiliary_loss": True})


def deformable(preset: str, **options: Any) -> Pair:
    options |= {"d_model": WIDTH, "num_feature_levels": 4, "two_stage_num_proposals": QUERIES, "auxiliary_loss": True}
    return Pair(preset, DeformableDetrForObjectDetection, DeformableDetrConfig, options)


PAIRS = [
    CONDITIONAL_PAIR,
    DAB_PAIR,
    replace(DAB_PAIR, options=DAB_PAIR.options | {"num_patterns": 2}),
    deformable("deformable_detr"),
    deformable("deformable_detr_refine", with_box_refine=True),
    deformable("deformable_detr_two_stage", with_box_refine=True, two_stage=True),
]


def _id(pair: Pair) -> str:
    return f"{pair.preset}, patterns" if "num_patterns" in pair.options else pair.preset


@dataclass(frozen=True)
class Models:
    pair: Pair
    theirs: nn.Module
    ours: Detector
    criterion: nn.Module


@pytest.fixture(scope="module", params=PAIRS, ids=_id)
def models(request: pytest.FixtureRequest) -> Models:
    """Both with their weights; none is left over on either side."""
    pair, theirs = request.param, request.param.theirs()
    saved = revert_weight_conversion(theirs, theirs.state_dict())
    assert huggingface.model(saved) == pair.preset
    settings = huggingface.settings(saved, pair.preset, theirs.config.to_dict())
    config = application.compose("train", [f"model={pair.preset}", *settings[2:], "model.dropout=0"])
    detector = instantiate(config.model.detector, _convert_="all").eval()
    converted, report = pair.convert(theirs, theirs.state_dict(), detector)
    report.require_fit(pair.preset)
    detector.load_state_dict(converted)
    return Models(pair, theirs, detector, instantiate(config.criterion))


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


def objects(mask: Tensor, counts: tuple[int, ...]) -> tuple[Targets, list[dict[str, Tensor]]]:
    """For us and for them."""
    generator = torch.Generator().manual_seed(2)
    most = max(*counts, 1)
    centres, sides = torch.rand(2, len(counts), most, 2, generator=generator)
    boxes = torch.cat([centres * 0.4 + 0.3, sides * 0.3 + 0.1], -1)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    labels = torch.randint(CLASSES, (len(counts), most), generator=generator) * valid
    sizes = torch.stack([mask[:, :, 0].sum(1), mask[:, 0].sum(1)], 1)
    theirs = [{"boxes": b[ok], "class_labels": c[ok]} for b, c, ok in zip(boxes, labels, valid, strict=True)]
    return Targets(boxes, labels, valid, Frames.unscaled(sizes)), theirs


def detect(detector: Detector, pixels: Tensor, mask: Tensor, targets: Targets) -> Output:
    """What `Detector.forward` does with an image whose colours are normalised already."""
    memory = detector.encoder(detector.neck(detector.backbone(pixels)), mask == 0)
    groups = {"main": detector.queries["main"](QueryContext(memory, targets))}
    return Output(groups, detector.decoder(groups, memory), memory=memory)


def their_layers(pair: Pair, theirs: nn.Module, pixels: Tensor, mask: Tensor, labels: list) -> Iterator[dict]:
    """What every decoder layer predicts, and at last the first stage, if there is one."""
    if pair is CONDITIONAL_PAIR:
        # With auxiliary_loss theirs feeds the normalised output of a layer to the next one, unlike the original; so
        # each layer's predictions come from a decoder that ends there.
        layers = theirs.model.decoder.layers
        for count in range(1, LAYERS + 1):
            theirs.model.decoder.layers = layers[:count]
            out = theirs(pixels, mask)
            yield {"logits": out.logits, "pred_boxes": out.pred_boxes}
        return
    out = theirs(pixels, mask, labels=labels)  # no auxiliary outputs without labels
    yield from [*out.auxiliary_outputs, {"logits": out.logits, "pred_boxes": out.pred_boxes}]
    if pair.options.get("two_stage"):
        yield {"logits": out.enc_outputs_class, "pred_boxes": out.enc_outputs_coord_logits.sigmoid()}


def their_losses(layers: list[dict], labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """By our names. The library leaves out the first stage's: as in the original code, all its objects are class 0."""
    judge = DeformableDetrImageLoss(DeformableDetrHungarianMatcher(2, 5, 2), CLASSES, 0.25, ["labels", "boxes"])
    *earlier, last = layers[:LAYERS]
    found = judge({**last, "auxiliary_outputs": earlier}, labels)
    names = {str(i): f"_{i}" for i in range(LAYERS - 1)} | {str(LAYERS - 1): ""}
    if len(layers) > LAYERS:
        first = judge(layers[-1], [{**image, "class_labels": image["class_labels"] * 0} for image in labels])
        found |= {f"{name}_encoder": value for name, value in first.items()}
        names["encoder"] = "_encoder"
    return {
        f"main/{layer}/{term}": weight * found[name + suffix]
        for layer, suffix in names.items()
        for term, (name, weight) in LOSSES.items()
    }


def close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_logits_and_boxes_of_every_layer(models: Models, batch: str) -> None:
    pixels, mask = BATCHES[batch]
    targets, labels = objects(mask, (2,) * len(mask))
    output = detect(models.ours, pixels, mask, targets)
    found = list(zip(output.predictions["main"].logits, output.predictions["main"].boxes, strict=True))
    if (first := output.groups["main"].proposals) is not None:
        found.append((first.prediction.logits, first.prediction.boxes))
    layers = their_layers(models.pair, models.theirs, pixels, mask, labels)
    for (logits, boxes), expected in zip(found, layers, strict=True):
        close(logits, expected["logits"])
        close(boxes, expected["pred_boxes"])


@pytest.mark.parametrize("counts", [(6, 0, 1), (0, 0, 0)], ids=["objects", "no objects"])
def test_losses_and_gradients_of_every_layer(models: Models, counts: tuple[int, ...]) -> None:
    """Gradients too, since where references are detached does not show in the values."""
    pixels, mask = BATCHES["padded"]
    targets, labels = objects(mask, counts)
    models.ours.zero_grad()
    models.theirs.zero_grad()
    losses = models.criterion(detect(models.ours, pixels, mask, targets), targets)
    layers = list(their_layers(models.pair, models.theirs, pixels, mask, labels))
    expected = their_losses(layers, labels)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        close(value, expected[name])

    torch.stack(list(losses.values())).sum().backward()
    torch.stack(list(expected.values())).sum().backward()
    theirs = {name: _gradient(p) for name, p in models.theirs.named_parameters(remove_duplicate=False)}
    gradients, _ = models.pair.convert(models.theirs, theirs, models.ours)
    idle = []
    for name, parameter in models.ours.named_parameters():
        if parameter.requires_grad:
            largest = float(gradients[name].abs().max())
            close(_gradient(parameter), gradients[name], max(largest, 1.0))
            idle += [name] if largest < 1e-5 else []
    if any(counts):
        assert all(re.search(IDLE, name) for name in idle), idle


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
