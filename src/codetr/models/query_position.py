"""Where the queries of a decoder layer are: the position rules of the DETR family."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from codetr.nn.mlp import MLP, xavier
from codetr.nn.position import sine_reference
from codetr.types import Memory


@dataclass
class Placement:
    """Encoded positions of the queries in one layer, each [B, N, C].

    position: for self-attention, and for the query of deformable cross-attention.
    location: the spatial half of the query of conditional cross-attention.
    added: joins its content half in the first layer, None in the others.
    level: of the memory, to which masked cross-attention keeps; None: all.
    """

    position: Tensor
    location: Tensor | None = None
    added: Tensor | None = None
    level: int | None = None


class GivenPosition(nn.Module):
    """The groups bring their positions, the same for every layer (Deformable DETR)."""

    wants_position, gives_location = True, False

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, given: Tensor | None, memory: Memory
    ) -> Placement:
        """layer: from 0.
        content: [B, N, C].
        reference: [B, N, 2 or 4].
        given: [B, N, C], the groups' own.
        """
        return Placement(_needed(given))


class LevelsInTurn(GivenPosition):
    """As GivenPosition; the layers look at one level each, the coarsest first, then finer ones, in turn (Mask2Former,
    sec. 3.2.1)."""

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, given: Tensor | None, memory: Memory
    ) -> Placement:
        levels = len(memory.spatial_shapes)
        return Placement(_needed(given), level=levels - 1 - layer % levels)


class ReferencePosition(nn.Module):
    """Positions from the current reference box, made anew in every layer (DAB-Deformable-DETR; DINO).

    scaled: from the second layer on, multiplied by a function of the content (DAB-Deformable-DETR).
    """

    wants_position, gives_location = False, False

    def __init__(self, width: int, temperature: float, scaled: bool) -> None:
        super().__init__()
        self.features_per_coordinate, self.temperature = width // 2, temperature
        self.mlp = MLP(2 * width, width, width, 2)
        self.scale = MLP(width, width, width, 2) if scaled else None
        xavier(self)

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, given: Tensor | None, memory: Memory
    ) -> Placement:
        finest = memory.valid_ratios[:, None, 0].repeat(1, 1, 2)
        sine = sine_reference(reference * finest, self.features_per_coordinate, self.temperature, "yxwh")
        position = self.mlp(sine)
        if self.scale is not None and layer > 0:
            position = position * self.scale(content)
        return Placement(position)


class ConditionalPosition(nn.Module):
    """The groups bring their positions; the location is the reference point, scaled by the content
    (Conditional DETR, sec. 3.3, eq. 2-5)."""

    wants_position, gives_location = True, True

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.features_per_coordinate, self.temperature = width // 2, temperature
        self.scale = MLP(width, width, width, 2)
        self.added = nn.Linear(width, width)
        xavier(self)

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, given: Tensor | None, memory: Memory
    ) -> Placement:
        position = _needed(given)
        location = sine_reference(reference[..., :2], self.features_per_coordinate, self.temperature, "yx")
        if layer == 0:
            return Placement(position, location, self.added(position))
        return Placement(position, location * self.scale(content))


class ModulatedPosition(nn.Module):
    """Position and location from the reference box, anew in every layer; the spread of the location follows the box
    (DAB-DETR, eq. 3-6)."""

    wants_position, gives_location = False, True

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.width, self.temperature = width, temperature
        self.mlp = MLP(2 * width, width, width, 2)
        self.scale = MLP(width, width, width, 2)
        self.size = MLP(width, width, 2, 2)
        self.added = nn.Linear(width, width)
        xavier(self)

    def forward(
        self, layer: int, content: Tensor, reference: Tensor, given: Tensor | None, memory: Memory
    ) -> Placement:
        sine = sine_reference(reference, self.width // 2, self.temperature, "yxwh")
        position, location = self.mlp(sine), sine[..., : self.width]
        if layer > 0:
            location = location * self.scale(content)
        spread = self.size(content).sigmoid() / reference[..., 2:].clamp(min=1e-4)  # (w_ref / w, h_ref / h)
        location = location.unflatten(-1, (2, -1)) * spread.flip(-1)[..., None]  # the y half first
        return Placement(position, location.flatten(-2), self.added(position) if layer == 0 else None)


def _needed(given: Tensor | None) -> Tensor:
    if given is None:
        raise ValueError(
            "the decoder's query_position wants positions from every query group: make the query sources with "
            "embed_position=True, or choose a query_position that derives them from references"
        )
    return given
