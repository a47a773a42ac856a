"""In which form operations enter a graph that is exported, where runtimes differ."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_GATHERS = ContextVar("gathers", default=False)
_ONNX = ContextVar("onnx", default=False)


@contextmanager
def for_onnx() -> Iterator[None]:
    """What is exported in this context becomes ONNX, which has other operations than PyTorch."""
    token = _ONNX.set(True)
    try:
        yield
    finally:
        _ONNX.reset(token)


def becomes_onnx() -> bool:
    return _ONNX.get() or torch.onnx.is_in_onnx_export()


@contextmanager
def with_gathers() -> Iterator[None]:
    """Deformable attention that is exported in this context has gathers instead of `grid_sample`."""
    token = _GATHERS.set(True)
    try:
        yield
    finally:
        _GATHERS.reset(token)


def gathers() -> bool:
    return _GATHERS.get()
