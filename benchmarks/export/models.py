"""The detectors whose exported graphs are held against PyTorch, with random weights: all at toy width, some at full."""

from __future__ import annotations

import torch
from hydra.utils import instantiate
from torch import Tensor

from codetr import application
from codetr.costs.step import without_pretrained
from codetr.exporting.graph import Canvas, Graph, least_side, takes_any_size
from codetr.models.detector import Detector
from codetr.nn.deformable_attention import DeformableAttention
from codetr.postprocess import PostProcess

_SIZES = (
    "model.width=32",
    "model.num_heads=2",
    "model.ffn_width=32",
    "model.norm_groups=4",
    "model.detector.encoder.num_layers=1",
    "model.detector.decoder.num_layers=2",
    "model.detector.main.num_queries=10",
)
_RESNET = (
    *_SIZES,
    "model.detector.backbone.name=resnet10t",
    "+model.detector.backbone.arguments={channels:[8,16,32,32],stem_width:8}",
)
_SWIN = (
    *_SIZES,
    "model/backbone=swin_tiny",
    "+model.detector.backbone.arguments={embed_dim:16,depths:[1,2,1,1],num_heads:[1,2,2,2],window_size:4}",
)
_VIT = (
    *_SIZES,
    "model/backbone=vit_large",
    "model/neck=simple_pyramid",
    "model.detector.backbone.name=eva02_tiny_patch14_224",
    "model.detector.backbone.window=4",
    "model.detector.backbone.global_blocks=[1]",
    "model.detector.backbone.checkpointed_blocks=0",
    "+model.detector.backbone.arguments={img_size:64,patch_size:16,depth:2,embed_dim:32,num_heads:2}",
)
TOY = {
    "conditional_detr": ("model=conditional_detr", *_RESNET),
    "dab_detr": ("model=dab_detr", *_RESNET),
    "dn_detr": ("model=dn_detr", *_RESNET),
    "deformable_detr": ("model=deformable_detr", *_RESNET),
    "deformable_detr_refine": ("model=deformable_detr_refine", *_RESNET),
    "deformable_detr_two_stage": ("model=deformable_detr_two_stage", *_RESNET),
    "deformable_pp": ("model=deformable_pp", *_RESNET),
    "h_deformable": ("model=h_deformable", *_RESNET),
    "dab_deformable_detr": ("model=dab_deformable_detr", *_RESNET),
    "dn_deformable_detr": ("model=dn_deformable_detr", *_RESNET),
    "dino": ("model=dino", *_RESNET),
    "dino_5scale": ("model=dino_5scale", *_RESNET),
    "co_dino": ("model=co_dino", *_RESNET),
    "co_deformable": ("model=co_deformable", *_RESNET),
    "group_dino": ("model=dino", "model.query_groups=3", *_RESNET),
    "group_co_deformable": ("model=co_deformable", "model.query_groups=3", *_RESNET),
    "swin": ("model=deformable_pp", *_SWIN),
    "vit": ("model=deformable_pp", *_VIT),
    "masks": (
        "model=co_deformable",
        *_RESNET,
        "model/mask_head=refine_mask",
        "model.detector.mask_head.iou.hidden_width=16",
    ),
}
# At full width: the side of the images, which decides how long they take, and the overrides.
FULL = {
    "deformable_pp_r50": (640, ("model=deformable_pp",)),
    "co_dino_5scale_r50": (256, ("model=co_dino",)),
}
# Traced without numbers, since they are too large to be run here.
SHAPES = {"deformable_pp_swin_large": (640, ("model=deformable_pp", "model/backbone=swin_large"))}


def detector(overrides: tuple[str, ...]) -> Detector:
    """With random weights of three classes; heads that start at zero, and would hide most of the graph, do not."""
    torch.manual_seed(0)
    config = application.compose("train", ["model.num_classes=3", "run_dir=nowhere", *overrides])
    built: Detector = instantiate(without_pretrained(config).model.detector, _convert_="all").eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return built


def graph(overrides: tuple[str, ...], form: str, size: tuple[int, int], detections: int) -> tuple[Graph, Canvas]:
    """The graph of such a detector, with so many detections, and what it takes: `size` where that has to be fixed."""
    built = detector(overrides)
    fixed = None if takes_any_size(built, form) else size
    return Graph(built, PostProcess(detections, None), None).eval(), Canvas(fixed, 32, least_side(built, 32))


def samples(own: Graph) -> bool:
    """Whether it has deformable attention, which not every format has in the same form."""
    return any(isinstance(module, DeformableAttention) for module in own.modules())


def batch(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The first image fills the canvas; the padding of the others is not black."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    sizes = torch.stack([torch.randint(n // 2, n + 1, (count,), generator=generator) for n in (height, width)], 1)
    sizes[0] = torch.tensor([height, width])
    return images, sizes
