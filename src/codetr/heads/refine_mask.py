"""Instance masks, refined in stages (RefineMask, Zhang et al., arXiv 2104.08569), as in the official ViT models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, interpolate

from codetr.errors import UserError
from codetr.heads.mask import crop_masks, objects_and_rois
from codetr.heads.mask_iou import MaskIoU, conv_block, mask_iou_target, share_inside
from codetr.heads.regions import Regions, sample_regions
from codetr.heads.roi import RoIPool
from codetr.nn.boxes import best_pairs
from codetr.nn.class_rows import by_class
from codetr.ops.normaliser import normaliser
from codetr.ops.roi_align import roi_align_pyramid
from codetr.types import Detections, Masks, Prediction, Pyramid, Targets

WHOLE = 2  # so many stages predict whole masks, the later ones correct boundaries (sec. 3.3)


class Refinement(nn.Module):
    """One stage's semantic fusion (fig. 3): features of a region, its mask so far, and what the image shows there.

    Half as many channels come out, the mask among them. Beside the dilated convolutions stands the mean over the
    region, which the paper does not have.
    """

    def __init__(self, width: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.fuse = nn.Conv2d(2 * width + 1, width, 1)
        self.branches = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in dilations)
        self.merge = nn.Conv2d(width, width, 1)
        self.reduce = nn.Conv2d(width, width // 2 - 1, 1)

    def forward(self, features: Tensor, mask: Tensor, semantic: Tensor) -> Tensor:
        """features, semantic: [R, width, s, s]. mask: [R, s, s] in 0..1. Returns [R, width / 2, s, s]."""
        x = self.fuse(torch.cat([features, semantic, mask[:, None]], 1)).relu()
        branches = [branch(x).relu() for branch in self.branches]
        x = self.merge(sum(branches, x.mean((2, 3), keepdim=True))).relu()
        return torch.cat([self.reduce(x).relu(), mask[:, None]], 1)


class RefineMaskHead(nn.Module):
    """Masks of regions in stages, each of twice the resolution and half the width, and each mask's quality.

    All stages but the last predict a mask per class. Losses, of regions that the decoder's boxes and the objects
    themselves provide: cross entropy of all pixels in the first stages, of those near a boundary in the later ones;
    squared error of the predicted mask IoU.

    pool: its size is that of the first stage.
    stage_weights: of the stages' losses; there are as many stages.
    boundary_width: cells to either side of a boundary.
    num_candidates: boxes of the decoder per image.
    positive_iou: of a box with an object.
    most_positive: regions per image in the loss.
    regions_per_pass: at inference, to bound the memory.
    """

    def __init__(
        self,
        pool: RoIPool,
        width: int,
        num_convs: int,
        num_semantic_convs: int,
        num_classes: int,
        dilations: tuple[int, ...],
        stage_weights: tuple[float, ...],
        boundary_width: int,
        iou: MaskIoU,
        mask_weight: float,
        iou_weight: float,
        num_candidates: int,
        positive_iou: float,
        most_positive: int,
        regions_per_pass: int,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.instance = nn.Sequential(*(conv_block(width, width) for _ in range(num_convs)))
        self.semantic = nn.Sequential(*(conv_block(width, width) for _ in range(num_semantic_convs)))
        *coarse, finest = (width // 2**stage for stage in range(len(stage_weights)))
        self.maps = nn.ModuleList(nn.Conv2d(width, w, 1) for w in coarse)
        self.stages = nn.ModuleList(Refinement(w, dilations) for w in coarse)
        by_stage = [by_class(nn.Conv2d(w, num_classes, 1)) for w in coarse]
        self.classes = nn.ModuleList([*by_stage, nn.Conv2d(finest, 1, 1)])
        for layer in (*self.maps, *self.stages.modules(), *self.classes):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        self.iou = iou
        self.stage_weights, self.boundary_width = stage_weights, boundary_width
        self.mask_weight, self.iou_weight = mask_weight, iou_weight
        self.num_candidates, self.positive_iou, self.most_positive = num_candidates, positive_iou, most_positive
        self.regions_per_pass = regions_per_pass

    def semantics(self, pyramid: Pyramid) -> list[Tensor]:
        """Feature maps of the whole image, of the finest level's size, one for every stage that refines."""
        x = self.semantic(pyramid.levels[0])
        return [layer(x).relu() for layer in self.maps]

    def forward(
        self, pyramid: Pyramid, semantics: list[Tensor], images: Tensor, boxes: Tensor, labels: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """images: [R], the image of each box.
        boxes: [R, 4] xyxy in pixels.
        labels: [R].

        Returns the stages' logits [R, s, s], s doubling from stage to stage, and the mask IoU [R], float32.
        """
        pooled = self.pool.regions(pyramid, images, boxes)
        region = torch.arange(labels.shape[0], device=labels.device)  # `len` would fix it in a graph
        finest = torch.zeros_like(images)
        x = self.instance(pooled)
        logits: list[Tensor] = []
        for stage, classes, semantic in zip(self.stages, self.classes, semantics, strict=False):
            if logits:
                x = interpolate(x, scale_factor=2, mode="bilinear")
            logits.append(classes(x)[region, labels].float())
            seen = roi_align_pyramid([semantic], pyramid.strides[:1], images, boxes, finest, x.shape[-1], 0)
            x = stage(x, logits[-1].sigmoid(), seen)
        last = self.classes[-1](x)[:, 0].float()
        logits.append(enlarge(last, 2 * last.shape[-1]))
        return logits, self.iou(pooled, logits[WHOLE - 1])[region, labels]

    def losses(self, pyramid: Pyramid, prediction: Prediction, targets: Targets) -> dict[str, Tensor]:
        """prediction: of the decoder's last layer, [B, N, ...]; no gradient flows into it. Term -> scalar, weighted."""
        with torch.no_grad():
            scores, _, boxes = best_pairs(prediction, targets.frames.sizes, self.num_candidates)
        regions = sample_regions(boxes, scores > 0, targets, self.positive_iou, self.most_positive, self.most_positive)
        return self.region_losses(pyramid, regions, targets)

    def region_losses(self, pyramid: Pyramid, regions: Regions, targets: Targets) -> dict[str, Tensor]:
        """The losses of the positive regions. Raises UserError when the targets come without masks."""
        if targets.masks is None:
            raise UserError("the mask head needs the objects' masks: set data.masks=true")
        images, places = torch.where(regions.matched_index >= 0)
        boxes, matched_index = regions.boxes[images, places], regions.matched_index[images, places]
        logits, iou = self(pyramid, self.semantics(pyramid), images, boxes, targets.labels[images, matched_index])
        objects, rois = objects_and_rois(targets.masks, targets.valid, images, matched_index, boxes)
        target_masks = [crop_masks(objects, rois, one.shape[-1]) for one in logits]
        counted = counted_pixels(logits, target_masks, self.boundary_width)
        target_iou = mask_iou_target(logits[WHOLE - 1], target_masks[WHOLE - 1], share_inside(objects, rois))
        known = target_iou > 0
        counts = normaliser(torch.stack([where.sum() for where in (*counted, known)])).clamp(min=1)
        losses = {}
        for i, (own, target_mask, where, weight) in enumerate(
            zip(logits, target_masks, counted, self.stage_weights, strict=True)
        ):
            entropy = binary_cross_entropy_with_logits(own, target_mask, reduction="none")
            losses[f"stage{i}"] = entropy.where(where, 0).sum() / counts[i] * (weight * self.mask_weight)
        error = (iou - target_iou).square().where(known, 0).sum()
        return losses | {"iou": error / counts[-1] * self.iou_weight}

    @torch.no_grad()
    def segment(self, pyramid: Pyramid, detections: list[Detections]) -> list[Masks]:
        """Masks of detections in network pixels."""
        counts = torch.tensor([len(found.scores) for found in detections])
        boxes = torch.cat([found.boxes_xyxy for found in detections])
        images = torch.arange(len(detections)).repeat_interleave(counts).to(boxes.device)
        scores, labels = (torch.cat([getattr(found, name) for found in detections]) for name in ("scores", "labels"))
        semantics, masks, ious = self.semantics(pyramid), [], []
        for part in torch.arange(len(images), device=images.device).split(self.regions_per_pass):
            logits, iou = self(pyramid, semantics, images[part], boxes[part], labels[part])
            masks.append(refined(logits).sigmoid())
            ious.append(iou)
        rows = (torch.cat(masks), scores * torch.cat(ious))
        return [Masks(*own) for own in zip(*(row.split(counts.tolist()) for row in rows), strict=True)]

    def segment_all(self, pyramid: Pyramid, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `segment`, of as many boxes in every image and in one pass, which a graph can hold.

        boxes: [B, n, 4] xyxy in network pixels. labels: [B, n]. Returns the masks [B, n, s, s] and their IoU [B, n].
        """
        images = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand(labels.shape).flatten()
        logits, iou = self(pyramid, self.semantics(pyramid), images, boxes.flatten(0, 1), labels.flatten())
        return refined(logits).sigmoid().unflatten(0, labels.shape), iou.unflatten(0, labels.shape)


def enlarge(x: Tensor, size: int) -> Tensor:
    """[R, s, s] -> [R, size, size], bilinear; the corner cells stay in the corners."""
    return interpolate(x[:, None], size=(size, size), mode="bilinear", align_corners=True)[:, 0]


@torch.no_grad()
def near_boundary(mask: Tensor, width: int) -> Tensor:
    """The cells where over a tenth of the window of (2 width + 1)^2 cells differs from its centre: [R, s, s] -> bool.

    mask: bool, or 0 and 1. Beyond the region there is background.
    """
    mask = mask.float()
    share = avg_pool2d(mask[:, None], 2 * width + 1, 1, width)[:, 0]
    return (mask - share).abs() > 0.1


@torch.no_grad()
def refined(logits: list[Tensor]) -> Tensor:
    """The stages' masks in one, of the last one's size: each stage replaces what is near the boundary so far."""
    best = logits[WHOLE - 1]
    for finer in logits[WHOLE:]:
        size = finer.shape[-1]
        edge = enlarge(near_boundary(best >= 0, 1).float(), size) >= 0.5
        best = finer.where(edge, enlarge(best, size))
    return best


@torch.no_grad()
def counted_pixels(logits: list[Tensor], target_masks: list[Tensor], width: int) -> list[Tensor]:
    """Which pixels of each stage count in its loss: all, or those near a boundary of the mask so far or the true mask,
    both of the stage before (sec. 3.3). [R, s, s] bool each.
    """
    counted = [torch.ones_like(own, dtype=torch.bool) for own in logits[:WHOLE]]
    for stage in range(WHOLE, len(logits)):
        edge = near_boundary(refined(logits[:stage]) >= 0, width) | near_boundary(target_masks[stage - 1], width)
        counted.append(enlarge(edge.float(), logits[stage].shape[-1]) >= 0.5)
    return counted
