"""What is made once: when it is made again, and that it may be used wherever it is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from codetr.ops.once import once

CPU = torch.device("cpu")


def counted() -> tuple[list[tuple], object]:
    calls: list[tuple] = []

    @once
    def ramp(size: int, device: torch.device) -> Tensor:
        calls.append((size, device))
        return torch.arange(size, device=device) / 2

    return calls, ramp


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def test_equal_arguments_make_it_once() -> None:
    calls, ramp = counted()
    assert ramp(3, CPU) is ramp(3, CPU)  # type: ignore[operator]
    ramp(4, CPU)  # type: ignore[operator]
    ramp(3, torch.device("meta"))  # type: ignore[operator]
    with default_dtype(torch.float64):
        assert ramp(3, CPU).dtype == torch.float64  # type: ignore[operator]
    assert ramp(3, CPU).dtype == torch.float32  # type: ignore[operator]
    assert len(calls) == 4


def test_what_validation_made_serves_training() -> None:
    """A tensor of inference mode could not be kept for a backward pass."""
    _, ramp = counted()
    with torch.inference_mode():
        ramp(3, CPU)  # type: ignore[operator]
    weight = torch.ones(3, requires_grad=True)
    (weight * ramp(3, CPU)).sum().backward()  # type: ignore[operator]
    assert torch.equal(weight.grad, torch.tensor([0, 0.5, 1.0]))  # type: ignore[arg-type]


def test_a_tensor_without_numbers_is_not_kept() -> None:
    _, ramp = counted()
    with FakeTensorMode():
        assert isinstance(ramp(3, CPU), FakeTensor)  # type: ignore[operator]
    assert not isinstance(ramp(3, CPU), FakeTensor)  # type: ignore[operator]


def test_a_graph_makes_its_own() -> None:
    """Of the size that it is given, although one of another size was kept."""
    _, ramp = counted()

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + ramp(x.shape[0], x.device)  # type: ignore[operator]

    ramp(3, CPU)  # type: ignore[operator]
    size = torch.export.Dim("size", min=2, max=64)
    exported = torch.export.export(Shifted(), (torch.zeros(3),), dynamic_shapes=({0: size},)).module()
    compiled = torch.compile(Shifted(), backend="eager", fullgraph=True)
    for n in (3, 5):
        assert torch.equal(exported(torch.zeros(n)), torch.arange(n) / 2)
        assert torch.equal(compiled(torch.zeros(n)), torch.arange(n) / 2)
