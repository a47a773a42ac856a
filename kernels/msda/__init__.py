"""Multi-scale deformable attention: a reference in PyTorch, and the op `codetr::msda` with fast kernels."""

from .op import msda
from .reference import msda_reference

__all__ = ["msda", "msda_reference"]
