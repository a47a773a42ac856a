"""The simple feature pyramid: levels of one width from the single map of a plain ViT."""

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from codetr.errors import UserError


class SimplePyramid(nn.Module):
    """P3 to P6, or P2 to P6, from the last map of a ViT (ViTDet, Li et al., arXiv 2203.16527, fig. 2c).

    As in the code of Co-DETR: finer levels by nearest upsampling and 3x3 convolutions, where the paper has transposed
    ones; P6 comes from the map as well. Every level ends with a 1x1 and a 3x3 convolution to `width`; each convolution
    is followed by a layer norm over the channels, with GELU in between.

    in_channels: of the one map, which counts as P4.
    num_levels: 5 from P2 on, 4 from P3 on, and so forth.

    Raises UserError for several maps or more levels.
    """

    def __init__(self, in_channels: tuple[int, ...], width: int, num_levels: int) -> None:
        super().__init__()
        if len(in_channels) != 1 or not 1 <= num_levels <= 5:
            raise UserError(
                f"model.neck: a simple pyramid makes up to 5 levels of one map, not model.num_levels={num_levels} "
                f"of {len(in_channels)}; choose another backbone, neck or num_levels"
            )
        (channels,) = in_channels
        levels = {
            "p2": [*finer(channels), *finer(channels // 2), *output(channels // 4, width)],
            "p3": [*finer(channels), *output(channels // 2, width)],
            "p4": output(channels, width),
            "p5": [nn.MaxPool2d(3, 2, 1), *output(channels, width)],
            "p6": [nn.MaxPool2d(3, 2, 1), *block(channels, channels, 3, 2), nn.GELU(), *output(channels, width)],
        }
        self.levels = nn.ModuleDict({name: nn.Sequential(*levels[name]) for name in sorted(levels)[-num_levels:]})

    def strides(self, in_strides: tuple[int, ...]) -> tuple[int, ...]:
        """The strides of the levels, given the map's: P6 has four times as much."""
        return tuple(in_strides[0] * 4 // 2**i for i in reversed(range(len(self.levels))))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [level(features[0]) for level in self.levels.values()]


def block(in_channels: int, out_channels: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.xavier_uniform_(conv.weight)
    return [conv, LayerNorm2d(out_channels)]


def finer(channels: int) -> list[nn.Module]:
    """A layer that gives twice the resolution and half the channels."""
    return [nn.Upsample(scale_factor=2), *block(channels, channels // 2, 3, 1), nn.GELU()]


def output(channels: int, width: int) -> list[nn.Module]:
    return [*block(channels, width, 1, 1), nn.GELU(), *block(width, width, 3, 1)]
