"""The official recipes: what is built against the official models' sizes, and what learns how fast when against the
official rules, written down here once more."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from codetr.callbacks.ema import EMA
from codetr.models.detector import Detector

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "experiment" / "official").glob("*.yaml"))

# (epochs, epochs after which the rate drops)
ONE, TWO, THREE, FINE = (12, [11]), (24, [20]), (36, [30]), (16, [8])
TIMES = {
    "co_dino_5scale_lsj_swin_large_3x_lvis": ONE,  # as in the official file, whatever its name says
    "co_dino_5scale_vit_large_coco": (12, [7]),
    "co_dino_5scale_vit_large_coco_instance": (12, [7]),
    "co_dino_5scale_lsj_vit_large_lvis": (16, [9, 15]),
    "co_dino_5scale_lsj_vit_large_lvis_instance": (16, [9, 15]),
}


@cache
def recipe(name: str) -> DictConfig:
    classes = 1203 if "lvis" in name else 80
    overrides = [f"experiment=official/{name}", f"model.num_classes={classes}"]
    with initialize_config_module("codetr.conf", version_base="1.3"):
        return compose("train", [*overrides, "model.detector.backbone.pretrained=false"])


@cache
def build(name: str) -> Detector:
    with torch.device("meta"):
        return instantiate(recipe(name).model.detector, _convert_="all")


def size(module: nn.Module) -> int:
    """Frozen batch norms are buffers here, and parameters in the official code."""
    frozen = [m for m in module.modules() if isinstance(m, FrozenBatchNorm2d)]
    return sum(p.numel() for p in module.parameters()) + sum(m.weight.numel() + m.bias.numel() for m in frozen)


def test_there_are_thirty() -> None:
    assert len(RECIPES) == 30


@pytest.mark.parametrize("name", RECIPES)
def test_sizes(name: str, official: Path) -> None:
    """The official number of parameters, by modules, and of those that are trained."""
    assert recipe(name).name == name
    detector = build(name)
    expected = json.loads((official / "keys" / f"{name}.json").read_text())
    modules = expected["parameters_by_module"]
    region = "mask_rcnn" if "_mask_" in name else "faster_rcnn"
    assert list(detector.heads) == [region, "atss"]
    sizes = {
        "backbone": size(detector.backbone),
        "neck": size(detector.neck),
        "query_head": sum(size(getattr(detector, n)) for n in ("encoder", "adapter", "queries", "decoder")),
        "rpn_head": size(detector.heads[region].rpn),
        "roi_head": size(detector.heads[region]) - size(detector.heads[region].rpn),
        "bbox_head": size(detector.heads["atss"]),
    }
    if detector.mask_head is not None:
        quality = size(detector.mask_head.iou)
        sizes |= {"mask_iou_head": quality, "mask_head": size(detector.mask_head) - quality}
    assert sizes == modules
    assert sum(p.numel() for p in detector.parameters() if p.requires_grad) == expected["num_trainable"]


def official_factor(name: str, parameter: str) -> float:
    """Of the learning rate: custom_keys, or LayerDecayOptimizerConstructor with 24 layers and 0.8."""
    if "vit_large_coco" in name:
        if parameter.startswith(("backbone.pos_embed", "backbone.patch_embed")):
            layer = 0
        elif parameter.startswith("backbone.blocks"):
            layer = int(parameter.split(".")[2]) + 1
        else:
            layer = 25
        return 0.8 ** (26 - layer - 1)
    slow = parameter.startswith("backbone.") or ("deformable" in name and "sampling_offsets" in parameter)
    return 0.1 if slow else 1.0


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rates_and_decay_of_weights(name: str) -> None:
    config, detector = recipe(name), build(name)
    names = {id(p): n for n, p in detector.named_parameters()}
    optimizer = instantiate(config.optimizer)(detector, fused=False)
    steps = 1000
    epochs, milestones = TIMES.get(name) or next(
        (t for key, t in {"1x": ONE, "2x": TWO, "3x": THREE, "16e": FINE}.items() if key in name)
    )
    assert config.trainer.max_epochs == epochs
    assert config.trainer.gradient_clip_val == 0.1
    schedule = instantiate(config.schedule)
    rate = 5e-5 if "vit" in name else 1e-4 if "o365" in name else 2e-4
    weight_decay = 0.05 if "deformable_detr_swin" in name or "vit_large_lvis" in name else 1e-4
    weight_decay = 0.01 if "vit_large_coco" in name else weight_decay
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            label = names[id(parameter)]
            undecayed = "vit_large_coco" in name and (parameter.dim() == 1 or label.endswith(".bias"))
            undecayed &= not label.endswith("atss.predictor.scales")  # one number per level there, which decays
            assert group["weight_decay"] == (0.0 if undecayed else weight_decay), label
            assert group["lr"] == pytest.approx(rate * official_factor(name, label), rel=1e-12), label
    for step in (0, 1, 250, 499, 500, 3456, *(m * steps + d for m in milestones for d in (-1, 0, 1)), epochs * steps):
        factor = 0.1 ** sum(step // steps >= m for m in milestones)
        if "vit" in name and step < 500:
            factor *= 1 - (1 - step / 500) * (1 - 0.01)
        assert schedule.factor(step, step / steps, epochs) == pytest.approx(factor, rel=1e-12)


def test_the_layers_of_a_vit() -> None:
    """Named parameters, in numbers."""
    config, detector = (f("co_dino_5scale_vit_large_coco") for f in (recipe, build))
    optimizer = instantiate(config.optimizer)(detector, fused=False)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    parameters = dict(detector.named_parameters())
    for name, rate in {
        "backbone.pos_embed": 5e-5 * 0.8**25,
        "backbone.patch_embed.proj.weight": 5e-5 * 0.8**25,
        "backbone.blocks.0.norm1.weight": 5e-5 * 0.8**24,
        "backbone.blocks.2.norm1.weight": 5e-5 * 0.8**22,
        "backbone.blocks.23.norm1.weight": 5e-5 * 0.8,
        "backbone.norm.weight": 5e-5,
        "encoder.level_embedding": 5e-5,
    }.items():
        assert rates[id(parameters[name])] == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_vit_on_coco_is_averaged(name: str) -> None:
    callbacks = recipe(name).callbacks
    assert ("ema" in callbacks) == ("vit_large_coco" in name)
    if "ema" in callbacks:
        ema = instantiate(callbacks.ema)
        assert isinstance(ema, EMA)
        for iteration in (0, 1, 100, 2000, 50000):  # the update after iteration t is number t + 1
            momentum = (1 - 1e-4) * math.exp(-(1 + iteration) / 2000) + 1e-4
            assert 1 - ema.decay_at(iteration + 1) == pytest.approx(momentum, rel=1e-9)


@pytest.mark.parametrize("name", RECIPES)
def test_the_rest_of_the_settings(name: str) -> None:
    """Losses, queries, denoising, suppression, drop path and sizes of input."""
    config = recipe(name)
    detector, dino = config.model.detector, "dino" in name
    assert (config.criterion.class_loss._target_, config.criterion.focal) == (
        ("codetr.losses.QualityFocal", 1.0) if dino else ("codetr.losses.Focal", 2.0)
    )
    assert config.criterion.matching_cost.focal == 2.0
    assert detector.collaborative.use_features == (not dino)
    queries = 1500 if "vit_large_coco" in name else 900 if dino or "900q" in name else 300
    assert detector.main.num_queries == queries
    if dino:
        denoising = detector.queries.denoising
        noise = (300, 0.4) if "vit" in name else (500, 0.4) if "o365" in name else (100, 1.0)
        assert (denoising.num_queries, denoising.box_noise, denoising.label_noise) == (*noise, 0.25)
        assert denoising.unused == "background"
    post = config.postprocess
    best = 1000 if "vit" in name or "o365tolvis" in name else 300 if dino or "900q" in name else 100
    assert post.max_detections == best
    assert (post.suppression is not None) == dino
    if dino:
        assert (post.suppression.method, post.suppression.iou, post.suppression.min_score) == ("linear", 0.8, 1e-3)
    heads = detector.heads.values()
    alone = [head.selection.max_detections if "selection" in head else head.max_detections for head in heads]
    assert alone == [1000 if "vit" in name or "o365tolvis" in name else 100, 1000 if "o365tolvis" in name else 100]
    if "swin" in name or "vit" in name:
        long = {"tiny_3x": 0.3, "small_3x": 0.4, "base_3x": 0.4, "900q_3x": 0.6, "large_3x_coco": 0.6}
        special = {"lsj_swin_large_3x_coco": 0.5, "large_2x": 0.5, "vit_large_coco": 0.4}
        short = 0.2 if "tiny" in name or "small" in name or "base" in name else 0.3
        drop = next((rate for key, rate in {**special, **long}.items() if key in name), short)
        assert detector.backbone.arguments.drop_path_rate == drop
    canvas = 0
    if "lsj" in name:
        canvas = 1536 if "vit" in name or "o365" in name else 1280 if "swin" in name else 1024
        assert config.data.train_transform.canvas == config.data.val_transform.canvas == canvas
        assert tuple(config.data.train_transform.scale_range) == (0.1, 2.0)
    else:
        large = "o365" in name or "vit" in name
        sizes = (1280, 2048) if large else (800, 1333)
        assert (config.data.val_transform.size, config.data.val_transform.max_size) == sizes
        resize = instantiate(config.data.train_transform).transforms[2]
        assert list(resize.min_size) == list(range(480, 1537 if large else 801, 32))
        assert resize.max_size == (2400 if "vit" in name else 2048 if large else 1333)
    single = dino and ("swin" in name or "vit" in name)
    assert config.data.batch_size == (1 if single else 2)
    assert ("copy_paste" in config.data) == bool(canvas)
    # The LSJ files of ResNet and Swin name the plain data set; the others inherit ClassBalancedDataset.
    repeated = "lvis" in name and ("vit" in name or "lsj" not in name)
    assert config.data.sampling._target_ == f"codetr.data.sampling.{'RepeatFactor' if repeated else 'Uniform'}"
    if repeated:
        assert (config.data.sampling.threshold, config.data.sampling.round_up) == (1e-3, True)
    assert config.data.aspect_ratio_grouping
