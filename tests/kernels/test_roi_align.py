"""RoIAlign over the levels of a pyramid: the Numba kernels against torchvision's, one call per level, in float64."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from codetr.kernels.roi_align import cpu, roi_align, roi_align_reference
from codetr.kernels.roi_align.inputs import Regions
from codetr.kernels.roi_align.op import _roi_align
from torch import Tensor
from torchvision import ops

Maps = list[Tensor]
STRIDES = (4, 8, 16)
RATIOS = [0, 1, 2, 3]
ratios = pytest.mark.parametrize("ratio", RATIOS)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def maps(batch: int = 2, channels: int = 5, image: tuple[int, int] = (72, 100)) -> Maps:
    return [torch.randn(batch, channels, -(-image[0] // s), -(-image[1] // s)) for s in STRIDES]


def regions(count: int = 60, size: int = 3, ratio: int = 0, batch: int = 2, exact: bool = False) -> Regions:
    """Inside, across the borders, beyond them, without area, upside down; a tenth of them of no level.

    exact: coordinates are eighths of a pixel, so that float32 and float64 agree on the number of samples.
    """
    low, sides = torch.rand(count, 2) * 130 - 25, (torch.rand(count, 2) * 4.5).exp()
    boxes = torch.cat([low, low + sides], -1)
    boxes[0], boxes[1] = -500.0, torch.tensor([0.0, 0, 100, 72])
    boxes[2, 2:], boxes[3, 2:], boxes[4] = boxes[2, :2], boxes[3, :2] - 5, torch.tensor([-300.0, -300, 400, 400])
    if exact:
        boxes = (boxes * 8).round() / 8
    levels = torch.randint(0, len(STRIDES), (count,)).where(torch.rand(count) < 0.9, -1)
    return Regions(torch.randint(0, batch, (count,)), boxes, levels, STRIDES, size, ratio)


def pool(function: Callable[..., Tensor], levels: Maps, given: Regions) -> Tensor:
    images, boxes, level_of, strides, size, ratio = given
    return function(levels, strides, images, boxes, level_of, size, ratio)


def singles(levels: Maps, given: Regions) -> Tensor:
    """torchvision's, a call per region."""
    found = []
    for image, box, level in zip(given.images.tolist(), given.boxes, given.level_of.tolist(), strict=True):
        if level < 0:
            found.append(levels[0].new_zeros(1, levels[0].shape[1], given.size, given.size))
            continue
        one, scale = levels[level][image : image + 1], 1 / given.strides[level]
        boxes = [box[None].to(one)]
        found.append(ops.roi_align(one, boxes, given.size, scale, given.sampling_ratio, aligned=True))
    return torch.cat(found)


def with_gradients(
    function: Callable[[Maps], Tensor], levels: Maps, dtype: torch.dtype | None = None
) -> tuple[Tensor, Maps]:
    """The result and the gradients of the maps, for an upstream gradient that is the same in every precision."""
    leaves = [level.detach().to(dtype or level.dtype).requires_grad_() for level in levels]
    output = function(leaves)
    upstream = (torch.linspace(-1, 1, output.numel(), dtype=torch.float64) * 40).sin().view(output.shape)
    return output.detach(), list(torch.autograd.grad(output, leaves, upstream.to(output.dtype)))


def assert_close(actual: tuple[Tensor, Maps], expected: tuple[Tensor, Maps], tolerance: float = 1e-5) -> None:
    """Each within `tolerance` of its largest entry."""
    for own, true in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        largest = max(true.abs().max().item(), 1e-3) if true.numel() else 1.0
        torch.testing.assert_close(own.double(), true.double(), rtol=0, atol=tolerance * largest)


@ratios
@pytest.mark.parametrize("channels", [1, 5, 32, 40, 64])
def test_is_torchvisions_in_float32(ratio: int, channels: int) -> None:
    levels, given = maps(channels=channels), regions(ratio=ratio)
    assert_close(
        with_gradients(lambda x: pool(roi_align, x, given), levels),
        with_gradients(lambda x: singles(x, given), levels),
        3e-5,  # torchvision's own rounding: it adds up the samples of a cell one by one
    )


@ratios
@pytest.mark.parametrize("size", [1, 4, 7])
def test_is_torchvisions_in_float64(ratio: int, size: int) -> None:
    levels, given = maps(), regions(size=size, ratio=ratio, exact=True)
    assert_close(
        with_gradients(lambda x: pool(roi_align, x, given), levels),
        with_gradients(lambda x: singles(x, given._replace(boxes=given.boxes.double())), levels, torch.float64),
    )


@ratios
def test_the_reference_is_torchvisions(ratio: int) -> None:
    levels = [level.double() for level in maps()]
    given = regions(ratio=ratio)
    given = given._replace(boxes=given.boxes.double())
    output, gradients = with_gradients(lambda x: pool(roi_align_reference, x, given), levels)
    expected, true = with_gradients(lambda x: singles(x, given), levels)
    assert torch.equal(output, expected)
    for own, other in zip(gradients, true, strict=True):
        torch.testing.assert_close(own, other)


