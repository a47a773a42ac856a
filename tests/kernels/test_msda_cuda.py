"""The Triton kernels on a GPU, against the reference in float64 on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from codetr.kernels.msda import deformable_attention, msda
from codetr.kernels.msda.inputs import Gradients, Inputs
from codetr.kernels.msda.launch import Launch
from codetr.kernels.msda.op import _msda
from codetr.kernels.msda.reference import sampling_locations
from msda_cases import FORMS, assert_close, draw, truth, upstream
from torch import Tensor

from codetr.ops.msda import deformable_attention as attention_door
from codetr.ops.msda import multi_scale_deformable_attention

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

WAYS = {"atomic": False, "deterministic": True}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ENCODER = ((19, 26), (10, 13), (5, 7))  # as many queries as cells
CELLS = sum(height * width for height, width in ENCODER)


def moved(inputs: Inputs, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Inputs:
    """value, offsets and logits in dtype, as autocast leaves them; locations of the classic form and reference not.

    Samples that fall between two cells, where rounding decides which one's derivative counts, get a weight of zero.
    """
    narrow = ("value", "offsets", "logits") if inputs.reference is not None else ("value", "logits")
    inputs = inputs._replace(**{name: getattr(inputs, name).to(dtype) for name in narrow})
    _, shapes, reference, offsets, logits, _ = inputs
    places = offsets.double()
    if reference is not None:
        places = sampling_locations(reference.double(), places, shapes)
    places = places * torch.tensor([(width, height) for height, width in shapes])[:, None] - 0.5
    between = ((places - places.round()).abs() < 1e-4).any(-1)
    inputs = inputs._replace(logits=logits.masked_fill(between, 0 if reference is None else -1e4))
    return Inputs(*(t.to(device) if isinstance(t, Tensor) else t for t in inputs))


def on_cpu(inputs: Inputs) -> Inputs:
    return Inputs(*(t.detach().cpu() if isinstance(t, Tensor) else t for t in inputs))


def run(
    inputs: Inputs, deterministic: bool = False, launch: Launch | None = None, gradient: Tensor | None = None
) -> tuple[Tensor, Gradients]:
    """By the launcher itself, every gradient."""
    from codetr.kernels.msda import gpu

    gradient = upstream(inputs).to(inputs.value.device) if gradient is None else gradient
    output = gpu.forward(inputs, launch)
    return output, gpu.backward(gradient, output, inputs, inputs.reference is not None, launch, deterministic)


def back(found: tuple[Tensor, Gradients]) -> tuple[Tensor, Gradients]:
    return found[0].cpu(), Gradients(*(None if g is None else g.cpu() for g in found[1]))


def check(inputs: Inputs, **options: object) -> None:
    dtype = inputs.value.dtype
    # The mean that the softmax's gradient subtracts comes from the output, already rounded: hence two units, not one.
    tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert_close(back(run(inputs, **options)), truth(on_cpu(inputs)), tolerance)  # type: ignore[arg-type]


@contextmanager
def deterministic_algorithms(fill: bool) -> Iterator[None]:
    """fill: memory that is not written holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def poison() -> Iterator[None]:
    with deterministic_algorithms(fill=True):
        yield


