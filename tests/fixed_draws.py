"""Draws that are no longer random."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from codetr.assign import sampling


@contextmanager
def fixed_draws(key: Callable[[Tensor], Tensor] = lambda rank: rank) -> Iterator[None]:
    """In which `sample` takes the members with the lowest keys. key: from the rank of every member within its image's
    mask, [B, N], to its key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "random_keys", lambda mask: key(mask.cumsum(1) - 1).float())
        yield
