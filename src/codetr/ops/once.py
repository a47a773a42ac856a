"""Tensors that depend on nothing but sizes, such as grids and anchors: made once instead of in every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch._guards import detect_fake_mode

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")
KEPT = 128  # results of a function: multi-scale training has many sizes, and each lies on the device


def once(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Keeps the results of `make`, a pure function of hashable arguments (one says the device).

    Nobody may change what it returns. While a graph is traced it is called as it is, so that the graph contains it.
    """

    @lru_cache(KEPT)
    def kept(dtype: torch.dtype, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        with torch.inference_mode(False), torch.no_grad():  # what validation makes serves training too
            return make(*args, **kwargs)

    @wraps(make)
    def get(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or detect_fake_mode() is not None
        if traced:
            return make(*args, **kwargs)
        return kept(torch.get_default_dtype(), *args, **kwargs)  # type: ignore[arg-type]

    return get