@pytest.mark.parametrize("deterministic", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("poison")
def test_is_the_reference(form: str, dtype: torch.dtype, deterministic: bool) -> None:
    inputs = draw(form, queries=CELLS, heads=3, channels=32, points=4, shapes=ENCODER)
    check(moved(inputs, dtype), deterministic=deterministic)


@pytest.mark.parametrize("channels", [1, 5, 8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.usefixtures("poison")
def test_head_widths(channels: int, dtype: torch.dtype) -> None:
    inputs = moved(draw("boxes", queries=70, channels=channels, points=3), dtype)
    check(inputs)
    check(inputs, deterministic=True)


@pytest.mark.parametrize("queries", [1, 31, 33, 900, 5000])
@pytest.mark.usefixtures("poison")
def test_queries(queries: int) -> None:
    check(moved(draw("boxes", batch=1, queries=queries, channels=32, points=4)))


@pytest.mark.parametrize("num_warps", [1, 4, 8])
@pytest.mark.parametrize("tile_width", [0, 4, 8, 16])
@pytest.mark.parametrize("tile", [256, 1024])
@pytest.mark.usefixtures("poison")
def test_launches(tile: int, tile_width: int, num_warps: int) -> None:
    """Whatever a tuner may write into the table is right."""
    inputs = draw("points", queries=CELLS, channels=32, points=4, shapes=ENCODER)
    check(moved(inputs), launch=Launch(tile, tile_width, num_warps))


def test_head_major_value_and_permuted_strides() -> None:
    plain = moved(draw("boxes", channels=32))
    assert plain.reference is not None
    by_head = plain._replace(value=plain.value.transpose(1, 2).contiguous().transpose(1, 2))
    turned = by_head._replace(
        value=plain.value.transpose(0, 3).contiguous().transpose(0, 3),
        reference=plain.reference.transpose(1, 2).contiguous().transpose(1, 2),
        offsets=plain.offsets.transpose(1, 4).contiguous().transpose(1, 4),
        logits=plain.logits.repeat(1, 1, 1, 1, 2)[..., : plain.logits.shape[-1]],
    )
    for inputs in (by_head, turned):
        assert not inputs.value.is_contiguous()
        check(inputs)
        check(inputs, deterministic=True)


def test_same_bits_every_time() -> None:
    """And those of the atomic sum within rounding."""
    inputs = moved(draw("points", queries=CELLS, heads=8, channels=32, points=4, shapes=ENCODER), torch.bfloat16)
    first = run(inputs, deterministic=True)
    for _ in range(4):
        again = run(inputs, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))  # type: ignore[arg-type]
    atomic = run(inputs)[1].value.double()
    scale = first[1].value.double().abs().max().item()
    bound = torch.finfo(torch.bfloat16).eps * scale
    torch.testing.assert_close(atomic, first[1].value.double(), rtol=0, atol=bound)


def test_deterministic_algorithms_are_obeyed() -> None:
    """The op's gradients under the flag are, bit by bit, those of the deterministic kernels."""
    inputs = moved(draw("points", queries=CELLS, heads=8, channels=32, points=4, shapes=ENCODER))
    expected = run(inputs, deterministic=True)[1]
    with deterministic_algorithms(fill=False):
        for _ in range(5):
            assert torch.equal(by_autograd(inputs)[1], expected.value)


def by_autograd(inputs: Inputs, function=deformable_attention, gradient=None) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """Output and the gradients of value, offsets and logits."""
    gradient = upstream(inputs).to(inputs.value.device) if gradient is None else gradient
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in ("value", "offsets", "logits")}
    output = function(*inputs._replace(**leaves))
    return output.detach(), *torch.autograd.grad(output, list(leaves.values()), gradient)


def test_gradients_of_the_ops() -> None:
    boxes, classic = moved(draw("boxes")), moved(draw("classic"))
    output, gradients = truth(on_cpu(boxes))
    found = [t.cpu() for t in by_autograd(boxes)]
    assert_close((found[0], Gradients(*found[1:], None)), (output, gradients._replace(reference=None)))
    output, gradients = truth(on_cpu(classic))
    found = [t.cpu() for t in by_autograd(classic, lambda v, s, _, x, w, __: msda(v, s, x, w))]
    assert_close((found[0], Gradients(*found[1:], None)), (output, gradients))


def test_the_other_device() -> None:
    """On the last of several devices, which is not the current one; on the only one, if there is one."""
    device = f"cuda:{torch.cuda.device_count() - 1}"
    inputs = moved(draw("boxes"), device=device)
    found = run(inputs)
    assert str(found[0].device) == device
    assert_close(back(found), truth(on_cpu(inputs)))


def test_on_a_stream_of_its_own() -> None:
    """The kernels wait for what that stream computes, and for nothing else: the inputs come late."""
    there = moved(draw("boxes", queries=200))
    gradient = upstream(there).cuda()
    run(there)  # compiles
    stream = torch.cuda.Stream()
    late = there._replace(value=torch.zeros_like(there.value))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.value.copy_(there.value)
        found = run(late, gradient=gradient)
    stream.synchronize()
    assert_close(back(found), truth(on_cpu(there)))


@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ from version to version
def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    inputs = moved(draw("boxes"))
    for function, given in (
        (attention_door, inputs),
        (lambda v, s, _, x, w, __: multi_scale_deformable_attention(v, s, x, w), moved(draw("classic"))),
    ):
        plain, compiled = by_autograd(given, function), by_autograd(given, torch.compile(function, fullgraph=True))
        for a, b in zip(plain, compiled, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("form", FORMS)
def test_op_contract(form: str) -> None:
    value, shapes, reference, offsets, logits, valid_sizes = moved(draw(form, queries=3, padding=False))
    sizes = [size for shape in shapes for size in shape]
    leaves = [t.requires_grad_() for t in (value, offsets, logits)]
    torch.library.opcheck(_msda, (leaves[0], sizes, reference, leaves[1], leaves[2], valid_sizes))


def test_autocast() -> None:
    """Mixed dtypes as they come: nothing is cast, the output has value's dtype."""
    inputs = moved(draw("boxes"), torch.bfloat16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = deformable_attention(*inputs)
    assert output.dtype == torch.bfloat16
    expected = truth(on_cpu(inputs))[0]
    bound = torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
    torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=bound)


def test_graph_capture() -> None:
    """Forward and backward, replayed on new numbers."""
    static, second = moved(draw("points", queries=100)), moved(draw("points", queries=100))
    gradient = upstream(static).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(static, gradient=gradient)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(static, gradient=gradient)
    for name in ("value", "reference", "offsets", "logits"):
        getattr(static, name).copy_(getattr(second, name))
    graph.replay()
    torch.cuda.synchronize()
    assert_close(back(found), truth(on_cpu(second)))


@pytest.mark.parametrize("deterministic", WAYS.values(), ids=WAYS)
def test_the_host_never_waits(deterministic: bool) -> None:
    inputs = moved(draw("boxes"))
    gradient = upstream(inputs).cuda()
    run(inputs, deterministic)  # compiles, and copies the table of levels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, deterministic, gradient=gradient)
        by_autograd(inputs, gradient=gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
