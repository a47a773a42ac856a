"""What the benchmarks of deformable attention measure: the attentions of a detector on images of 800 x 1333 pixels."""

import math
from dataclasses import dataclass

import torch
from codetr.kernels.msda.inputs import Inputs, Shapes
from codetr.kernels.msda.reference import sampling_locations
from torch import Tensor

HEADS, CHANNELS, POINTS = 8, 32, 4


@dataclass(frozen=True)
class Case:
    strides: tuple[int, ...]
    queries: int | None  # None: the encoder, whose queries are the cells of the maps
    batch: int = 2

    def shapes(self, image: tuple[int, int]) -> Shapes:
        return tuple((math.ceil(image[0] / stride), math.ceil(image[1] / stride)) for stride in self.strides)


FOUR, FIVE = (8, 16, 32, 64), (4, 8, 16, 32, 64)
CASES = {
    "encoder, 4 levels": Case(FOUR, None),
    "encoder, 5 levels": Case(FIVE, None),
    "decoder, 4 levels": Case(FOUR, 900),
    "decoder, 5 levels": Case(FIVE, 900),
}
IMAGE = 800, 1333


def centres(shapes: Shapes) -> Tensor:
    """[S, 2] (x, y): the centre of every cell of every map, normalised."""
    parts = []
    for height, width in shapes:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        parts.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(parts)


def initial_offsets() -> Tensor:
    """[H, P, 2]: as a network has them before training, head h in direction 2 pi h / H, point p at p + 1 cells."""
    angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    return direction[:, None] * torch.arange(1, POINTS + 1)[:, None]


def draw(
    case: Case, dtype: torch.dtype, device: torch.device, image: tuple[int, int] = IMAGE, spread: float = 2.0
) -> Inputs:
    """value, offsets and logits in dtype, as autocast leaves them; reference in float32. No padding.

    Encoder: points at the cells' centres, offsets as at the start of training plus noise of `spread` cells. Decoder:
    boxes of 2% to 50% of the image, the same offsets, which count half sizes over P.
    """
    shapes = case.shapes(image)
    size = sum(height * width for height, width in shapes)
    queries = case.queries or size
    if case.queries is None:
        reference = centres(shapes)[None].expand(case.batch, -1, -1)
    else:
        extent = 0.02 * 25 ** torch.rand(case.batch, queries, 2)
        reference = torch.cat([torch.rand(case.batch, queries, 2), extent], -1)
    reference = reference[:, :, None].repeat(1, 1, len(shapes), 1)
    slots = (case.batch, queries, HEADS, len(shapes), POINTS)
    offsets = initial_offsets()[:, None] + torch.randn(*slots, 2) * spread
    value = torch.randn(case.batch, size, HEADS, CHANNELS)
    moved = [t.to(device, dtype) for t in (value, offsets, torch.randn(slots))]
    return Inputs(moved[0], shapes, reference.to(device), moved[1], moved[2], None)


def without_ambiguous(inputs: Inputs) -> Inputs:
    """Samples that fall between two cells, where either one's derivative is right, get a weight of zero."""
    assert inputs.reference is not None
    sizes = torch.tensor([(width, height) for height, width in inputs.spatial_shapes], device=inputs.value.device)
    places = sampling_locations(inputs.reference.double(), inputs.offsets.double(), inputs.spatial_shapes)
    places = places * sizes[:, None] - 0.5
    ambiguous = ((places - places.round()).abs() < 1e-3).any(-1)
    return inputs._replace(logits=inputs.logits.masked_fill(ambiguous, -1e4))


def hbm_bytes(inputs: Inputs) -> tuple[int, int]:
    """Every input read once and every output written once: forward, backward (gradients in the inputs' dtypes)."""
    narrow = sum(t.nbytes for t in (inputs.value, inputs.offsets, inputs.logits))
    read = narrow + (0 if inputs.reference is None else inputs.reference.nbytes)
    output = inputs.logits[..., 0, 0].numel() * inputs.value.shape[3] * inputs.value.itemsize
    return read + output, read + 2 * output + narrow


def gather_bytes(inputs: Inputs) -> int:
    """Four corners of every sample, a row of channels each: what the multiprocessors ask of their caches, once."""
    return inputs.logits.numel() * 4 * inputs.value.shape[3] * inputs.value.itemsize


def atomic_bytes(inputs: Inputs) -> int:
    """The same rows in float32: what is added to the gradient of value."""
    return inputs.logits.numel() * 4 * inputs.value.shape[3] * 4
