"""The op's contract, and the reference by hand and by finite differences. The kernels: test_msda_cpu, test_msda_gpu."""

import pytest
import torch
from codetr.kernels.msda import deformable_attention_reference, msda, msda_reference
from codetr.kernels.msda.inputs import Inputs
from codetr.kernels.msda.op import _msda
from msda_cases import FORMS, SHAPES, assert_close, draw, reference_of, truth, upstream
from torch import Tensor

forms = pytest.mark.parametrize("form", FORMS)


def through_op(inputs: Inputs) -> Tensor:
    return _msda(inputs.value, [size for shape in inputs.spatial_shapes for size in shape], *inputs[2:])


def with_gradients(inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """The inputs as leaves, and those by name."""
    names = [name for name in ("value", "reference", "offsets", "logits") if getattr(inputs, name) is not None]
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in names}
    return inputs._replace(**leaves), leaves


def test_reference_by_hand() -> None:
    """Two samples between the cells of one 2 x 2 map, and one half outside."""
    value = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 4, 1, 1)
    locations = torch.tensor([[0.5, 0.5], [0.375, 0.25], [0.0, 0.25]], dtype=torch.float64).view(1, 1, 1, 1, 3, 2)
    weights = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).view(1, 1, 1, 1, 3)
    assert msda_reference(value, ((2, 2),), locations, weights).item() == pytest.approx(2.5 + 12.5 + 50)


@pytest.mark.parametrize(
    ("reference", "offset", "expected"),
    [([0.5, 0.25], [0.5, 0.0], 2.0), ([0.5, 0.25, 9.0, 9.0], [0.0, 0.0], 1.5), ([0.5, 0.5, 0.5, 0.25], [1, 2], 4.0)],
)
def test_fused_reference_by_hand(reference: list[float], offset: list[float], expected: float) -> None:
    """On one 2 x 2 map, with one point: half a cell to the right; a box's centre; its lower right corner."""
    value = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 4, 1, 1)
    places = torch.tensor(reference, dtype=torch.float64).view(1, 1, 1, -1)
    offsets = torch.tensor(offset, dtype=torch.float64).view(1, 1, 1, 1, 1, 2)
    logits = torch.full((1, 1, 1, 1, 1), 7.0, dtype=torch.float64)
    seen = deformable_attention_reference(value, ((2, 2),), places, offsets, logits)
    assert seen.item() == pytest.approx(expected)


@forms
def test_reference_gradients(form: str) -> None:
    inputs, leaves = with_gradients(draw(form, queries=3, channels=3, padding=False))
    inputs, leaves = with_gradients(inputs._replace(**{name: leaf.double() for name, leaf in leaves.items()}))

    def function(*args: Tensor) -> Tensor:
        return reference_of(inputs._replace(**dict(zip(leaves, args, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_location_that_is_not_finite_is_outside(odd: float) -> None:
    inputs = draw("classic")
    inputs.offsets[:, 2, :, 1] = odd
    inputs.logits[:, 3] = 0
    inputs.offsets[:, 3, 0] = odd
    assert_close(truth(inputs), truth(inputs._replace(offsets=inputs.offsets.nan_to_num(-5.0, -5.0, -5.0))))


@forms
@pytest.mark.parametrize("of_reference", [True, False])
def test_gradients_through_the_op(form: str, of_reference: bool) -> None:
    inputs, leaves = with_gradients(draw(form))
    if not of_reference and inputs.reference is not None:
        inputs = inputs._replace(reference=leaves.pop("reference").detach())
    found = torch.autograd.grad(through_op(inputs), list(leaves.values()), upstream(inputs))
    output, expected = truth(inputs)
    gradients = {"reference": None, **dict(zip(leaves, found, strict=True))}
    if not of_reference:
        expected = expected._replace(reference=None)
    assert_close((through_op(inputs).detach(), expected._replace(**gradients)), (output, expected))


def test_expanded_gradient() -> None:
    inputs, leaves = with_gradients(draw(padding=False))
    wide, wide_leaves = with_gradients(inputs._replace(**{name: leaf.double() for name, leaf in leaves.items()}))
    found = torch.autograd.grad(through_op(inputs).sum(), list(leaves.values()))
    expected = torch.autograd.grad(reference_of(wide).sum(), list(wide_leaves.values()))
    for own, true in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), true, rtol=2e-5, atol=2e-5 * true.abs().max().item())


def test_autocast() -> None:
    inputs = draw("classic")
    inputs = inputs._replace(value=inputs.value.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = msda(inputs.value, SHAPES, inputs.offsets, inputs.logits)
    expected = truth(inputs)[0]
    assert actual.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=eps * expected.abs().max().item())


def test_rejects_shapes_that_do_not_fit() -> None:
    inputs = draw()
    assert inputs.reference is not None
    assert inputs.valid_sizes is not None
    for bad in (
        inputs._replace(value=inputs.value[:, 1:]),
        inputs._replace(spatial_shapes=SHAPES[:2]),
        inputs._replace(reference=inputs.reference[..., :3]),
        inputs._replace(reference=inputs.reference[:, 1:]),
        inputs._replace(offsets=inputs.offsets[:, :1]),
        inputs._replace(logits=inputs.logits[..., :0]),
        inputs._replace(valid_sizes=inputs.valid_sizes[:, :2]),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            through_op(bad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@forms
def test_op_contract(form: str) -> None:
    inputs, _ = with_gradients(draw(form, padding=False))
    torch.library.opcheck(_msda, (inputs.value, [size for shape in SHAPES for size in shape], *inputs[2:]))


@forms
def test_refuses_float64(form: str) -> None:
    inputs = draw(form)
    with pytest.raises(TypeError, match="use the reference"):
        through_op(inputs._replace(offsets=inputs.offsets.double()))
    if inputs.valid_sizes is not None:
        with pytest.raises(TypeError, match="instead of int32"):
            through_op(inputs._replace(valid_sizes=inputs.valid_sizes.long()))
