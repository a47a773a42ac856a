"""timm backbones as feature extractors that take the raw uint8 image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import EntryNotFoundError
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from codetr.errors import UserError
from codetr.models.frozen_norm import fold_frozen_norms
from codetr.types import NormKind

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # how the hub names them
Pretrained = bool | str | Mapping[str, Tensor]
SECONDS = 5  # until the hub must have answered


def pretrained_weights(name: str, pretrained: Pretrained) -> dict[str, Any]:
    """Keywords of `timm.create_model` for the weights of model `name`: none (False), those of a file in timm's names
    (.safetensors, .pth, .bin), tensors by these names, or timm's own (True), from the hub's cache if they lie there.

    Raises UserError for a file that is absent, and for weights that are not here when the hub does not answer.
    """
    if not pretrained:
        return {"pretrained": False}
    if isinstance(pretrained, Mapping):
        return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(pretrained)}}
    cfg = timm.get_pretrained_cfg(name)
    path = pretrained if isinstance(pretrained, str) else _cached(cfg.hf_hub_id if cfg else None)
    if path is None:
        return {"pretrained": True}
    if not Path(path).is_file():
        raise UserError(f"model.detector.backbone.pretrained={path}: there is no such file")
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}


def _cached(hub_id: str | None) -> str | None:
    """The file in the hub's cache, or None when it can be fetched. Without this question timm tries for minutes."""
    if not hub_id:
        return None
    for file in WEIGHTS:
        found = try_to_load_from_cache(hub_id, file)
        if isinstance(found, str):
            return found
    try:
        get_hf_file_metadata(hf_hub_url(hub_id, WEIGHTS[0]), timeout=SECONDS)
    except EntryNotFoundError:
        return None  # under another name
    except Exception as error:  # of whichever library the hub's client is built on
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model.detector.backbone.pretrained=true: the weights {hub_id} are not in {HF_HUB_CACHE}, and the hub "
            f"does not give them ({type(error).__name__}: {reason}). Start from random weights with "
            f"model.detector.backbone.pretrained=false, or fetch {WEIGHTS[0]} of {hub_id} elsewhere and name the file: "
            "model.detector.backbone.pretrained=FILE"
        ) from error
    return None


class Normalize(nn.Module):
    """Colours, normalised on the device: workers ship uint8, and the constants travel with the model."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, padding: Tensor) -> Tensor:
        """[B, 3, H, W] uint8 -> float, zero on the padding [B, H, W]."""
        return ((images.float() - self.mean) / self.std).masked_fill(padding[:, None], 0)


def feature_network(name: str, out_indices: tuple[int, ...], pretrained: Pretrained, arguments: dict[str, Any]) -> Any:
    """timm's model `name` with feature maps, which its `feature_info` describes.

    out_indices: timm's feature levels.
    pretrained: see `pretrained_weights`.
    arguments: further keywords for `timm.create_model`.

    Raises UserError when timm does not know the name, and for weights that cannot be had.
    """
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise UserError(f"model.backbone.name={name}: timm has no such model (near: {near})")
    weights = pretrained_weights(name, pretrained)
    return timm.create_model(name, features_only=True, out_indices=tuple(out_indices), **weights, **arguments)


def stages(body: nn.Module) -> list[list[nn.Module]]:
    """The children of timm's network by feature stage (`layer1`, `stages_0`, ...); stage 0 is whatever comes before the
    first."""
    found: list[list[nn.Module]] = [[]]
    for name, child in body.named_children():
        if name.startswith(("layer", "stages", "layers")):
            found.append([])
        found[-1].append(child)
    return found


def freeze_stages(body: nn.Module, count: int) -> None:
    """The first `count` of `stages` are not trained."""
    for child in chain(*stages(body)[:count]):
        child.requires_grad_(False)


class Backbone(nn.Module):
    """Any timm model with feature maps.

    name: timm model.
    out_indices: timm's feature levels (a ResNet's 1..4 are C2..C5).
    pretrained: see `pretrained_weights`.
    norm: "frozen" replaces batch norms by their frozen form (the papers'), "batch" trains them, "group" builds the
        network with group norm (training from scratch on small batches).
    frozen_stages: the first n stages are not trained, the stem counts as the first.
    mean, std: of the colours, 0 to 255.
    arguments: further keywords for `timm.create_model`.

    Raises UserError when timm does not know the name, and for weights that cannot be had.
    """

    def __init__(
        self,
        name: str,
        out_indices: tuple[int, ...],
        pretrained: Pretrained,
        norm: NormKind,
        frozen_stages: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        arguments: dict[str, Any],
    ) -> None:
        super().__init__()
        if norm == "group":
            arguments = {**arguments, "norm_layer": partial(nn.GroupNorm, 8)}
        body = feature_network(name, out_indices, pretrained, arguments)
        self.channels: tuple[int, ...] = tuple(body.feature_info.channels())
        self.strides: tuple[int, ...] = tuple(body.feature_info.reduction())
        if norm == "frozen":
            body = freeze_batch_norm_2d(body)
            fold_frozen_norms(body)
        # Faster convolutions on CPUs and GPUs, and levels that flatten into tokens without a copy.
        self.body = body.to(memory_format=torch.channels_last)
        freeze_stages(self.body, frozen_stages)
        self.normalize = Normalize(mean, std)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images -> feature maps [B, C_i, H_i, W_i], finest first."""
        return self.body(images.contiguous(memory_format=torch.channels_last))
