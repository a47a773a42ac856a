"""The op `codetr::msda`: kernels behind one schema, with gradients, fake tensors, `torch.compile` and autocast.

Value may be narrower than locations and weights (bfloat16 next to float32, as autocast leaves them): every tensor
keeps its dtype, gradients included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import msda_reference


def msda(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """As `msda_reference`, with the fastest kernel there is for the device and dtype. Differentiable once."""
    tensors = value, sampling_locations, attention_weights
    if any(t.device.type != "cpu" or t.dtype == torch.float64 for t in tensors):
        return msda_reference(value, spatial_shapes, sampling_locations, attention_weights)
    return _msda(value, [size for shape in spatial_shapes for size in shape], sampling_locations, attention_weights)


@torch.library.custom_op("codetr::msda", mutates_args=(), device_types="cpu")
def _msda(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    from . import cpu

    return cpu.forward(value, _shapes(sizes), locations, weights)


@torch.library.custom_op("codetr::msda_backward", mutates_args=(), device_types="cpu")
def _msda_backward(
    gradient: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from . import cpu

    return cpu.backward(gradient, value, _shapes(sizes), locations, weights)


def _shapes(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(sizes[::2], sizes[1::2], strict=True))


@_msda.register_fake
def _(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@_msda_backward.register_fake
def _(
    gradient: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    value, ctx.sizes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
    value, locations, weights = ctx.saved_tensors
    g_value, g_locations, g_weights = _msda_backward(gradient, value, ctx.sizes, locations, weights)
    return g_value, None, g_locations, g_weights


_msda.register_autograd(_backward, setup_context=_setup_context)
