"""The compiled kernels against the reference in float64, and the reference against finite differences."""

import subprocess
import sys
from threading import Thread

import pytest
import torch
from codetr.kernels.msda import cpu, msda, msda_reference
from codetr.kernels.msda.inputs import Inputs
from codetr.kernels.msda.op import _msda
from torch import Tensor

SHAPES = ((7, 5), (3, 4), (1, 1))
Drawn = tuple[Tensor, Tensor, Tensor]


def draw(batch: int, queries: int, heads: int, channels: int, points: int, shapes=SHAPES) -> Drawn:  # type: ignore[no-untyped-def]
    """A quarter of the samples falls onto borders or outside."""
    slots = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels)
    return value, torch.rand(*slots, 2) * 1.6 - 0.3, torch.rand(slots)


def run(function, inputs: Drawn, shapes=SHAPES) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """Output and gradients, for a gradient that is the same in every precision."""
    value, locations, weights = (t.detach().requires_grad_() for t in inputs)
    output = function(value, shapes, locations, weights)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).sin().view(output.shape)
    return output, *torch.autograd.grad(output, (value, locations, weights), upstream.to(output.dtype))


def truth(inputs: Drawn, shapes=SHAPES) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    value, locations, weights = (t.double() for t in inputs)
    return run(msda_reference, (value, locations, weights), shapes)


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 2e-5) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance * max(1.0, e.abs().max().item()))


def test_reference_by_hand() -> None:
    """Two samples between the cells of one 2 x 2 map, and one half outside."""
    value = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 4, 1, 1)
    locations = torch.tensor([[0.5, 0.5], [0.375, 0.25], [0.0, 0.25]], dtype=torch.float64).view(1, 1, 1, 1, 3, 2)
    weights = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).view(1, 1, 1, 1, 3)
    assert msda_reference(value, ((2, 2),), locations, weights).item() == pytest.approx(2.5 + 12.5 + 50)


def test_reference_gradients() -> None:
    inputs = tuple(t.double().requires_grad_() for t in draw(2, 3, 2, 3, 2))
    assert torch.autograd.gradcheck(lambda v, x, w: msda_reference(v, SHAPES, x, w), inputs)


SIZES = [(1, 1, 1, 16, 1), (2, 9, 3, 16, 2), (1, 50, 2, 5, 3), (2, 4, 1, 1, 4)]


@pytest.mark.parametrize("size", SIZES, ids="B{0[0]}-Q{0[1]}-D{0[3]}".format)
def test_kernel_is_the_reference(size: tuple[int, int, int, int, int]) -> None:
    inputs = draw(*size)
    assert_close(run(msda, inputs), truth(inputs))


def test_many_threads_and_queries() -> None:
    shapes = ((16, 16), (8, 8))
    inputs = draw(3, 300, 4, 16, 4, shapes)
    assert_close(run(msda, inputs, shapes), truth(inputs, shapes))


def test_borders_and_far_outside() -> None:
    """Samples between the border and zero count in part; beyond a cell they and their gradients are exactly zero."""
    inputs = draw(1, 6, 1, 16, 1)
    for query, place in enumerate([0.01, 0.99, -0.04, 1.03, -9.0, 1e30]):
        inputs[1][:, query] = place
    actual = run(msda, inputs)
    assert_close(actual, truth(inputs))
    assert not actual[0][:, 4:].any()
    assert not actual[2][:, 4:].any()
    assert not actual[3][:, 4:].any()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("function", [msda, msda_reference])
def test_location_that_is_not_finite_is_outside(function, odd: float) -> None:  # type: ignore[no-untyped-def]
    inputs = draw(1, 5, 2, 16, 2)
    inputs[1][:, 2, :, 1] = odd
    inputs[2][:, 3] = 0
    inputs[1][:, 3, 0] = odd
    outside = inputs[1].nan_to_num(-5.0, -5.0, -5.0)
    assert_close(run(function, inputs), truth((inputs[0], outside, inputs[2])))


def test_not_contiguous() -> None:
    value, locations, weights = draw(2, 5, 3, 16, 2)
    turned = (
        value.transpose(1, 2).contiguous().transpose(1, 2),
        locations.flip(-1).contiguous().flip(-1).transpose(1, 4).contiguous().transpose(1, 4),
        weights.repeat(1, 1, 1, 1, 2)[..., :2],
    )
    assert not any(t.is_contiguous() for t in turned)
    assert_close(run(msda, turned), truth((value, locations, weights)))


