"""The Triton kernels compiled ahead of time, without a GPU: registers, stack (spills), shared memory, atomics.

To be imported before anything else imports Triton, in a process that does not run its interpreter.
"""

import itertools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # the interpreter's functions cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.knobs
from codetr.kernels.msda import triton_kernels
from codetr.kernels.msda.gpu import BLOCK_N
from codetr.kernels.msda.launch import Launch, launch_for_capability
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

ARCHITECTURES = (80, 90, 100)
KERNELS = ("forward", "backward", "backward, deterministic", "gather")
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
WIDTHS = (8, 16, 64, 128)
FORMS = {"classic": 0, "points": 2, "boxes": 4}


@dataclass(frozen=True)
class Case:
    architecture: int
    kernel: str
    dtype: str  # of value, offsets and logits; reference is float32
    width: int  # of a head
    form: str


def all_cases(quick: bool) -> list[Case]:
    """Every head width with boxes, every form at 32; float16 once, which costs what bfloat16 does. quick: head width 32
    with boxes alone."""
    product = itertools.product(ARCHITECTURES, KERNELS, ("float32", "bfloat16"))
    kinds = [("boxes", 32)] if quick else [(form, 32) for form in FORMS] + [("boxes", width) for width in WIDTHS]
    cases = [Case(*one, width, form) for one in product for form, width in kinds]
    return cases if quick else [*cases, *(Case(90, kernel, "float16", 32, "boxes") for kernel in KERNELS)]


def compiled(case: Case, launch: Launch | None = None) -> CompiledKernel:
    """As gpu.py launches it: 8 heads, 4 levels, 4 points, padding, the gradient of reference."""
    name = "backward" if case.kernel.startswith("backward") else case.kernel
    function = getattr(triton_kernels, f"{name}_kernel")
    bits = 32 if case.dtype == "float32" else 16
    launch = launch or launch_for_capability(case.architecture, "forward" if name == "forward" else "backward", bits)
    block_d = max(case.width, 16) if name == "backward" else case.width
    block_q, narrow = launch.block_q(block_d), TYPES[case.dtype]
    pointers = dict.fromkeys(
        ("value", "offsets", "logits", "gradient", "output", "g_offsets", "g_logits"), f"*{narrow}"
    )
    pointers |= dict.fromkeys(("reference", "g_value", "g_reference", "shares"), "*fp32")
    pointers |= {"valid_sizes": "*i32", "levels": "*i32", "bases": "*i32", "order": "*i64", "starts": "*i64"}
    constants = {
        "H": 8,
        "D": case.width,
        "L": 4,
        "P": 4,
        "FORM": FORMS[case.form],
        "PADDED": True,
        "OF_REFERENCE": True,
    }
    constants |= {"ATOMIC": case.kernel == "backward", "BLOCK_Q": block_q, "BLOCK_D": block_d, "BLOCK_LP": 16}
    constants |= {"TILE_WIDTH": min(launch.tile_width, block_q), "BLOCK_N": BLOCK_N}
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    pointers = {name: kind for name, kind in pointers.items() if name in names}
    warps = 1 if name == "gather" else launch.num_warps
    return build(function, pointers, constants, case.architecture, warps)


def build(
    function: Any, pointers: dict[str, str], constants: dict[str, object], architecture: int, num_warps: int
) -> CompiledKernel:
    """A kernel for an architecture. pointers: name -> kind, aligned as tensors are; constants: name -> value; what else
    it takes has 32 bits, strides a multiple of 16."""
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers or "stride" in name}
    source = ASTSource(
        fn=function,
        signature=signature,
        attrs=aligned,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": num_warps})


def resources(kernel: CompiledKernel) -> dict[str, object]:
    """registers per thread; stack: bytes per thread, more than 0 means spills; shared: bytes per program; instructions
    and barriers in the code; atomics: which, and how often they stand there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", said.stdout + said.stderr))
    atomics = re.findall(r"(?<![a-z])(?:red|atom)\.global[.a-z0-9]+", kernel.asm["ptx"])
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "shared": kernel.metadata.shared,
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/ +[@A-Z]", code)),
        "barriers": len(re.findall(r"BAR\.SYNC", code)),
        "atomics": {name: atomics.count(name) for name in sorted(set(atomics))},
    }
