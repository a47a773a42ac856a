"""The one door to multi-scale deformable attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from codetr.kernels.msda import deformable_attention as attention_kernel
from codetr.kernels.msda import (
    deformable_attention_gathered,
    deformable_attention_reference,
    deformable_attention_sampled,
    msda,
    msda_reference,
)
from codetr.ops.choice import Operation
from codetr.ops.export_form import gathers

MSDA = Operation("deformable attention", "CODETR_MSDA", cpu="numba", cuda="triton")


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    valid_sizes: Tensor,
) -> Tensor:
    """What each query sees around its reference, summed with weights (Deformable DETR, sec. 4.1, eq. 3).

    value: [B, S, H, D]. spatial_shapes: (height, width) per level, plain integers. reference: [B, Q, L, 2 or 4],
    points or boxes (cx, cy, w, h), normalised to each level. offsets: [B, Q, H, L, P, 2], in cells around points, in
    half sizes over P around boxes. logits: [B, Q, H, L, P]; the weights are their softmax over levels and points.
    valid_sizes: [B, L, 2] int32, (height, width) of the part of each level that is not padding; the rest counts as
    zero. Returns [B, Q, H * D] in value's dtype.

    The environment variable CODETR_MSDA=reference|numba|triton overrides the choice; a UserError where that cannot be.
    What is exported are forms that other runtimes do well: that with gathers where `with_gathers` says so. Half
    precision is exported as the reference, whose places autocast leaves in float32.
    """
    if gathers():
        run = deformable_attention_gathered
    elif torch.compiler.is_exporting() and not torch.is_autocast_enabled(value.device.type):
        run = deformable_attention_sampled
    else:
        takes = MSDA.takes_kernel(value, reference, offsets, logits)
        run = attention_kernel if takes else deformable_attention_reference
    return run(value, spatial_shapes, reference, offsets, logits, valid_sizes)


def multi_scale_deformable_attention(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The classic form: locations and weights are given. sampling_locations: [B, Q, H, L, P, 2], (x, y) normalised
    to each level. attention_weights: [B, Q, H, L, P]. Otherwise as `deformable_attention`."""
    run = msda if MSDA.takes_kernel(value, sampling_locations, attention_weights) else msda_reference
    return run(value, spatial_shapes, sampling_locations, attention_weights)