def test_gradients_by_finite_differences() -> None:
    """The result is linear in the maps: differences are exact but for rounding, at any distance."""
    levels, given = maps(channels=2, image=(16, 24)), regions(12, 2, 0)
    output, gradients = with_gradients(lambda x: pool(roi_align, x, given), levels)
    weight = (torch.linspace(-1, 1, output.numel(), dtype=torch.float64) * 40).sin().view(output.shape)
    for level, gradient in zip(levels, gradients, strict=True):
        for i in range(0, level.numel(), 7):
            moved = level.clone()
            moved.view(-1)[i] += 1
            other = pool(roi_align, [moved if one is level else one for one in levels], given)
            change = ((other.double() - output.double()) * weight).sum().item()
            assert change == pytest.approx(gradient.reshape(-1)[i].item(), abs=1e-5)


def test_a_region_by_hand() -> None:
    """Four cells of two pixels on a ramp x + 10 y: each is the ramp at its centre. Of the four samples of a cell across
    the border those at x = 7.5 see the last pixel, 7; those beyond 8 count as zero."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    ramp = (x + 10 * y)[None, None]
    given = Regions(torch.zeros(1).long(), torch.tensor([[1.5, 2.5, 5.5, 6.5]]), torch.zeros(1).long(), (1,), 2, 0)
    assert pool(roi_align, [ramp], given)[0, 0].tolist() == [[32, 34], [52, 54]]
    outside = given._replace(boxes=torch.tensor([[6.5, 0.5, 10.5, 4.5]]))
    assert pool(roi_align, [ramp], outside)[0, 0].tolist() == [[16.75, 0], [36.75, 0]]


@ratios
def test_nothing_outside_and_of_no_level(ratio: int) -> None:
    levels = [level + 100 for level in maps()]
    boxes = torch.tensor([[-90.0, -90, -20, -20], [140, 10, 200, 40], [0, 0, 50, 50], [-1e4, -1e4, -1e4, -1e4]])
    given = Regions(torch.zeros(4).long(), boxes, torch.tensor([0, 1, -1, 0]), STRIDES, 3, ratio)
    output, gradients = with_gradients(lambda x: pool(roi_align, x, given), levels)
    assert not output.any()
    assert not any(g.any() for g in gradients)


@ratios
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_boxes_that_are_not_finite_are_empty(ratio: int, odd: float) -> None:
    levels, given = maps(), regions(ratio=ratio)
    given.boxes[5] = odd
    given.boxes[6, 2] = odd
    output, gradients = with_gradients(lambda x: pool(roi_align, x, given), levels)
    assert not output[5].any()
    assert output.isfinite().all()
    others = [i for i in range(len(given.images)) if i not in (5, 6)]
    few = Regions(given.images[others], given.boxes[others], given.level_of[others], *given[3:])
    assert torch.equal(output[others], pool(roi_align, levels, few))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("batch", [0, 2])
def test_no_regions(batch: int) -> None:
    levels, given = maps(batch), regions(10)
    none = Regions(given.images[:0], given.boxes[:0], given.level_of[:0], *given[3:])
    output, gradients = with_gradients(lambda x: pool(roi_align, x, none), levels)
    assert output.shape == (0, 5, 3, 3)
    assert [g.shape for g in gradients] == [level.shape for level in levels]
    assert not any(g.any() for g in gradients)


@ratios
def test_an_empty_map_is_zero(ratio: int) -> None:
    levels, given = maps(), regions(ratio=ratio)
    levels[1] = torch.randn(2, 5, 0, 4)
    output, _ = with_gradients(lambda x: pool(roi_align, x, given), levels)
    assert not output[given.level_of == 1].any()
    assert output[given.level_of == 0].any()


def test_as_many_samples_as_pixels() -> None:
    """More regions than are weighed at a time, and a box of many maps' size."""
    given = regions(300)
    given.boxes[7] = torch.tensor([-3000.0, -2000, 4000, 5000])
    levels = maps()
    expected = with_gradients(lambda x: singles(x, given), levels)
    assert_close(with_gradients(lambda x: pool(roi_align, x, given), levels), expected, 1e-4)


