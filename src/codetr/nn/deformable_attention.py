"""Multi-scale deformable attention (Deformable DETR, sec. 4.1)."""

import math

import torch
from torch import Tensor, nn

from codetr.errors import UserError
from codetr.ops.msda import deformable_attention
from codetr.types import Memory


class DeformableAttention(nn.Module):
    """Each query samples `num_points` places per head and level around its reference."""

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        if width % num_heads:
            raise UserError(f"model.width={width} must be divisible by model.num_heads={num_heads}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(width, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(width, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Head h starts by looking into direction 2 pi h / H, point p at p + 1 cells (paper, appendix A.1)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        bias = direction[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.num_levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """query: [B, N, C]. reference: [B, N, L, 2 or 4], normalised to the padded map of each level."""
        grid = (self.num_heads, self.num_levels, self.num_points)
        sampled = deformable_attention(
            self.value_proj(memory.tokens).unflatten(-1, (self.num_heads, -1)),
            memory.spatial_shapes,
            reference,
            self.sampling_offsets(query).unflatten(-1, (*grid, 2)),
            self.attention_weights(query).unflatten(-1, grid),
            memory.valid_sizes,
        )
        return self.output_proj(sampled)