def test_expanded_gradient() -> None:
    inputs = tuple(t.requires_grad_() for t in draw(1, 4, 2, 16, 2))
    precise = tuple(t.detach().double().requires_grad_() for t in inputs)
    actual = torch.autograd.grad(msda(inputs[0], SHAPES, *inputs[1:]).sum(), inputs)
    assert_close(actual, torch.autograd.grad(msda_reference(precise[0], SHAPES, *precise[1:]).sum(), precise))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_value_beside_float32_locations(dtype: torch.dtype) -> None:
    """As autocast leaves them. Rounding happens once, at the end: within half a unit in the last place."""
    value, locations, weights = draw(2, 6, 2, 16, 2)
    value = value.to(dtype)
    actual = run(msda, (value, locations, weights))
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32, torch.float32]
    upstream = torch.linspace(-1, 1, actual[0].numel(), dtype=torch.float64).sin().to(dtype).double()
    precise = tuple(t.double().requires_grad_() for t in (value, locations, weights))
    output = msda_reference(precise[0], SHAPES, *precise[1:])
    expected = (output, *torch.autograd.grad(output, precise, upstream.view(output.shape)))
    assert_close(actual[:2], expected[:2], torch.finfo(dtype).eps)
    assert_close(actual[2:], expected[2:])


def test_autocast() -> None:
    value, locations, weights = draw(1, 4, 2, 16, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = msda(value.bfloat16(), SHAPES, locations, weights)
    expected = msda_reference(value.bfloat16().double(), SHAPES, locations.double(), weights.double())
    assert actual.dtype == torch.bfloat16
    assert_close((actual,), (expected,), torch.finfo(torch.bfloat16).eps)


def test_same_bits_every_time_and_for_any_threads() -> None:
    shapes = ((16, 16), (8, 8))
    inputs = draw(2, 200, 3, 16, 4, shapes)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(msda, inputs, shapes))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_callers_on_many_threads() -> None:
    shapes = ((16, 16), (8, 8))
    inputs = [draw(2, 150, 3, 16, 4, shapes) for _ in range(4)]
    alone, together = [run(msda, i, shapes) for i in inputs], [()] * 4  # type: ignore[var-annotated]

    def work(i: int) -> None:
        together[i] = run(msda, inputs[i], shapes)  # type: ignore[call-overload]

    threads = [Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(2, 5, 2, 16, 2)
    inputs[1][:, 1] = 7  # a query that sees nothing
    zeros = torch.zeros
    monkeypatch.setattr(cpu.torch, "empty", lambda *size: zeros(*size).fill_(torch.nan))
    given = Inputs(inputs[0], SHAPES, None, *inputs[1:], None)
    output = cpu.forward(given)
    assert output.isfinite().all()
    assert all(g.isfinite().all() for g in cpu.backward(torch.ones_like(output), output, given, False)[:3])


def test_rejects_shapes_that_do_not_fit() -> None:
    value, locations, weights = draw(1, 2, 1, 16, 1)
    for bad in (
        (value[:, 1:], SHAPES, locations, weights),
        (value, SHAPES[:2], locations, weights),
        (value, SHAPES, locations[:, :1], weights),
        (value, SHAPES, locations, weights[..., :0]),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            msda(*bad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_op_contract() -> None:
    value, locations, weights = draw(1, 3, 2, 16, 2)
    sizes = [size for shape in SHAPES for size in shape]
    args = [t.requires_grad_() for t in (value, locations, weights)]
    torch.library.opcheck(_msda, (args[0], sizes, None, *args[1:], None))


def test_refuses_float64() -> None:
    inputs = tuple(t.double() for t in draw(1, 3, 2, 16, 2))
    with pytest.raises(TypeError, match="use the reference"):
        msda(inputs[0], SHAPES, *inputs[1:])


def test_works_in_a_forked_child() -> None:
    """As in a data loader's worker: the parent's threads do not exist there."""
    code = """
import os, signal, torch
torch.set_num_threads(2)
from codetr.kernels.msda import msda
shapes = ((16, 16),)
args = torch.rand(4, 256, 2, 16), shapes, torch.rand(4, 512, 2, 1, 4, 2), torch.rand(4, 512, 2, 1, 4)
expected = msda(*args)
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(msda(*args), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
