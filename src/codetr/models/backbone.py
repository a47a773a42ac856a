"""timm backbones as feature extractors that take the raw uint8 image."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from codetr.errors import UserError
from codetr.types import NormKind


class Backbone(nn.Module):
    """Any timm model with feature maps.

    Normalises colours on the device, so that workers ship uint8 and the constants travel with the weights.

    name: timm model. out_indices: timm's feature levels (a ResNet's 1..4 are C2..C5). norm: "frozen" replaces
    batch norms by their frozen form (the papers'), "batch" trains them, "group" builds the network with group
    norm (training from scratch on small batches). frozen_stages: the first n stages are not trained, the stem
    counts as the first. arguments: further keywords for `timm.create_model`.

    Raises UserError when timm does not know the name.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        out_indices: tuple[int, ...],
        pretrained: bool,
        norm: NormKind,
        frozen_stages: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        arguments: dict[str, Any],
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
            raise UserError(f"model.backbone.name={name}: timm has no such model (near: {near})")
        if norm == "group":
            arguments = {**arguments, "norm_layer": partial(nn.GroupNorm, 8)}
        body: Any = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=tuple(out_indices), **arguments
        )
        self.channels: tuple[int, ...] = tuple(body.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(body.feature_info.reduction())
        body = freeze_batch_norm_2d(body) if norm == "frozen" else body
        # Faster convolutions on CPUs and GPUs, and levels that flatten into tokens without a copy.
        self.body = body.to(memory_format=torch.channels_last)
        self._freeze_stages(frozen_stages)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def _freeze_stages(self, count: int) -> None:
        """Stage 0 is whatever comes before the first feature stage (`layer1`, `stages_0`, ...)."""
        stage = 0
        for child_name, child in self.body.named_children():
            if child_name.startswith(("layer", "stages", "layers")):
                stage += 1
            if stage < count:
                child.requires_grad_(False)

    def normalize(self, images: Tensor, padding: Tensor) -> Tensor:
        """[B, 3, H, W] uint8 -> float, zero on the padding."""
        return ((images.float() - self.mean) / self.std).masked_fill(padding[:, None], 0)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images -> feature maps [B, C_i, H_i, W_i], finest first."""
        return self.body(images.contiguous(memory_format=torch.channels_last))
