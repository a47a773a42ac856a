"""The op `codetr::msda`: kernels behind one schema, with gradients, fake tensors, `torch.compile` and autocast.

Inputs may differ in dtype (a bfloat16 value next to a float32 reference, as autocast leaves them): every tensor keeps
its dtype, gradients included. Differentiable once.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .inputs import Inputs


def msda(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """As `msda_reference`, by the kernel for the device (Numba: CPU, Triton: CUDA). Raises TypeError for float64."""
    return _msda(value, _flat(spatial_shapes), None, sampling_locations, attention_weights, None)


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    valid_sizes: Tensor | None = None,
) -> Tensor:
    """As `deformable_attention_reference`, by the kernel for the device. Raises TypeError for float64.

    Neither locations nor weights are written to memory; the backward pass computes them again.
    """
    return _msda(value, _flat(spatial_shapes), reference, offsets, logits, valid_sizes)


def _kernels(value: Tensor) -> ModuleType:
    """Of its device, imported when first needed: neither Numba nor Triton is loaded for the other."""
    if value.is_cuda:
        from . import gpu

        return gpu
    from . import cpu

    return cpu


@torch.library.custom_op("codetr::msda", mutates_args=(), device_types=("cpu", "cuda"))
def _msda(
    value: Tensor,
    sizes: Sequence[int],
    reference: Tensor | None,
    offsets: Tensor,
    logits: Tensor,
    valid_sizes: Tensor | None,
) -> Tensor:
    inputs = Inputs.checked(value, _shapes(sizes), reference, offsets, logits, valid_sizes)
    output: Tensor = _kernels(value).forward(inputs)
    return output


@torch.library.custom_op("codetr::msda_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _msda_backward(
    gradient: Tensor,
    output: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    reference: Tensor | None,
    offsets: Tensor,
    logits: Tensor,
    valid_sizes: Tensor | None,
    of_reference: bool,
) -> list[Tensor]:
    """The gradients of value, offsets and logits, and of reference where it is asked for."""
    inputs = Inputs(value, _shapes(sizes), reference, offsets, logits, valid_sizes)
    found = _kernels(value).backward(gradient, output, inputs, of_reference)
    return [g for g in found if g is not None]


def _flat(spatial_shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [size for shape in spatial_shapes for size in shape]


def _shapes(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(sizes[::2], sizes[1::2], strict=True))


@_msda.register_fake
def _(value, sizes, reference, offsets, *_) -> Tensor:  # type: ignore[no-untyped-def]
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


@_msda_backward.register_fake
def _(gradient, output, value, sizes, reference, offsets, logits, valid_sizes, of_reference):  # type: ignore
    wanted = (value, offsets, logits, *((reference,) if of_reference and reference is not None else ()))
    return [tensor.new_empty(tensor.shape) for tensor in wanted]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    value, ctx.sizes, reference, offsets, logits, valid_sizes = inputs
    ctx.save_for_backward(output, value, reference, offsets, logits, valid_sizes)


def _backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
    output, value, *others = ctx.saved_tensors
    wanted = ctx.needs_input_grad[2]
    found = _msda_backward(gradient, output, value, ctx.sizes, *others, wanted)
    g_value, g_offsets, g_logits = found[:3]
    return g_value, None, found[3] if wanted else None, g_offsets, g_logits, None


_msda.register_autograd(_backward, setup_context=_setup_context)
