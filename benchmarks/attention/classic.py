"""The CUDA extension of Deformable DETR, built from a checkout of its repository for comparison; nothing of it is kept.

Its source was written for PyTorch 1: a copy in a temporary folder gets the names that PyTorch has today.
To build it a CUDA compiler is needed, a GPU is not.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

RENAMED = {
    r"#include <THC/THCAtomics\.cuh>": "#include <ATen/cuda/Atomic.cuh>",
    r"#include <ATen/cuda/CUDAContext\.h>": "#include <c10/cuda/CUDAStream.h>",  # without cuSPARSE's headers
    r"at::cuda::getCurrentCUDAStream": "c10::cuda::getCurrentCUDAStream",
    r"\.type\(\)\.is_cuda\(\)": ".is_cuda()",
    r"AT_DISPATCH_FLOATING_TYPES\((\w+)\.type\(\)": r"AT_DISPATCH_FLOATING_TYPES(\1.scalar_type()",
    r"\.data<": ".data_ptr<",
    r"\bAT_ASSERTM\(": "TORCH_CHECK(",
    r"\bAT_ERROR\(": "TORCH_CHECK(false, ",
}


def build(folder: Path) -> ModuleType:
    """folder: `models/ops/src` of github.com/fundamentalvision/Deformable-DETR. For the card at hand, or sm_90."""
    if Path("/usr/local/cuda/lib64").exists():  # a compiler on the PATH need not have its libraries beside it
        os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    from torch.utils import cpp_extension

    if not (folder / "vision.cpp").exists():
        sys.exit(f"{folder} has no vision.cpp: give the folder models/ops/src of Deformable-DETR")
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    home = Path(tempfile.mkdtemp(prefix="msda_classic_"))
    source = shutil.copytree(folder, home / "src")
    for path in [*source.rglob("*.h"), *source.rglob("*.cu*"), *source.rglob("*.cpp")]:
        text = path.read_text()
        for old, new in RENAMED.items():
            text = re.sub(old, new, text)
        path.write_text(text)
    (home / "build").mkdir()
    return cpp_extension.load(
        "msda_classic",
        [str(source / "vision.cpp"), str(source / "cuda" / "ms_deform_attn_cuda.cu")],
        extra_include_paths=[str(source)],
        extra_cflags=["-O3", "-DWITH_CUDA"],
        extra_cuda_cflags=["-O3", "-DWITH_CUDA"],
        build_directory=str(home / "build"),
        with_cuda=True,
    )


class Classic:
    """The extension as a differentiable function like `codetr.kernels.msda.msda`, in float32, which is all it knows
    (and float64): narrower inputs are cast, as every training code base around it does."""

    def __init__(self, extension: ModuleType) -> None:
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Tensor:
                ctx.save_for_backward(*inputs)
                return extension.ms_deform_attn_forward(*inputs, 64)

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
                found = extension.ms_deform_attn_backward(*ctx.saved_tensors, gradient.contiguous(), 64)
                return found[0], None, None, found[1], found[2]

        self.function = Function
        self.tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        sizes, starts = self.table(tuple(shapes), value.device)
        return self.function.apply(
            value.float().contiguous(), sizes, starts, locations.float().contiguous(), weights.float().contiguous()
        ).to(value.dtype)

    def table(self, shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
        if shapes not in self.tables:
            sizes = torch.tensor(shapes, device=device)
            cells = sizes.prod(1)
            self.tables[shapes] = sizes, cells.cumsum(0) - cells
        return self.tables[shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="models/ops/src of a checkout of Deformable-DETR")
    print(build(parser.parse_args().folder).__file__)
