"""Multi-scale deformable attention: a reference in PyTorch, and the op `codetr::msda` with fast kernels."""

from .gathered import deformable_attention_gathered
from .op import deformable_attention, msda
from .reference import deformable_attention_reference, msda_reference
from .sampled import deformable_attention_sampled

__all__ = [
    "deformable_attention",
    "deformable_attention_gathered",
    "deformable_attention_reference",
    "deformable_attention_sampled",
    "msda",
    "msda_reference",
]
