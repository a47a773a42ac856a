"""Non-maximum suppression of a batch, without a wait of the host: the op `codetr::survivors`."""

from .op import survivors

__all__ = ["survivors"]
