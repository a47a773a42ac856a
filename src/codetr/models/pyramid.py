"""The pyramid adapter: encoder memory -> {F_1..F_J} for the auxiliary heads (Co-DETR, sec. 3.2)."""

from torch import Tensor, nn
from torch.nn.functional import interpolate

from codetr.errors import UserError
from codetr.types import Memory, Pyramid


class PyramidAdapter(nn.Module):
    """`num_levels` levels from `finest_stride` on: the memory's own, and those that it lacks.

    Coarser levels come from the memory's last one by 3x3 convolutions of stride 2, finer ones from its first by
    bilinear upsampling and 3x3 convolutions, each with group norm; so a single-scale encoder serves the heads too.

    strides: of the memory's levels, in network pixels per cell.
    pad_divisor: see `Pyramid`.

    Raises UserError when the memory's strides are no consecutive ones of the pyramid's.
    """

    def __init__(
        self,
        width: int,
        strides: tuple[int, ...],
        finest_stride: int,
        num_levels: int,
        num_groups: int,
        pad_divisor: int,
    ) -> None:
        super().__init__()
        self.pad_divisor = pad_divisor
        self.strides = tuple(finest_stride * 2**i for i in range(num_levels))
        if strides not in [self.strides[i : i + len(strides)] for i in range(num_levels)]:
            raise UserError(
                f"the memory has strides {strides}, a pyramid of model.pyramid_levels={num_levels} from "
                f"model.pyramid_stride={finest_stride} has {self.strides}: the first must be a run of the second"
            )

        def block(stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(width, width, 3, stride, 1), nn.GroupNorm(num_groups, width))

        self.upsample = nn.ModuleList(block(1) for s in self.strides if s < strides[0])
        self.downsample = nn.ModuleList(block(2) for s in self.strides if s > strides[-1])

    def forward(self, memory: Memory) -> Pyramid:
        levels: list[Tensor] = memory.levels()
        for conv in self.upsample:
            levels.insert(0, conv(interpolate(levels[0], scale_factor=2, mode="bilinear", align_corners=False)))
        for conv in self.downsample:
            levels.append(conv(levels[-1]))
        return Pyramid(levels, self.strides, self.pad_divisor)
