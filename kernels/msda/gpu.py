"""Launches the Triton kernels. With TRITON_INTERPRET=1, set before Triton is imported, they run on the CPU."""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from .inputs import Gradients, Inputs, Shapes
from .launch import Launch, launch_for
from .triton_kernels import backward_kernel, forward_kernel, gather_kernel

LIMIT = 2**31  # elements of one image: indices within it have 32 bits
BLOCK_N = 16  # samples that `gather_kernel` adds at once


def forward(inputs: Inputs, launch: Launch | None = None) -> Tensor:
    """[B, Q, H * D] in value's dtype. Computes in float32."""
    inputs = _arranged(inputs)
    value, offsets = inputs.value, inputs.offsets
    batch, _, H, D = value.shape
    Q = offsets.shape[1]
    output = value.new_empty(batch, Q, H * D)
    if not output.numel() or not offsets.numel():
        return output.zero_()
    launch = launch or launch_for(value.device, "forward", value.dtype)
    grid, levels, constants = _plan(inputs, launch)
    with torch.cuda.device_of(value):
        forward_kernel[grid](
            value, *_optional(inputs), offsets, inputs.logits, levels, output, Q, *value.stride()[:3], **constants
        )
    return output


def backward(
    gradient: Tensor,
    output: Tensor,
    inputs: Inputs,
    of_reference: bool,
    launch: Launch | None = None,
    deterministic: bool | None = None,
) -> Gradients:
    """Gradients of the inputs, for that of the output.

    That of value is summed with atomics. Deterministic (by default what `torch.use_deterministic_algorithms` says):
    samples are sorted by the cell they go to and summed in that order. The same bits on every run, more slowly and
    with about 40 bytes of memory per sample.
    """
    dtypes = inputs.value.dtype, inputs.reference.dtype if inputs.reference is not None else torch.float32
    inputs = _arranged(inputs)
    value, _, reference, offsets, logits, _ = inputs
    batch, _, H, _ = value.shape
    Q = offsets.shape[1]
    atomic = not (torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic)
    g_value = torch.zeros_like(value, dtype=torch.float32)
    g_offsets, g_logits = torch.empty_like(offsets), torch.empty_like(logits)
    of_reference = of_reference and reference is not None
    g_reference = value.new_zeros(batch, Q, H, *(reference.shape[2:] if of_reference else (0,)), dtype=torch.float32)
    if output.numel() and offsets.numel():
        launch = launch or launch_for(value.device, "backward", value.dtype)
        grid, levels, constants = _plan(inputs, launch, 3 * offsets.shape[4] + 4)
        num_bases = sum((height + 1) * (width + 1) for height, width in inputs.spatial_shapes)
        bases = offsets.new_empty(logits.shape if not atomic else (0,), dtype=torch.int32)
        shares = offsets.new_empty((*bases.shape, 4), dtype=torch.float32)
        gradient = gradient.contiguous()
        with torch.cuda.device_of(value):
            backward_kernel[grid](
                gradient,
                output.contiguous(),
                value,
                *_optional(inputs),
                offsets,
                logits,
                levels,
                g_value,
                g_reference,
                g_offsets,
                g_logits,
                bases,
                shares,
                Q,
                num_bases,
                *value.stride()[:3],
                OF_REFERENCE=of_reference,
                ATOMIC=atomic,
                **constants,
            )
            if not atomic:
                _gather(gradient, inputs, levels, num_bases, bases, shares, g_value)
    return Gradients(
        g_value.to(dtypes[0]), g_offsets, g_logits, g_reference.sum(2).to(dtypes[1]) if of_reference else None
    )


def _gather(
    gradient: Tensor, inputs: Inputs, levels: Tensor, num_bases: int, bases: Tensor, shares: Tensor, g_value: Tensor
) -> None:
    """The gradient of value from its samples, sorted by base cell; those off the map (-1) come first and are left."""
    (batch, S, H, D), (L, P) = inputs.value.shape, inputs.offsets.shape[3:5]
    bases, order = bases.flatten().sort(stable=True)
    starts = torch.searchsorted(bases, torch.arange(batch * H * num_bases + 1, dtype=torch.int32, device=bases.device))
    valid_sizes, _ = _optional(inputs)
    gather_kernel[(S, batch * H)](
        gradient,
        valid_sizes,
        levels,
        order,
        starts,
        shares,
        g_value,
        num_bases,
        *g_value.stride()[:3],
        H=H,
        D=D,
        L=L,
        P=P,
        PADDED=inputs.valid_sizes is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=1,
    )


def _arranged(inputs: Inputs) -> Inputs:
    """Value as [B, S, H, D] or, head by head, as [B, H, S, D] in memory; the rest contiguous."""
    value, shapes, reference, offsets, logits, valid_sizes = inputs
    if not value.transpose(1, 2).is_contiguous():
        value = value.contiguous()
    if max(value[0].numel(), 2 * offsets[0].numel()) >= LIMIT:
        raise ValueError(
            f"value {tuple(value.shape)} or offsets {tuple(offsets.shape)}: 2**31 elements an image or more"
        )
    return Inputs(
        value,
        shapes,
        None if reference is None else reference.contiguous(),
        offsets.contiguous(),
        logits.contiguous(),
        None if valid_sizes is None else valid_sizes.contiguous(),
    )


def _optional(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Valid sizes and reference; any tensor stands in for one that no kernel will read."""
    value, _, reference, _, _, valid_sizes = inputs
    return (value if valid_sizes is None else valid_sizes), (value if reference is None else reference)


def _plan(inputs: Inputs, launch: Launch, columns: int = 1) -> tuple[tuple[int, int], Tensor, dict[str, int]]:
    """Grid (programs, images x heads: one pair after the other, so that few maps are in the cache at a time), table of
    levels, and constants of both kernels. columns: that a tile has at least."""
    (batch, S, H, D), (_, Q, _, L, P, _) = inputs.value.shape, inputs.offsets.shape
    block_d = triton.next_power_of_2(max(D, columns))
    block_q = launch.block_q(block_d)
    tile_width = min(launch.tile_width, block_q) if Q == S else 0
    levels, tiles = level_table(inputs.spatial_shapes, block_q, tile_width, inputs.value.device)
    constants = {
        "H": H,
        "D": D,
        "L": L,
        "P": P,
        "FORM": 0 if inputs.reference is None else inputs.reference.shape[-1],
        "PADDED": inputs.valid_sizes is not None,
        "BLOCK_Q": block_q,
        "BLOCK_D": block_d,
        "BLOCK_LP": triton.next_power_of_2(L * P),
        "TILE_WIDTH": tile_width,
        "num_warps": launch.num_warps,
    }
    return (tiles if tile_width else triton.cdiv(Q, block_q), batch * H), levels, constants


@lru_cache(maxsize=1024)
def level_table(shapes: Shapes, block_q: int, tile_width: int, device: torch.device) -> tuple[Tensor, int]:
    """int32 [L, 5]: height, width, first cell, first tile, first base cell of each level; and the number of tiles.

    Cached: the copy to the device happens once for each size of images.
    """
    rows, cells, tiles, bases = [], 0, 0, 0
    for height, width in shapes:
        rows.append((height, width, cells, tiles, bases))
        cells += height * width
        bases += (height + 1) * (width + 1)
        if tile_width:
            tiles += triton.cdiv(height, block_q // tile_width) * triton.cdiv(width, tile_width)
    return torch.tensor(rows, dtype=torch.int32, device=device), tiles
