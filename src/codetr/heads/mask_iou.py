"""The quality of a predicted mask (Mask Scoring R-CNN, Huang et al., arXiv 1903.00241)."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from codetr.nn.class_rows import by_class


def conv_block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, layer norm over the channels, ReLU, with the epsilon of the official code."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, LayerNorm2d(out_channels, eps=1e-5), nn.ReLU(True))


def linear_block(in_features: int, out_features: int) -> nn.Sequential:
    linear = nn.Linear(in_features, out_features)
    nn.init.kaiming_uniform_(linear.weight, a=1)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.ReLU(True))


class MaskIoU(nn.Module):
    """Predicts the IoU of a region's mask with its object's whole mask, for every class (sec. 3.2).

    size: cells per side of the region's features.
    num_convs: the last has stride 2.
    """

    def __init__(
        self, width: int, size: int, num_convs: int, num_hidden: int, hidden_width: int, num_classes: int
    ) -> None:
        super().__init__()
        widths = [width + 1, *[width] * num_convs]
        strides = [1] * (num_convs - 1) + [2]
        self.convs = nn.Sequential(*(conv_block(widths[i], width, strides[i]) for i in range(num_convs)))
        inputs = [width * ((size + 1) // 2) ** 2, *[hidden_width] * num_hidden]
        self.hidden = nn.Sequential(*(linear_block(inputs[i], hidden_width) for i in range(num_hidden)))
        self.classes = by_class(nn.Linear(inputs[-1], num_classes))
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.zeros_(self.classes.bias)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """features: [R, C, size, size]. logits: [R, 2 size, 2 size] of the masks. Returns [R, K] in 0..1, float32."""
        mask = max_pool2d(logits.sigmoid()[:, None], 2)
        x = self.convs(torch.cat([features, mask], 1))
        return self.classes(self.hidden(x.flatten(1))).float().sigmoid()


@torch.no_grad()
def mask_iou_target(logits: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """IoU of the predicted mask, which ends with its region, and the object's whole mask (sec. 3.3): [R].

    logits: [R, s, s].
    target: [R, s, s], 0 or 1, what the region shows of the object.
    inside: [R], which share of the object that is.
    """
    mask = (logits > 0).to(target)
    overlap = (mask * target).sum((1, 2))
    whole = target.sum((1, 2)) / (inside + 1e-7)
    return overlap / (mask.sum((1, 2)) + whole - overlap).clamp(min=1e-7)


@torch.no_grad()
def share_inside(objects: Tensor, rois: Tensor) -> Tensor:
    """The share of an object's pixels that lies in the region, its corners rounded towards 0; at least a pixel: [R].

    objects: [n, 1, H, W], 0 or 1.
    rois: [R, 5], the object's place and xyxy in pixels.
    """
    height, width = objects.shape[-2:]
    # Sums over everything above and to the left of a pixel's corner; float32 counts the pixels of any image exactly.
    areas = pad(objects[:, 0], (1, 0, 1, 0)).cumsum_(1).cumsum_(2)
    place, x1, y1, x2, y2 = rois.long().unbind(1)
    x1, y1 = x1.clamp(0, width), y1.clamp(0, height)
    x2, y2 = x2.maximum(x1 + 1).clamp(max=width), y2.maximum(y1 + 1).clamp(max=height)
    inside = areas[place, y2, x2] - areas[place, y1, x2] - areas[place, y2, x1] + areas[place, y1, x1]
    return inside / (areas[place, -1, -1] + 1e-7)
