"""What every implementation takes, checked once: kernels check nothing, and what does not fit must not reach them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]


class Inputs(NamedTuple):
    """Deformable attention in either form: with `reference`, offsets and logits; without, locations and weights.

    value: [B, S, H, D], the levels flattened and concatenated. spatial_shapes: (height, width) per level.
    reference: [B, Q, L, 2 or 4], or None. offsets: [B, Q, H, L, P, 2], the locations where there is no reference.
    logits: [B, Q, H, L, P], the weights where there is no reference. valid_sizes: [B, L, 2] int32, or None: (height,
    width) of the part of each map, from its upper left corner, that is not padding. The rest counts as zero, whatever
    stands there.
    """

    value: Tensor
    spatial_shapes: Shapes
    reference: Tensor | None
    offsets: Tensor
    logits: Tensor
    valid_sizes: Tensor | None

    @classmethod
    def checked(
        cls,
        value: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        reference: Tensor | None,
        offsets: Tensor,
        logits: Tensor,
        valid_sizes: Tensor | None,
    ) -> Inputs:
        """Raises ValueError where shapes contradict each other, TypeError for a dtype that no kernel computes in."""
        inputs = cls(value, tuple(spatial_shapes), reference, offsets, logits, valid_sizes)
        floating = {"value": value, "reference": reference, "offsets": offsets, "logits": logits}
        for name, tensor in floating.items():
            if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise TypeError(f"{name} is {tensor.dtype}: the kernels compute in float32; use the reference instead")
        if valid_sizes is not None and valid_sizes.dtype != torch.int32:
            raise TypeError(f"valid_sizes is {valid_sizes.dtype} instead of int32")
        if not inputs._fit():
            names = ("value", "reference", "offsets", "logits", "valid_sizes")
            shapes = {name: tuple(t.shape) for name in names if (t := getattr(inputs, name)) is not None}
            raise ValueError(f"{shapes} and spatial_shapes {inputs.spatial_shapes} do not fit together")
        return inputs

    def _fit(self) -> bool:
        if self.value.ndim != 4 or self.offsets.ndim != 6:
            return False
        (B, S, H, _), (_, Q, _, L, P, _) = self.value.shape, self.offsets.shape
        reference, valid_sizes = self.reference, self.valid_sizes
        return (
            self.offsets.shape == (B, Q, H, L, P, 2)
            and self.logits.shape == (B, Q, H, L, P)
            and len(self.spatial_shapes) == L
            and sum(height * width for height, width in self.spatial_shapes) == S
            and (reference is None or (reference.shape[:-1] == (B, Q, L) and reference.shape[-1] in (2, 4)))
            and (valid_sizes is None or valid_sizes.shape == (B, L, 2))
        )


class Gradients(NamedTuple):
    """In the shapes and dtypes of the inputs; reference: None where it was not asked for."""

    value: Tensor
    offsets: Tensor
    logits: Tensor
    reference: Tensor | None
