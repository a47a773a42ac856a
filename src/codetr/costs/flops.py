"""Arithmetic of single operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry


def flops(operator: Any, args: tuple, kwargs: dict, result: Any) -> float:
    """Of one call; 0 for what is no product. As PyTorch's counter has it, but for the gradient of the weight of a
    convolution in groups, which that counts as if all channels met: both gradients cost what the forward pass does."""
    count = flop_registry.get(operator)
    if count is None:
        return 0.0
    if operator is torch.ops.aten.convolution_backward and args[-2] > 1:
        grad, x, weight, *_, transposed, _padding, _groups, wanted = args
        output = x.shape if transposed else grad.shape
        each = 2 * output[0] * math.prod(output[2:]) * math.prod(weight.shape)
        return each * (wanted[0] + wanted[1])
    return count(*args, **kwargs, out_val=result)
