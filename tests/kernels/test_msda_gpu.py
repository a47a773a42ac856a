"""The Triton kernels, in Triton's interpreter where there is no GPU (test_msda_cuda.py has the rest)."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from codetr.kernels.msda import gpu
from codetr.kernels.msda.inputs import Gradients, Inputs
from codetr.kernels.msda.launch import TABLE, Launch, launch_for_capability
from msda_cases import FORMS, assert_close, draw, truth, upstream
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU"),
    pytest.mark.filterwarnings("ignore:invalid value"),  # NumPy's, where the interpreter computes what is masked later
]

ONE_PROGRAM = Launch(tile=64 * 16, tile_width=0, num_warps=4)  # the interpreter's cost is by program
WAYS = {"atomic": False, "deterministic": True}


def run(inputs: Inputs, launch: Launch = ONE_PROGRAM, deterministic: bool = False) -> tuple[Tensor, Gradients]:
    output = gpu.forward(inputs, launch)
    of_reference = inputs.reference is not None
    return output, gpu.backward(upstream(inputs), output, inputs, of_reference, launch, deterministic)


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("poison")
def test_is_the_reference(form: str, deterministic: bool) -> None:
    inputs = draw(form)
    assert_close(run(inputs, deterministic=deterministic), truth(inputs))


SIZES = {
    "one query, one channel": {"queries": 1, "channels": 1, "heads": 1, "points": 1},
    "odd": {"queries": 7, "channels": 5, "heads": 3, "points": 3, "batch": 3},
    "24 channels": {"channels": 24, "points": 4},
    "128 channels": {"channels": 128, "batch": 1},
    "one level": {"shapes": ((5, 6),)},
    "an empty level": {"shapes": ((3, 2), (0, 0), (2, 2))},
}
LONG = ("odd", "24 channels")  # in Triton's interpreter


def _slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("size", [_slow(SIZES[name]) if name in LONG else SIZES[name] for name in SIZES], ids=SIZES)
@pytest.mark.usefixtures("poison")
def test_sizes(size: dict) -> None:
    """Rows and columns of a tile that stand for nothing, programs that end early."""
    inputs = draw("boxes", **size)
    width = inputs.value.shape[3]
    assert_close(run(inputs, Launch(4 * gpu.triton.next_power_of_2(width), 0, 4)), truth(inputs))


def test_an_empty_level_in_a_fixed_order() -> None:
    inputs = draw("points", shapes=((2, 0), (2, 2), (0, 0)), heads=1)
    assert_close(run(inputs, deterministic=True), truth(inputs))


@pytest.mark.parametrize("empty", [{"shapes": ()}, {"queries": 0}, {"shapes": ((0, 0),)}])
def test_nothing(empty: dict) -> None:
    inputs = draw("points", padding=False, **empty)
    assert_close(run(inputs), truth(inputs))


@pytest.mark.parametrize("tile_width", [2, _slow(4), _slow(64)])
@pytest.mark.usefixtures("poison")
def test_tiles_of_neighbours(tile_width: int) -> None:
    """Every query of the maps once, whatever the tiles; wider than a program is cut."""
    shapes = ((3, 5), (4, 2), (1, 1))
    inputs = draw("boxes", queries=24, heads=1, shapes=shapes)
    assert_close(run(inputs, Launch(8 * 16, tile_width, 4)), truth(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, _slow(torch.float16)])
def test_narrow_inputs(dtype: torch.dtype) -> None:
    """As autocast leaves them: a float32 reference beside narrow others. Sums are float32, rounded once."""
    inputs = draw("boxes")
    inputs = inputs._replace(
        value=inputs.value.to(dtype), offsets=inputs.offsets.to(dtype), logits=inputs.logits.to(dtype)
    )
    output, gradients = run(inputs)
    dtypes = [tensor.dtype for tensor in (output, *gradients) if tensor is not None]
    assert dtypes == [dtype, dtype, dtype, dtype, torch.float32]
    assert_close((output, gradients), truth(inputs), torch.finfo(dtype).eps)
    assert_close(run(inputs, deterministic=True), truth(inputs), torch.finfo(dtype).eps)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
@pytest.mark.parametrize("form", FORMS)
def test_far_outside(form: str, odd: float) -> None:
    """Adds nothing, and has no gradient. The truth's own gradient of a box is not a number there, 0 x inf."""
    inputs = draw(form, batch=1)
    inputs.offsets[:, 2, :, 1] = odd
    inputs.offsets[:, 3, 0, :, 0, 0] = odd
    found, (output, gradients) = run(inputs), truth(inputs)
    if form == "boxes":
        own, true = found[1].reference, gradients.reference
        gradients = gradients._replace(reference=torch.where(true.isnan(), own.double(), true))
    assert_close(found, (output, gradients))


