"""The kernels compiled ahead of time, without a GPU. As `codetr.kernels.msda.ahead`, to be imported before Triton."""

from codetr.kernels.msda.ahead import CompiledKernel, build

from .gpu import ROWS, WARPS
from .triton_kernels import overlap_kernel, walk_kernel

ARCHITECTURES = (80, 90, 100)
WORDS = (2, 32, 128, 256, 512)  # of 32 candidates: 5 levels x 1000 are 157, padded to 256


def overlap(architecture: int) -> CompiledKernel:
    """As gpu.py launches it."""
    pointers = {"boxes": "*fp32", "groups": "*i64", "bits": "*i32", "iou": "fp32"}
    return build(overlap_kernel, pointers, {"ROWS": ROWS}, architecture, WARPS)


def walk(architecture: int, words: int) -> CompiledKernel:
    """As gpu.py launches it. words: a power of two."""
    return build(walk_kernel, {"bits": "*i32", "kept": "*i1"}, {"BLOCK": words}, architecture, WARPS)
