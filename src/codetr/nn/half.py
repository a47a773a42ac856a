"""Parameters of half precision under autocast: what may be rounded, and what may not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Module = TypeVar("Module", bound=nn.Module)


def halve(module: Module, dtype: torch.dtype) -> Module:
    """Turn the parameters of `module` into `dtype` (float16 or bfloat16), in place, and return it.

    Of the buffers only the statistics of batch norms go with their weights; constants, such as mean colours and
    anchors, stay as they are. The forward pass then belongs under `torch.autocast`, so that coordinates keep float32:
    bfloat16 knows no pixel 1001.
    """
    parts = (part for part in module.modules() if not isinstance(part, _NormBase))
    constants = {id(buffer) for part in parts for buffer in part.buffers(recurse=False)}

    def halved(tensor: Tensor) -> Tensor:
        keep = id(tensor) in constants or not tensor.is_floating_point()
        return tensor if keep else tensor.to(dtype)

    return module._apply(halved)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """In which nothing is cast to half precision. device: its type, also one that autocast does not know."""
    halved = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if halved else nullcontext()
