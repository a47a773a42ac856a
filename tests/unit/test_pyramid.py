"""The pyramid adapter: places are kept where levels are made from a memory that lacks them."""

import pytest
import torch
from torch import Tensor, nn

from codetr.errors import UserError
from codetr.models.pyramid import PyramidAdapter
from codetr.types import Memory

WIDTH, IMAGE = 8, (128, 192)


def memory(*strides: int) -> Memory:
    """Two channels hold the centre (x, y) of every cell in pixels, the others zero."""
    shapes = tuple((IMAGE[0] // s, IMAGE[1] // s) for s in strides)
    tokens = torch.cat([centres(s).flatten(1).T for s in strides])[None]
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    return Memory(
        tokens, torch.zeros_like(tokens), padding, shapes, torch.tensor([shapes]).int(), torch.ones(1, len(strides), 2)
    )


def centres(stride: int) -> Tensor:
    y, x = ((torch.arange(size // stride) + 0.5) * stride for size in IMAGE)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"))
    return torch.cat([grid, torch.zeros(WIDTH - 2, *grid.shape[1:])])


def passing(adapter: PyramidAdapter) -> PyramidAdapter:
    """With convolutions that take the middle of their window, and no norm: only resampling is left."""
    for block in (*adapter.upsample, *adapter.downsample):
        nn.init.dirac_(block[0].weight)
        nn.init.zeros_(block[0].bias)
        block[1] = nn.Identity()
    return adapter


@pytest.mark.parametrize("stride", [16, 32])
def test_a_single_level_becomes_all_of_them(stride: int) -> None:
    """On finer levels a cell's value is its own centre, as bilinear upsampling keeps linear functions, except next to
    the border; a coarser level starts at the first cell of the one before and takes every second one."""
    pyramid = passing(PyramidAdapter(WIDTH, (stride,), 8, 5, 4, 1))(memory(stride))
    assert pyramid.strides == (8, 16, 32, 64, 128)
    for level, own in zip(pyramid.levels, pyramid.strides, strict=True):
        if own <= stride:
            assert level.shape[2:] == (IMAGE[0] // own, IMAGE[1] // own)
            edge = stride // own  # at least half a cell of the memory
            inner = (..., slice(edge, -edge), slice(edge, -edge)) if own < stride else ...
            torch.testing.assert_close(level[0][inner], centres(own)[inner])
        else:
            torch.testing.assert_close(level[0], centres(stride)[:, :: own // stride, :: own // stride])


def test_the_memory_itself_is_not_touched() -> None:
    given = memory(8, 16, 32)
    adapter = PyramidAdapter(WIDTH, (8, 16, 32), 8, 5, 4, 1)
    for level, same in zip(adapter(given).levels[:3], given.levels(), strict=True):
        assert torch.equal(level, same)
    assert (len(adapter.upsample), len(adapter.downsample)) == (0, 2)


def test_made_levels_are_normalised() -> None:
    """A group norm behind every convolution: zero mean and unit variance per group, whatever comes in."""
    pyramid = PyramidAdapter(WIDTH, (32,), 8, 5, 4, 1)(memory(32))
    for level, stride in zip(pyramid.levels, pyramid.strides, strict=True):
        groups = level.unflatten(1, (4, -1)).flatten(2)
        if stride != 32:
            torch.testing.assert_close(groups.mean(-1), torch.zeros(1, 4), rtol=0, atol=1e-5)
            torch.testing.assert_close(groups.var(-1, correction=0), torch.ones(1, 4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("strides", [(4,), (12,), (256,), (8, 32), (16, 8)])
def test_foreign_strides_are_an_error(strides: tuple[int, ...]) -> None:
    """Also a memory with a gap: its levels would be taken for others."""
    with pytest.raises(UserError, match=r"model\.pyramid_levels=5 from model\.pyramid_stride=8"):
        PyramidAdapter(WIDTH, strides, 8, 5, 4, 1)
