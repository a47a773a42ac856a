"""What a composed configuration amounts to: read off the objects that it builds, wherever it builds any."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import timm
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from codetr.mask_criterion import MaskCriterion
from codetr.models.detector import Detector
from codetr.nn.deformable_attention import DeformableAttention
from codetr.queries.collaborative import CollaborativeQueries
from codetr.queries.denoising import DenoisingQueries
from codetr.queries.hybrid import HybridQueries

Facts = dict[str, Any]


def resolve(config: DictConfig) -> Facts:
    """The keys of `tests/papers/*.yaml`; a key that does not apply is absent."""
    detector, trained = _build(OmegaConf.to_yaml(config.model, resolve=True), OmegaConf.to_yaml(config.optimizer))
    facts = {**detector, **trained, **_training(config), **_loss(config, detector["heads"]), **_data(config.data)}
    post = config.postprocess
    facts |= {"detections": post.max_detections, "suppression": _suppression(post.get("suppression"))}
    facts |= {
        "evaluate_heads": config.evaluate_heads,
        "ema": config.callbacks.ema.decay if "ema" in config.callbacks else False,
    }
    return facts


@functools.cache
def _build(model: str, optimizer: str) -> tuple[Facts, Facts]:
    config, recipe = OmegaConf.create(model), OmegaConf.create(optimizer)
    name = config.detector.backbone.name
    config.detector.backbone.pretrained = False
    with torch.device("meta"):
        detector = instantiate(config.detector, _convert_="all")
        groups = instantiate(recipe)(detector, fused=False).param_groups
    tagged = name if "." in name else f"{name}.{timm.get_pretrained_cfg(name).tag}"
    facts = {"weights": tagged, "ffn_width": config.ffn_width, "dropout": config.dropout}
    return {**facts, **_backbone(detector), **_queries(detector)}, _rates(detector, groups)


def _backbone(detector: Detector) -> Facts:
    backbone = detector.backbone
    stages: dict[str, list[nn.Parameter]] = {"stem": []}
    for name, child in backbone.body.named_children():
        stage = f"stage {len(stages)}" if name.startswith(("layer", "stages", "layers")) else "stem"
        stages.setdefault(stage, []).extend(child.parameters())
    norms = [p for m in backbone.modules() if isinstance(m, (nn.LayerNorm, _NormBase)) for p in m.parameters()]
    return {
        "frozen": [stage for stage, own in stages.items() if not any(p.requires_grad for p in own)],
        "norms": "trained" if any(p.requires_grad for p in norms) else "frozen",
        "drop_path": max([m.drop_prob for m in backbone.modules() if isinstance(m, DropPath)], default=0),
        "strides": list(backbone.strides),
    }


def _queries(detector: Detector) -> Facts:
    sources = dict(detector.queries)
    groups = [name for name in sources if name == "main" or name.startswith("group_")]
    main = sources["main"]
    positives = {name: s for name, s in sources.items() if isinstance(s, CollaborativeQueries)}
    facts: Facts = {
        "queries": main.num_queries,
        "groups": len(groups),
        "repeats": main.repeats,
        "heads": sorted(detector.heads),
        "query_sources": sorted(positives),
        "dn_number": 0,
        "hybrid_queries": 0,
        "encoder_layers": len(detector.encoder.layers),
        "decoder_layers": len(detector.decoder.layers),
    }
    if positives:
        facts["lambda_1"] = _one({source.weight for source in positives.values()})
        limits = {(source.min_queries, source.max_queries) for source in positives.values()}
        facts["positives"] = [value for pair in sorted(limits) for value in pair]
        facts["query_features"] = all(source.features is not None for source in positives.values())
        facts["fill"] = _one({source.fill for source in positives.values()})
    if "atss" in detector.heads:
        tower = detector.heads["atss"].predictor.class_tower
        facts["atss_convs"] = sum(isinstance(m, nn.Conv2d) for m in tower.modules())
    for source in sources.values():
        if isinstance(source, DenoisingQueries):
            facts |= {"dn_number": source.num_queries, "dn_contrastive": source.contrastive}
            facts |= {"dn_label_noise": source.label_noise, "dn_box_noise": source.box_noise}
            facts["dn_unused"] = source.unused
        if isinstance(source, HybridQueries):
            facts |= {"hybrid_queries": source.num_queries, "hybrid_repeats": source.repeats}
            facts["hybrid_weight"] = source.weight
    return facts


def _rates(detector: Detector, groups: list[dict[str, Any]]) -> Facts:
    """`lr` of everything that no other kind holds, and the others as factors of it (of the greatest of several)."""
    of = {id(p): group for group in groups for p in group["params"]}
    offsets = {id(p) for m in detector.modules() if isinstance(m, DeformableAttention) for p in _of(m.sampling_offsets)}
    reference = {id(p) for p in _of(getattr(detector.decoder, "reference_head", None))}
    rates: dict[str, set[float]] = {"lr": set(), "lr_backbone": set(), "lr_offsets": set(), "lr_reference": set()}
    decays, undecayed = set(), set()
    for name, parameter in detector.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in of, f"{name} is frozen and optimized"
            continue
        kind = "lr_backbone" if name.startswith("backbone.") else "lr"
        kind = "lr_offsets" if id(parameter) in offsets else "lr_reference" if id(parameter) in reference else kind
        group = of[id(parameter)]
        rates[kind].add(group["lr"])
        (decays if group["weight_decay"] else undecayed).add(group["weight_decay"] or f"{min(parameter.dim(), 2)}-d")
    base = rates.pop("lr")
    facts = {kind: _one({rate / max(base) for rate in of_kind}) for kind, of_kind in rates.items() if of_kind}
    return {"lr": _one(base), "weight_decay": _one(decays), "undecayed": sorted(undecayed), **facts}


def _of(module: nn.Module | None) -> Iterator[nn.Parameter]:
    return iter(()) if module is None else module.parameters()


def _one(values: set[Any]) -> Any:
    """The value, or the least and the greatest of several."""
    return next(iter(values)) if len(values) == 1 else [min(values), max(values)]


def _training(config: DictConfig) -> Facts:
    trainer, schedule = config.trainer, instantiate(config.schedule)
    epochs = trainer.max_epochs
    factors = [schedule.factor(10**9, epoch, epochs) for epoch in range(epochs)]
    drops = [epoch for epoch in range(1, epochs) if factors[epoch] != factors[epoch - 1]]
    return {
        "batch": config.data.batch_size * trainer.accumulate_grad_batches * trainer.devices * trainer.num_nodes,
        "epochs": epochs,
        "milestones": drops,
        "gamma": _one({factors[epoch] / factors[epoch - 1] for epoch in drops}) if drops else None,
        "warmup_steps": schedule.warmup_steps,
        "clip": trainer.gradient_clip_val,
    }


def _loss(config: DictConfig, heads: list[str]) -> Facts:
    criterion = instantiate(config.criterion, _convert_="all")
    if isinstance(criterion, MaskCriterion):
        return _mask_loss(criterion)
    name = type(criterion.class_loss).__name__
    cost = criterion.matching_cost
    facts = {
        "class_loss": {"Focal": "focal", "QualityFocal": "quality_focal", "VariFocal": "varifocal"}.get(name, name),
        "loss_weights": [criterion.focal, criterion.l1, criterion.giou],
        "matching_cost": [cost.focal, cost.l1, cost.giou],
        "fed_loss": criterion.fed_loss is not None,
    }
    if heads:
        facts["lambda_2"] = _one({criterion.lambda_2_by_head.get(head, criterion.lambda_2) for head in heads})
    return facts


def _mask_loss(criterion: MaskCriterion) -> Facts:
    """Of detectors without auxiliary heads."""
    cost, points = criterion.matching_cost, criterion.points
    return {
        "class_loss": "softmax",
        "no_object": criterion.no_object,
        "loss_weights": [criterion.class_weight, criterion.mask_weight, criterion.dice_weight],
        "matching_cost": [cost.class_weight, cost.mask_weight, cost.dice_weight],
        "points": [points.count, points.oversample, points.share, cost.num_points],
        "fed_loss": False,
    }


def _suppression(node: DictConfig | None) -> str:
    if node is None:
        return "none"
    return f"{'soft' if node._target_.endswith('SoftNMS') else 'nms'} {node.iou}"


def _data(data: DictConfig) -> Facts:
    """Of DETR's augmentation and of large-scale jitter."""
    lvis = "lvis" in f"{data.reader._target_} {data.train_annotations}"
    facts: Facts = {"data": "lvis" if lvis else "coco", "size_divisor": data.size_divisor}
    facts |= {"aspect_groups": data.aspect_ratio_grouping, "canvas": 0}
    copy_paste = data.get("copy_paste")
    facts["copy_paste"] = copy_paste.most if copy_paste else 0
    recipe = data.train_transform
    if recipe._target_.endswith("large_scale_jitter"):
        facts |= {"canvas": recipe.canvas, "scale_range": list(recipe.scale_range), "flip": recipe.flip}
        none: Facts = {"short": [], "long": 0, "crop_short": [], "crop": []}
        test = data.val_transform
        return facts | none | {"eval_size": [test.canvas] * 2 if "canvas" in test else [test.size, test.max_size]}
    flip, cropped, last = instantiate(recipe, _convert_="all").transforms
    before, crop = cropped.transforms
    facts |= {"short": list(last.min_size), "long": last.max_size, "crop_short": list(before.min_size)}
    facts |= {"crop": [crop.min_size, crop.max_size], "flip": flip.p}
    return facts | {"eval_size": [data.val_transform.size, data.val_transform.max_size]}
