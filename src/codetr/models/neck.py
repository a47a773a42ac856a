"""Necks: backbone features -> levels of one width."""

from collections.abc import Sequence

from torch import Tensor, nn

from codetr.errors import UserError


class ChannelMapper(nn.Module):
    """A 1x1 convolution per feature map, and further levels by strided 3x3 convolutions (Deformable DETR, fig. 4).

    The first extra level reads the last backbone feature, the next ones read the level before.

    num_groups: of the group norm behind every convolution; None: no norm (DETR).
    bias: of the convolutions; of some levels alone: one for each.

    Raises UserError for more feature maps than levels.
    """

    def __init__(
        self,
        in_channels: tuple[int, ...],
        width: int,
        num_levels: int,
        num_groups: int | None,
        bias: bool | Sequence[bool],
    ) -> None:
        super().__init__()
        extra = num_levels - len(in_channels)
        if extra < 0:
            raise UserError(
                f"model.num_levels={num_levels}: model.detector.backbone.out_indices gives {len(in_channels)} feature "
                "maps; raise the one or shorten the other"
            )

        biases = [bias] * num_levels if isinstance(bias, bool) else list(bias)
        if len(biases) != num_levels:
            raise UserError(f"model.detector.neck.bias={biases}: model.num_levels={num_levels}; give as many, or one")

        def block(level: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=biases[level])
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            return nn.Sequential(conv, *([] if num_groups is None else [nn.GroupNorm(num_groups, width)]))

        self.lateral = nn.ModuleList(block(i, c, 1, 1) for i, c in enumerate(in_channels))
        laterals = len(in_channels)
        self.extra = nn.ModuleList(block(laterals + i, width if i else in_channels[-1], 3, 2) for i in range(extra))

    def strides(self, in_strides: tuple[int, ...]) -> tuple[int, ...]:
        """The strides of the levels, given those of the feature maps."""
        return (*in_strides, *(in_strides[-1] * 2 ** (i + 1) for i in range(len(self.extra))))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        levels = [conv(x) for conv, x in zip(self.lateral, features, strict=True)]
        source = features[-1]
        for conv in self.extra:
            source = conv(source)
            levels.append(source)
        return levels