@pytest.mark.parametrize("form", FORMS)
def test_on_the_border(form: str) -> None:
    """Centres of cells, edges of the map, a cell beyond: the derivative is that of the cell to the right and below."""
    shapes = ((8, 4), (2, 4), (1, 1))  # powers of two: normalised places are exact
    inputs = draw(form, batch=1, queries=6, padding=False, shapes=shapes)
    places = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5, 2.5])[:, None, None, None]
    cells = torch.tensor([(w, h) for h, w in shapes])[:, None]
    if form == "classic":
        inputs.offsets[:] = places[..., None] / cells
    else:
        assert inputs.reference is not None
        inputs.reference[..., :2] = (places[:, 0] / cells[:, 0])[None]
        inputs.offsets[:] = 0
    assert_close(run(inputs), truth(inputs))


@pytest.mark.slow
def test_memory_in_other_orders() -> None:
    """Head by head is taken as it is; anything else is copied."""
    plain = draw("boxes")
    assert plain.reference is not None
    assert plain.valid_sizes is not None
    by_head = plain._replace(value=plain.value.transpose(1, 2).contiguous().transpose(1, 2))
    turned = Inputs(
        plain.value.transpose(0, 3).contiguous().transpose(0, 3),
        plain.spatial_shapes,
        plain.reference.transpose(1, 2).contiguous().transpose(1, 2),
        plain.offsets.flip(-1).contiguous().flip(-1).transpose(1, 4).contiguous().transpose(1, 4),
        plain.logits.repeat(1, 1, 1, 1, 2)[..., :2],
        plain.valid_sizes.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not any(t.is_contiguous() for t in turned if isinstance(t, Tensor))
    for inputs in (by_head, turned):
        assert_close(run(inputs), truth(plain))
    assert_close(run(by_head, deterministic=True), truth(plain))


def test_padding_is_never_read_as_a_number() -> None:
    """`draw` puts NaN there; one that holds zeros must give the same, to the bit."""
    inputs = draw("points")
    assert inputs.value.isnan().any()
    clean = inputs._replace(value=inputs.value.nan_to_num(0))
    results = [run(one) for one in (inputs, clean)]
    for a, b in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_is_expanded() -> None:
    inputs = draw("classic", batch=1)
    output = gpu.forward(inputs, ONE_PROGRAM)
    ones = output.new_ones(1).expand(output.shape)
    expected = gpu.backward(torch.ones_like(output), output, inputs, False, ONE_PROGRAM, False)
    for a, b in zip(gpu.backward(ones, output, inputs, False, ONE_PROGRAM, False)[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


def test_deterministic_algorithms_are_obeyed(poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw("points", batch=1, heads=1, shapes=((2, 2),))
    output = gpu.forward(inputs, ONE_PROGRAM)
    sorts = []
    gather = gpu._gather
    monkeypatch.setattr(gpu, "_gather", lambda *args: (sorts.append(1), gather(*args)))
    gpu.backward(upstream(inputs), output, inputs, False, ONE_PROGRAM)
    assert sorts == [1]


def test_too_large_for_32_bits() -> None:
    value = torch.empty(1, 2**25, 8, 8, device="meta")
    slots = torch.empty(1, 1, 8, 1, 1, 2, device="meta")
    with pytest.raises(ValueError, match="2\\*\\*31"):
        gpu.forward(Inputs(value, ((2**25, 1),), None, slots, slots[..., 0], None))


def test_constants_for_every_architecture() -> None:
    table = json.loads(TABLE.read_text())
    assert table.keys() >= {"sm_80", "sm_90", "sm_100"}
    for architecture, kernels in table.items():
        for kernel in ("forward", "backward"):
            for bits in (16, 32):
                own = launch_for_capability(int(architecture.removeprefix("sm_")), kernel, bits)
                assert own == Launch(**kernels[kernel][f"{bits} bits"])
    newest = max(table, key=lambda name: int(name.removeprefix("sm_")))
    for capability, row in {999: newest, 99: "sm_90", 81: "sm_80", 75: "sm_80"}.items():
        assert launch_for_capability(capability, "backward", 16) == Launch(**table[row]["backward"]["16 bits"])
