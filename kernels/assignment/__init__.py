"""Linear assignment of many problems at once, exactly: the op `codetr::assign`."""

from .op import assign

__all__ = ["assign"]
