"""The one door to multi-scale deformable attention: picks the implementation and says which."""

import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from codetr.errors import UserError
from codetr.kernels.msda import deformable_attention as attention_kernel
from codetr.kernels.msda import deformable_attention_reference, msda, msda_reference

log = logging.getLogger(__name__)

KERNELS = {"cpu": "numba", "cuda": "triton"}


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
    """
    run = attention_kernel if _use_kernel(value, reference, offsets, logits) else deformable_attention_reference
    return run(value, spatial_shapes, reference, offsets, logits, valid_sizes)


def multi_scale_deformable_attention(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The classic form: locations and weights are given. sampling_locations: [B, Q, H, L, P, 2], (x, y) normalised
    to each level. attention_weights: [B, Q, H, L, P]. Otherwise as `deformable_attention`."""
    run = msda if _use_kernel(value, sampling_locations, attention_weights) else msda_reference
    return run(value, spatial_shapes, sampling_locations, attention_weights)


def _use_kernel(*tensors: Tensor) -> bool:
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return False
    double = any(t.dtype == torch.float64 for t in tensors)
    return _decision(os.environ.get("CODETR_MSDA", ""), tensors[0].device, double)


@torch.compiler.assume_constant_result
def _decision(wish: str, device: torch.device, double: bool) -> bool:
    return _decide(wish, device, double)


@cache
def _decide(wish: str, device: torch.device, double: bool) -> bool:
    """Once per situation: whether a kernel runs. Logs which implementation, and why."""
    name, reason, remedy = choose(device, wish, double)
    if remedy:
        log.warning("deformable attention on %s: reference, several times slower: %s; %s", device, reason, remedy)
    else:
        log.info("deformable attention on %s: %s", device, f"{name} ({reason})" if reason else f"{name} kernel")
    return name != "reference"


def choose(device: torch.device, wish: str = "", double: bool = False) -> tuple[str, str, str]:
    """Which implementation runs on `device`: (its name, why it is not the kernel, what to do about that), the latter
    two empty where there is nothing to say.

    wish: the value of CODETR_MSDA. double: for float64. Raises UserError for a wish that cannot be.
    """
    if wish not in ("", "reference", *KERNELS.values()):
        raise UserError(f"CODETR_MSDA={wish!r} is unknown; unset it, or set it to reference, numba or triton")
    if wish == "reference":
        return wish, "CODETR_MSDA", ""
    kernel = KERNELS.get(device.type, "")
    if wish and wish != kernel:
        raise UserError(f"CODETR_MSDA={wish}: it cannot run on {device}; unset it to let codetr choose")
    reason, remedy = ("it has no float64", "") if double else _obstacle(kernel, device)
    if reason and wish:
        raise UserError(f"CODETR_MSDA={wish}: {reason}; {remedy or 'unset it to let codetr choose'}")
    return "reference" if reason else kernel, reason, remedy


def _obstacle(kernel: str, device: torch.device) -> tuple[str, str]:
    """(why the kernel cannot run, what to do about it), empty where it can and where nothing can be done."""
    if not kernel:
        return f"no kernel for {device.type}", ""
    if importlib.util.find_spec(kernel) is None:
        return f"{kernel} is not installed", f"pip install {kernel}"
    if device.type == "cuda" and torch.version.hip:
        return "the kernel was never tried on ROCm", ""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton needs compute capability 8.0 (Ampere) or newer", ""
    return "", ""
