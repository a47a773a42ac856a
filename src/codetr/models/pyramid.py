"""The pyramid adapter: encoder memory -> {F_1..F_J} for the auxiliary heads (Co-DETR, sec. 3.2)."""

from torch import Tensor, nn

from codetr.types import Memory, Pyramid


class PyramidAdapter(nn.Module):
    """The memory's levels, and coarser ones by a 3x3 convolution of stride 2 with group norm on the last level."""

    def __init__(self, width: int, strides: tuple[int, ...], num_levels: int, num_groups: int) -> None:
        super().__init__()
        extra_levels = num_levels - len(strides)
        self.strides = (*strides, *(strides[-1] * 2 ** (i + 1) for i in range(extra_levels)))
        self.downsample = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.GroupNorm(num_groups, width))
            for _ in range(extra_levels)
        )

    def forward(self, memory: Memory) -> Pyramid:
        levels: list[Tensor] = memory.levels()
        for conv in self.downsample:
            levels.append(conv(levels[-1]))
        return Pyramid(levels, self.strides)
