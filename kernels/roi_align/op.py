"""The op `codetr::roi_align`: kernels behind one schema, with gradients, fake tensors, `torch.compile` and autocast.

Maps and boxes may differ in dtype, as autocast leaves them. Differentiable once, with respect to the maps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .inputs import Regions, check


def roi_align(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    images: Tensor,
    boxes: Tensor,
    level_of: Tensor,
    size: int,
    sampling_ratio: int,
) -> Tensor:
    """As `roi_align_reference`, by the kernel (Numba: CPU), which computes in float32. Raises TypeError for float64."""
    return _roi_align(list(levels), images, boxes, level_of, list(strides), size, sampling_ratio)


@torch.library.custom_op("codetr::roi_align", mutates_args=(), device_types="cpu")
def _roi_align(
    levels: Sequence[Tensor],
    images: Tensor,
    boxes: Tensor,
    level_of: Tensor,
    strides: Sequence[int],
    size: int,
    sampling_ratio: int,
) -> Tensor:
    from . import cpu  # imports Numba

    regions = Regions(images, boxes, level_of, tuple(strides), size, sampling_ratio)
    check(list(levels), regions)
    return cpu.forward(list(levels), regions).to(boxes.dtype)


@torch.library.custom_op("codetr::roi_align_backward", mutates_args=(), device_types="cpu")
def _roi_align_backward(
    gradient: Tensor,
    images: Tensor,
    boxes: Tensor,
    level_of: Tensor,
    strides: Sequence[int],
    size: int,
    sampling_ratio: int,
    batch: int,
    sizes: Sequence[int],
    channels_last: bool,
) -> list[Tensor]:
    """The gradients of the maps, float32. batch: images. sizes: H_0, W_0, H_1, ..."""
    from . import cpu

    regions = Regions(images, boxes, level_of, tuple(strides), size, sampling_ratio)
    return cpu.backward(gradient, _pairs(sizes), batch, channels_last, regions)


def _pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


@_roi_align.register_fake
def _(levels, images, boxes, level_of, strides, size, sampling_ratio) -> Tensor:  # type: ignore[no-untyped-def]
    return boxes.new_empty(boxes.shape[0], levels[0].shape[1], size, size)


@_roi_align_backward.register_fake
def _(gradient, images, boxes, level_of, strides, size, sampling_ratio, batch, sizes, channels_last):  # type: ignore
    order = torch.channels_last if channels_last else torch.contiguous_format
    shapes = [(batch, gradient.shape[1], *pair) for pair in _pairs(sizes)]
    return [torch.empty(shape, dtype=torch.float32, device=gradient.device, memory_format=order) for shape in shapes]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    levels, *regions, ctx.strides, ctx.size, ctx.sampling_ratio = inputs
    ctx.save_for_backward(*regions)
    ctx.batch, ctx.sizes = levels[0].shape[0], [n for level in levels for n in level.shape[2:]]
    ctx.dtypes = [level.dtype for level in levels]
    ctx.channels_last = levels[0].stride(1) == 1  # the gradients then lie as the maps do


def _backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
    own = ctx.strides, ctx.size, ctx.sampling_ratio, ctx.batch, ctx.sizes, ctx.channels_last
    found = _roi_align_backward(gradient, *ctx.saved_tensors, *own)
    return [g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)], *(None,) * 6


_roi_align.register_autograd(_backward, setup_context=_setup_context)
