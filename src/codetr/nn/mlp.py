"""Small building blocks shared by encoder, decoder and query sources."""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from codetr.nn.class_rows import by_class
from codetr.nn.half import without_autocast

Activation = Literal["relu", "prelu"]


class CoordinateLinear(nn.Linear):
    """A linear layer to coordinates, in float32 at least under autocast as well.

    At a logit of 2, bfloat16 goes in steps of 0.016, which are 1.6 pixels of 1000; the layer is a narrow one. What it
    reads is of half precision, but the errors of many features nearly cancel.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device.type):
            return linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class MLP(nn.Sequential):
    """Linear layers with ReLU between them. last: the class of the last one."""

    def __init__(
        self, in_features: int, hidden: int, out_features: int, num_layers: int, last: type[nn.Linear] = nn.Linear
    ) -> None:
        widths = [in_features, *[hidden] * (num_layers - 1), out_features]
        layers: list[nn.Module] = []
        for number, (a, b) in enumerate(itertools.pairwise(widths), 1):
            layers += [nn.Linear(a, b) if number < num_layers else last(a, b), nn.ReLU()]
        super().__init__(*layers[:-1])


class CoordinateMLP(MLP):
    """Whose last layer is a `CoordinateLinear`."""

    def __init__(self, in_features: int, hidden: int, out_features: int, num_layers: int) -> None:
        super().__init__(in_features, hidden, out_features, num_layers, CoordinateLinear)


class FFN(nn.Module):
    """The feed-forward half of a post-norm transformer layer, residual and norm included."""

    def __init__(self, width: int, hidden: int, dropout: float, activation: Activation) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.activation: nn.Module = nn.PReLU() if activation == "prelu" else nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))


def class_head(width: int, num_classes: int, prior: float = 0.01) -> nn.Linear:
    """A linear classifier whose sigmoid starts at `prior` (RetinaNet, sec. 4.1)."""
    head = nn.Linear(width, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
    return by_class(head)


def box_head(width: int) -> MLP:
    """The three-layer box regressor of DETR; its last layer starts at zero, so the first boxes are the references."""
    head = CoordinateMLP(width, width, 4, 3)
    nn.init.zeros_(head[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(head[-1].bias)  # type: ignore[arg-type]
    return head


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer of `module`, as the DETR family starts them."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
