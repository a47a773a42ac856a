"""Frozen batch norms as part of the convolutions before them."""

from __future__ import annotations

from collections import Counter

import torch
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

FROZEN = (FrozenBatchNorm2d, FrozenBatchNormAct2d)


class ConvWithNorm(nn.Conv2d):
    """A convolution that computes the frozen norm behind it too: a scale of its weights, and a bias.

    That saves two passes over the feature map, and a third one backwards; and under autocast the map stays of half
    precision, where a norm whose constants are of float32 makes float32 of it.

    norm: in a tuple, since its buffers stay where a checkpoint has them.
    """

    norm: tuple[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # type: ignore[operator]
        shift = norm.bias - norm.running_mean * scale  # type: ignore[operator]
        bias = shift if self.bias is None else shift + self.bias * scale
        return self._conv_forward(x, self.weight * scale[:, None, None, None], bias)


class NormInConv(FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x


class NormActInConv(FrozenBatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.act(self.drop(x))
        return activated


@torch.no_grad()
def fold_frozen_norms(body: nn.Module, side: int = 64) -> None:
    """Give every plain convolution that is followed by a frozen norm, and by nothing else, that norm's work, in place.

    The state dict stays as it is. Which follows which is seen in a run on an image of `side` pixels. A convolution that
    is put in the place of one of these afterwards lacks the norm: fold again, or change its weights instead.
    """
    made_by: dict[int, nn.Conv2d] = {}
    alive: list[object] = []  # so that no number is given again
    readers: dict[int, list[nn.Module]] = {}

    def made(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        made_by[id(output)] = module  # type: ignore[assignment]
        alive.append(output)

    def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        alive.append(inputs)
        for x in inputs:
            readers.setdefault(id(x), []).append(module)

    leaves = [module for module in body.modules() if not list(module.children()) or isinstance(module, FROZEN)]
    hooks = [module.register_forward_pre_hook(read) for module in leaves]
    hooks += [module.register_forward_hook(made) for module in leaves if type(module) is nn.Conv2d]
    training = body.training
    weight = next(body.parameters())
    body.eval()(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))
    body.train(training)
    for hook in hooks:
        hook.remove()
    calls = Counter(map(id, made_by.values()))
    for number, conv in made_by.items():
        (norm, *others) = readers.get(number, [None])
        if type(norm) not in FROZEN or others or calls[id(conv)] > 1:
            continue
        conv.norm, conv.__class__ = (norm,), ConvWithNorm  # type: ignore[assignment]
        norm.__class__ = NormInConv if type(norm) is FrozenBatchNorm2d else NormActInConv
