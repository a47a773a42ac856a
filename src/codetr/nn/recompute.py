"""Layers that give memory for time (gradient checkpointing)."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(layer: Callable[..., Any], *inputs: Any, when: bool) -> Any:
    """What `layer(*inputs)` yields; its activations are not kept for the backward pass, but computed there again.

    when: whether to do so; without gradients nothing is kept in any case.
    """
    if when and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)
