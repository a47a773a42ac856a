"""The Numba kernels against the reference in float64."""

import subprocess
import sys
from collections.abc import Iterator
from threading import Thread

import pytest
import torch
from codetr.kernels.msda import cpu
from codetr.kernels.msda.inputs import Gradients, Inputs
from msda_cases import FORMS, assert_close, draw, run, truth, upstream
from torch import Tensor

Results = tuple[Tensor, Gradients]

forms = pytest.mark.parametrize("form", FORMS)
fused = pytest.mark.parametrize("form", FORMS[1:])


@pytest.fixture
def set_threads() -> Iterator:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same_bits(actual: Results, expected: Results) -> None:
    pairs = zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True)
    assert all(a is e if e is None else torch.equal(a, e) for a, e in pairs)


def with_wide_maps(form: str, **sizes: int) -> Inputs:
    """Enough samples for several threads."""
    return draw(form, **{"batch": 2, "queries": 700, "heads": 3, "points": 4, **sizes}, shapes=((16, 15), (8, 8)))  # type: ignore[arg-type]


SIZES = {
    "one of everything": {"batch": 1, "queries": 1, "heads": 1, "points": 1, "shapes": ((1, 1),)},
    "odd": {"batch": 3, "queries": 9, "heads": 3, "points": 3},
    "17 slots": {"points": 17, "shapes": ((5, 9),)},
    "32 slots": {"points": 8, "shapes": ((6, 4), (3, 2), (2, 1), (1, 1))},
    "lines and columns": {"shapes": ((1, 9), (8, 1), (2, 3))},
    "not padded": {"padding": False},
}


@forms
@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_is_the_reference(form: str, size: dict) -> None:
    inputs = draw(form, **size)
    assert_close(run(cpu, inputs), truth(inputs))


@pytest.mark.parametrize("channels", [1, 5, 24, 32, 64, 128])
def test_head_widths(channels: int) -> None:
    inputs = draw(channels=channels)
    assert_close(run(cpu, inputs), truth(inputs))


@forms
def test_many_queries_on_threads(form: str, set_threads) -> None:  # type: ignore[no-untyped-def]
    set_threads(2)
    inputs = with_wide_maps(form)
    assert_close(run(cpu, inputs), truth(inputs))


@forms
@pytest.mark.parametrize("heads", [1, 3])
def test_same_bits_every_time_and_for_any_threads(form: str, heads: int, set_threads) -> None:  # type: ignore[no-untyped-def]
    inputs = with_wide_maps(form, batch=1, queries=4200 // heads, heads=heads)
    results = []
    for threads in (1, 1, 2, 3, 4, 5):
        set_threads(threads)
        assert cpu._threads(inputs) == min(threads, 4)
        results.append(run(cpu, inputs))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@forms
def test_no_levels(form: str) -> None:
    inputs = draw(form, shapes=(), padding=False)
    output, gradients = run(cpu, inputs)
    assert output.shape == (2, 5, 32)
    assert not output.any()
    assert gradients.value.shape == inputs.value.shape


@forms
@pytest.mark.parametrize("empty", [(0, 0), (3, 0), (0, 3)])
def test_empty_map_is_a_map_of_zeros(form: str, empty: tuple[int, int]) -> None:
    inputs = draw(form, shapes=((3, 4), (1, 1), (2, 2)), padding=False)
    inputs.value[:, 12] = 0
    output, gradients = truth(inputs)
    others = [s for s in range(17) if s != 12]
    actual = run(cpu, inputs._replace(value=inputs.value[:, others], spatial_shapes=((3, 4), empty, (2, 2))))
    assert_close(actual, (output, gradients._replace(value=gradients.value[:, others])))


@pytest.mark.parametrize("queries", [0, 3])
def test_nothing_to_see_or_to_ask(queries: int) -> None:
    assert run(cpu, draw(batch=1, queries=queries))[0].shape == (1, queries, 32)
    assert run(cpu, draw("classic", batch=0, queries=queries))[0].shape == (0, queries, 32)


def test_borders_and_far_outside() -> None:
    """Samples between the border and zero count in part; beyond a cell they and their gradients are exactly zero."""
    inputs = draw("classic", 1, 6, 1)
    for query, place in enumerate([0.01, 0.99, -0.04, 1.03, -9.0, 1e30]):
        inputs.offsets[:, query] = place
    actual = run(cpu, inputs)
    assert_close(actual, truth(inputs))
    assert not any(t[:, 4:].any() for t in (actual[0], actual[1].offsets, actual[1].logits))


@forms
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_location_that_is_not_finite_or_huge_is_outside(form: str, odd: float) -> None:
    inputs = draw(form)
    inputs.offsets[:, 2, :, 1, 0, 0] = odd
    inputs.offsets[:, 3] = odd
    outside = inputs.offsets.where(inputs.offsets.abs() < 1e30, -1e6)
    assert_close(run(cpu, inputs), truth(inputs._replace(offsets=outside)))


@fused
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e30])
def test_reference_that_is_not_finite_is_outside(form: str, odd: float) -> None:
    inputs = draw(form)
    assert inputs.reference is not None
    outside = inputs.reference.clone()
    outside[:, 2, 1] = -1e6
    inputs.reference[:, 2, 1] = odd
    output, gradients = run(cpu, inputs)
    assert_close((output, gradients), truth(inputs._replace(reference=outside)))
    assert not gradients.offsets[:, 2, :, 1].any()