def test_any_memory_layout() -> None:
    """Channels last, as tokens have them, and strange ones: the same bits, and gradients that lie alike."""
    levels, given = maps(channels=40), regions()
    expected = with_gradients(lambda x: pool(roi_align, x, given), levels)
    tokens = torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2).contiguous()
    parts = tokens.split([level.shape[2] * level.shape[3] for level in levels], 1)
    layouts = {
        "channels last": [level.contiguous(memory_format=torch.channels_last) for level in levels],
        "tokens": [p.transpose(1, 2).unflatten(2, x.shape[2:]) for p, x in zip(parts, levels, strict=True)],
        "transposed": [level.transpose(0, 3).contiguous().transpose(0, 3) for level in levels],
    }
    for name, other in layouts.items():
        assert not any(level.is_contiguous() for level in other), name
        output, gradients = with_gradients(lambda x: pool(roi_align, x, given), other)
        assert torch.equal(output, expected[0]), name
        for own, true in zip(gradients, expected[1], strict=True):
            assert torch.equal(own, true), name
            assert (own.stride(1) == 1) == (name != "transposed"), name
    strange = Regions(given.images.repeat(2)[::2], given.boxes.t().contiguous().t(), given.level_of, *given[3:])
    strange = strange._replace(images=torch.stack([given.images, given.images], 1)[:, 0])
    assert torch.equal(pool(roi_align, levels, strange), expected[0])
    leaves = [level.clone().requires_grad_() for level in levels]
    one, two = (torch.autograd.grad(pool(roi_align, leaves, given), leaves, g) for g in expanded(expected[0]))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def expanded(like: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.randn(like.shape[1])[:, None, None].expand(like.shape)
    return one, one.contiguous()


@ratios
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_maps(ratio: int, dtype: torch.dtype) -> None:
    """Computed in float32 from boxes in float32; only the gradients of the maps are rounded, once."""
    levels, given = [level.to(dtype) for level in maps()], regions(ratio=ratio)
    output, gradients = with_gradients(lambda x: pool(roi_align, x, given), levels)
    expected, true = with_gradients(lambda x: pool(roi_align, x, given), levels, torch.float32)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)
    for own, other in zip(gradients, true, strict=True):
        assert torch.equal(own, other.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pool(roi_align, levels, given), expected)
    narrow = given._replace(boxes=given.boxes.to(dtype))
    wide = given._replace(boxes=narrow.boxes.float())
    assert torch.equal(pool(roi_align, levels, narrow), pool(roi_align, levels, wide).to(dtype))


@ratios
def test_same_bits_every_time_and_for_any_threads(ratio: int, set_threads: Callable[[int], None]) -> None:
    levels, given = maps(3, 70), regions(200, 7, ratio, batch=3)
    assert 4 * cpu.NUMBERS_PER_THREAD < 200 * 70 * 49
    results = []
    for threads in (1, 1, 2, 3, 5):
        set_threads(threads)
        results.append(with_gradients(lambda x: pool(roi_align, x, given), levels))
    for output, gradients in results[1:]:
        assert torch.equal(output, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1], strict=True))


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, given, zeros = maps(channels=40), regions(), torch.zeros
    sizes = [(level.shape[2], level.shape[3]) for level in levels]
    output = cpu.forward(levels, given)
    gradients = cpu.backward(output, sizes, 2, False, given)
    monkeypatch.setattr(cpu.torch, "empty", lambda *size, **_: zeros(*size).fill_(torch.nan))
    assert torch.equal(cpu.forward(levels, given), output)
    again = cpu.backward(output, sizes, 2, False, given)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


@pytest.mark.parametrize("of", [torch.contiguous_format, torch.channels_last])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_op_contract(of: torch.memory_format) -> None:
    levels = [level.contiguous(memory_format=of).requires_grad_() for level in maps()]
    images, boxes, level_of, strides, size, ratio = regions()
    torch.library.opcheck(_roi_align, (levels, images, boxes, level_of, list(strides), size, ratio))


def test_compiles_into_one_graph() -> None:
    levels, given = maps(), regions()
    whole = torch.compile(lambda x: pool(roi_align, x, given), backend="aot_eager", fullgraph=True)
    expected = with_gradients(lambda x: pool(roi_align, x, given), levels)
    assert_close(with_gradients(whole, levels), expected, 0)


def test_refuses_what_does_not_fit() -> None:
    levels, given = maps(), regions()
    images, boxes, level_of = given[:3]
    for bad in (
        given._replace(images=images[1:]),
        given._replace(boxes=boxes[:, :3]),
        given._replace(level_of=level_of[None]),
        given._replace(strides=STRIDES[:2]),
        given._replace(size=0),
        given._replace(sampling_ratio=-1),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            pool(roi_align, levels, bad)
    with pytest.raises(ValueError, match="do not fit together"):
        pool(roi_align, [levels[0], levels[1][:, 1:], levels[2]], given)
    for name, tensor in (("images", images + 2), ("images", images - 1), ("level_of", level_of + 3)):
        with pytest.raises(ValueError, match="of none of"):
            pool(roi_align, levels, given._replace(**{name: tensor}))
    with pytest.raises(TypeError, match="use the reference"):
        pool(roi_align, [level.double() for level in levels], given)
    with pytest.raises(TypeError, match="instead of int64"):
        pool(roi_align, levels, given._replace(images=images.int()))


@pytest.mark.slow
def test_the_next_process_loads_from_the_cache(tmp_path: Path) -> None:
    code = "from codetr.kernels.roi_align.numba_kernels import kernels;"
    code += "print([sum(kernel.stats.cache_hits.values()) for kernel in kernels()])"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    said = [subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) for _ in range(2)]
    assert said == ["[0, 0]\n", "[1, 1]\n"]
