"""The one door to multi-scale deformable attention: picks the implementation and says which."""

import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from codetr.errors import UserError
from codetr.kernels.msda import msda, msda_reference

log = logging.getLogger(__name__)


def multi_scale_deformable_attention(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples over all levels and points (Deformable DETR, sec. 4.1, eq. 3).

    value: [B, S, H, D]. spatial_shapes: (height, width) per level, plain integers. sampling_locations:
    [B, Q, H, L, P, 2], (x, y) normalised to each level. attention_weights: [B, Q, H, L, P].
    Returns [B, Q, H * D] in value's dtype. The environment variable CODETR_MSDA=reference|numba overrides the choice;
    any other value is a UserError.
    """
    run = msda if _use_kernel(value, sampling_locations, attention_weights) else msda_reference
    return run(value, spatial_shapes, sampling_locations, attention_weights)


def _use_kernel(*tensors: Tensor) -> bool:
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return False
    wish = os.environ.get("CODETR_MSDA", "")
    if any(t.device.type != "cpu" for t in tensors):
        return _decide(wish, "no kernel for this device yet")
    if any(t.dtype == torch.float64 for t in tensors):
        return _decide(wish, "the kernels compute in float32")
    return _decide(wish, "")


@cache
def _decide(wish: str, obstacle: str) -> bool:
    """Once per situation: whether the Numba kernel runs. Logs it, with the reason."""
    if wish not in ("", "reference", "numba"):
        raise UserError(f"CODETR_MSDA={wish!r} is unknown; unset it, or set it to 'reference' or 'numba'")
    if wish == "reference":
        log.info("multi-scale deformable attention: reference (CODETR_MSDA)")
        return False
    if wish == "numba" and obstacle:
        raise UserError(f"CODETR_MSDA=numba: {obstacle}; unset it to let codetr choose")
    if not obstacle and importlib.util.find_spec("numba") is None:
        if wish:
            raise UserError("CODETR_MSDA=numba, but numba is not installed: pip install numba")
        log.warning("multi-scale deformable attention: reference, several times slower; pip install numba")
        return False
    log.info("multi-scale deformable attention: %s", f"reference ({obstacle})" if obstacle else "Numba kernel (CPU)")
    return not obstacle