@fused
def test_steep_logits(form: str) -> None:
    inputs = draw(form, queries=40, points=7)
    inputs.logits.mul_(torch.logspace(-3, 3, 40).view(1, -1, 1, 1, 1)).add_(1000)
    inputs.logits[:, 7:9, :, 1] = -torch.inf
    inputs.logits[:, 11, :, 0, 3] = 1e30
    inputs.logits[:, 12, :, 2, 4] = 1e30
    assert_close(run(cpu, inputs), truth(inputs), 1e-4)  # the rounding of logits around 1000


@fused
def test_padding_gets_no_gradient(form: str) -> None:
    inputs = draw(form)
    gradient = run(cpu, inputs)[1].value
    padded = inputs.value.isnan()
    assert padded.any()
    assert not gradient[padded].any()


@pytest.mark.parametrize("sizes", [(0, 0), (0, 2), (-1, 3), (99, 99)])
def test_odd_valid_sizes(sizes: tuple[int, int]) -> None:
    inputs = draw(padding=False)
    inputs = inputs._replace(valid_sizes=torch.tensor(sizes, dtype=torch.int32).expand(2, 3, 2))
    assert_close(run(cpu, inputs), truth(inputs))


@forms
def test_not_contiguous(form: str) -> None:
    inputs = draw(form)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, -1).contiguous().transpose(1, -1)

    names = ("value", "offsets", "logits") if form == "classic" else ("value", "reference", "offsets", "logits")
    strange = inputs._replace(**{name: turned(getattr(inputs, name)) for name in names})
    assert not any(getattr(strange, name).is_contiguous() for name in names)
    if inputs.valid_sizes is not None:
        strange = strange._replace(valid_sizes=turned(inputs.valid_sizes))
    assert_same_bits(run(cpu, strange), run(cpu, inputs))
    output = cpu.forward(inputs)
    expanded = torch.ones(()).expand(output.shape)
    assert_same_bits(
        (output, cpu.backward(expanded, output, inputs, False)),
        (output, cpu.backward(expanded.contiguous(), output, inputs, False)),
    )


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [True, False])
def test_narrow_dtypes(form: str, dtype: torch.dtype, mixed: bool) -> None:
    """Also as autocast leaves them: a narrow value beside float32. Every tensor is rounded once, at the end."""
    inputs = draw(form)
    narrow = inputs._replace(value=inputs.value.to(dtype))
    if not mixed:
        narrow = narrow._replace(offsets=inputs.offsets.to(dtype), logits=inputs.logits.to(dtype))
    actual = run(cpu, narrow)
    assert actual[0].dtype == dtype
    for name in ("value", "reference", "offsets", "logits"):
        given, gradient = getattr(narrow, name), getattr(actual[1], name)
        assert given is gradient is None or given.dtype == gradient.dtype
    assert_close(actual, truth(narrow), torch.finfo(dtype).eps)
    exact, of_exact = truth(narrow)
    if mixed:
        of_value = actual[1].value.double(), of_exact.value
        assert_close(
            (exact, actual[1]._replace(value=of_value[1].float())), (exact, of_exact._replace(value=of_value[1]))
        )


@fused
def test_gradient_of_reference_only_on_demand(form: str) -> None:
    inputs = draw(form)
    output = cpu.forward(inputs)
    with_it, without = (cpu.backward(upstream(inputs), output, inputs, wanted) for wanted in (True, False))
    assert without.reference is None
    assert_same_bits((output, with_it._replace(reference=None)), (output, without))


@forms
def test_every_element_is_written(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, and the maps of the kernels, whose borders are zero."""
    inputs, zeros = draw(form, heads=3), torch.zeros
    inputs.offsets[:, 1] = 1e9  # a query that sees nothing
    expected = run(cpu, inputs)
    monkeypatch.setattr(cpu.torch, "empty", lambda *size: zeros(*size).fill_(torch.nan))
    assert_same_bits(run(cpu, inputs), expected)
    assert_close(expected, truth(inputs))


def test_callers_on_many_threads(set_threads) -> None:  # type: ignore[no-untyped-def]
    set_threads(2)
    inputs = [with_wide_maps("boxes") for _ in range(4)]
    alone, together = [run(cpu, i) for i in inputs], list[Results | None]([None] * 4)

    def work(i: int) -> None:
        together[i] = run(cpu, inputs[i])

    threads = [Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert b is not None
        assert_same_bits(a, b)


def test_works_in_a_forked_child() -> None:
    """As in a data loader's worker: the parent's threads do not exist there."""
    code = """
import os, signal, torch
torch.set_num_threads(2)
from codetr.kernels.msda import msda
shapes = ((16, 16),)
args = torch.rand(4, 256, 2, 16), shapes, torch.rand(4, 1024, 2, 1, 4, 2), torch.rand(4, 1024, 2, 1, 4)
expected = msda(*args)
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(msda(*args), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
