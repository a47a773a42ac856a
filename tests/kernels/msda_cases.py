"""Inputs for deformable attention, and the truth: the reference in float64 (for its own, see test_msda.py)."""

from collections.abc import Sequence

import torch
from codetr.kernels.msda import deformable_attention_reference, msda_reference
from codetr.kernels.msda.inputs import Gradients, Inputs, Shapes
from codetr.kernels.msda.reference import padding_of
from torch import Tensor

SHAPES: Shapes = ((7, 5), (3, 4), (1, 1))
FORMS = ("classic", "points", "boxes")


def draw(
    form: str = "boxes",
    batch: int = 2,
    queries: int = 5,
    heads: int = 2,
    channels: int = 16,
    points: int = 2,
    shapes: Shapes = SHAPES,
    padding: bool = True,
) -> Inputs:
    """A quarter of the samples or more falls onto borders or outside. Padding holds NaN."""
    slots = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels)
    if form == "classic":
        return Inputs(value, shapes, None, torch.rand(*slots, 2) * 1.6 - 0.3, torch.rand(slots), None)
    reference = torch.rand(batch, queries, len(shapes), 2 if form == "points" else 4)
    offsets = torch.randn(*slots, 2) * (1.5 if form == "points" else points)
    if not padding:
        return Inputs(value, shapes, reference, offsets, torch.randn(slots) * 2, None)
    sizes = [
        [(h, w), (max(h - 1, 0), max(w - 2, min(w, 1)))] for h, w in shapes
    ]  # of the first image, and of the others
    valid_sizes = torch.tensor(sizes, dtype=torch.int32).view(-1, 2, 2).transpose(0, 1)[[0] + [1] * (batch - 1)]
    value[padding_of(valid_sizes, shapes)] = torch.nan
    return Inputs(value, shapes, reference, offsets, torch.randn(slots) * 2, valid_sizes.contiguous())


def upstream(inputs: Inputs) -> Tensor:
    """A gradient of the output, the same in every precision."""
    size = (inputs.value.shape[0], inputs.offsets.shape[1], inputs.value.shape[2] * inputs.value.shape[3])
    ramp = torch.linspace(-1, 1, torch.Size(size).numel(), dtype=torch.float64)
    return (ramp * 7).sin().view(size).to(inputs.value.dtype)


def reference_of(inputs: Inputs) -> Tensor:
    value, shapes, reference, offsets, logits, valid_sizes = inputs
    if reference is None:
        return msda_reference(value, shapes, offsets, logits)
    return deformable_attention_reference(value, shapes, reference, offsets, logits, valid_sizes)


def truth(inputs: Inputs) -> tuple[Tensor, Gradients]:
    """Output and gradients in float64, for inputs as they are (already rounded, if they are narrow)."""
    wide = {
        name: tensor.detach().double().requires_grad_()
        for name in ("value", "reference", "offsets", "logits")
        if (tensor := getattr(inputs, name)) is not None
    }
    output = reference_of(inputs._replace(**wide))
    found: Sequence[Tensor | None] = [None] * len(wide)  # where there is nothing to sample
    if output.requires_grad:
        found = torch.autograd.grad(output, list(wide.values()), upstream(inputs).double(), allow_unused=True)
    gradients = {name: torch.zeros_like(wide[name]) if g is None else g for name, g in zip(wide, found, strict=True)}
    return output.detach(), Gradients(**{"reference": None, **gradients})


def run(implementation, inputs: Inputs) -> tuple[Tensor, Gradients]:  # type: ignore[no-untyped-def]
    """Of a module with `forward` and `backward`: every gradient."""
    output = implementation.forward(inputs)
    return output, implementation.backward(upstream(inputs), output, inputs, inputs.reference is not None)


def assert_close(actual: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients], tolerance: float = 2e-5) -> None:
    """Each within `tolerance` of its largest entry. Float32 rounds positions to 1e-6 of a cell, which gradients see
    times the difference of neighbours and, in coordinates of the map, times its size."""
    pairs = {"output": (actual[0], expected[0])}
    pairs |= {name: (getattr(actual[1], name), getattr(expected[1], name)) for name in Gradients._fields}
    for name, (own, true) in pairs.items():
        assert (own is None) == (true is None), name
        if own is None or true is None:
            continue
        assert own.shape == true.shape, name
        assert own.isfinite().all(), name
        scale = max(1.0, true.abs().max().item()) if true.numel() else 1.0
        torch.testing.assert_close(
            own.double(), true, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
