"""The kernel compiled ahead of time, without a GPU. As `codetr.kernels.msda.ahead`, to be imported before Triton."""

from codetr.kernels.msda.ahead import CompiledKernel, build

from .gpu import warps
from .triton_kernels import assignment_kernel

ARCHITECTURES = (80, 90, 100)
BLOCKS = (16, 128, 512, 1024, 2048, 4096)  # places: 900 queries are 1024


def compiled(architecture: int, block: int) -> CompiledKernel:
    """As gpu.py launches it."""
    pointers = {"costs": "*fp32", "counts": "*i64", "owners": "*i64"}
    return build(assignment_kernel, pointers, {"BLOCK": block}, architecture, warps(block))
